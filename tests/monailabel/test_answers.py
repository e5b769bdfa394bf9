"""The log of answers, the effort of cases, and weights that go back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout

from med3dinsight_ext.monailabel.app.answers import AnswerLog, clicks_of, effort
from med3dinsight_ext.monailabel.app.versions import Versions, adopt_round, go_back
from med3dinsight_ext.training.record import state_hash


def event(second: float, image: str = "a", **more: Any) -> dict[str, Any]:
    minute, second = divmod(second, 60)
    return {"time": f"2026-01-01T10:{int(minute):02d}:{second:06.3f}+00:00", "image": image, **more}


def answer(second: float, clicks: int, image: str = "a", **more: Any) -> dict[str, Any]:
    found = event(second, image, model="m", weights="w", seconds=0.5, **more)
    return found | {"clicks": {"liver": clicks} if clicks else {}}


def test_the_effort_of_a_case_is_from_the_first_request_to_the_saved_label() -> None:
    rows = effort([answer(1, 0), answer(11, 1), answer(21, 3), event(31, saved="final")])
    assert rows == [
        {
            "image": "a",
            "annotator": None,
            "begin": rows[0]["begin"],
            "answers": 3,
            "clicks": 3,
            "seconds": 30.5,
            "waited": 1.5,
            "saved": True,
            "model": "m",
            "weights": "w",
        }
    ]


def test_a_pause_is_no_work() -> None:
    (row,) = effort([answer(0, 0), answer(10, 1), answer(10 + 301, 2), answer(10 + 305, 2)])
    assert row["seconds"] == 0.5 + 10 + 4 and not row["saved"]


def test_cases_of_two_annotators_and_of_a_second_visit_stand_apart() -> None:
    lines = [
        answer(0, 1, annotator="x"),
        answer(1, 2, annotator="y"),
        answer(2, 5, "b", annotator="x"),
        event(3, saved="final", annotator="x"),
        answer(4, 7, annotator="x"),
        event(5, "c", saved="final"),
    ]
    found = [(row["image"], row["annotator"], row["clicks"]) for row in effort(lines)]
    assert found == [("a", "x", 1), ("a", "y", 2), ("b", "x", 5), ("a", "x", 7)]


def test_clicks_are_counted_by_label() -> None:
    request = {
        "Liver": [[1, 2, 3], [4, 5, 6]],
        "background": [],
        "other": [[1, 2, 3]],
        "x": "liver",
    }
    assert clicks_of(request, ["background", "liver"]) == {"liver": 2}


def test_a_log_keeps_whole_lines_and_a_full_disk_costs_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    assert log.events() == []
    log.add(image="a", seconds=1.0)
    with log.path.open("a") as file:
        file.write('{"time": "2026", "ima\n[1]\n{"image": "no time"}\n')
    log.add(image="ü", saved="final")
    assert [line["image"] for line in log.events()] == ["a", "ü"]
    AnswerLog(tmp_path / "gone" / "answers.jsonl").add(image="a")
    assert "not logged" in caplog.text


def folder(models: Path, value: str) -> Path:
    models.mkdir(parents=True, exist_ok=True)
    (models / "model.pt").write_text(value)
    (models / "run.json").write_text(json.dumps(value))
    return models


def contents(models: Path) -> tuple[str, str]:
    return (models / "model.pt").read_text(), json.loads((models / "run.json").read_text())


def test_a_round_replaces_the_weights_and_going_back_exchanges_them(tmp_path: Path) -> None:
    models = folder(tmp_path / "bundle" / "models", "old")
    with pytest.raises(ValueError, match="weights must have earlier ones, got none in bundle"):
        go_back(models)
    folder(models / "round", "new")
    assert adopt_round(models)
    assert contents(models) == ("new", "new") and contents(models / "earlier") == ("old", "old")
    go_back(models)
    assert contents(models) == ("old", "old") and contents(models / "earlier") == ("new", "new")
    go_back(models)
    assert contents(models) == ("new", "new")
    assert not (models / "round").exists()


def test_weights_do_not_go_back_during_a_training(tmp_path: Path) -> None:
    models = folder(tmp_path / "models", "old")
    folder(models / "earlier", "before")
    with FileLock(models / ".training"), pytest.raises(Timeout):
        go_back(models)
    assert contents(models) == ("old", "old") and contents(models / "earlier") == ("before",) * 2


def test_a_record_that_comes_after_its_weights_is_shown(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    torch.save({"w": torch.ones(1)}, models / "model.pt")
    versions = Versions(models)
    assert versions.weights["epochs"] is None
    digest = state_hash({"w": torch.ones(1)})
    record = {"weights_sha256": {"model.pt": digest}, "epochs": 3}
    (models / "run.json").write_text(json.dumps(record))
    assert versions.weights["epochs"] == 3


def test_a_round_in_which_no_epoch_was_better_changes_nothing(tmp_path: Path) -> None:
    models = folder(tmp_path / "models", "old")
    folder(models / "round", "start")
    (models / "round" / "run.json").unlink()  # a record is written with a better epoch
    assert not adopt_round(models)
    assert contents(models) == ("old", "old") and not (models / "earlier").exists()


def test_weights_without_a_record_never_get_that_of_others(tmp_path: Path) -> None:
    models = folder(tmp_path / "models", "old")
    (models / "run.json").unlink()
    folder(models / "round", "new")
    adopt_round(models)
    go_back(models)
    assert (models / "model.pt").read_text() == "old" and not (models / "run.json").exists()


def test_an_annotator_that_is_no_text_breaks_no_page() -> None:
    rows = effort([answer(1, 0, annotator=["anna", 3]), answer(2, 1, annotator={"a": 1})])
    assert [row["annotator"] for row in rows] == ["['anna', 3]", "{'a': 1}"]
