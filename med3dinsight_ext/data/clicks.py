"""Clicks of an annotator as input channels, and simulated clicks for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.transforms import MapTransform
from scipy import ndimage
from torch import Tensor, nn

Region = tuple[int, int, tuple[slice, ...], np.ndarray]  # voxels, class, box, mask in the box


def add_click(channel: Tensor, centre: Sequence[float], sigma: float) -> None:
    """Draw a gaussian of height 1 into a guidance channel; the maximum counts where clicks overlap.

    Args:
        channel: (x, y, z), is changed.
        centre: voxel indices, not necessarily whole.
        sigma: in voxels.
    """
    if sigma <= 0:
        raise ValueError(f"click_sigma must be above 0 voxels, got {sigma}")
    bells = [
        torch.exp(-((torch.arange(n, device=channel.device) - c) ** 2) / (2 * sigma**2))
        for n, c in zip(channel.shape, centre, strict=True)
    ]
    torch.maximum(channel, torch.einsum("x,y,z->xyz", *bells).to(channel), out=channel)


def optional_clicks(network: nn.Module, label_names: Sequence[str]) -> nn.Module:
    """Let a network take a volume without guidance channels too, which are then zero.

    Validation, feature extraction and MONAI's checks pass one channel.

    Args:
        network: takes (b, 1 + labels, x, y, z).
        label_names: of all classes, the background first.
    """

    def pad(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        volume, *rest = inputs
        missing = len(label_names) if volume.shape[1] == 1 else 0
        return (F.pad(volume, (0,) * 6 + (0, missing)), *rest)

    network.register_forward_pre_hook(pad)
    return network


class AddClicksd(MapTransform):
    """Appends a guidance channel for each label, with the clicks of an item.

    Clicks have MONAI Label's form for type deepedit, under the label's name in any case:
    ``{"image": …, "organ": [[i, j, k], …], "background": []}``, in voxel indices of the stored
    file. Affines map them to the image's grid, so this transform comes after the last spatial one.
    They are removed from the item.

    Args:
        keys: image (1, x, y, z), a MetaTensor from ``LoadImaged``.
        label_names: of all classes, the background first.
        sigma: of a click, in voxels of the image's grid.
    """

    def __init__(self, keys: str, label_names: Sequence[str], sigma: float = 2.0) -> None:
        super().__init__(keys)
        self.label_names = [name.lower() for name in label_names]
        self.sigma = sigma

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        clicks = self._clicks(data)
        kept = {k: v for k, v in data.items() if str(k).lower() not in clicks or k in self.keys}
        for key in self.keys:
            image = data[key]
            size = (len(self.label_names), *image.shape[1:])
            guidance = torch.zeros(size, dtype=image.dtype, device=image.device)
            for channel, name in zip(guidance, self.label_names, strict=True):
                for centre in to_grid(image, clicks.get(name, []), name):
                    add_click(channel, centre, self.sigma)
            both = torch.cat((image.as_tensor(), guidance))
            done = image.applied_operations
            kept[key] = MetaTensor(both, meta=image.meta, applied_operations=done)
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
    """Whether this is [i, j, k]."""
    is_triple = isinstance(value, (list, tuple)) and len(value) == 3
    return is_triple and all(isinstance(x, Real) and not isinstance(x, bool) for x in value)


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


def corrective_click(
    prediction: np.ndarray, label: np.ndarray, random: np.random.RandomState | None = None
) -> tuple[int, tuple[int, ...]] | None:
    """Simulate a corrective click: inside a large error of a segmentation.

    Args:
        prediction: (x, y, z) class numbers.
        label: (x, y, z) true class numbers.
        random: draws a region in proportion to its voxels and a voxel in proportion to its squared
            depth; None takes the largest region and its deepest voxel, the most central of several.

    Returns:
        The true class and the voxel; None if nothing is wrong.
    """
    regions = _error_regions(prediction, label)
    if not regions:
        return None
    sizes = np.array([region[0] for region in regions], dtype=float)
    chosen = random.choice(len(sizes), p=sizes / sizes.sum()) if random else sizes.argmax()
    _, number, box, mask = regions[chosen]
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]
    if random:
        odds = (depth**2 / (depth**2).sum()).ravel()
        inside = np.unravel_index(random.choice(odds.size, p=odds), mask.shape)
    else:
        deepest = np.argwhere(depth == depth.max())
        away = np.linalg.norm(deepest - np.argwhere(mask).mean(0), axis=1)
        inside = tuple(deepest[away.argmin()])
    return number, tuple(int(i) + side.start for i, side in zip(inside, box, strict=True))


def _error_regions(prediction: np.ndarray, label: np.ndarray) -> list[Region]:
    """Connected components of the wrongly classified voxels of each class."""
    wrong = prediction != label
    found = []
    for number in np.unique(label[wrong]):
        parts, _ = ndimage.label(wrong & (label == number))
        for i, box in enumerate(ndimage.find_objects(parts), 1):
            mask = parts[box] == i
            found.append((int(mask.sum()), int(number), box, mask))
    return found


class SimulatedClicks:
    """A trainer's ``iteration_update`` with simulated clicks in the network's own errors.

    Each item gets 0 or 1 to ``max_clicks`` clicks, one after the other, each in the errors that
    remain with those before. MONAI's DeepEdit has ``Interaction`` for this, whose click transforms
    fail on a label without errors, need scikit-image, and block ranks if the network has running
    statistics. Draws come from numpy's global state, which ``EpochSeed`` seeds.

    Args:
        label_names: of all classes, the background first.
        max_clicks: of an item.
        automatic_share: share of the items without clicks, for automatic segmentation.
        sigma: of a click, in voxels.
    """

    def __init__(
        self,
        label_names: Sequence[str],
        max_clicks: int = 5,
        automatic_share: float = 0.3,
        sigma: float = 2.0,
    ) -> None:
        if max_clicks < 1:
            raise ValueError(f"max_clicks must be at least 1, got {max_clicks}")
        if not 0 <= automatic_share <= 1:
            raise ValueError(f"automatic_share must be in [0, 1], got {automatic_share}")
        self.channels = len(label_names)
        self.max_clicks = max_clicks
        self.automatic_share = automatic_share
        self.sigma = sigma

    def __call__(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        random = np.random.RandomState(np.random.randint(2**31))
        volume, label = engine.prepare_batch(
            batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        image = F.pad(volume, (0,) * 6 + (0, self.channels))
        truth = label[:, 0].cpu().numpy()
        clicks = random.randint(1, self.max_clicks + 1, len(image))
        clicks[random.random_sample(len(image)) < self.automatic_share] = 0
        for turn in range(clicks.max()):
            rows = np.flatnonzero(clicks > turn)
            for row, prediction in zip(rows, self._segment(engine, image[rows]), strict=True):
                if click := corrective_click(prediction, truth[row], random):
                    add_click(image[row, 1 + click[0]], click[1], self.sigma)
        return engine._iteration(engine, {**batchdata, "image": image, "label": label})

    @torch.no_grad()
    def _segment(self, engine: SupervisedTrainer, image: Tensor) -> np.ndarray:
        """Class numbers (b, x, y, z), without DDP: ranks have different numbers of clicks."""
        network = getattr(engine.network, "module", engine.network)
        network.eval()
        with torch.autocast(image.device.type, enabled=engine.amp):
            return engine.inferer(image, network).argmax(1).cpu().numpy()
