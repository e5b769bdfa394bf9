"""What each link of dense teaching holds: a light head on frozen features, with few labels.

The head (``voxel_head``, with the position in the volume) is fitted on the labelled cases and
scored on the same development cases as the networks of ``runs.py``, which runs this.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from torch import Tensor, nn

from dense import runs
from med3dinsight_ext.embeddings.grids import GridStore
from med3dinsight_ext.embeddings.whitening import position_terms
from med3dinsight_ext.models.features import pyramid_of
from med3dinsight_ext.models.pyramid import find_pyramid
from med3dinsight_ext.models.voxel_head import fit_voxel_head
from med3dinsight_ext.training.checkpoints import load_weights
from med3dinsight_ext.training.soft_labels import SoftLabels

TISSUE = 0.02  # of the scaled intensity; darker voxels are no rows
Case = tuple[str, Tensor, Tensor]


def network_of(weights: Path | None) -> nn.Module:
    """The U-Net as ``pretrain`` builds it; random weights without a file."""
    torch.manual_seed(0)
    parser = ConfigParser({"out_channels": 1, "backbone": runs.BACKBONES["unet"]})
    network: nn.Module = parser.get_parsed_content("backbone")
    if weights:
        load_weights(network, weights)
    return network.eval()


@torch.no_grad()
def features_of(network: nn.Module, image: Tensor) -> Tensor:
    """Features of three levels and the position, (c, x / 2, y / 2, z / 2) of a padded image."""
    levels = find_pyramid(network, runs.TASK.patch, "auto", 3)
    values, _ = pyramid_of(network, levels, image[None])
    half = [n // 2 for n in image.shape[1:]]
    shown = [F.interpolate(value, half, mode="trilinear") for value in values]
    steps = [(torch.arange(n) + 0.5) / n for n in half]
    fraction = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).flatten(0, 2)
    terms = position_terms(fraction)[:, 1:].mT.unflatten(1, half)
    return torch.cat((*(value[0] for value in shown), terms))


def padded(value: Tensor) -> Tensor:
    """With zeros to a multiple of 8 voxels at the upper ends."""
    return F.pad(value, [end for n in reversed(value.shape[-3:]) for end in (0, -n % 8)])


def rows_of(case: Case, describe: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Features and class shares of the voxels that show tissue."""
    _, image, label = case
    image, label = padded(image), padded(label)
    onehot = F.one_hot(label.long(), len(runs.TASK.classes)).movedim(-1, 0).float()
    keep = F.avg_pool3d(image[None], 2)[0, 0] > TISSUE
    shares = F.avg_pool3d(onehot[None], 2)[0]
    return describe(image)[:, keep].mT, shares[:, keep].mT


def readout(
    train: list[Case], scored: list[Case], describe: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Dice of a head on these features."""
    described = [rows_of(case, describe) for case in train]
    rows, shares = (torch.cat(part) for part in zip(*described, strict=True))
    head = fit_voxel_head(rows, shares)
    cases = {}
    for name, image, label in scored:
        whole = padded(image)
        share = head.predict(describe(whole))
        share = F.interpolate(share[None], whole.shape[1:], mode="trilinear")[0]
        guess = torch.where(whole[0] > TISSUE, share.argmax(0), 0)
        guess = guess[tuple(slice(n) for n in label.shape)]
        cases[name] = runs.dice(guess, label)
    return summary(cases) | {"features": rows.shape[1]}


def codes_readout(work: Path, labelled: str, root: Path, tag: str) -> dict[str, Any]:
    """Dice of the head of ``unlabelled.yaml``: on the teacher's own codes, without a 3D network."""
    store = GridStore(work / "store", runs.images_only(**runs.teacher_settings(work, tag)), "auto")
    sample = json.loads((work / "lists/pretrain.json").read_text())
    store.fill(runs.whitened(sample))
    train = json.loads((work / "lists" / f"{labelled}.json").read_text())
    maker = SoftLabels(work / "store", len(runs.TASK.classes), [2 * mm for mm in runs.TASK.spacing])
    head = maker.fit(store.fill(train))
    cases = {}
    for name, image, label in runs.SCORED_CASES:
        item = {"image": str(root / "imagesTr" / f"{name}.nii.gz"), "modality": runs.TASK.modality}
        [item] = store.fill([item])
        volume = maker.image(item)
        share = head.predict(maker.features(item, volume))
        share = F.interpolate(share[None].float(), image.shape[1:], mode="trilinear")[0]
        guess = torch.where(image[0] > TISSUE, share.argmax(0), 0)
        cases[name] = runs.dice(guess, label)
    return summary(cases) | {"features": int(head.mean.numel())}


def summary(cases: dict[str, list[float]]) -> dict[str, Any]:
    """Mean Dice, that of each organ, and the cases'."""
    table = np.array(list(cases.values()))
    return {"dice": float(table.mean()), "organs": table.mean(0).round(4).tolist(), "cases": cases}


def run(work: Path, init: str, labelled: str) -> dict[str, Any]:
    """Read out one source of features.

    Args:
        work: folder of all runs.
        init: a pre-training of it, "untrained", or "codes", "random_codes" or "adapted_codes".
        labelled: list of labelled cases.
    """
    items = json.loads((work / "lists" / f"{labelled}.json").read_text())
    root = Path(items[0]["image"]).parents[1]
    if init.endswith("codes"):
        tag = init.removesuffix("codes").rstrip("_") or "imagenet"
        return codes_readout(work, labelled, root, tag)
    train = runs.load_cases(root, [Path(i["image"]).name.split(".")[0] for i in items])
    weights = None if init == "untrained" else work / "runs" / init / "models/model.pt"
    return readout(train, runs.SCORED_CASES, partial(features_of, network_of(weights)))
