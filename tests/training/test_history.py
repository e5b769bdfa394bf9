from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ignite.engine import Engine

from med3dinsight_ext.training.history import History, read_history


def test_history_holds_epoch_means_and_drops_repeated_epochs(tmp_path: Path) -> None:
    values = iter([1.0, 3.0, 5.0, 7.0, 0.0, 0.0])
    current: dict[str, float] = {}
    engine = Engine(lambda *_: current.update(loss=next(values)))
    path = tmp_path / "eval" / "history.jsonl"
    History(path, lambda: current).attach(engine)
    engine.run([0, 1], max_epochs=2)
    assert [(row["epoch"], row["loss"]) for row in read_history(path)] == [(1, 2.0), (2, 6.0)]
    engine.load_state_dict({"epoch_length": 2, "max_epochs": 2, "iteration": 2})
    engine.run([0, 1], max_epochs=2)
    assert [(row["epoch"], row["loss"]) for row in read_history(path)] == [(1, 2.0), (2, 0.0)]


def test_a_row_that_was_cut_off_is_left_out_and_its_epoch_repeated(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    engine = Engine(lambda *_: {"loss": torch.ones(1)})
    History(path).attach(engine)
    engine.run([0], max_epochs=3)
    whole = path.read_bytes()
    start = whole.rindex(b"{")
    for end in range(start + 1, len(whole) - 2):  # the process is killed within the last write
        path.write_bytes(whole[:end])
        assert [row["epoch"] for row in read_history(path)] == [1, 2]
    engine.load_state_dict({"epoch_length": 1, "max_epochs": 3, "iteration": 2})
    engine.run([0], max_epochs=3)
    assert [row["epoch"] for row in read_history(path)] == [1, 2, 3]


@pytest.mark.parametrize("text", ['{"epoch": 1}\n{"epo\n{"epoch": 3}\n', '{"epo\n', "rubbish"])
def test_a_broken_row_is_an_error_that_names_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="history.*history.jsonl"):
        read_history(path)
