from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine

from med3dinsight_ext.training import history
from med3dinsight_ext.training.history import History, Progress, read_history


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the handlers that a bundle's logging.conf left in this process."""
    kept = [h for h in logging.root.handlers if type(h) is not logging.StreamHandler]
    monkeypatch.setattr(logging.root, "handlers", kept)
    monkeypatch.setattr(logging.getLogger("med3dinsight_ext"), "handlers", [])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


def trained(epochs: int, latest: dict[str, float]) -> Engine:
    """An engine with a progress handler that has run."""
    engine = Engine(lambda *_: None)
    evaluator = Engine(lambda *_: None)
    evaluator.state.key_metric_name = "dice"
    evaluator.state.metrics = {"dice": 0.5}
    Progress(lambda: latest, evaluator).attach(engine)
    engine.run([0, 1], max_epochs=epochs)
    return engine


def test_in_a_file_progress_is_at_most_one_line_an_epoch_and_no_bar(
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with caplog.at_level(logging.INFO, "med3dinsight_ext"):
        trained(20, {"loss": 0.25})
    first, last = caplog.messages  # 20 epochs take no half minute
    assert first.startswith("epoch 1/20: loss 0.2500, dice 0.5000; ") and first.endswith(" left")
    assert last.startswith("epoch 20/20: ") and "00:00 left" in last
    assert not capsys.readouterr().err
    caplog.clear()
    monkeypatch.setattr(history, "SECONDS", -1)
    with caplog.at_level(logging.INFO, "med3dinsight_ext"):
        trained(3, {"loss": 0.25})
    assert len(caplog.messages) == 3


def test_on_a_terminal_progress_is_a_bar_and_no_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with caplog.at_level(logging.INFO, "med3dinsight_ext"):
        trained(2, {"loss": 0.25})
    assert not caplog.messages
    assert "4/4" in terminal.getvalue() and "loss=0.2500, dice=0.5000" in terminal.getvalue()


def test_other_ranks_show_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    with caplog.at_level(logging.INFO, "med3dinsight_ext"):
        trained(2, {"loss": 0.25})
    assert not caplog.messages
