"""Grids of slices, and the tokens and text scores that are written of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor, list_data_collate
from monai.transforms import Compose, LoadImaged, Orientationd, Spacingd
from safetensors.torch import load_file
from torch import Tensor

from med3dinsight_ext.models.student import StudentOutput
from med3dinsight_ext.training.inferers import SliceGridd, TextScores, TokenWriter, prepare_grid


class Words:
    """A teacher for which a text is a direction, counted in calls."""

    calls = 0

    def encode_text(self, texts: list[str]) -> Tensor:
        self.calls += 1
        return torch.eye(3)[[("x", "yé", "z").index(text) for text in texts]]


def volume(path: str, size: tuple[int, ...] = (8, 6, 4)) -> MetaTensor:
    """Tissue in the lower half along x; its upper half is empty."""
    value = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) + 10
    value[:, size[0] // 2 :] = 0
    return MetaTensor(value, affine=torch.eye(4), meta={"filename_or_obj": path})


def run(writer: TokenWriter, paths: list[str], space: str = "text", per_plane: int = 4) -> Engine:
    """One batch of volumes through the engine; token i of a volume is (i + 1) times a direction."""
    grid = SliceGridd("image", per_plane, (16, 6, 4))
    batch = list_data_collate([grid({"image": volume(path)}) for path in paths])
    n = 3 * per_plane
    rising = torch.linspace(0, 1, n)
    tokens = torch.stack([rising, 1 - rising, torch.zeros(n)], 1).expand(len(paths), n, 3)
    pred = StudentOutput({space: 7 * tokens, "image": torch.ones(len(paths), n, 2)}, None, None)
    engine = Engine(lambda *_: {"pred": pred})
    writer.attach(engine)
    engine.run([batch])
    return engine


def test_the_grid_is_even_and_stays_in_place_when_the_volume_is_padded() -> None:
    found = SliceGridd("image", 4, (16, 6, 4))({"image": volume("a.nii"), "kept": 1})
    assert found["image"].shape == (1, 16, 6, 4) and found["kept"] == 1
    assert found["plane"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found["grid"].tolist() == 3 * [0.125, 0.375, 0.625, 0.875]
    along_x = [(4 + 8 * p) / 16 for p in (0.125, 0.375, 0.625, 0.875)]  # 4 voxels on either side
    assert found["position"].tolist() == pytest.approx(along_x + 2 * found["grid"][:4].tolist())


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
def test_positions_are_those_of_the_file_however_it_is_resampled(
    codes: str, tmp_path: Path
) -> None:
    thick = nib.Nifti1Image(np.random.default_rng(0).random((8, 6, 3)), np.diag([1, 1, 5, 1.0]))
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(thick.as_reoriented(turn), tmp_path / "thick.nii.gz")
    read = Compose(
        [
            LoadImaged("image", reader="NibabelReader", ensure_channel_first=True),
            Orientationd("image", "RAS", labels=None),
            Spacingd("image", (1.0, 1.0, 1.5)),
        ]
    )
    image = read({"image": tmp_path / "thick.nii.gz"})["image"]
    found = SliceGridd("image", 4, (8, 6, 8))({"image": image})
    height = np.array([0.125, 0.375, 0.625, 0.875]) * image.shape[3] * 1.5 - 0.75  # of the grid, mm
    assert found["grid"][8:].tolist() == pytest.approx(((height / 5 + 0.5) / 3).tolist())
    assert found["grid"][:8].tolist() == pytest.approx(2 * [0.125, 0.375, 0.625, 0.875])


def test_a_batch_of_the_grid_is_what_the_student_takes() -> None:
    batch = list_data_collate([SliceGridd("image", 2, (8, 6, 4))({"image": volume("a.nii")})])
    image, label, (plane, position), more = prepare_grid(batch, "cpu", True, unused=1)
    assert type(image) is torch.Tensor and image.shape == (1, 1, 8, 6, 4)
    assert label is None and more == {}
    assert torch.equal(plane, batch["plane"]) and torch.equal(position, batch["position"])


def test_tokens_of_unit_length_are_written_below_the_folder_of_the_image(tmp_path: Path) -> None:
    root = tmp_path / "data"
    paths = [str(root / "p1" / "t1.nii.gz"), str(tmp_path / "other" / "b.nii")]
    writer = TokenWriter(tmp_path / "out", None, root=root)
    engine = run(writer, paths)
    assert engine.state.output["text_scores"] == []
    files = sorted(p.relative_to(tmp_path / "out").as_posix()
                   for p in (tmp_path / "out").rglob("*") if p.is_file())  # fmt: skip
    assert files == ["b_tokens.safetensors", "p1/t1_tokens.safetensors"]
    found = load_file(tmp_path / "out" / files[1])
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "text": (12, 3), "image": (12, 2), "plane": (12,), "position": (12,)
    }  # fmt: skip
    assert torch.allclose(found["text"].norm(dim=1), torch.ones(12))
    assert torch.allclose(found["text"][0], torch.tensor([0.0, 1.0, 0.0]))
    assert found["position"][:4].tolist() == [0.125, 0.375, 0.625, 0.875]  # of the volume
    assert found["plane"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_without_a_root_images_are_named_by_their_file(tmp_path: Path) -> None:
    run(TokenWriter(tmp_path, None), ["/data/p1/a.nii.gz"])
    assert [p.name for p in tmp_path.iterdir()] == ["a_tokens.safetensors"]


def test_two_images_of_one_name_are_an_error_and_one_again_is_not(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, None)
    run(writer, ["/data/p1/a.nii.gz"])
    run(writer, ["/data/p1/a.nii.gz"])
    with pytest.raises(ValueError, match=r"got /data/p1/a.nii.gz and /data/p2/a.nii.gz, both a;"):
        run(writer, ["/data/p2/a.nii.gz"])


def scores_of(folder: Path, space: str = "text") -> tuple[Any, dict, Words]:
    teacher: Any = Words()
    writer = TokenWriter(folder, teacher, ["x", "yé"])
    engine = run(writer, ["/d/a.nii.gz"], space)
    return engine.state.output["text_scores"], json.loads(
        (folder / "a_text.json").read_text("utf-8")
    ), teacher  # fmt: skip


@pytest.mark.parametrize("space", ["text", "joint"])
def test_prompts_are_scored_along_each_plane(space: str, tmp_path: Path) -> None:
    (scored,), written, _ = scores_of(tmp_path, space)
    assert isinstance(scored, TextScores) and scored.stem == tmp_path / "a"
    assert scored.image.shape == (1, 16, 6, 4) and list(scored.prompts) == ["x", "yé"]
    rising = np.linspace(0, 1, 12)
    expected = rising / np.hypot(rising, 1 - rising)
    for plane, name in enumerate(("sagittal", "coronal", "axial")):
        found, rows = scored.prompts["x"][plane], slice(4 * plane, 4 * plane + 4)
        assert found.score.tolist() == pytest.approx(expected[rows])
        assert found.position.tolist() == [0.125, 0.375, 0.625, 0.875]
        wide = [0.3125, 0.4375, 0.5625, 0.6875] if plane == 0 else found.position.tolist()
        assert found.padded.tolist() == pytest.approx(wide)
        saved = written["prompts"]["x"][name]
        assert saved["position"] == found.position.tolist()
        assert saved["score"] == [round(v, 5) for v in expected[rows].tolist()]
    sagittal = scored.prompts["x"][0]  # the upper half of the volume is empty
    assert [math.isnan(v) for v in sagittal.visible] == [False, False, True, True]
    assert sagittal.visible[:2].tolist() == sagittal.score[:2].tolist() and sagittal.best == 1
    assert [scored.prompts["x"][p].best for p in (1, 2)] == [3, 3]
    assert [scored.prompts["yé"][p].best for p in (0, 1, 2)] == [0, 0, 0]
    assert written["prompts"]["x"]["sagittal"]["best"] == 0.375
    assert written["image"] == "/d/a.nii.gz" and list(written["prompts"]) == ["x", "yé"]


def test_scores_are_written_as_readable_text(tmp_path: Path) -> None:
    _, _, teacher = scores_of(tmp_path)
    text = (tmp_path / "a_text.json").read_text("utf-8")
    assert '\n "prompts"' in text and '"yé"' in text
    assert teacher.calls == 1


def test_an_empty_volume_keeps_all_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "med3dinsight_ext.data.slicing.usable",
        lambda volume: [torch.zeros(n, dtype=torch.bool) for n in volume.shape[1:]],
    )
    (scored,), *_ = scores_of(tmp_path)
    for plane in range(3):
        found = scored.prompts["x"][plane]
        assert torch.equal(found.visible, found.score) and found.best == 3


def test_the_texts_are_encoded_once_for_all_volumes(tmp_path: Path) -> None:
    teacher: Any = Words()
    writer = TokenWriter(tmp_path, teacher, "z")  # one text is a list of one
    for name in ("a", "b"):
        engine = run(writer, [f"/d/{name}.nii"])
        assert list(engine.state.output["text_scores"][0].prompts) == ["z"]
    assert teacher.calls == 1


def test_prompts_need_a_teacher_and_a_text_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher must be given for prompts, got None; name one"):
        run(TokenWriter(tmp_path, None, ["x"]), ["/d/a.nii"])
    teacher: Any = Words()
    with pytest.raises(ValueError, match=r"text head, got heads \['a', 'image'\]; pre-train"):
        run(TokenWriter(tmp_path, teacher, ["x"]), ["/d/a.nii"], "a")


def test_tokens_are_written_after_each_batch(tmp_path: Path) -> None:
    writer, engine = TokenWriter(tmp_path, None), Engine(lambda *_: None)
    writer.attach(engine)
    assert engine.has_event_handler(writer, Events.ITERATION_COMPLETED)
