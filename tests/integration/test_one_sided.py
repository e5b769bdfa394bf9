"""Two organs of equal look, told apart by their side alone, through the fine-tuning bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from running import merged, run, settings
from torch import Tensor, nn

NAMES = ["background", "left organ", "right organ"]
SIZE = (32, 16, 16)
UNET = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
    "channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1, "norm": "INSTANCE",
}  # fmt: skip
PLAIN = {"mirror_axes": [0], "mirror_pairs": []}  # as RandFlipd


def write(folder: Path, count: int) -> Path:
    """Bodies with a ball on each side; segmentation.json lists them with both as labels.

    classification.json lists bodies with one ball and its side. Odd files are stored mirrored.
    """
    grid = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), -1)
    body = (((grid - [15.5, 7.5, 7.5]) / [15, 7, 7]) ** 2).sum(-1) < 1
    masks: list[dict[str, Any]] = []
    classes: list[dict[str, Any]] = []
    for i in range(count):
        random = np.random.default_rng(i)
        centres = [random.uniform(-1, 1, 3) + [x, 7.5, 7.5] for x in (8, 23)]
        balls = [np.linalg.norm(grid - centre, axis=-1) < 3.5 for centre in centres]
        noise = 20 * random.random(SIZE)
        both = noise + 100 * body + 100 * (balls[0] | balls[1])
        files = {
            "both": both,
            "one": noise + 100 * body + 100 * balls[i // 2 % 2],
            "label": (balls[0] + 2 * balls[1]).astype(np.uint8),
        }
        for name, array in files.items():
            image = nib.Nifti1Image(array, np.diag([4.0, 4.0, 4.0, 1.0]))
            turn = nib.orientations.axcodes2ornt("LAS" if i % 2 else "RAS")
            nib.save(image.as_reoriented(turn), folder / f"{name}{i}.nii.gz")
        masks.append({"image": f"both{i}.nii.gz", "label": f"label{i}.nii.gz"})
        classes.append({"image": f"one{i}.nii.gz", "label": ("left", "right")[i // 2 % 2]})
    (folder / "segmentation.json").write_text(json.dumps({"training": masks}))
    (folder / "classification.json").write_text(json.dumps(classes))
    return folder


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bodies"), 8)


def small(bundle: str, root: Path, bodies: Path, **changes: Any) -> dict[str, Any]:
    names = {"label_names": NAMES} if bundle == "seg-finetune" else {"class_names": NAMES[1:]}
    grid = {"spacing": [4.0] * 3, "patch_size": list(SIZE), "backbone": UNET}
    return settings(bundle, root, bodies, **{**grid, **names, **changes})


def best_dice(root: Path, bodies: Path, **changes: Any) -> float:
    """Validation Dice of a short training."""
    given = small("seg-finetune", root, bodies, max_epochs=24, val_interval=4, val_fraction=0.25)
    run("seg-finetune", ["train.json"], **given, learning_rate=0.01, warmup_epochs=1, **changes)
    rows = [json.loads(line) for line in (root / "eval" / "history.jsonl").open()]
    return max(row.get("val_mean_dice", 0.0) for row in rows)


@pytest.mark.slow
def test_sides_are_learnt_and_are_not_with_plain_flips(tmp_path: Path, bodies: Path) -> None:
    swapped = best_dice(tmp_path / "swapped", bodies)
    plain = best_dice(tmp_path / "plain", bodies, **PLAIN)
    assert swapped > 0.8 > 0.7 > plain


def augmented(bundle: str, tmp_path: Path, bodies: Path, **changes: Any) -> list[dict[str, Any]]:
    """Training items by the bundle's config, each of them four times."""
    parser = ConfigParser(merged(bundle, "train.json"))
    parser.update(small(bundle, tmp_path, bodies, val_fraction=0, **changes))
    transform = parser.get_parsed_content("train::preprocessing").set_random_state(0)
    items = parser.get_parsed_content("train::dataset::data")
    made = [transform(item) for item in items for _ in range(4)]
    return [row for result in made for row in (result if isinstance(result, list) else [result])]


def sides(volume: Tensor) -> tuple[float, float]:
    """Sums over the left and the right half of (1, x, y, z)."""
    left, right = volume.as_subclass(Tensor).chunk(2, 1)
    return float(left.sum()), float(right.sum())


def side_of_ball(image: Tensor) -> int:
    """0 left, 1 right; the ball is brighter than the body."""
    return int(np.argmax(sides(image > 0.8 * image.max())))


