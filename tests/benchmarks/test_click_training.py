"""Training for a time, and the steps of the click benchmark, on tiny volumes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_clicks
from timed_training import TimedCosine


def rates(seconds: list[float]) -> list[float]:
    """Learning rates at these seconds of a training of 10, whose optimizer begins at zero."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    timing = TimedCosine(optimizer, rate=0.2, seconds=10, warmup=0.1)
    clock = iter(seconds)
    timing.clock, timing.begin = lambda: next(clock), 0.0
    found = []
    for _ in seconds:
        timing(Engine(lambda *_: None))
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_rate_rises_and_then_falls_to_zero_over_the_time() -> None:
    found = rates([0.0, 0.5, 1.0, 5.0, 10.0, 11.0])
    assert found == pytest.approx([0, 0.1, 0.2 * (0.5 + 0.5 * np.cos(0.1 * np.pi)), 0.1, 0, 0])


def test_a_training_ends_with_the_first_epoch_after_its_time() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    now = [0.0]
    trainer = Engine(lambda engine, _: now.__setitem__(0, now[0] + 1))
    timing = TimedCosine(optimizer, rate=0.1, seconds=10)
    timing.clock = lambda: now[0]
    timing.attach(trainer)
    trainer.run(range(4), max_epochs=100)
    assert trainer.state.epoch == 3


def test_a_step_for_each_class_clicks_on_its_own_errors() -> None:
    label = np.zeros((20, 8, 8), int)
    label[2:6, 2:6, 2:6], label[12:16, 2:6, 2:6] = 1, 2
    found = label.copy()
    found[2:4, 2:6, 2:6] = 0  # half of 1 is missing
    found[16:18, 2:6, 2:6] = 2  # too much of 2
    clicks = bench_clicks.next_clicks(found, label, 3, each=True)
    assert [number for number, _ in clicks] == [1, 0]
    assert label[clicks[0][1]] == 1 and found[clicks[1][1]] == 2
    assert len(bench_clicks.next_clicks(found, label, 3, each=False)) == 1


def test_clicks_are_counted_to_the_goal() -> None:
    case: dict[str, Any] = {"scores": [], "seconds": [0.5] * 10, "clicks": list(range(11))}
    rising = case | {"dice": [0.8 + 0.02 * n for n in range(11)]}
    never = case | {"dice": [0.5] * 11}
    found = bench_clicks.statistics([rising, never])
    assert found["noc"]["mean"] == (3 + 10) / 2 and found["noc"]["failed"] == 1
    assert found["gain"]["mean"] == pytest.approx(0.05)
    assert [step["mean"] for step in found["dice"]][:2] == pytest.approx([0.65, 0.66])
