from __future__ import annotations

from pathlib import Path

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
