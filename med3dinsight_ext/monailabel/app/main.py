"""The MONAI Label app: local bundles as they are; no zoo, no downloads.

MONAI Label looks for a direct subclass of ``MONAILabelApp`` in the main.py of an app's folder, once
in the server and once in each process that it starts for a training.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from copy import copy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.utils.others.generic import file_ext

from med3dinsight_ext import __version__
from med3dinsight_ext.io.errors import root_cause
from med3dinsight_ext.monailabel.app.answers import clicks_of
from med3dinsight_ext.monailabel.app.datastores import CheckedDatastore, refused
from med3dinsight_ext.monailabel.app.dicom_store import DicomStore, with_names
from med3dinsight_ext.monailabel.app.kcenter_greedy import Features, kcenter_greedy
from med3dinsight_ext.monailabel.app.requests import (
    RESULTS,
    check_extension,
    check_values,
    is_inside,
)
from med3dinsight_ext.monailabel.app.rounds import Training, end_with
from med3dinsight_ext.monailabel.app.versions import EARLIER, WEIGHTS, Versions, has_weights
from med3dinsight_ext.monailabel.server import class_names, find_bundles
from med3dinsight_ext.training.click_inferer import ClickInferer

logger = logging.getLogger(__name__)
SERVER = "MED3D_LABEL_SERVER"  # its process id, for the processes that it starts


class LabelApp(MONAILabelApp):
    """Serves bundles under their folders' names.

    Args:
        app_dir: folder of this file.
        studies: folder of images, or URL of a DICOMweb store.
        conf: "bundles", paths with commas between them.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = {folder.name: folder for folder in find_bundles(conf.get("bundles", ""))}
        server = int(os.environ.setdefault(SERVER, str(os.getpid())))
        if server != os.getpid():
            threading.Thread(target=end_with, args=(server,), daemon=True).start()
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="Med3DInsight",
            description="Segmentation from label-free pre-training",
            version=__version__,
        )

    def init_datastore(self) -> Datastore:
        names = class_names(next(iter(self.bundles.values())))  # the same in all of them
        if self.studies.startswith(("http://", "https://")):
            return DicomStore(super().init_datastore()._client, names)
        return CheckedDatastore(self.studies, names)

    def _download_dcmqi_tools(self) -> None:
        if not shutil.which("itkimage2segimage"):
            raise ValueError(
                "dcmqi must be there for a DICOMweb store, got no itkimage2segimage in PATH; "
                "make the environment again by label-install, or pip install dcmqi"
            )

    def init_infers(self) -> dict[str, InferTask]:
        infers: dict[str, InferTask] = {}
        before: dict[str, InferTask] = {}
        for name, folder in self.bundles.items():
            models = folder / "models"
            versions, earlier = Versions(models), Versions(models / EARLIER)
            kind = "deepedit" if takes_clicks(folder) else "segmentation"
            if kind == "deepedit":
                infers[f"{name}_seg"] = Inference(folder, self.conf, "segmentation", versions)
            infers[name] = Inference(folder, self.conf, kind, versions)
            before[f"{name}_{EARLIER}"] = Inference(folder, self.conf, kind, earlier)
        infers |= before
        return infers

    def on_init_complete(self) -> None:
        """Add the page of rounds; called in the server only."""
        from monailabel.app import app as server
        from monailabel.endpoints import infer

        from med3dinsight_ext.monailabel.app.rounds_page import router

        super().on_init_complete()
        infer.nifti_to_dicom_seg = with_names(infer.nifti_to_dicom_seg, self.datastore().names)
        server.include_router(router(self, self._trainers, self.datastore().log))

    def init_trainers(self) -> dict[str, TrainTask]:
        return {name: Training(str(folder), self.conf) for name, folder in self.bundles.items()}

    def init_strategies(self) -> dict[str, Strategy]:
        own = KCenterGreedy(next(iter(self.bundles.values())))
        return {
            "random": Random(),
            "first": First(),
            "kcenter_greedy": own,
        }  # viewers take the first

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> Any:
        there = {name: task for name, task in self._infers.items() if task.is_valid()}
        known(request.get("model"), there, "model")
        task, begin = there[request["model"]], time.perf_counter()
        image = request.get("image")
        store = datastore or self.datastore()
        with refused():
            check_values({key: value for key, value in request.items() if key != "image"})
        # The server's own code would read any path: of its working folder, of other patients.
        given = (tempfile.gettempdir(), self.sessions().store_path)  # uploads and sessions
        named = isinstance(image, str) and os.sep not in image  # a path asks no DICOM server
        stored = store.get_image_uri(image) if named else ""
        uploaded = isinstance(image, str) and os.path.exists(image) and is_inside(image, given)
        if not stored and not uploaded:
            raise HTTPException(404, f"image must be one of the datastore's, got {image!r}")
        try:
            own = {"image": stored, "save_label": False} if stored else {}
            found = super().infer(request | own, datastore)
        except (ValueError, RuntimeError) as error:  # what transforms raise; the cause is inside
            if isinstance(cause := root_cause(error), ValueError):
                raise HTTPException(400, str(cause)) from error
            raise
        if stored and request.get("save_label") and found["file"]:
            info = {"model": request["model"], "params": found["params"]}
            tag = request.get("label_tag", DefaultLabelTag.ORIGINAL)
            found["label"] = store.save_label(image, found["file"], tag, info)
        store.log.add(
            image=os.path.basename(str(image)),
            model=request["model"],
            weights=task.versions.weights["saved"],
            clicks=clicks_of(request, task.labels),
            seconds=round(time.perf_counter() - begin, 3),
            annotator=request.get("client_id"),
        )
        return found

    def train(self, request: dict[str, Any]) -> Any:
        """Train, in a process of its own only: it may end itself, and changes its priority."""
        if os.environ[SERVER] == str(os.getpid()):
            raise HTTPException(
                400, "run_sync must be false for a training, got true; leave it out"
            )
        return super().train(request)

    def bundle_path(self, model: str) -> str:
        """Folder of a model's bundle, which the server needs to start a training."""
        known(model, self._trainers, "model")
        return str(self.bundles[model])

    def next_sample(self, request: dict[str, Any]) -> Any:
        known(request.get("strategy", "random"), self._strategies, "strategy")
        return super().next_sample(request)


