"""Clicks as input channels: where an annotator clicked, and where a simulated one would."""

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
    """Draw a gaussian of height 1 into a guidance channel; where clicks meet, the higher counts.

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
    """The same network, but one that takes a volume alone too: no clicks are channels of zeros.

    So whatever asks a one-channel network (validation, features, MONAI's checks) asks this one.

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
    """Appends a guidance channel for each label, with the clicks that an item has.

    Clicks come as MONAI Label sends them for type deepedit, under the label's name in any case:
    ``{"image": …, "organ": [[i, j, k], …], "background": []}``, in voxel indices of the file as it
    is stored. They go through its affine to the world and through the image's to its grid, so this
    belongs behind the last spatial transform. They are not kept in the item.

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
            guidance = image.new_zeros(len(self.label_names), *image.shape[1:])
            guidance = torch.as_tensor(guidance).as_subclass(Tensor)
            for channel, name in zip(guidance, self.label_names, strict=True):
                for centre in to_grid(image, clicks.get(name, []), name):
                    add_click(channel, centre, self.sigma)
            both = torch.cat((image.as_tensor(), guidance))
            kept[key] = MetaTensor(
                both, meta=image.meta, applied_operations=image.applied_operations
            )
        return kept

    def _clicks(self, data: Mapping[Any, Any]) -> dict[str, list[Any]]:
        """Clicks by label; a list of points under any other name is a mistake."""
        found = {}
        for key, value in data.items():
            name = str(key).lower()
            if key in self.keys or not isinstance(value, (list, tuple)):
                continue
            if name in self.label_names:
                if not all(_is_point(point) for point in value):
                    raise ValueError(
                        f"clicks must be [i, j, k] each, got {value} for {key}; give voxel indices "
                        "of the stored file"
                    )
                found[name] = list(value)
            elif value and all(_is_point(point) for point in value):
                raise ValueError(
                    f"clicks must be on one of the labels {', '.join(self.label_names)}, got "
                    f"{len(value)} on {key!r}; correct its name"
                )
        return found


def _is_point(value: Any) -> bool:
    """Whether this is [i, j, k]."""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    return all(isinstance(x, Real) and not isinstance(x, bool) for x in value)


def to_grid(image: MetaTensor, clicks: Sequence[Sequence[float]], name: str) -> list[list[float]]:
    """Voxels of the stored file as voxels of an image that was reoriented, resampled or padded.

    Args:
        image: (c, x, y, z) with its affine and what ``LoadImaged`` notes of the file.
        clicks: [i, j, k] each, in the file's voxels.
        name: of the label, for the message.

    Raises:
        ValueError: a click is outside the file's voxels, or the file's affine is not known.
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
    """Where somebody who corrects a segmentation would click: inside a large error.

    Args:
        prediction: (x, y, z) class numbers.
        label: the same, the truth.
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
    """Connected parts of each class that were taken for something else."""
    wrong = prediction != label
    found = []
    for number in np.unique(label[wrong]):
        parts, _ = ndimage.label(wrong & (label == number))
        for i, box in enumerate(ndimage.find_objects(parts), 1):
            mask = parts[box] == i
            found.append((int(mask.sum()), int(number), box, mask))
    return found


class SimulatedClicks:
    """A trainer's iteration, before which its own errors are clicked on, as an annotator would.

    Each item gets none, or 1 to ``max_clicks`` clicks, one after the other, each in what the
    network still gets wrong with those before. This stands where MONAI's DeepEdit has
    ``Interaction`` with its click transforms; these fail on a label without errors once there is
    more than one click, need scikit-image, and leave ranks waiting for each other where the network
    has running statistics. All is drawn from numpy's global state, which ``EpochSeed`` seeds.

    Args:
        label_names: of all classes, the background first.
        max_clicks: most clicks an item gets.
        automatic_share: share of the items that get none, so that the network also segments alone.
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
            asked = np.flatnonzero(clicks > turn)
            for row, prediction in zip(asked, self._segment(engine, image[asked]), strict=True):
                if click := corrective_click(prediction, truth[row], random):
                    add_click(image[row, 1 + click[0]], click[1], self.sigma)
        return engine._iteration(engine, {**batchdata, "image": image, "label": label})

    @torch.no_grad()
    def _segment(self, engine: SupervisedTrainer, image: Tensor) -> np.ndarray:
        """Class numbers (b, x, y, z), by the bare network: ranks may ask it at different times."""
        network = getattr(engine.network, "module", engine.network)
        network.eval()
        with torch.autocast(image.device.type, enabled=engine.amp):
            return engine.inferer(image, network).argmax(1).cpu().numpy()
