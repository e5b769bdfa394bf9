"""Task-adapted teaching: soft labels of unlabelled volumes, for a network that learns from both.

They come from a head on the frozen 2D features, fitted on the few labelled cases (task-specific
distillation, arXiv:2503.06976), from a network fine-tuned on them (self-training, Noisy Student,
arXiv:1911.04252), or are the mean of the two.
"""

from __future__ import annotations

import copy
import filecmp
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import LoadImage, MapTransform, Orientation, ResampleToMatch, Spacing
from torch import Tensor, nn

from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.volumes import ScaleByModalityd, read_volume
from med3dinsight_ext.embeddings.grid_volumes import codes_on_grid
from med3dinsight_ext.embeddings.shards import rank_share, wait_for_ranks
from med3dinsight_ext.embeddings.whitening import position_terms
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.files import HashMemo, keyed_path, sha256, write_atomic
from med3dinsight_ext.io.remote import local_path
from med3dinsight_ext.losses.soft import MOST
from med3dinsight_ext.models.voxel_head import VoxelHead, fit_voxel_head
from med3dinsight_ext.training.checkpoints import load_weights

logger = logging.getLogger(__name__)
FORMAT = 2  # raise it when this file changes what is stored
FIT_ROWS = 2**21  # voxels of all labelled cases, at most, that the head is fitted on
LEAST = 13  # of 255: smaller probabilities become 0, so that a crop can find the foreground


