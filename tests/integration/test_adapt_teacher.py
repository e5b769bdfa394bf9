"""pretrain with adapt_teacher.yaml: the image encoder is adapted to slices, then teaches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from fakes import FakeTexts
from running import NETWORKS, Killed, run, settings, trains_in
from safetensors.torch import load_file
from torch import Tensor, nn

from med3dinsight_ext.embeddings.grids import read_slices
from med3dinsight_ext.teachers.adapted import adapted_of, write_adapted
from med3dinsight_ext.teachers.teacher import Teacher, pair, untrained
from med3dinsight_ext.teachers.towers import ImageTower, TextTower
from med3dinsight_ext.training import engine
from med3dinsight_ext.training.adaptation import RandViewsd, ViewEncoder, numbered

OVERLAYS = ["train.json", "adapt_teacher.yaml"]
SIZE = (30, 32, 34)


class SmallCnn(ImageTower):
    size, mean, std, fingerprint = 32, (0.4,) * 3, (0.3,) * 3, "small-cnn"

    def load(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
            )

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).mean((2, 3))


def small(weights: str | None = None) -> Teacher:
    return pair(SmallCnn(), FakeTexts(), weights=weights)


def no_texts() -> Teacher:
    return Teacher(SmallCnn(), TextTower())


def joint() -> Teacher:
    return Teacher(SmallCnn(), FakeTexts(), joint=True)


def given(root: Path, volumes: Path, **changes: Any) -> dict[str, Any]:
    own = {"teacher": {"_target_": "test_adapt_teacher.no_texts"}, "planes": ["axial"]}
    short = {"max_epochs": 6, "steps_per_epoch": 10, "learning_rate": 0.01, "val_fraction": 0.0}
    sizes = {"batch_size": 4, "slices": 6, "per_plane": 8}
    return settings("pretrain", root, volumes) | own | short | sizes | changes


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes whose direction turns from slice to slice."""
    folder = tmp_path_factory.mktemp("volumes")
    x, y, z = np.meshgrid(*map(np.arange, SIZE), indexing="ij")
    angle = np.pi * z / SIZE[2]
    for i in range(6):
        random = np.random.default_rng(i)
        along = x * np.cos(angle) + y * np.sin(angle)
        stripes = np.sin(0.9 * along + random.uniform(0, 6)) + 0.3 * random.random(SIZE)
        image = nib.Nifti1Image(stripes.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))
        nib.save(image, folder / f"v{i}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, volumes: Path) -> tuple[Path, list[Any]]:
    """Folder of an adaptation, and the transforms of its views."""
    root = tmp_path_factory.mktemp("adapted")
    workflow = run("pretrain", OVERLAYS, **given(root, volumes))
    views: list[Any] = workflow.parser.get_parsed_content("train::augment")
    return root / "models" / "teacher", views


def weights(folder: Path) -> str:
    return str(folder / "adapted.safetensors")


def found_again(teacher: Teacher, volumes: Path, views: list[Any]) -> float:
    """Share of slices whose other view is the nearest, among those of the volume."""
    draw = RandViewsd("image", views, 12)
    draw.set_random_state(0)
    hits = []
    for path in sorted(volumes.iterdir()):
        pictures = read_slices({"image": str(path)}, 12, 1, [2], 32).pictures
        levels = (pictures * 255).to(torch.uint8).expand(-1, 3, -1, -1)
        pairs = draw({"image": levels, "number": 0})["image"]
        one, two = (teacher.encode_image(pairs[:, n]) for n in range(2))
        hits.append(((one @ two.mT).argmax(1) == torch.arange(len(one))).float().mean())
    return float(torch.stack(hits).mean())


def test_adaptation_finds_the_other_view_of_a_slice(
    adapted: tuple[Path, list[Any]], volumes: Path
) -> None:
    folder, views = adapted
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    before, after = small(), small(weights(folder))
    assert found_again(before, volumes, views) < 0.3 < 0.5 < found_again(after, volumes, views)
    pictures = torch.rand(4, 1, 32, 32)
    assert (before.encode_image(pictures) - after.encode_image(pictures)).abs().max() > 0.01


def test_weights_change_and_the_statistics_of_norms_do_not(adapted: tuple[Path, list[Any]]) -> None:
    first, last = SmallCnn().load().state_dict(), load_file(weights(adapted[0]))
    changed = {name for name, value in first.items() if not torch.equal(value, last[name])}
    assert changed == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}


