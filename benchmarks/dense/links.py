"""What each link of dense teaching holds: a light head on frozen features, with few labels.

The head (``voxel_head``, with the position in the volume) is fitted on the labelled cases and
scored on the same 21 development cases as ``headneck.py``, whose WORK has the networks.

python benchmarks/dense/links.py DATA WORK [--draws 3] [--networks both_p0,recon_p0]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import headneck  # noqa: E402

from common import machine  # noqa: E402
from med3dinsight_ext.embeddings.grids import GridStore  # noqa: E402
from med3dinsight_ext.embeddings.whitening import position_terms  # noqa: E402
from med3dinsight_ext.models.features import pyramid_of  # noqa: E402
from med3dinsight_ext.models.pyramid import find_pyramid  # noqa: E402
from med3dinsight_ext.models.voxel_head import fit_voxel_head  # noqa: E402
from med3dinsight_ext.training.checkpoints import load_weights  # noqa: E402
from med3dinsight_ext.training.soft_labels import SoftLabels  # noqa: E402

TISSUE = 0.02  # of the scaled intensity; darker voxels are no rows
Case = tuple[str, Tensor, Tensor]


def network_of(weights: Path | None) -> nn.Module:
    """The U-Net as ``pretrain`` builds it; random weights without a file."""
    torch.manual_seed(0)
    parser = ConfigParser({"out_channels": 1, "backbone": headneck.BACKBONES["unet"]})
    network: nn.Module = parser.get_parsed_content("backbone")
    if weights:
        load_weights(network, weights)
    return network.eval()


@torch.no_grad()
def features_of(network: nn.Module, image: Tensor) -> Tensor:
    """Features of three levels and the position, (c, x / 2, y / 2, z / 2) of a padded image."""
    levels = find_pyramid(network, headneck.PATCH, "auto", 3)
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
    onehot = F.one_hot(label.long(), len(headneck.CLASSES)).movedim(-1, 0).float()
    keep = F.avg_pool3d(image[None], 2)[0, 0] > TISSUE
    shares = F.avg_pool3d(onehot[None], 2)[0]
    return describe(image)[:, keep].mT, shares[:, keep].mT


def cases_of(root: Path, work: Path, labelled: str) -> list[Case]:
    names = [
        Path(item["image"]).name.split(".")[0]
        for item in json.loads((work / "lists" / f"{labelled}.json").read_text())
    ]
    return headneck.load_cases(root, names)


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
        cases[name] = headneck.dice(guess, label)
    return summary(cases) | {"features": rows.shape[1]}


def codes_readout(
    root: Path, work: Path, labelled: str, scored: list[Case], random: bool
) -> dict[str, Any]:
    """Dice of the head of ``unlabelled.yaml``: on the teacher's own codes, without a 3D network."""
    store = GridStore(work / "store", headneck.images_only(0 if random else None), "auto")
    sample = json.loads((work / "lists/pretrain.json").read_text())
    store.fill(sample[:: len(sample) // 16])  # as headneck.py, so that the whitening is the same
    train = json.loads((work / "lists" / f"{labelled}.json").read_text())
    maker = SoftLabels(work / "store", len(headneck.CLASSES), [2 * mm for mm in headneck.SPACING])
    head = maker.fit(store.fill(train))
    cases = {}
    for name, image, label in scored:
        item = {"image": str(root / "imagesTr" / f"{name}.nii.gz"), "modality": "CT"}
        [item] = store.fill([item])
        volume = maker.image(item)
        share = head.predict(maker.features(item, volume))
        share = F.interpolate(share[None].float(), image.shape[1:], mode="trilinear")[0]
        guess = torch.where(image[0] > TISSUE, share.argmax(0), 0)
        cases[name] = headneck.dice(guess, label)
    return summary(cases) | {"features": int(head.mean.numel())}


def summary(cases: dict[str, list[float]]) -> dict[str, Any]:
    """Mean Dice, that of each organ, and the cases'."""
    table = np.array(list(cases.values()))
    return {"dice": float(table.mean()), "organs": table.mean(0).round(4).tolist(), "cases": cases}


def main(data: str, work: str, draws: int = 3, networks: str | tuple[str, ...] = ()) -> None:
    """Read out each network, one that was never trained, and the teachers' codes.

    Results are WORK/results/readout_*.json; what is there is not done again.
    """
    torch.set_num_threads(1)
    root, folder = Path(data).resolve(), Path(work).resolve()
    scored = headneck.load_cases(root, headneck.split(root)["scored"])
    given = [networks] if isinstance(networks, str) else list(networks)
    for draw in range(draws):
        train = cases_of(root, folder, f"draw{draw}")
        for name in ["untrained", *given, "codes", "random_codes"]:
            path = folder / "results" / f"readout_{name}_d{draw}.json"
            if path.exists():
                continue
            begin = time.time()
            if name.endswith("codes"):
                found = codes_readout(root, folder, f"draw{draw}", scored, name[:6] == "random")
            else:
                weights = folder / "runs" / name / "models/model.pt"
                network = network_of(None if name == "untrained" else weights)
                found = readout(train, scored, partial(features_of, network))
            line = {
                "name": f"{name}_d{draw}",
                "kind": "readout",
                "init": name,
                "labelled": f"draw{draw}",
                **found,
                "wall_s": round(time.time() - begin, 1),
            }
            path.write_text(json.dumps(line | machine()))
            print(line["name"], f"{found['dice']:.3f}", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