def known(name: object, there: dict[str, Any], what: str) -> None:
    """Answer 404 with the known names, where the server would answer 500 without a text."""
    if name not in there:
        raise HTTPException(404, f"{what} must be one of {', '.join(there)}, got {name!r}")


def takes_clicks(bundle: Path) -> bool:
    """Whether a bundle takes clicks, by its metadata or, as in the stock app, its folder's name."""
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text("utf-8"))
    return "deepedit" in bundle.name.lower() or metadata.get("click") == "deepedit"


class Inference(BundleInferTask):
    """A bundle's inference.json with weights of it, which have to fit as a whole.

    Args:
        bundle: its folder.
        conf: of the app.
        type: segmentation or deepedit.
        versions: of the weights, with the answers so far.
    """

    def __init__(self, bundle: Path, conf: dict[str, str], type: str, versions: Versions) -> None:
        super().__init__(str(bundle), conf, type=type, load_strict=True)
        self.versions = versions
        self.path = [str(versions.models / WEIGHTS)]
        # Else the shortest name in models/ is taken, which may be a resumable run's state.
        self._config.pop("model_filename", None)

    def is_valid(self) -> bool:
        """Earlier weights are there after a round."""
        return bool(self.valid) and has_weights(self.versions.models)

    def info(self) -> dict[str, Any]:
        found = super().info()
        text = f"{found['description']} {self.versions.text()}"
        return found | {"description": text, "weights": self.versions.weights}

    def inferer(self, data: dict[str, Any] | None = None) -> Any:
        found = copy(super().inferer(data))  # MONAI's parser gives the same one to all requests
        if isinstance(found, ClickInferer) and (image := (data or {}).get("image_path")):
            found.history = self.versions.history(image)
        return found

    def writer(self, data: dict[str, Any], extension: Any = None, dtype: Any = None) -> Any:
        """NIfTI by nibabel: itk takes seconds at its first use, and refuses sheared grids."""
        ending = data.get("result_extension") or file_ext(data.get("image_path") or "")
        check_extension(f"a{ending}", "result_extension", RESULTS)
        with refused():
            if ending not in (".nii", ".nii.gz"):
                return super().writer(data, extension, dtype)
            mask = data[self.output_label_key]
            array = mask.array.astype(np.uint8 if mask.array.max() < 256 else np.int16)
            file, path = tempfile.mkstemp(suffix=ending)
            os.close(file)
            nib.save(nib.Nifti1Image(array, mask.affine.numpy()), path)
        return path, {**data.get(self.output_json_key, {}), "weights": self.versions.weights}


class KCenterGreedy(Strategy):
    """Picks the image whose features are farthest from those of the labelled ones.

    Args:
        bundle: folder of the network.
    """

    def __init__(self, bundle: Path) -> None:
        super().__init__("Farthest from the labelled images in the network's features")
        self.bundle = bundle
        self.features: Features | None = None

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        self.features = self.features or Features(self.bundle)
        labelled = set(datastore.get_labeled_images(request.get("label_tag")))
        names, rows = [], []
        left, fault = 0, ""
        for name in sorted(datastore.list_images()):
            try:
                rows.append(self.features(datastore.get_image_uri(name)))
            except (RuntimeError, ValueError, OSError, HTTPException) as error:
                logger.warning("left out: %s (%s)", name, error)
                left, fault = left + (name not in labelled), str(error)
            else:
                names.append(name)
        if left and not set(names) - labelled:
            raise HTTPException(503, f"features of {left} images could not be computed: {fault}")
        there = [i for i, name in enumerate(names) if name in labelled]
        if len(there) == len(names):
            return None
        return {"id": names[kcenter_greedy(torch.stack(rows), there)]}
