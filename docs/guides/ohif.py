"""Puts NIfTI images into a DICOMweb store."""

from __future__ import annotations

import fire
import nibabel as nib
import numpy as np
from dicomweb_client import DICOMwebClient
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid


def upload(store: str, *images: str) -> None:
    """Send NIfTI images to a DICOMweb store as MR series of made-up patients.

    Args:
        store: URL, such as http://127.0.0.1:8042/dicom-web.
        images: files with three axes.
    """
    client = DICOMwebClient(store)
    for number, path in enumerate(images, 1):
        slices = dicom_slices(nib.load(path), f"Example^Number {number}")
        client.store_instances(slices)
        print(path, slices[0].SeriesInstanceUID)


def dicom_slices(image: nib.Nifti1Image, patient: str) -> list[Dataset]:
    """One MR slice for each index of the last axis; DICOM's x and y point against those of NIfTI."""
    volume = np.asarray(image.dataobj, dtype=np.float64)
    volume = np.round((volume - volume.min()) * (4095 / np.ptp(volume))).astype(np.uint16)
    affine = np.diag([-1.0, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    slices = []
    for k in range(volume.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one = Dataset()
        one.file_meta, one.preamble = meta, bytes(128)
        one.SOPClassUID, one.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.PatientName, one.PatientID = patient, patient.split()[-1]
        one.PatientBirthDate = one.PatientSex = one.AccessionNumber = one.ReferringPhysicianName = (
            ""
        )
        one.StudyDate, one.StudyTime, one.StudyID = "20000101", "000000", "1"
        one.StudyDescription = one.SeriesDescription = "Example"
        one.Modality, one.SeriesNumber, one.InstanceNumber = "MR", 1, k + 1
        one.Manufacturer = one.PositionReferenceIndicator = ""
        one.ScanningSequence, one.SequenceVariant, one.ScanOptions = "GR", "NONE", ""
        one.MRAcquisitionType, one.EchoTime, one.RepetitionTime, one.EchoTrainLength = "3D", 1, 1, 1
        one.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
        directions = affine[:3, :2] / spacing[:2]
        one.ImageOrientationPatient = [f"{x:.8g}" for x in directions.T.ravel()]
        one.ImagePositionPatient = [f"{x:.8g}" for x in (affine @ [0, 0, k, 1])[:3]]
        one.PixelSpacing = [f"{spacing[1]:.8g}", f"{spacing[0]:.8g}"]  # between rows, columns
        one.SliceThickness = one.SpacingBetweenSlices = f"{spacing[2]:.8g}"
        one.Columns, one.Rows = volume.shape[:2]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 12, 11, 0
        one.WindowCenter, one.WindowWidth = 2048, 4096
        one.PixelData = volume[:, :, k].T.tobytes()
        slices.append(one)
    return slices


if __name__ == "__main__":
    fire.Fire({"upload": upload})