def test_the_file_names_what_made_it(adapted: tuple[Path, list[Any]]) -> None:
    about = adapted_of(weights(adapted[0]))
    record = json.loads((adapted[0] / "run.json").read_text())
    assert about["volumes"] == record["data"]["training"] and about["volumes"]["cases"] == 6
    assert (about["tower"], about["seed"], about["steps"]) == ("SmallCnn:small-cnn", 0, 60)


def test_a_store_keeps_the_embeddings_of_both(
    adapted: tuple[Path, list[Any]], volumes: Path, tmp_path: Path
) -> None:
    teacher: dict[str, Any] = {"_target_": "test_adapt_teacher.small"}
    for n, more in enumerate(({}, {"weights": weights(adapted[0])}), 1):
        given = settings("pretrain", tmp_path, volumes, teacher=teacher | more)
        run("pretrain", ["train.json", "embed.json"], **given)
        assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 6 * n
    entries = [json.loads(path.read_text()) for path in (tmp_path / "store").rglob("??/*.json")]
    assert len({entry["teacher"] for entry in entries}) == 2
    assert len(entries) == 12


def test_a_network_is_trained_by_the_adapted_teacher(
    adapted: tuple[Path, list[Any]], volumes: Path, tmp_path: Path
) -> None:
    teacher = {"_target_": "test_adapt_teacher.small", "weights": weights(adapted[0])}
    given = settings("pretrain", tmp_path, volumes, teacher=teacher, points=50)
    given |= {"backbone": NETWORKS["seg-finetune"]["backbone"], "grid_store::layers": ["0"]}
    run("pretrain", ["train.json", "dense.yaml"], **given)
    assert (tmp_path / "models/model.pt").exists()


