"""Heads that are fitted without epochs, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from running import forked, trains_in

from med3dinsight_ext.models.classifier import Classifier
from med3dinsight_ext.training import probing
from med3dinsight_ext.training.record import state_hash

SIZE = (16, 16, 16)
CPU = torch.device("cpu")
HEADS = {"linear": "pooled", "knn": "neighbours"}


class Batches:
    """Four batches of two cases, the same ones every time; ``meanwhile`` is called among them."""

    dataset, batch_size = (), 2

    def __init__(self, meanwhile: Any = lambda: None) -> None:
        self.meanwhile = meanwhile

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        for i in range(4):
            volume = torch.rand(2, 1, *SIZE, generator=generator)
            yield {"image": volume, "label": torch.tensor([0, i % 2])}
            if i == 1:
                self.meanwhile()


def fit(folder: Path, mode: str, batches: Batches) -> dict[str, torch.Tensor]:
    """Fit a network that is the same at every call; the weights that are written."""
    torch.manual_seed(0)
    classifier = Classifier(fakes.PlainNet(), 2, SIZE, head=HEADS[mode])
    probing.run(classifier, batches, CPU, mode, folder)
    return torch.load(folder / "model.pt", weights_only=True)


@pytest.mark.parametrize("mode", HEADS)
def test_the_weights_and_their_record_are_written(mode: str, tmp_path: Path) -> None:
    saved = fit(tmp_path, mode, Batches())
    classifier = Classifier(fakes.PlainNet(), 2, SIZE, head=HEADS[mode])
    classifier.load_state_dict(saved)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["weights_sha256"] == {"model.pt": state_hash(saved)}


@pytest.mark.parametrize("mode", HEADS)
def test_of_two_at_once_the_second_is_refused_and_changes_nothing(
    mode: str, tmp_path: Path
) -> None:
    alone = fit(tmp_path / "alone", mode, Batches())
    folder = tmp_path / "shared"

    def second() -> None:
        with pytest.raises(ValueError, match=f"one training at a time, got {folder}, where"):
            fit(folder, mode, Batches())

    def meanwhile() -> None:
        with forked(second):
            assert [path.name for path in folder.iterdir()] == [".running"]

    shared = fit(folder, mode, Batches(meanwhile))
    assert state_hash(shared) == state_hash(alone)
    assert {path.name for path in folder.iterdir()} == {"model.pt", "run.json"}


def test_weights_of_a_folder_where_another_process_trains_stay(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("those of the other")
    with trains_in(tmp_path):
        with pytest.raises(ValueError, match="wait for its end, or name another folder"):
            fit(tmp_path, "linear", Batches())
    assert (tmp_path / "model.pt").read_text() == "those of the other"


def test_a_mode_that_does_not_go_with_the_head_is_an_error(tmp_path: Path) -> None:
    classifier = Classifier(fakes.PlainNet(), 2, SIZE)
    for mode in ("knn", "lineer"):
        with pytest.raises(ValueError, match=f"mode must be finetune, linear .*, got '{mode}'"):
            probing.run(classifier, Batches(), CPU, mode, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_weights_of_a_fine_tuning_stay(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"of a fine-tuning")
    (tmp_path / "model.pt").write_bytes(b"its best epoch")
    with pytest.raises(ValueError, match="must hold no fine-tuned network, .*last.ckpt; give ano"):
        fit(tmp_path, "linear", Batches())
    assert (tmp_path / "model.pt").read_bytes() == b"its best epoch"
