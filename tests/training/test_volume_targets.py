from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_volumes
from monai.transforms import ScaleIntensityd
from test_dense import teacher

from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.patients import patients_of
from med3dinsight_ext.data.volumes import ReadVolumed
from med3dinsight_ext.models.teacher_classifier import TeacherFeatures
from med3dinsight_ext.training.volume_targets import VolumeTargets


def targets(root: Path, per_plane: int = 2, most: float = 1.0) -> VolumeTargets:
    features = TeacherFeatures(teacher(), [1.0] * 3, per_plane)
    return VolumeTargets(root, features, [ReadVolumed("image"), ScaleIntensityd("image", 0, most)])


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, Any]]:
    return datalist(write_volumes(tmp_path / "volumes", 4))


def test_targets_are_the_standardised_features_of_each_volume(
    tmp_path: Path, items: list[dict[str, Any]]
) -> None:
    made = targets(tmp_path / "store")
    rows = torch.stack([made.features(made.load(item)["image"][None])[0] for item in items])
    found = torch.stack([item["label"] for item in made.fill(items)])
    expected = (rows - rows.mean(0)) / rows.std(0)
    varied = rows.std(0) > 1e-4
    assert varied.sum() > 3
    assert torch.allclose(found[:, varied], expected[:, varied], atol=1e-3)
    assert [item["image"] for item in made.fill(items[::-1])] == [i["image"] for i in items[::-1]]


@pytest.mark.parametrize("change", ["content", "settings", "per_plane", "modality"])
def test_whatever_changes_a_target_makes_a_new_file(
    change: str, tmp_path: Path, items: list[dict[str, Any]]
) -> None:
    root = tmp_path / "store"
    targets(root).fill(items)
    again = targets(root)
    if change == "content":
        Path(items[0]["image"]).write_bytes(Path(items[1]["image"]).read_bytes())
        Path(items[1]["image"]).unlink()  # its content has a file already
        items = [items[0], *items[2:]]
    elif change == "settings":
        again = targets(root, most=0.9)
    elif change == "per_plane":
        again = targets(root, per_plane=3)
    else:
        items = [{**item, "modality": "MR"} for item in items]
    again.fill(items)
    count = len(list(root.rglob("*.safetensors")))
    assert count == (4 if change == "content" else 8)


def test_one_volume_has_no_variance(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="volumes must be two or more .* got 1; add some"):
        targets(tmp_path).fill(items[:1])


def test_copies_are_of_one_patient_and_a_missing_volume_is_left_out(
    tmp_path: Path, items: list[dict[str, Any]]
) -> None:
    Path(items[0]["image"]).unlink()
    Path(items[2]["image"]).write_bytes(Path(items[1]["image"]).read_bytes())
    with pytest.raises(ValueError, match="1 bad of 4"):
        targets(tmp_path / "store").fill(items)
    found = targets(tmp_path / "store").fill(items, skip_bad=True)
    assert [item["image"] for item in found] == [item["image"] for item in items[1:]]
    names = patients_of(found)
    assert names[0] == names[1] != names[2]
