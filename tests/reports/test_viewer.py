import base64
import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.transforms import LoadImage
from page_reader import Page

from med3dinsight_ext.reports import viewer
from med3dinsight_ext.reports.pages import csp_hash
from med3dinsight_ext.reports.predictions import write_predictions

needs_niivue = pytest.mark.skipif(viewer.niivue() is None, reason="nilearn is not installed")
CLASSES = ["left one", "<b>right</b>"]


def case(folder: Path) -> tuple[Path, MetaTensor]:
    """A volume stored from left to right and up to down, and its label map."""
    affine = np.array([[-2.0, 0, 0, 30], [0, 1.5, 0, -7], [0, 0, -3, 40], [0, 0, 0, 1]])
    random = np.random.default_rng(0)
    image = random.uniform(0, 900, (12, 9, 7)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[8:10, 2:5, 3], label[1, 1, 1] = 2, 1
    paths = [folder / "a.nii.gz", folder / "a_seg.nii.gz"]
    for path, array in zip(paths, (image, label), strict=True):
        nib.save(nib.Nifti1Image(array, affine), path)
    return paths[0], LoadImage(image_only=True, ensure_channel_first=True)(paths[1])


def layers_of(page: Path) -> dict[str, Any]:
    text = re.search(r'id="layers">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert text
    return json.loads(text[1])


def volume_of(layer: dict[str, str]) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(layer["data"])))


def in_world(file: Any) -> dict[tuple[float, ...], int]:
    """Value at each marked voxel's place in the world."""
    array = np.asarray(file.dataobj)
    places = nib.affines.apply_affine(file.affine, np.argwhere(array))
    return {tuple(p.round(3)): int(v) for p, v in zip(places, array[array > 0], strict=True)}


@needs_niivue
def test_maps_lie_where_their_files_put_them(tmp_path: Path) -> None:
    image, label = case(tmp_path)
    page = tmp_path / "view.html"
    assert viewer.write_viewer(page, image, {"Prediction": label}, CLASSES, "all.html")
    found = layers_of(page)
    shown, marked = map(volume_of, found["layers"])
    assert [layer["name"] for layer in found["layers"]] == ["Image", "Prediction"]
    assert nib.aff2axcodes(shown.affine) == nib.aff2axcodes(marked.affine) == ("R", "A", "S")
    assert in_world(marked) == in_world(nib.load(tmp_path / "a_seg.nii.gz"))
    assert np.allclose(shown.affine, marked.affine) and shown.shape == marked.shape
    original: Any = nib.as_closest_canonical(nib.load(image))
    pixels = np.corrcoef(np.asarray(shown.dataobj).ravel(), original.get_fdata().ravel())
    assert pixels[0, 1] > 0.99
    x, y, z = (np.array(found["start"]) * shown.shape).astype(int)
    assert np.asarray(marked.dataobj)[x, y, z] == 2


@needs_niivue
def test_a_large_volume_is_thinned_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewer, "LIMIT", 100)
    image, label = case(tmp_path)
    page = tmp_path / "view.html"
    viewer.write_viewer(page, image, {"Prediction": label}, CLASSES, "all.html")
    shown, marked = map(volume_of, layers_of(page)["layers"])
    assert shown.shape == marked.shape == (4, 3, 3)
    assert shown.header.get_zooms() == pytest.approx((6, 4.5, 9))
    assert "one of 3 an axis" in page.read_text("utf-8")


@needs_niivue
def test_the_policy_names_the_script_and_names_are_escaped(tmp_path: Path) -> None:
    image, label = case(tmp_path)
    path = tmp_path / "view.html"
    viewer.write_viewer(path, image, {"Prediction": label}, CLASSES, "all.html")
    page = Page(path)
    [script] = re.findall(r"<script>(.*?)</script>", page.source, re.S)
    assert f"script-src '{csp_hash(script)}'" in page.source
    assert "<b>right" not in page.source and set(page.links) == {"all.html"}