def test_each_organ_stays_on_its_side(tmp_path: Path, bodies: Path) -> None:
    for row in augmented("seg-finetune", tmp_path, bodies):
        for number, away in ((1, 1), (2, 0)):
            assert sides(row["label"] == number)[away] < 0.1 * (row["label"] == number).sum()
    mirrored = augmented("seg-finetune", tmp_path, bodies, **PLAIN)
    assert any(sides(row["label"] == 1)[1] > 20 for row in mirrored)


def test_the_class_of_a_volume_is_its_side(tmp_path: Path, bodies: Path) -> None:
    names = {"class_names": ["left", "right"]}
    rows = augmented("cls-finetune", tmp_path, bodies, **names)
    found = [side_of_ball(row["image"]) for row in rows]
    assert found == [row["label"] for row in rows] and set(found) == {0, 1}
    counts = [sum(row["label"] for row in rows[i : i + 4]) for i in range(0, len(rows), 4)]
    assert not set(counts) <= {0, 4}  # flips swap


def test_a_class_of_one_side_alone_is_not_flipped(tmp_path: Path, bodies: Path) -> None:
    rows = [{"image": f"one{i}.nii.gz", "label": i // 2} for i in (0, 2)]  # left, right
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    names = {"class_names": ["left mass", "other"], "datalist": str(tmp_path / "rows.json")}
    rows = augmented("cls-finetune", tmp_path, bodies, **names)
    found = [side_of_ball(row["image"]) for row in rows]
    assert found == [0] * 4 + [1] * 4


class Recorder(nn.Module):
    """Calls everything background, and keeps the guidance of every training step."""

    seen: list[Tensor] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            Recorder.seen.append(x[:, 1:4].clone())
        return torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1, 1) + 0 * self.layer(x)


@pytest.mark.parametrize(("changes", "on_their_side"), [({}, True), (PLAIN, False)])
def test_simulated_clicks_follow_the_mirrored_label(
    changes: dict[str, Any], on_their_side: bool, tmp_path: Path, bodies: Path
) -> None:
    backbone = {"_target_": "test_one_sided.Recorder"}
    given = small("seg-finetune", tmp_path, bodies, backbone=backbone, val_fraction=0, **changes)
    given |= {"max_epochs": 4, "click_radius": 1.0}  # a single voxel of 1
    Recorder.seen.clear()
    run("seg-finetune", ["train.json", "click.yaml"], **given)
    peaks = (torch.cat(Recorder.seen) == 1).sum((0, 3, 4))  # (labels, x)
    left, right = peaks.chunk(2, 1)
    assert left[1].sum() > 5 and right[2].sum() > 5
    assert (int(right[1].sum() + left[2].sum()) == 0) == on_their_side


@pytest.mark.parametrize(
    "files", [["train.json"], ["train.json", "evaluate.json"], ["inference.json"]]
)
@pytest.mark.parametrize(
    ("bundle", "names", "flips", "pairs"),
    [
        ("seg-finetune", NAMES, [[], [2], [3], [2, 3]], ((1, 2),)),
        ("seg-finetune", NAMES[:2], [[], [3]], ()),
        ("cls-finetune", NAMES[1:], [[], [2], [3], [2, 3]], ((0, 1),)),
        ("cls-finetune", ["right organ", "other"], [[], [3]], ()),
    ],
)
def test_test_time_flips_swap_pairs_or_leave_the_axis_out(
    bundle: str,
    names: list[str],
    flips: list[list[int]],
    pairs: tuple[Any, ...],
    files: list[str],
    tmp_path: Path,
) -> None:
    parser = ConfigParser(merged(bundle, *files))
    key = "label_names" if bundle == "seg-finetune" else "class_names"
    parser.update({key: names, "tta_axes": [0, 1], "train_items": []})
    parser.update({"train::dataset::data": []} if "train.json" in files else {})
    inferer = parser.get_parsed_content(
        "inferer" if "inference.json" in files else "validate::inferer"
    )
    assert inferer.flips == flips and inferer.pairs == pairs


def test_inference_repeats_a_decision_that_is_given() -> None:
    parser = ConfigParser(merged("seg-finetune", "inference.json"))
    parser.update({"label_names": ["background", "liver"], "mirror_axes": [], "tta_axes": [0]})
    assert parser.get_parsed_content("inferer").flips == [[]]


def test_the_first_line_of_a_training(
    tmp_path: Path, bodies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = small("seg-finetune", tmp_path, bodies, val_fraction=None, max_cases=5)
    parser = ConfigParser(merged("seg-finetune", "train.json"))
    parser.update(given)
    with caplog.at_level("INFO"):
        parser.get_parsed_content("run::4")
    assert caplog.messages[-1] == (
        "5 labelled cases: 5 for training, 0 for validation, so the last epoch is kept; "
        "left–right flips; swapped classes: left organ ↔ right organ"
    )