def unlabelled_items(
    source: str | None, modality: str, *known: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Images of a datalist or folder, once none is a labelled, validation or test case.

    Args:
        source: as in ``datalists.datalist``; labels in it are not read.
        modality: as there.
        known: the items that must not be in it.

    Raises:
        ValueError: there is no source, or it names a known image or a copy of one.
    """
    if not source:
        raise ValueError("unlabelled must be a datalist or folder, got none; --unlabelled DIR")
    listed = datalist(source, modality=modality)
    items = [{k: v for k, v in item.items() if k != "label"} for item in listed]
    used: dict[int | None, set[str]] = {}
    for path in {os.path.realpath(item["image"]) for part in known for item in part}:
        used.setdefault(_size(path), set()).add(path)
    if both := [item["image"] for item in items if _is_one_of(item["image"], used)]:
        raise ValueError(
            f"unlabelled must hold no labelled, validation or test case, got {len(both)}: "
            f"{', '.join(both[:5])}; take them out of that list"
        )
    return items


def _size(path: str) -> int | None:
    """Bytes of a file; None for a folder or an address."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def _is_one_of(image: str, used: Mapping[int | None, set[str]]) -> bool:
    """Whether an image is one of these, by their size, or a copy of one of those files."""
    path = os.path.realpath(image)
    size = _size(path)
    alike = used.get(size, set())
    if path in alike or size is None:
        return path in alike
    return any(filecmp.cmp(path, file, shallow=False) for file in alike)


class NetworkLabels:
    """Predicts class probabilities of a volume by a network fine-tuned on the labelled cases.

    Args:
        network: the backbone of the run; it is copied, and its own weights stay.
        weights: model.pt of a run on the same labelled cases.
        patch_size: (x, y, z) of a window, in voxels.
        spacing: mm that the network was trained at.
        ct_range: HU that become 0 and 1.
        device: where it computes.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str | Path,
        patch_size: Sequence[int],
        spacing: Sequence[float],
        ct_range: Sequence[float] = (-200.0, 300.0),
        device: str | torch.device = "cpu",
    ) -> None:
        self.network = copy.deepcopy(network)
        load_weights(self.network, weights)
        self.network.to(device).eval()
        self.fingerprint = [sha256(Path(weights)), list(patch_size), list(spacing), list(ct_range)]
        self.spacing, self.device = list(spacing), device
        self.scale = ScaleByModalityd("image", ct_range)
        self.inferer = SlidingWindowInferer(patch_size, 4, overlap=0.5, mode="gaussian")

    @torch.no_grad()
    def __call__(self, item: dict[str, Any], image: MetaTensor) -> Tensor:
        """Probabilities (classes, x, y, z) on the grid of ``image``."""
        volume = self.scale({**item, "image": read_volume(item["image"])})["image"]
        volume = Spacing(self.spacing, mode="bilinear")(volume)
        logits = self.inferer(volume.as_tensor()[None].to(self.device), self.network)
        share = logits[0].float().softmax(0).cpu()
        found = MetaTensor(share, affine=volume.affine)
        resample = ResampleToMatch(mode="bilinear", padding_mode="border")
        return resample(found, image).as_tensor()


class SoftLabels:
    """Makes and keeps soft labels, one file a volume; what exists is not made again.

    Args:
        root: folder.
        classes: with the background.
        spacing: mm of the grid that they are made on; about the network's own, times two.
        hidden: width of the head.
        seed: of the head.
        network: predicts too, and the mean of both is kept.
        head: whether the head on 2D features is used; without it the network alone is.
    """

    def __init__(
        self,
        root: str | Path,
        classes: int,
        spacing: Sequence[float],
        hidden: int = 128,
        seed: int = 0,
        network: NetworkLabels | None = None,
        head: bool = True,
    ) -> None:
        if network is None and not head:
            raise ValueError("soft labels need a source: set soft_weights or soft_head=True")
        self.network, self.head = network, head
        self.root = local_path(root, "store_dir")
        self.classes, self.spacing = classes, list(spacing)
        self.hidden, self.seed = hidden, seed
        self._hashes = HashMemo(self.root / "files.jsonl")

    def image(self, item: dict[str, Any]) -> MetaTensor:
        """The item's volume on the grid of the soft labels."""
        return Spacing(self.spacing, mode="bilinear")(read_volume(item["image"]))

    def features(self, item: dict[str, Any], image: MetaTensor) -> Tensor:
        """Codes and position (c, x, y, z) of an item with ``grids``, on the image's grid."""
        codes = codes_on_grid(item["grids"], image.affine, image.shape[1:])
        steps = [(torch.arange(n) + 0.5) / n for n in image.shape[1:]]
        fraction = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).flatten(0, 2)
        terms = position_terms(fraction)[:, 1:].mT.unflatten(1, image.shape[1:])
        return torch.cat((codes, terms.half()))

    def _source(self, item: dict[str, Any]) -> str:
        """Names all that an item's soft label is made from."""
        if self.head:
            return Path(item["grids"]).stem
        return f"{self._hashes(item['image'])} {item.get('modality')}"

    def fit(self, labelled: Sequence[dict[str, Any]]) -> VoxelHead:
        """A head on the labelled items' features, at ``FIT_ROWS`` random voxels or all."""
        rows, labels = [], []
        most = FIT_ROWS // len(labelled)
        generator = torch.Generator().manual_seed(self.seed)
        load = LoadImage(image_only=True, ensure_channel_first=True)
        for item in labelled:
            image = self.image(item)
            features = self.features(item, image)
            label = Orientation("RAS", labels=None)(load(item["label"]))
            onehot = F.one_hot(label[0].long(), self.classes).movedim(-1, 0).float()
            onehot = MetaTensor(onehot, affine=label.affine)
            share = ResampleToMatch(mode="bilinear", padding_mode="border")(onehot, image)
            share = share.as_tensor().clamp(min=0)
            share = share / share.sum(0).clamp(min=1e-6)
            pick = torch.randperm(share[0].numel(), generator=generator)[:most]
            rows.append(features.flatten(1)[:, pick].mT)
            labels.append(share.flatten(1)[:, pick].mT)
        return fit_voxel_head(torch.cat(rows), torch.cat(labels), self.hidden, seed=self.seed)

    def fill(
        self, labelled: Sequence[dict[str, Any]], unlabelled: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The unlabelled items without grids, each with ``label``, the path of its soft label.

        Each rank of torchrun makes its share.

        Args:
            labelled: image, label and, for the head, grids.
            unlabelled: image and, for the head, grids.
        """
        made: list[Any] = [
            FORMAT,
            self.classes,
            self.spacing,
            self.hidden,
            self.seed,
            [[self._source(item), self._hashes(item["label"])] for item in labelled],
        ]
        if self.network:
            made += [self.network.fingerprint, self.head]
        folder, sources = self.root / "soft", map(self._source, unlabelled)
        paths = [keyed_path(folder, [*made, source], ".nii.gz") for source in sources]
        own = [(unlabelled[n], paths[n]) for n in rank_share(len(paths))]
        missing = [(item, path) for item, path in own if not path.exists()]
        if missing:
            logger.info(f"{len(missing)} of {len(own)} volumes have no soft label")
            head = self.fit(labelled) if self.head else None
        for item, path in Bar(missing, "soft labels", unit="volume", disable=not missing):
            image = self.image(item)
            shares = [head.predict(self.features(item, image))] if head else []
            if self.network:
                shares.append(self.network(item, image))
            share = (torch.stack(shares).mean(0) * 255).round().to(torch.uint8)
            share[share < LEAST] = 0
            volume = nib.Nifti1Image(share.movedim(0, -1).numpy(), image.affine.numpy())
            write_atomic(path, lambda draft, volume=volume: _save(volume, draft))
        if self.network:
            self.network.network.cpu()
        wait_for_ranks()
        items = [{k: v for k, v in item.items() if k != "grids"} for item in unlabelled]
        return [{**item, "label": str(path)} for item, path in zip(items, paths, strict=True)]


def _save(volume: nib.Nifti1Image, draft: Path) -> None:
    named = draft.with_name(f"{draft.name}.nii.gz")  # nibabel goes by the name's end
    nib.save(volume, named)
    named.replace(draft)


class SoftLabeld(MapTransform):
    """A label map or a soft label as class probabilities (classes, x, y, z) on the image's grid.

    It belongs behind every transform of the image that changes its grid but not at random.

    Args:
        keys: labels (1, x, y, z) or uint8 probabilities (classes, x, y, z), MetaTensors.
        image: key of the image that they are resampled to.
        classes: with the background.
    """

    def __init__(self, keys: str | list[str], image: str, classes: int) -> None:
        super().__init__(keys)
        self.image, self.classes = image, classes
        self.resample = ResampleToMatch(padding_mode="zeros")

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        data = dict(data)
        for key in self.keys:
            label = data[key]
            if label.shape[0] == 1:
                label = self.resample(label, data[self.image], mode="nearest")
                onehot = F.one_hot(label.as_tensor()[0].long(), self.classes).movedim(-1, 0)
                share = onehot.float()
            elif label.shape[0] == self.classes:
                share = self.resample(label.float(), data[self.image], mode="bilinear").as_tensor()
                share = (share / share.sum(0).clamp(min=255 / 2)).clamp(max=MOST)
            else:
                raise ValueError(
                    f"label must have 1 or {self.classes} channels, got {label.shape[0]}; "
                    "set label_names to the classes that the soft labels were made for"
                )
            data[key] = MetaTensor(share, meta=data[self.image].meta)
        return data


def balance(
    labelled: Sequence[dict[str, Any]], unlabelled: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Both lists, the labelled one repeated so that half of all items are labelled.

    Of their fields those that all have, as a batch needs: one list may name patients.
    """
    if not unlabelled:
        return list(labelled)
    count = max(len(unlabelled), len(labelled))
    items = [labelled[n % len(labelled)] for n in range(count)] + list(unlabelled)
    common = set(items[0]).intersection(*items)
    return [{key: value for key, value in item.items() if key in common} for item in items]
