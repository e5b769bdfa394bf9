"""Clicks of an annotator on the network's grid, and the input channels that show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor, nn

META = "clicks"  # key of an image's metadata: (n, 4) class, x, y, z in voxels of its grid


def draw_click(
    channel: Tensor, centre: Sequence[float], radius: float, shape: str = "disc"
) -> None:
    """Draw a click into a guidance channel; the maximum counts where clicks overlap.

    Args:
        channel: (x, y, z), is changed.
        centre: voxel indices, not necessarily whole.
        radius: in voxels, at least 1; of a gaussian, its standard deviation.
        shape: "disc", a ball of ones with a linear edge of one voxel, or "gaussian" of height 1.
    """
    if not radius >= 1:
        raise ValueError(f"click_radius must be at least 1 voxel, got {radius}")
    if shape not in ("disc", "gaussian"):
        raise ValueError(f"click_shape must be disc or gaussian, got {shape!r}")
    reach = 3 * radius if shape == "gaussian" else radius + 1
    starts = [max(0, math.ceil(c - reach)) for c in centre]
    stops = [min(n, math.floor(c + reach) + 1) for n, c in zip(channel.shape, centre, strict=True)]
    if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
        return  # outside
    region = channel[tuple(map(slice, starts, stops))]
    x, y, z = (
        (torch.arange(start, stop, device=channel.device) - c) ** 2
        for start, stop, c in zip(starts, stops, centre, strict=True)
    )
    squares = x[:, None, None] + y[:, None] + z
    if shape == "gaussian":
        ball = torch.exp(-squares / (2 * radius**2))
    else:
        ball = (radius + 0.5 - squares.sqrt()).clamp(0, 1)
    torch.maximum(region, ball.to(channel), out=region)


def click_input(volume: Tensor, guidance: Tensor, answer: Tensor | None) -> Tensor:
    """Join the input channels of a network that takes clicks.

    Args:
        volume: (b, 1, x, y, z).
        guidance: (b, classes, x, y, z) from ``draw_click``.
        answer: (b, classes, x, y, z) one-hot earlier answer, zero where there is none; None for a
            network without its channels.
    """
    return torch.cat([volume, guidance, *([] if answer is None else [answer])], 1)


def optional_clicks(network: nn.Module, channels: int) -> nn.Module:
    """Let a network take a volume without guidance channels too, which are then zero.

    Validation, feature extraction and MONAI's checks pass one channel.

    Args:
        network: takes (b, channels, x, y, z).
        channels: of its input.
    """

    def pad(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        volume, *rest = inputs
        missing = channels - 1 if volume.shape[1] == 1 else 0
        return (F.pad(volume, (0,) * 6 + (0, missing)), *rest)

    network.register_forward_pre_hook(pad)
    return network


class AddClicksd(MapTransform):
    """Moves the clicks of an item into its image's metadata, on the image's grid.

    Clicks have MONAI Label's form for type deepedit, under the label's name in any case:
    ``{"image": …, "organ": [[i, j, k], …], "background": []}``, in voxel indices of the stored
    file. Affines map them to the image's grid, so this transform comes after the last spatial one.
    ``ClickInferer`` reads them. The order is that of the lists; between labels, the first click of
    each comes before the second of any.

    Args:
        keys: image (1, x, y, z), a MetaTensor from ``LoadImaged``.
        label_names: of all classes, the background first.
    """

    def __init__(self, keys: str, label_names: Sequence[str]) -> None:
        super().__init__(keys)
        self.label_names = [name.lower() for name in label_names]

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        clicks = self._clicks(data)
        kept = {k: v for k, v in data.items() if str(k).lower() not in clicks or k in self.keys}
        for key in self.keys:
            rows = [
                (turn, number, *place)
                for number, name in enumerate(self.label_names)
                for turn, place in enumerate(to_grid(data[key], clicks.get(name, []), name))
            ]
            image = data[key].clone()
            ordered = [row[1:] for row in sorted(rows)]
            image.meta[META] = torch.tensor(ordered, dtype=torch.float64).reshape(-1, 4)
            kept[key] = image
        return kept

    def _clicks(self, data: Mapping[Any, Any]) -> dict[str, list[Any]]:
        """Clicks by label; a list of points under another name is an error."""
        found = {}
        for key, value in data.items():
            name = str(key).lower()
            if key in self.keys or not isinstance(value, (list, tuple)):
                continue
            all_points = all(_is_point(point) for point in value)
            if name in self.label_names:
                if not all_points:
                    raise ValueError(
                        f"clicks must be [i, j, k] each, got {value} for {key}; give voxel indices "
                        "of the stored file"
                    )
                found[name] = list(value)
            elif value and all_points:
                raise ValueError(
                    f"clicks must be on one of the labels {', '.join(self.label_names)}, got "
                    f"{len(value)} on {key!r}; correct its name"
                )
        return found


def _is_point(value: Any) -> bool:
    """Whether this is [i, j, k]; a longer integer would be no float."""
    is_triple = isinstance(value, (list, tuple)) and len(value) == 3
    numbers = is_triple and all(isinstance(x, Real) and not isinstance(x, bool) for x in value)
    return numbers and not any(isinstance(x, int) and abs(x) > 2**53 for x in value)


def to_grid(image: MetaTensor, clicks: Sequence[Sequence[float]], name: str) -> list[list[float]]:
    """Map voxel indices of the stored file to a reoriented, resampled or padded image.

    Args:
        image: (c, x, y, z) with its affine and the metadata of ``LoadImaged``.
        clicks: [i, j, k] each, in the file's voxels.
        name: of the label, for the message.

    Raises:
        ValueError: a click is outside the volume, or the file's affine is unknown.
    """
    if not clicks:
        return []
    stored, shape = image.meta.get("original_affine"), image.meta.get("spatial_shape")
    if stored is None or shape is None:
        raise ValueError(
            "clicks must refer to a file with an affine, got an image without original_affine; "
            "read it with LoadImaged"
        )
    extent = [int(n) for n in shape]
    points = np.array(clicks, dtype=float)
    for point in points:
        if not ((point > -0.5) & (point < np.array(extent) - 0.5)).all():  # NaN too
            raise ValueError(
                f"click must be inside the volume, 0 to {[n - 1 for n in extent]}, got "
                f"{point.tolist()} for {name}; give voxel indices of the stored file"
            )
    step = np.linalg.solve(np.asarray(image.affine), np.asarray(stored, dtype=float))
    return (points @ step[:3, :3].T + step[:3, 3]).tolist()
