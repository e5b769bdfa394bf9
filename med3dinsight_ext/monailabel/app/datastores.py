"""Datastores of images, a folder or DICOMweb, that take only labels that fit their image."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import SimpleITK as sitk
from dicomweb_client import DICOMwebClient
from fastapi import HTTPException
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore import local
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from pydicom import Dataset

from med3dinsight_ext.data.labels import read_label
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.monailabel.app.answers import NAME, AnswerLog
from med3dinsight_ext.monailabel.app.requests import check_extension, check_name

MODALITIES = ("CT", "MR", "PT")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def copy(source: str, target: str) -> None:
    """Replace a file as a whole: a training may be reading it, or the disk may be full."""
    write_atomic(Path(target), lambda draft: shutil.copyfile(source, draft))


local.shutil = SimpleNamespace(copy=copy)


@contextmanager
def refused(prefix: str = "") -> Iterator[None]:
    """Answer 400 where a check fails, and 507 where a disk is full."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(400, f"{prefix}{error}") from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        text = f"disk must have room, got {error}; nothing was saved, free some and save again"
        raise HTTPException(507, text) from error


class LabelChecks:
    """Refuses labels that do not fit their image, and logs those that it saves."""

    names: list[str]
    _datastore_path: str  # of the labels

    @property
    def log(self) -> AnswerLog:
        return AnswerLog(Path(self._datastore_path) / NAME)

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """Save a label; answer 404 without its image, and 400 where it does not fit."""
        store: Any = super()
        image = self.get_image_uri(image_id)  # type: ignore[attr-defined]
        if not image:
            raise HTTPException(404, f"image must be one of the datastore's, got {image_id!r}")
        with refused():
            check_name(label_tag, "tag")
        with refused("refused, nothing was saved: "):
            read_label({"image": image, "label": label_filename}, self.names)
        found: str = store.save_label(image_id, label_filename, label_tag, label_info)
        self.log.add(image=image_id, saved=label_tag, annotator=label_info.get("client_id"))
        return found


class CheckedDatastore(LabelChecks, LocalDatastore):
    """A folder of images.

    Args:
        studies: the folder.
        names: of the classes; the label value is the index.
    """

    def __init__(self, studies: str, names: list[str]) -> None:
        self.names = names
        super().__init__(
            studies,
            extensions=["*.nii.gz", "*.nii"],
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """Save a label; answer 400 where its file has another ending than volumes have."""
        with refused():
            check_extension(label_filename, "label")
            return super().save_label(image_id, label_filename, label_tag, label_info)

    def _update_datastore_file(self, lock: bool = True) -> None:
        text = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        path = Path(self._datastore_config_path)
        with FileLock(self._lock_file) if lock else nullcontext():
            self._ignore_event_config = True
            write_atomic(path, lambda draft: draft.write_text(text, "utf-8"))
            self._config_ts = path.stat().st_mtime

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Save an image; answer 400 where its name is not a plain one."""
        with refused():
            check_extension(image_filename, "image")
            if image_id:
                check_name(image_id, "image")
        return super().add_image(image_id, image_filename, image_info)


class DicomStore(LabelChecks, DICOMWebDatastore):
    """The current images of a DICOMweb store, which MONAI Label would cache for two hours.

    Args:
        client: of the store.
        names: of the classes; the label value is the index.
    """

    def __init__(self, client: DICOMwebClient, names: list[str]) -> None:
        self.names = names
        cache = settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or None
        super().__init__(client, {}, cache, settings.MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME)

    def list_images(self) -> list[str]:
        found = [Dataset.from_json(series) for series in self._client.search_for_series()]
        return [str(series.SeriesInstanceUID) for series in found if series.Modality in MODALITIES]

    def get_labeled_images(self, *tags: Any) -> list[str]:
        return sorted(set(DICOMWebDatastore.get_labeled_images.__wrapped__(self)))

    def get_image_uri(self, image_id: str) -> str:
        return super().get_image_uri(image_id) if image_id in self.list_images() else ""


def on_grid(label: str, image: str) -> str:
    """NIfTI file beside a label: a DICOM segmentation has only the slices that are not empty."""
    path = label.removesuffix(".nrrd") + ".nii.gz"
    grid = sitk.ReadImage(image)
    nearest = (sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    sitk.WriteImage(sitk.Resample(sitk.ReadImage(label), grid, *nearest), path)
    return path
