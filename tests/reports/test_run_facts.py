"""Pages show the training that wrote the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from page_reader import Page

from med3dinsight_ext.reports.pages import write_page
from med3dinsight_ext.reports.run_facts import run_block
from med3dinsight_ext.training.record import state_hash


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights, and the record of the training that wrote it."""
    state = {"a": torch.ones(2)}
    torch.save(state, tmp_path / "model.pt")
    record: dict[str, Any] = {
        "command": ["python", "-m", "monai.bundle", "run", "--max_epochs", "14 # <b>"],
        "epochs": 14,
        "best_epoch": 9,
        "best_metric": ["dice", 0.73],
        "resumed_after": [3],
        "rounds": [],
        "seconds": 3725.2,
        "pretrained": None,
        "learning_rate": 1e-3,
        "batch_size": 2,
        "seed": 0,
        "device": "cpu",
        "processes": 1,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "code": {"commit": "0123abcd", "changed": True},
        "data": {"training": {"cases": 67, "sha256": "f" * 64}, "validation": {"cases": 17}},
        "weights_sha256": {"model.pt": state_hash(state)},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    return tmp_path / "model.pt"


def test_the_block_holds_command_epochs_cases_time_and_versions(weights: Path) -> None:
    assert run_block(weights) == {
        "command": "python -m monai.bundle run --max_epochs '14 # <b>'",
        "epochs": "14; the weights are of epoch 9, dice 0.7300; resumed after epoch 3",
        "cases": "67 for training (fingerprint ffffffffffff), 17 for validation",
        "pre-trained from": "nothing, from scratch",
        "device": "cpu",
        "time (h:mm:ss)": "1:02:05",
        "versions": "python 3.11.7, torch 2.13.0",
        "commit": "0123abcd with changes",
    }


def test_a_record_of_other_weights_is_not_shown(weights: Path) -> None:
    torch.save({"a": torch.zeros(2)}, weights)
    assert run_block(weights) == {"record": f"none of these weights beside {weights}"}
    weights.with_name("run.json").unlink()
    assert run_block(weights) == {"record": f"none of these weights beside {weights}"}
    assert run_block(None) == {}


def test_a_published_record_has_no_command(weights: Path) -> None:
    path = weights.with_name("run.json")
    record = json.loads(path.read_text())
    del record["command"]
    path.write_text(json.dumps(record))
    assert "command" not in run_block(weights) and len(run_block(weights)) == 7


def test_a_page_shows_the_run_where_there_is_one(weights: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_page(page, "base.html", title="A", facts={"Cases": 1}, run=run_block(weights))
    found = Page(page)
    assert found.text["h2"] == ["Training run"] and {"command", "versions"} <= set(found.text["th"])
    assert any("'14 # <b>'" in cell for cell in found.text["td"]) and "b" not in found.names
    write_page(page, "base.html", title="A", facts={}, run=run_block(None))
    assert "h2" not in Page(page).text
