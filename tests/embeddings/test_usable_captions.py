from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeImages, FakeMllm, FakeTexts, volume, write_volumes
from running import run, settings

from med3dinsight_ext.captions.sources import FileCaptions, TemplateCaptions
from med3dinsight_ext.embeddings import usable_captions
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.embeddings.usable_captions import caption_statuses, check_captions
from med3dinsight_ext.teachers.teacher import Teacher


class SixTexts(FakeTexts):
    """Texts in the space of the images."""

    def embed(self, texts: list[str]) -> Any:
        return super().embed(texts)[:, :6]


def filled(folder: Path, captioner: Any, joint: bool = False) -> list[dict]:
    items = [volume(folder / f"{i}.nii.gz", i) for i in range(3)]
    teacher = Teacher(FakeImages(), SixTexts() if joint else FakeTexts(), joint=joint)
    return Store(folder / "store", teacher, captioner, per_plane=4).fill(items)


def test_refused_captions_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = filled(tmp_path, FakeMllm(refuses=2))
    statuses = caption_statuses(items)
    assert set(statuses) == {"ok", "refused"} and statuses.total() == 36
    with caplog.at_level(logging.INFO):
        check_captions(items, text_weight=1)
    share = round(100 * statuses["ok"] / 36)
    assert f"{statuses['ok']} of 36 captions ({share}%) are usable" in caplog.text
    assert f"{statuses['refused']} refused" in caplog.text


def test_captions_that_were_all_refused_stop_the_training(tmp_path: Path) -> None:
    items = filled(tmp_path, FakeMllm(refuses=1))
    match = r"0 of 36 captions \(0%\) are usable: 36 refused"
    with pytest.raises(ValueError, match=match) as e:
        check_captions(items, text_weight=0.5)
    assert f"captions {tmp_path / 'store'} " in str(e.value) and "text_weight 0" in str(e.value)
    check_captions(items, text_weight=0)


def test_one_usable_caption_is_enough(tmp_path: Path) -> None:
    row = '{"image": "0.nii.gz", "plane": "axial", "index": 7, "caption": "a mass"}'
    (tmp_path / "c.jsonl").write_text(row)
    volume(tmp_path / "0.nii.gz")
    items = filled(tmp_path, FileCaptions(tmp_path / "c.jsonl"))
    assert caption_statuses(items) == {"ok": 1}
    check_captions(items, text_weight=1)


def test_a_similarity_that_no_caption_reaches_stops_the_training(tmp_path: Path) -> None:
    items = filled(tmp_path, TemplateCaptions(), joint=True)
    check_captions(items, 1, min_similarity=-1.0)
    with pytest.raises(ValueError, match="36 below min_similarity"):
        check_captions(items, 1, min_similarity=1.01)


@pytest.mark.parametrize(("sample", "read"), [(1, 1), (2, 2), (9, 3)])
def test_of_many_volumes_some_are_counted(
    sample: int,
    read: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(usable_captions, "SAMPLE", sample)
    caplog.set_level("INFO")
    items = [
        {"targets": str(path.with_suffix(".safetensors"))}
        for path in [tmp_path / f"{i}.json" for i in range(3)]
    ]
    for item in items:
        row = '{"slices": [{"status": "ok", "similarity": null}]}'
        Path(item["targets"]).with_suffix(".json").write_text(row)
    check_captions(items, 1)
    assert f"{read} of {read} captions" in caplog.text
    assert ("of 3 volumes" in caplog.text) == (read < 3)
    for item in items[:2]:
        Path(item["targets"]).with_suffix(".json").write_text(row.replace("ok", "refused"))
    check_captions(items, 1)  # the last one is found where the sample has none


def test_copies_of_a_volume_count_once(tmp_path: Path) -> None:
    items = filled(tmp_path, TemplateCaptions())
    assert caption_statuses([*items, *items]) == {"ok": 36}


def test_the_bundle_does_not_train_on_refusals_alone(tmp_path: Path) -> None:
    folder = write_volumes(tmp_path / "volumes", 4)
    captioner = {"_target_": "fakes.FakeMllm", "refuses": 1}
    changes = settings("pretrain", tmp_path, folder, captioner=captioner)
    with pytest.raises(RuntimeError) as caught:
        run("pretrain", ["train.json"], **changes)
    assert "captions must be usable, got 0 of" in str(caught.value.__cause__)
    assert not (tmp_path / "models").exists()
    run("pretrain", ["train.json"], **changes, **{"loss::text_weight": 0})
    assert (tmp_path / "models" / "model.pt").exists()
