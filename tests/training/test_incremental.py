"""Trainings that an annotation server starts."""

from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from monai.data import MetaTensor
from running import merged, run, settings

from med3dinsight_ext.training.incremental import CheckLabeld

UNET = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
        "channels": [4, 8], "strides": [2]}  # fmt: skip


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 4)


def round_of(root: Path, volumes: Path, held_out: int = 0, **changes: Any) -> None:
    """Train as MONAI Label's BundleTrainTask does: data given, and model.pt loaded by a handler."""
    items = [{"image": str(volumes / f"v{i}.nii.gz"),
              "label": str(volumes / "labels" / f"v{i}.nii.gz")} for i in range(4)]  # fmt: skip
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
    cause: BaseException = caught.value
    while cause.__cause__ is not None and not isinstance(cause, ValueError):
        cause = cause.__cause__
    assert str(cause).startswith(f"weights in {trained}/models/model.pt must fit the network")


def volume(shape: tuple[int, ...], scale: float = 1.0, value: float = 1.0) -> MetaTensor:
    affine = torch.diag(torch.tensor([scale, scale, scale, 1.0]))
    meta = {"filename_or_obj": "a.nii.gz"}
    return MetaTensor(torch.full((1, *shape), value), affine=affine, meta=meta)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (volume((4, 5, 7)), r"have its image's shape \(4, 5, 6\), got \(4, 5, 7\) in a.nii.gz of"),
        (volume((4, 5, 6), 1.2), "lie where its image lies, got an affine that puts it up to 1.4"),
        (volume((4, 5, 6), value=2), r"hold 0 to 1 \(background, organ\), got the value 2"),
        (volume((4, 5, 6), value=0.5), "got the value 0.5"),
    ],
)
def test_a_label_that_does_not_fit_is_named(label: MetaTensor, message: str) -> None:
    check = CheckLabeld("label", "image", ["background", "organ"])
    with pytest.raises(ValueError, match=message):
        check({"image": volume((4, 5, 6)), "label": label})


def test_a_label_that_fits_is_left_as_it_is() -> None:
    data = {"image": volume((4, 5, 6), 1.01), "label": volume((4, 5, 6))}
    assert CheckLabeld("label", "image", ["background", "organ"])(data) is data
