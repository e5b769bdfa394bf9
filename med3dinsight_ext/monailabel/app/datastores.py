"""Where images and labels are, a folder or a DICOMweb store; only labels that fit get in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import SimpleITK as sitk
from dicomweb_client import DICOMwebClient
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from pydicom import Dataset

from med3dinsight_ext.data.labels import read_label
from med3dinsight_ext.monailabel.app.requests import check_extension, check_name

MODALITIES = ("CT", "MR", "PT")


class CheckedDatastore(LocalDatastore):
    """A folder of images that takes only labels that fit their image.

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
        image = self.get_image_uri(image_id)
        if not image:
            raise HTTPException(404, f"image must be one of the datastore's, got {image_id!r}")
        with refused():
            check_name(label_tag, "tag")
            check_extension(label_filename, "label")
        check(image, label_filename, self.names)
        return super().save_label(image_id, label_filename, label_tag, label_info)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        with refused():
            check_extension(image_filename, "image")
            if image_id:
                check_name(image_id, "image")
        return super().add_image(image_id, image_filename, image_info)


class DicomStore(DICOMWebDatastore):
    """The images of a DICOMweb store as it is now: MONAI Label would remember two hours long.

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

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        image = self.get_image_uri(image_id)
        if not image:
            raise HTTPException(404, f"image must be one of the datastore's, got {image_id!r}")
        with refused():
            check_name(label_tag, "tag")
        check(image, label_filename, self.names)
        return super().save_label(image_id, label_filename, label_tag, label_info)


@contextmanager
def refused() -> Iterator[None]:
    """Answer 400 where a check fails."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def check(image: str, label: str, names: list[str]) -> None:
    """Answer 400 where a label does not fit its image."""
    try:
        read_label({"image": image, "label": label}, names)
    except ValueError as error:
        raise HTTPException(400, f"refused, nothing was saved: {error}") from error


def on_grid(label: str, image: str) -> str:
    """NIfTI file beside a label: a DICOM segmentation has only the slices that are not empty."""
    path = label.removesuffix(".nrrd") + ".nii.gz"
    grid = sitk.ReadImage(image)
    nearest = (sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    sitk.WriteImage(sitk.Resample(sitk.ReadImage(label), grid, *nearest), path)
    return path
