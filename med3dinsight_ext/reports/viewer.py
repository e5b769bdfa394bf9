"""Page to scroll through a volume and its label maps, by NiiVue (BSD-2-Clause)."""

from __future__ import annotations

import base64
import gzip
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import torch
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.transforms import Orientation

from med3dinsight_ext.data.slicing import window
from med3dinsight_ext.data.volumes import guess_modality, read_volume
from med3dinsight_ext.reports.figures import class_colors
from med3dinsight_ext.reports.formatting import short
from med3dinsight_ext.reports.pages import write_page

LIMIT = 12e6  # voxels in a page; of larger volumes every second, third … voxel is shown
SCRIPT = "_assets/js/niivue.umd.js"  # in nilearn's wheel

logger = logging.getLogger(__name__)


class Curve(NamedTuple):
    """Scores along one axis of a volume, drawn in a box of 300 x 90.

    axis: 0 for x. name: of the plane and the ends of its axis. color: CSS. lines: points of each
    piece. best: place of the highest score, a fraction of the extent. low, high: scores.
    """

    axis: int
    name: str
    color: str
    lines: list[str]
    best: float
    low: float
    high: float


@cache
def niivue() -> str | None:
    """NiiVue's script as nilearn (extra ``demo``) ships it; None if it is not installed."""
    package = find_spec("nilearn")
    path = Path(package.origin).parent / SCRIPT if package and package.origin else Path()
    return path.read_text("utf-8") if path.is_file() else None


def write_viewer(
    page: Path,
    image: str | Path,
    maps: Mapping[str, MetaTensor],
    classes: Sequence[str],
    back: str = "",
    curves: Mapping[str, Sequence[Curve]] | None = None,
    stills: Sequence[Figure] = (),
) -> bool:
    """Write a page with one volume, offline like all pages; it needs WebGL 2.

    Args:
        page: HTML file.
        image: path of the volume.
        maps: name to class numbers (1, x, y, z) on the grid of the image's file.
        classes: names from number 1 on.
        back: page to go back to, relative to this one; empty if there is none.
        curves: text to its scores along the axes; the page begins at the best slices of the first.
        stills: figures for browsers without WebGL, below.

    Returns:
        Whether it was written: not without NiiVue, and not for more than 255 classes.
    """
    script = niivue()
    if script is None or len(classes) > 255:
        return False
    volume = read_volume(str(image))
    step = 1
    while volume[0, ::step, ::step, ::step].numel() > LIMIT:
        step += 1
    shown = window(volume, guess_modality(volume))[:1]
    layers: list[dict[str, Any]] = [
        {"name": "Image", "data": encoded(255 * shown, volume.affine, step)}
    ]
    start = [0.5, 0.5, 0.5]
    for curve in next(iter((curves or {}).values()), ()):
        start[curve.axis] = curve.best
    for name, label in maps.items():
        turned = Orientation("RAS", labels=None)(label.cpu())
        layers.append({"name": name, "data": encoded(turned, turned.affine, step)})
        marked = turned.as_tensor()[0].nonzero()
        if len(marked):
            apart = (marked - marked.double().mean(0)).square().sum(1)
            start = ((marked[apart.argmin()] + 0.5) / torch.tensor(turned.shape[1:])).tolist()
    facts = {"Image": str(image), "Voxels shown": "all" if step == 1 else f"one of {step} an axis"}
    write_page(
        page,
        "viewer.html",
        title=short(Path(image).name, 60),
        facts=facts,
        layers=layers,
        colors=class_colors(classes),
        niivue=script,
        back=back,
        start=start,
        curves=curves or {},
        stills=stills,
    )
    return True


def encoded(values: torch.Tensor, affine: torch.Tensor, step: int) -> str:
    """Every ``step``-th voxel of (1, x, y, z) in [0, 255] as base64 of a .nii.gz of bytes."""
    part = torch.as_tensor(values)[0, ::step, ::step, ::step].round().to(torch.uint8).numpy()
    moved = torch.as_tensor(affine).double().numpy().copy()
    moved[:3, :3] *= step
    return base64.b64encode(gzip.compress(nib.Nifti1Image(part, moved).to_bytes(), 6)).decode()
