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
import click_scores
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
    clicks = click_scores.next_clicks(found, label, 3, each=True)
    assert [number for number, _ in clicks] == [1, 0]
    assert label[clicks[0][1]] == 1 and found[clicks[1][1]] == 2
    assert len(click_scores.next_clicks(found, label, 3, each=False)) == 1


def test_clicks_are_counted_to_the_goal() -> None:
    case: dict[str, Any] = {
        "scores": [],
        "seconds": [0.5] * 10,
        "clicks": list(range(11)),
        "effects": [],
    }
    rising = case | {"dice": [0.8 + 0.02 * n for n in range(11)]}
    never = case | {"dice": [0.5] * 11}
    found = click_scores.statistics([rising, never], ["background", "a"])
    assert found["noc"]["mean"] == (3 + 10) / 2 and found["noc"]["failed"] == 1
    assert found["gain"]["mean"] == pytest.approx(0.05)
    assert [step["mean"] for step in found["dice"]][:2] == pytest.approx([0.65, 0.66])


def test_the_effect_of_a_click_is_what_it_corrects_and_spoils() -> None:
    label = np.zeros((6, 6, 6), int)
    label[:3] = 1
    before, after = label.copy(), label.copy()
    before[0, :2, :2] = 0  # 4 voxels missing
    after[0, 0, 0], after[5, 5, 4:] = 0, 1  # 3 of them corrected, 2 others spoilt
    row = click_scores.effect(before, after, label, (1, (0, 1, 1)))
    assert row == [1, 1, 3, 2]
    found = click_scores.effects([[*row, 0.1], [0, 0, 1, 0, 0.0]], ["background", "a"])
    assert found["a"] == {"clicks": 1, "followed": 1, "corrected": 3, "spoilt": 2, "gain": 0.1}
    assert found["all"]["clicks"] == 2 and found["all"]["followed"] == 0.5
