"""Plane slices of a volume in radiological convention, with plane and position.

Volumes are (c, x, y, z) in RAS: x runs to the patient's right, y to anterior, z to superior.
A position is a slice centre as a fraction of the extent, ``(index + 0.5) / size``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from med3dinsight_ext.io.errors import told

PLANES = ("sagittal", "coronal", "axial")  # cut x, y, z
MODALITIES = ("CT", "MR", "PET")
WINDOWS = {  # of CT: centre and width in HU
    "soft tissue": (40.0, 400.0),
    "lung": (-600.0, 1500.0),
    "bone": (400.0, 1800.0),
}
DEPTHS = (
    ("far left", "left", "central", "right", "far right"),
    ("far posterior", "posterior", "middle", "anterior", "far anterior"),
    ("lowest", "lower", "middle", "upper", "uppermost"),
)


def plane_number(name: str | int) -> int:
    """Number of a plane: 0 sagittal (cuts x), 1 coronal (y), 2 axial (z)."""
    names = {key: i for i, plane in enumerate(PLANES) for key in (plane, str(i))}
    number = names.get(str(name).strip().lower())
    if number is None:
        raise ValueError(
            f"plane must be one of {', '.join(PLANES)} or 0, 1, 2, got {told(name)}; correct it"
        )
    return number


def depth(plane: int, position: float) -> str:
    """Name the fifth of the extent that a slice is in.

    Examples:
        >>> depth(plane=2, position=0.9)
        'uppermost'
    """
    return DEPTHS[plane][min(int(position * 5), 4)]


def window(volume: Tensor, modality: str) -> Tensor:
    """Map intensities to [0, 1] by modality.

    CT gets one channel for each window of ``WINDOWS``. MR and PET have no fixed unit: their range
    is from the 0.5th percentile to the 99.5th of the values above it, so that a large black
    background does not reduce the contrast.

    Args:
        volume: (1, x, y, z); CT in HU.
        modality: "CT", "MR" or "PET".

    Returns:
        (3, x, y, z) for CT, else (1, x, y, z); float32.

    Examples:
        >>> window(torch.full((1, 1, 1, 1), 40.0), "CT").flatten().round(decimals=2)  # HU
        tensor([0.5000, 0.9300, 0.3000])
    """
    volume = torch.as_tensor(volume).as_subclass(Tensor).float()
    if volume.ndim != 4 or volume.shape[0] != 1:
        raise ValueError(f"volume must be (1, x, y, z), got {tuple(volume.shape)}; add a channel")
    if modality == "CT":
        channels = [(volume - centre) / width + 0.5 for centre, width in WINDOWS.values()]
        return torch.cat(channels).clamp_(0, 1)
    if modality not in MODALITIES:
        raise ValueError(
            f"modality must be one of {', '.join(MODALITIES)}, got {modality!r}; "
            "volumes.guess_modality(volume) distinguishes CT and MR"
        )
    step = max(1, round((volume.numel() / 50_000) ** (1 / 3)))
    sample = volume[:, ::step, ::step, ::step].flatten()  # exact percentiles would sort everything
    low = sample.quantile(0.005)
    above = sample[sample > low]
    high = above.quantile(0.995) if len(above) else volume.max()
    if not high > low:
        raise ValueError(f"volume must vary, got {low.item():g} everywhere; leave it out")
    return ((volume - low) / (high - low)).clamp_(0, 1)


def usable(volume: Tensor) -> list[Tensor]:
    """Find the slices with content: for each plane a bool (slices,) along its axis.

    Tissue is brighter than a tenth of the way from the minimum to the mean of the brighter voxels.
    A slice must have contrast and a tenth of the tissue of the fullest slice of its plane.

    Args:
        volume: (c, x, y, z), best from ``window``: raw CT may have padding far below air.
    """
    volume = torch.as_tensor(volume).as_subclass(Tensor).float().mean(0)
    bright = volume[volume >= volume.mean()].mean()
    tissue = volume > volume.min() + 0.1 * (bright - volume.min())
    found = []
    for plane in range(3):
        axes = [axis for axis in range(3) if axis != plane]
        share = tissue.float().mean(axes)
        varied = volume.amax(axes) > volume.amin(axes)
        found.append((share >= 0.1 * share.max()) & varied)
    return found


def choose(
    volume: Tensor, per_plane: int, seed: int, among: Sequence[int] = (0, 1, 2)
) -> tuple[Tensor, Tensor]:
    """Draw slices at random, evenly spread over the ``usable`` ones of each plane.

    A plane with no more than ``per_plane`` usable slices gives all of them.

    Args:
        volume: (c, x, y, z), best from ``window``, as in ``usable``.
        per_plane: slices a plane, >= 1.
        seed: the same seed gives the same slices, whichever planes are drawn among.
        among: planes to draw from.

    Returns:
        plane (n,) long and position (n,) float32, sorted, on exact slice centres.

    Examples:
        >>> plane, position = choose(torch.rand(1, 8, 8, 8), per_plane=2, seed=0)
        >>> plane
        tensor([0, 0, 1, 1, 2, 2])
    """
    if per_plane < 1:
        raise ValueError(f"per_plane must be at least 1, got {per_plane}; raise it")
    generator = torch.Generator().manual_seed(seed)
    planes, positions = [], []
    for plane, filled in enumerate(usable(volume)):
        index = filled.nonzero().flatten().cpu()
        if len(index) > per_plane:
            bound = torch.arange(per_plane + 1) * len(index) // per_plane
            drawn = torch.rand(per_plane, generator=generator) * bound.diff()
            index = index[bound[:-1] + drawn.long()]
        if plane in among:
            planes.append(torch.full_like(index, plane))
            positions.append((index + 0.5) / volume.shape[plane + 1])
    if not sum(map(len, planes)):
        raise ValueError(
            f"volume must have a slice with contrast, got {float(volume.min()):g} to "
            f"{float(volume.max()):g} in {tuple(volume.shape)}; leave it out"
        )
    return torch.cat(planes), torch.cat(positions)


def cut(
    volume: Tensor, spacing: Sequence[float], plane: int | str, position: Tensor, size: int
) -> Tensor:
    """Cut slices of one plane, in radiological convention and physical aspect ratio.

    Axial: anterior up, patient's right on the left. Coronal: superior up, patient's right on the
    left. Sagittal: superior up, anterior on the left. The longer side fills ``size``, zeros the
    rest of the square.

    Args:
        volume: (c, x, y, z), usually from ``window``.
        spacing: voxel size along x, y, z in mm.
        plane: number or name.
        position: (s,) fractions in [0, 1]; of each, the slice that contains it is cut.
        size: side of the square in pixels.

    Returns:
        (s, c, size, size) of the volume's dtype.

    Examples:
        >>> cut(torch.rand(1, 8, 8, 4), (1, 1, 2), "axial", torch.tensor([0.5]), size=32).shape
        torch.Size([1, 1, 32, 32])
    """
    plane = plane_number(plane)
    volume = torch.as_tensor(volume).as_subclass(Tensor)
    position = torch.as_tensor(position, device=volume.device)
    if not position.numel() or not 0 <= position.min() <= position.max() <= 1:
        raise ValueError(
            f"position must hold fractions in [0, 1], got {position.tolist()}; "
            "use (index + 0.5) / size"
        )
    if len(spacing) != 3 or not all(0 < mm < float("inf") for mm in spacing):
        raise ValueError(f"spacing must be three positive mm, got {spacing}; correct the header")
    count = volume.shape[plane + 1]
    index = (position * count).long().clamp(max=count - 1)
    slices = volume.index_select(plane + 1, index).movedim(plane + 1, 0)  # (s, c, across, up)
    extent = [n * mm for n, mm in zip(volume.shape[1:], spacing, strict=True)]
    across, up = (mm for axis, mm in enumerate(extent) if axis != plane)
    # High x is the patient's right, high y anterior, high z superior: all of them go left or up.
    slices = slices.mT.flip(-2, -1)
    shape = [max(1, round(size * mm / max(across, up))) for mm in (up, across)]
    low, high = slices.min(), slices.max()
    slices = F.interpolate(slices, shape, mode="bilinear", antialias=True)
    slices.clamp_(low, high)  # the weights sum to one but for rounding, and teachers take [0, 1]
    top, left = ((size - n) // 2 for n in shape)
    return F.pad(slices, (left, size - shape[1] - left, top, size - shape[0] - top))


def cut_planes(
    volume: Tensor, spacing: Sequence[float], plane: Tensor, position: Tensor, size: int
) -> Tensor:
    """``cut`` for slices of several planes: plane (s,) sorted, position (s,)."""
    planes = plane.unique().tolist()
    return torch.cat([cut(volume, spacing, p, position[plane == p], size) for p in planes])
