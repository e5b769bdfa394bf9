"""Images and segmentations of a DICOMweb store."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from dicomweb_client import DICOMwebClient
from fastapi import HTTPException
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.datastore.utils.convert import dicom_seg_to_itk_image
from monailabel.datastore.utils.dicom import dicom_web_download_series
from monailabel.interfaces.datastore import DefaultLabelTag
from pydicom import Dataset

from med3dinsight_ext.monailabel.app.datastores import CLASSES, LabelChecks
from med3dinsight_ext.monailabel.app.segments import class_value, described

logger = logging.getLogger(__name__)
MODALITIES = ("CT", "MR", "PT")
FINAL = DefaultLabelTag.FINAL.value


class Segmentation(NamedTuple):
    """A DICOM segmentation; ``values`` has the class of each segment, None for an unknown one."""

    image: str
    date: str
    series: str
    study: str
    values: dict[int, int | None]


class DicomStore(LabelChecks, DICOMWebDatastore):
    """The current images of a DICOMweb store, which MONAI Label would cache for two hours.

    The label of an image is the newest segmentation whose segments all have names of classes, from
    whatever program.

    Args:
        client: of the store.
        names: of the classes; the label value is the index.
    """

    get_label_uri = LocalDatastore.get_label_uri  # MONAI Label's takes a label's ID for a series

    def __init__(self, client: DICOMwebClient, names: list[str]) -> None:
        self.names = names
        self._read: dict[str, Segmentation] = {}
        cache = settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or None
        super().__init__(client, {}, cache, settings.MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME)
        self.watch()

    def list_images(self) -> list[str]:
        found = [Dataset.from_json(series) for series in self._client.search_for_series()]
        return [str(series.SeriesInstanceUID) for series in found if series.Modality in MODALITIES]

    def get_labeled_images(self, *tags: Any) -> list[str]:
        return sorted(self.segmentations())

    def get_image_uri(self, image_id: str) -> str:
        """File of an image, whose series is fetched whole, by one process at a time."""
        if image_id not in self.list_images():
            return ""
        folder = Path(self._datastore.image_path()) / image_id
        with FileLock(f"{folder}.lock"):
            if not folder.with_name(f"{image_id}.nii.gz").exists():
                self._fetch_image(image_id, folder)
            return super().get_image_uri(image_id)

    def _fetch_image(self, series: str, folder: Path) -> None:
        """Replace the folder of a series by what the store has; MONAI Label takes any part of it.

        Raises:
            HTTPException: 502, fewer images came than the store lists.
        """
        [row] = self._client.search_for_series(search_filters={"SeriesInstanceUID": series})
        study = str(Dataset.from_json(row).StudyInstanceUID)
        listed = len(self._client.retrieve_series_metadata(study, series))
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as place:
            draft = Path(place) / series
            dicom_web_download_series(study, series, str(draft), self._client, self._fetch_by_frame)
            came = len(list(draft.glob("*.dcm")))
            if came < listed:
                raise HTTPException(
                    502, f"series must come whole, got {came} of its {listed} images; try again"
                )
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)

    def segments(self, values: set[int], tag: str) -> list[dict[str, str]]:
        """Names of the values in a label, as MONAI Label needs them for a DICOM segmentation."""
        found = named(values, self.names)
        if tag == FINAL and not found:
            raise ValueError(
                "label must hold a class, got only background; a DICOM segmentation cannot be empty"
            )
        return found

    def segmentations(self) -> dict[str, Segmentation]:
        """The newest segmentation of each image that has one; those in the cache are known."""
        images = set(self.list_images())
        found: dict[str, list[Segmentation]] = {}
        for row in self._client.search_for_series(search_filters={"Modality": "SEG"}):
            series = Dataset.from_json(row)
            uid = str(series.SeriesInstanceUID)
            if uid not in self._read:
                self._read[uid] = self._segmentation(str(series.StudyInstanceUID), uid)
            own = self._read[uid]
            fits = own.values and None not in own.values.values()
            if own.image in images and (fits or self._is_here(own)):
                found.setdefault(own.image, []).append(own)
        return {
            image: max(rows, key=lambda own: (own.date, self._is_here(own)))
            for image, rows in found.items()
        }

    def _is_here(self, own: Segmentation) -> bool:
        """Whether the cache has its voxels, as values of the classes."""
        label = self._datastore.label(own.image, FINAL)
        is_read = label is not None and label.ext == ".nii.gz"
        known: bool = is_read and label.info.get("SeriesInstanceUID") == own.series
        return known and label.info.get(CLASSES, self.names) == self.names

    def _segmentation(self, study: str, uid: str) -> Segmentation:
        instances = self._client.retrieve_series_metadata(study, uid)
        meta = Dataset.from_json(instances[0])
        referred = meta.get("ReferencedSeriesSequence")
        image = str(referred[0].SeriesInstanceUID) if referred else ""
        names = {
            int(part.SegmentNumber): str(part.get("SegmentLabel", ""))
            for part in meta.get("SegmentSequence", [])
        }
        values = {number: class_value(name, self.names) for number, name in names.items()}
        if len(instances) > 1:  # each numbers its own segments, and MONAI Label reads any of them
            logger.warning("left out: segmentation %s must be one instance", uid)
            values = {}
        elif not values or None in values.values():
            shown = list(names.values())
            logger.warning("left out: segments of %s must be classes, got %s", uid, shown)
        date = f"{meta.get('ContentDate') or ''}{meta.get('ContentTime') or ''}"
        return Segmentation(image, date, uid, study, values)

    def _download_labeled_data(self) -> None:
        """Bring the cache up to date with the segmentations of the store."""
        found = self.segmentations()
        for image in LocalDatastore.get_labeled_images(self):
            if image not in found:
                logger.info("label of %s is no longer in the store", image)
                LocalDatastore.remove_label(self, image, FINAL)
        for own in found.values():
            if not self._is_here(own):
                self._fetch(own)
        self.refresh()

    def _fetch(self, own: Segmentation) -> None:
        image, _, series, study, values = own
        with tempfile.TemporaryDirectory() as folder:
            parts = os.path.join(folder, "parts")
            dicom_web_download_series(study, series, parts, self._client, self._fetch_by_frame)
            try:
                read = dicom_seg_to_itk_image(parts)
            except (ValueError, AttributeError, LookupError, RuntimeError) as error:
                logger.warning("left out: segmentation %s cannot be read: %s", series, error)
                return
            path = os.path.join(folder, "label.nii.gz")
            on_grid(read, self.get_image_uri(image), {k: v or 0 for k, v in values.items()}, path)
            Path(read).unlink()
            with self.changes:
                LocalDatastore.save_label(
                    self, image, path, FINAL, {"SeriesInstanceUID": series, CLASSES: self.names}
                )


def named(values: set[int], names: Sequence[str]) -> list[dict[str, str]]:
    """Segments of the values in a label, in their order, with the names of the classes."""
    return [{"name": names[value]} for value in sorted(values - {0})]


def with_names(write: Callable[..., str], names: Sequence[str]) -> Callable[..., str]:
    """``write``, MONAI Label's writer of DICOM segmentations, but with names by value.

    Args:
        write: folder of the image, label and segments to the file that it writes; it takes the
            first segment's name for the first value in the label, whichever that is.
        names: of the classes; the label value is the index.
    """

    def by_value(image: str, label: str, segments: Any, *args: Any, **kwargs: Any) -> str:
        stored: Any = nib.load(label)
        values = set(np.unique(np.asarray(stored.dataobj)).astype(int).tolist())
        own = described(named(values, names), segments)
        return write(image, label, own, *args, **kwargs)

    return by_value


def on_grid(label: str, image: str, values: dict[int, int], path: str) -> None:
    """Write the label of an image from a segmentation, which has only slices that are not empty.

    Args:
        label: file with the segments' numbers.
        image: file that has the grid.
        values: class of each segment's number.
        path: NIfTI file to write.
    """
    nearest = (sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    classes = sitk.ChangeLabel(sitk.ReadImage(label, sitk.sitkUInt16), values)
    sitk.WriteImage(sitk.Resample(classes, sitk.ReadImage(image), *nearest), path)