def test_a_seed_gives_the_same_bytes_after_an_interruption_too(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECK_STEPS", 1)
    short = {"max_epochs": 3, "steps_per_epoch": 4, "checkpoint_minutes": 1e-9}
    run("pretrain", OVERLAYS, **given(tmp_path / "whole", volumes, **short))
    cut = given(tmp_path / "cut", volumes, **short)
    kill = {"_target_": "running.KillAt", "step": 11}
    with pytest.raises(Killed):
        run("pretrain", OVERLAYS, **cut, **{"train_handlers::kill": kill})
    parts = [tmp_path / name / "models" / "teacher" for name in ("whole", "cut")]
    assert not Path(weights(parts[1])).exists()
    run("pretrain", OVERLAYS, **cut)
    whole, resumed = (Path(weights(part)).read_bytes() for part in parts)
    assert whole == resumed
    assert json.loads((parts[1] / "run.json").read_text())["resumed_after"] == [2]
    run("pretrain", OVERLAYS, **given(tmp_path / "other", volumes, seed=1, **short))
    assert Path(weights(tmp_path / "other" / "models" / "teacher")).read_bytes() != whole


def test_a_training_that_has_ended_keeps_its_file(volumes: Path, tmp_path: Path) -> None:
    short = {"max_epochs": 2, "steps_per_epoch": 2}
    run("pretrain", OVERLAYS, **given(tmp_path / "run", volumes, **short))
    path = Path(weights(tmp_path / "run" / "models" / "teacher"))
    before = path.read_bytes()
    few = tmp_path / "few.json"
    few.write_text(json.dumps([{"image": str(volumes / "v0.nii.gz"), "modality": "MR"}]))
    again = given(tmp_path / "run", volumes, datalist=str(few), **short)
    run("pretrain", OVERLAYS, **again)
    assert path.read_bytes() == before


def test_values_and_key_of_a_teacher_change_together(
    adapted: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    pictures, path = torch.rand(2, 1, 32, 32), weights(adapted[0])
    used, fresh = small(), small(path)
    used.encode_image(pictures)
    used.image.adapt(path)  # after its first use
    assert used.fingerprint == fresh.fingerprint
    assert torch.equal(used.encode_image(pictures), fresh.encode_image(pictures))
    drawn, plain = untrained(small(path)), untrained(small())
    assert torch.equal(drawn.encode_image(pictures), plain.encode_image(pictures))
    shutil.copy(path, moved := tmp_path / "adapted.safetensors")
    late = small(str(moved))
    write_adapted(moved, SmallCnn().load(), adapted_of(path))
    with pytest.raises(ValueError, match=r"weights must not change during a run, got another .*ad"):
        late.encode_image(pictures)
    trained = small()
    before = trained.fingerprint
    ViewEncoder(trained, "cpu")
    assert trained.fingerprint != before


def test_test_volumes_do_not_join(volumes: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    parts = {"development": ["v0", "v1", "v2", "v3"], "test": ["v4", "v5"]}
    split.write_text(json.dumps(parts))
    short = {"max_epochs": 1, "steps_per_epoch": 1, "split": str(split)}
    workflow = run("pretrain", OVERLAYS, **given(tmp_path / "run", volumes, **short))
    items = workflow.parser.get_parsed_content("train::dataset::data")
    assert sorted(item["patient"] for item in items) == parts["development"]


def error_of(root: Path, volumes: Path, **changes: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        run("pretrain", OVERLAYS, **given(root, volumes, max_epochs=1, **changes))
    return str(error.getrepr(chain=True))


def test_one_adaptation_at_a_time(volumes: Path, tmp_path: Path) -> None:
    with trains_in(tmp_path / "models" / "teacher"):
        assert "ckpt_dir must be of one training at a time" in error_of(tmp_path, volumes)


def test_a_bad_volume_is_named_and_can_be_left_out(volumes: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.json"
    images = [str(path) for path in volumes.iterdir()] + [str(tmp_path / "bad.nii.gz")]
    (tmp_path / "bad.nii.gz").write_text("no volume")
    listed.write_text(json.dumps([{"image": path, "modality": "MR"} for path in images]))
    assert "bad.nii.gz" in error_of(tmp_path, volumes, datalist=str(listed))
    short = {"max_epochs": 1, "steps_per_epoch": 1, "datalist": str(listed), "skip_bad": True}
    run("pretrain", OVERLAYS, **given(tmp_path, volumes, **short))
    assert adapted_of(weights(tmp_path / "models" / "teacher"))["volumes"]["cases"] == 6


def test_what_cannot_be_adapted_or_loaded_is_named(
    adapted: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="volumes must be one or more to adapt a teacher, got non"):
        numbered([])
    with pytest.raises(ValueError, match="teacher must have an image encoder apart from its text"):
        ViewEncoder(joint(), "cpu")
    with pytest.raises(ValueError, match="teacher must have its own weights to be adapted, got ad"):
        ViewEncoder(small(weights(adapted[0])), "cpu")
    with pytest.raises(ValueError, match=r"weights must be readable, got .*nothing.*; name the ad"):
        small(str(tmp_path / "nothing.safetensors"))
    (tmp_path / "model.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights must be readable, got .*model.pt"):
        small(str(tmp_path / "model.pt"))
    other = SmallCnn()
    other.fingerprint = "other"
    message = "weights must be adapted from SmallCnn:other, got .* of SmallCnn:small-cnn; name that"
    with pytest.raises(ValueError, match=message):
        other.adapt(weights(adapted[0]))
