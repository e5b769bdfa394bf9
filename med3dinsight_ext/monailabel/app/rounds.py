"""A round: training on the labels so far, in a process of its own."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import psutil
from filelock import FileLock, Timeout
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.utils.async_tasks.utils import tasks

from med3dinsight_ext.data.labels import check_order, read_label
from med3dinsight_ext.io.memory import total_memory
from med3dinsight_ext.monailabel.app.datastores import CLASSES
from med3dinsight_ext.monailabel.app.requests import check_training
from med3dinsight_ext.monailabel.app.validation import validation_split
from med3dinsight_ext.monailabel.app.versions import BUSY, EARLIER, ROUND, Versions, adopt_round
from med3dinsight_ext.monailabel.server import class_names
from med3dinsight_ext.training.history import read_history

logger = logging.getLogger(__name__)
GIB = 2**30
NICE = 5  # inference goes first
# Not for clients: which expression of the config runs, from which file, and where results are sent
OWN = {"run_id": "run", "model_filename": "model.pt", "tracking_uri": ""}


def end() -> NoReturn:
    """End this process and those that it started, as torchrun and its ranks."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def end_with(server: int) -> None:
    """End this process when the server is gone: a killed server's training must not go on."""
    while os.getppid() == server:
        time.sleep(0.5)
    end()


def memory(process: psutil.Process) -> int:
    """Bytes of a process and its children; pages that they share count once where known."""
    found = 0
    for part in (process, *process.children(recursive=True)):
        try:
            info = part.memory_full_info()
        except psutil.Error:  # it has ended
            continue
        found += getattr(info, "pss", info.rss)
    return found


def end_above(limit: float) -> None:
    """End this process when it needs more memory than this, in GiB."""
    process = psutil.Process()
    while (used := memory(process)) <= limit * GIB:
        time.sleep(1)
    last_words(
        f"ValueError: memory of a training must be at most {limit:g} GiB, got "
        f"{used / GIB:.1f}; lower batch_size in the bundle's train.json, or raise memory_gb in the "
        "training's options; the model stays as it was"
    )
    end()


def last_words(text: str) -> None:
    """Print a line that no other follows, as a server keeps a training's last 20 alone."""
    out, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the training itself still runs and logs
        os.dup2(nowhere, stream)
    os.write(out, f"\n{text}\n".encode())


class Training(BundleTrainTask):
    """A bundle's train.json on the labels so far, from its model.pt.

    The weights are written into a folder of their own and replace model.pt at the end, so that no
    annotator's model changes during a training, and a training that is stopped changes nothing.
    """

    def __init__(self, path: str, conf: dict[str, str]) -> None:
        super().__init__(path, conf)
        self.models = Path(path) / "models"
        self.versions, self.earlier = Versions(self.models), Versions(self.models / EARLIER)

    def config(self) -> dict[str, Any]:
        half = max(1, round(total_memory() / GIB / 2))
        options = super().config() | {"model_filename": ["model.pt"], "memory_gb": half}
        return {
            key: value for key, value in options.items() if key not in ("run_id", "tracking_uri")
        }

    def stats(self) -> dict[str, Any]:
        """Progress and score, as viewers show them."""
        score = self.versions.weights["validation"] or {}
        found: dict[str, Any] = {"best_metric": next(iter(score.values()))} if score else {}
        name = Path(self.bundle_path).name
        for task in tasks("train"):
            if task["status"] == "RUNNING" and task["request"].get("model") == name:
                begin = datetime.fromisoformat(task["start_ts"]).timestamp()
                path = Path(self.bundle_path) / "eval" / "history.jsonl"
                fresh = path.exists() and path.stat().st_mtime >= begin
                rows = read_history(path) if fresh else []
                found["epoch"] = rows[-1]["epoch"] if rows else 0
                found["total_epochs"] = task["request"].get("max_epochs", 50)
        return found

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> Any:
        check_training(request)
        if not request.get("pretrained", True):
            raise ValueError("pretrained must be true, got false; train from scratch by the bundle")
        limit = request.get("memory_gb") or self.config()["memory_gb"]
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise ValueError(f"memory_gb must be above 0, got {limit!r}")
        lock = FileLock(self.models / BUSY)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"trainings of a bundle must not overlap, got a second one of {self.bundle_path}; "
                "wait until the other server's has ended"
            ) from error
        threading.Thread(target=end_above, args=(limit,), daemon=True).start()
        os.nice(NICE)
        with lock:
            shutil.rmtree(self.models / ROUND, ignore_errors=True)  # of one that was stopped
            super().__call__(request | OWN, datastore)
            kept = "now serves the new weights" if adopt_round(self.models) else "keeps its weights"
            logger.info("%s %s", Path(self.bundle_path).name, kept)
        return {}

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        overrides["ckpt_dir"] = str(self.models / ROUND)
        frozen = self.bundle_config.get("freeze_epochs")
        if isinstance(frozen, int) and frozen > 0:  # the first training's, for transferred weights
            overrides["freeze_epochs"] = 0
        return overrides

    def _run_command(self, cmd: list[str], env: dict[str, str]) -> None:
        """Run the ranks of several GPUs; a server's own code would not see that they failed."""
        logger.info("running %s", cmd)
        code = subprocess.run(cmd, env=env).returncode
        if code:
            raise RuntimeError(
                f"ranks of a training must end without an error, got return code {code}; the log "
                "above has the cause; the model stays as it was"
            )

    def _fetch_datalist(self, request: dict[str, Any], datastore: Datastore) -> Any:
        """Labelled cases that are good, with their patient and the values of the label."""
        names = class_names(Path(self.bundle_path))
        patients, classes = patients_of(datastore), classes_of(datastore)
        items = []
        for item in super()._fetch_datalist(request, datastore):
            try:
                values = read_label(item, names)
                check_order(names, classes[item["image"]], item["label"])
            except ValueError as error:
                logger.warning("left out: %s", error)
            else:
                items.append({**item, "patient": patients[item["image"]], "values": values})
        if not items:
            raise ValueError("labels must be there for a training, got none; save one first")
        return items

    def _partition_datalist(
        self, datalist: list[dict[str, Any]], request: dict[str, Any], shuffle: bool = False
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        share = request.get("val_split", 0.2)
        train, held = (datalist, []) if share < 0 else validation_split(datalist, share)
        logger.info("%d cases to train on, %d to validate on", len(train), len(held))
        return paths(train), None if share < 0 else paths(held)


def paths(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a training reads of the cases."""
    return [{"image": item["image"], "label": item["label"]} for item in items]


def classes_of(datastore: Datastore) -> dict[str, list[str]]:
    """Of each image file, with links resolved: the classes of its label when that was saved."""
    found = {}
    for name in datastore._datastore.objects:
        path = datastore.get_image_info(name)["path"]
        found[path] = datastore.get_label_info(name, DefaultLabelTag.FINAL.value).get(CLASSES, [])
    return found


def patients_of(datastore: Datastore) -> dict[str, str]:
    """Of each image file, with links resolved: the PatientID of its series, or the image's ID."""
    found = {}
    for name in datastore._datastore.objects:
        info = datastore.get_image_info(name)
        patient = info.get("PatientID")
        found[info["path"]] = name if patient in (None, "", "UNK") else str(patient)
    return found
