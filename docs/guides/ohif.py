"""Puts NIfTI images into a DICOMweb store, and takes the guide's pictures of OHIF."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import fire
import nibabel as nib
import numpy as np
from dicomweb_client import DICOMwebClient
from playwright.sync_api import sync_playwright
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

FIGURES = Path(__file__).parent / "figures"
CHROMIUM = [
    "--no-sandbox", "--no-first-run", "--no-proxy-server", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
    "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip
# Scrolls the three views to a voxel, and says where it is on the page in the axial one.
GO_TO = """voxel => {
  const service = services.cornerstoneViewportService;
  const axial = service.getCornerstoneViewport("mpr-axial");
  const world = axial.getImageData().imageData.indexToWorld(voxel);
  for (const name of ["mpr-axial", "mpr-sagittal", "mpr-coronal"])
    service.getCornerstoneViewport(name).jumpToWorld(world);
  const box = axial.canvas.getBoundingClientRect(), at = axial.worldToCanvas(world);
  return [box.x + at[0], box.y + at[1]];
}"""

# Indices of the voxels of a label in the segmentation that the viewer draws.
DRAWN = """name => {
  const [found] = services.segmentationService.getSegmentations();
  const index = Object.values(found.segments).find(one => one.label === name).segmentIndex;
  const volume = cornerstone.cache.getVolume(found.representationData.Labelmap.volumeId);
  const values = volume.voxelManager.getCompleteScalarDataArray();
  const [x, y] = volume.dimensions, voxels = [];
  values.forEach((value, at) => {
    if (value === index)
      voxels.push([at % x, Math.floor(at / x) % y, Math.floor(at / (x * y))]);
  });
  return voxels;
}"""


def upload(store: str, *images: str) -> None:
    """Send NIfTI images to a DICOMweb store as MR series of made-up patients.

    Args:
        store: URL, such as http://127.0.0.1:8042/dicom-web.
        images: files with three axes.
    """
    for path, series in sent(store, images):
        print(path, series)


def sent(store: str, images: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Send images as ``upload`` does; each with the id of its series."""
    client = DICOMwebClient(store)
    for number, path in enumerate(images, 1):
        slices = dicom_slices(nib.load(path), f"Example^Number {number}")
        client.store_instances(slices)
        yield path, slices[0].SeriesInstanceUID


def dicom_slices(image: Any, patient: str) -> list[Dataset]:
    """One MR slice an index of the last axis; DICOM's x and y point against those of NIfTI."""
    volume = np.asarray(image.dataobj, dtype=np.float64)
    volume = np.round((volume - volume.min()) * (4095 / np.ptp(volume))).astype(np.uint16)
    window = int(np.quantile(volume, 0.995))
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
        one.WindowCenter, one.WindowWidth = str(window // 2), str(window)
        one.PixelData = volume[:, :, k].T.tobytes()
        slices.append(one)
    return slices


class Viewer:
    """OHIF in a headless Chromium, with a study of MONAI Label's server open.

    Args:
        server: URL of MONAI Label.
        patient: as the study list shows it.
    """

    def __init__(self, server: str, patient: str) -> None:
        self._server = server
        self._playwright = sync_playwright().start()
        chromium = self._playwright.chromium
        self._browser = chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        self.page = page = self._browser.new_page(viewport={"width": 1400, "height": 640})
        page.set_default_timeout(120_000)
        page.on("dialog", lambda dialog: dialog.accept())  # "reload current page?"
        page.goto(f"{server}/ohif/")
        page.get_by_text("Confirm and Hide").click()
        page.get_by_text(patient).first.click()
        page.get_by_text("MONAI Label").first.click()
        self.connect()

    def connect(self) -> None:
        """Give MONAI Label's panel the server's address."""
        self.page.locator("#monailabelServerURL").fill(f"{self._server}/")
        self.page.locator(".settingsTable button").click()
        self.page.get_by_text("Auto-Segmentation").wait_for()
        self.page.wait_for_timeout(2000)  # the segments get their colours a second later

    def open(self, tab: str, title: str) -> None:
        """Unfold a tab of the panel, which folds the others."""
        if not self.page.locator(f"input[value={tab}]").is_checked():
            self.page.get_by_text(title, exact=True).click()

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()

    def run(self, tab: str) -> float:
        """Press a tab's Run; seconds until the viewer has drawn the answer.

        Args:
            tab: "segmentation" or "pointprompts".
        """
        begin = perf_counter()
        with self.page.expect_response(lambda response: "/infer/" in response.url) as answer:
            self.page.locator(f".tab:has(input[value={tab}]) button").first.click()
        if not answer.value.ok:
            raise RuntimeError(f"{tab} must be answered, got {answer.value.status}; see /logs/")
        self.page.get_by_text(re.compile("Running .* - Successful")).last.wait_for()
        return perf_counter() - begin

    def clear_clicks(self) -> None:
        """Take all clicks back, and select each label once: only those are drawn again."""
        self.open("pointprompts", "Point Prompts")
        self.page.get_by_text("Clear All Points").click()
        for row in self.page.locator("tr.clickable-row").all():
            row.click()

    def click(self, label: str, voxel: tuple[int, int, int]) -> None:
        """Say by a mouse click that a label is at a voxel of the stored image."""
        self.page.locator("tr.clickable-row", has_text=label).click()
        self.page.mouse.click(*self.page.evaluate(GO_TO, voxel))
        self.page.wait_for_timeout(1000)

    def next_case(self) -> str:
        """Let the strategy choose a case, open it, and connect again; its page's address."""
        self.open("activelearning", "Active Learning")
        self.page.get_by_text("Next Sample", exact=True).click()
        with self.page.expect_navigation():
            self.page.get_by_text("OK", exact=True).click()
        self.connect()
        return self.page.url

    def train(self) -> None:
        """Start a training of all models."""
        self.open("activelearning", "Active Learning")
        self.page.get_by_text("Update Model", exact=True).click()
        self.page.get_by_text("Model update task STARTED").wait_for()

    def drawn(self, label: str) -> np.ndarray:
        """Voxels of a label in the viewer's segmentation, (n, 3) indices of the stored image."""
        return np.array(self.page.evaluate(DRAWN, label)).reshape(-1, 3)


def shoot(server: str, patient: str, label: str, voxel: tuple[int, int, int]) -> None:
    """Segment a patient's image in the viewer, click, run again; a screenshot after each.

    Args:
        server: URL of MONAI Label with one bundle that takes clicks.
        patient: as the study list shows it.
        label: that the click says is there.
        voxel: to click, an index into the stored image.
    """
    FIGURES.mkdir(exist_ok=True)
    begin = perf_counter()
    viewer = Viewer(server, patient)
    viewer.page.evaluate(GO_TO, voxel)
    viewer.run("segmentation")
    print(f"viewer opened to first overlay: {perf_counter() - begin:.1f} s")
    viewer.page.wait_for_timeout(6000)  # until the viewer's messages have gone
    viewer.page.screenshot(path=FIGURES / "ohif_segmentation.png")
    viewer.clear_clicks()  # else labels without points break the viewer
    viewer.click(label, voxel)
    print(f"click: {viewer.run('pointprompts'):.1f} s")
    viewer.page.wait_for_timeout(6000)
    viewer.page.screenshot(path=FIGURES / "ohif_click.png")
    viewer.close()


if __name__ == "__main__":
    fire.Fire({"upload": upload, "shoot": shoot})
