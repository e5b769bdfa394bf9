"""Incremental training as MONAI Label starts it."""

from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from running import merged, run, settings

UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
        "channels": [4, 8], "strides": [2]}  # fmt: skip


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 4)


def round_of(root: Path, volumes: Path, held_out: int = 0, **changes: Any) -> None:
    """Train as MONAI Label's BundleTrainTask does: data given, and model.pt loaded by a handler."""
    items = [
        {"image": str(volumes / f"v{i}.nii.gz"), "label": str(volumes / "labels" / f"v{i}.nii.gz")}
        for i in range(4)
    ]
    handlers = merged("seg-finetune", "train.json")["train"]
    loader = {
        "_target_": "CheckpointLoader",
        "load_path": str(root / "models" / "model.pt"),
        "load_dict": {"model": "$@network"},
        "strict": False,
    }
    given = settings("seg-finetune", root, volumes, backbone=UNET) | {
        "train#handlers": [loader, *handlers["handlers"]],
        "train#dataset#data": items[held_out:],
        "validate#dataset#data": items[:held_out],
        "train#trainer#max_epochs": 1,
        "datalist": None,
        "dataset_dir": "none",
    }
    run("seg-finetune", ["train.json"], **(given | changes))


@pytest.fixture
def trained(tmp_path: Path, volumes: Path) -> Path:
    """bundle_root of a run from the command line."""
    given = settings("seg-finetune", tmp_path, volumes, val_fraction=0, backbone=UNET)
    run("seg-finetune", ["train.json"], **given)
    return tmp_path


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "models" / "model.pt", weights_only=True)


def change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max(float((value - after[name]).abs().max()) for name, value in before.items())


def test_a_round_starts_at_the_loaded_weights_and_not_at_the_last_run(
    trained: Path, volumes: Path
) -> None:
    before, last = weights(trained), (trained / "models" / "last.ckpt").read_bytes()
    round_of(trained, volumes)
    assert 0 < change(before, weights(trained)) < 0.02  # a few steps of AdamW at 1e-3
    assert (trained / "models" / "last.ckpt").read_bytes() == last


def test_a_worse_epoch_does_not_replace_the_weights(trained: Path, volumes: Path) -> None:
    before = weights(trained)
    round_of(trained, volumes, held_out=1, learning_rate=0.5)
    assert change(before, weights(trained)) == 0


def test_a_better_epoch_replaces_the_weights(trained: Path, volumes: Path) -> None:
    before = weights(trained)
    more = {"train#trainer#max_epochs": 15, "val_interval": 15, "learning_rate": 0.02}
    round_of(trained, volumes, held_out=1, ema_decay=0.5, **more)
    assert change(before, weights(trained)) > 0


def test_weights_of_another_network_are_refused(trained: Path, volumes: Path) -> None:
    other = {**UNET, "channels": [4, 16]}
    with pytest.raises(RuntimeError) as caught:
        round_of(trained, volumes, backbone=other)
    chain: list[BaseException] = [caught.value]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    expected = f"weights in {trained}/models/model.pt must fit the network"
    assert any(str(error).startswith(expected) for error in chain)