@needs_niivue
def test_predictions_link_to_their_viewers(tmp_path: Path) -> None:
    image, _ = case(tmp_path)
    page = tmp_path / "out" / "predictions.html"
    write_predictions(page, {str(image): tmp_path / "a_seg.nii.gz"}, ["background", *CLASSES])
    assert "viewer/a_seg.html" in Page(page).links
    assert "../predictions.html" in Page(tmp_path / "out/viewer/a_seg.html").links


@needs_niivue
def test_names_with_dots_have_viewers_of_their_own(tmp_path: Path) -> None:
    image, _ = case(tmp_path)
    files = {}
    for name in ("1.2", "1.3"):
        files[str(tmp_path / f"{name}.nii.gz")] = tmp_path / f"{name}_seg.nii.gz"
        shutil.copy(image, tmp_path / f"{name}.nii.gz")
        shutil.copy(tmp_path / "a_seg.nii.gz", tmp_path / f"{name}_seg.nii.gz")
    write_predictions(tmp_path / "predictions.html", files, ["background", *CLASSES])
    found = {path.name for path in (tmp_path / "viewer").iterdir()}
    assert found == {"1.2_seg.html", "1.3_seg.html"}


def test_more_classes_than_a_byte_has_are_not_shown(tmp_path: Path) -> None:
    image, label = case(tmp_path)
    names = [f"class {n}" for n in range(256)]
    page = tmp_path / "viewer.html"
    assert not viewer.write_viewer(page, image, {"Label": label}, names) and not page.exists()
    if viewer.niivue():
        assert viewer.write_viewer(page, image, {"Label": label}, names[:255])


def test_without_niivue_there_is_no_viewer_and_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewer, "niivue", lambda: None)
    image, label = case(tmp_path)
    page = tmp_path / "predictions.html"
    write_predictions(page, {str(image): tmp_path / "a_seg.nii.gz"}, ["background", *CLASSES])
    assert all(link.startswith("data:") for link in Page(page).links)
    assert not (tmp_path / "viewer").exists()
    assert not viewer.write_viewer(tmp_path / "v.html", image, {"x": label}, CLASSES, "all.html")


FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--virtual-time-budget=30000",
    "--dump-dom",
]
CLICK = """
const wait = () => document.body.dataset.ready ? go() : setTimeout(wait, 100);
const go = () => {
  const shown = () => [...document.querySelectorAll("[data-axis]")].map((s) => s.value).join(" ");
  document.querySelector("[data-axis-to='2']").click();
  const button = shown();
  const curve = document.querySelector("[data-curve='0']"), box = curve.getBoundingClientRect();
  curve.dispatchEvent(new MouseEvent("click", { clientX: box.left + 0.75 * box.width }));
  document.body.dataset.sliders = `${button}, ${shown()}`;
};
wait();
"""


def shown(page: Path) -> str:
    """The page's document after its script has run in a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("the viewer's script needs chromium")
    command = [browser, *FLAGS, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180).stdout


@needs_niivue
def test_a_browser_shows_the_class_under_the_point(tmp_path: Path) -> None:
    image, label = case(tmp_path)
    page = tmp_path / "view.html"
    viewer.write_viewer(page, image, {"Prediction": label, "Label": label}, CLASSES, "all.html")
    dump = shown(page)
    assert 'data-ready="true"' in dump
    assert "Prediction: &lt;b&gt;right&lt;/b&gt;; Label: &lt;b&gt;right" in dump


@needs_niivue
def test_a_click_on_a_curve_goes_to_its_slice(tmp_path: Path) -> None:
    image, _ = case(tmp_path)
    page = tmp_path / "view.html"
    curves = [viewer.Curve(axis, "plane", "#000", ["0,0 300,90"], 0.2, 0, 1) for axis in (0, 1)]
    best = viewer.Curve(2, "axial", "#000", ["0,0 300,90"], 0.9, 0, 1)
    viewer.write_viewer(page, image, {}, [], curves={"a": curves, "<b>": [best]})
    source = page.read_text("utf-8")
    assert "<h3" in source and "&lt;b&gt;" in source and "All cases" not in source
    policy = re.compile('<meta http-equiv="Content-Security-Policy".*?>')
    page.write_text(policy.sub("", source) + f"<script>{CLICK}</script>")
    assert re.search('data-sliders="200 200 900, 7(49|50) 200 900"', shown(page))
