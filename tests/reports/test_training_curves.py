from __future__ import annotations

import pytest
from fake_figures import EVENTS

from med3dinsight_ext.reports.training_curves import curves


def test_each_loss_has_a_panel_with_its_values() -> None:
    panels = curves(EVENTS).get_axes()
    assert [ax.get_title("left").rsplit(" ", 1)[0] for ax in panels[:3]] == [
        "loss (sum)",
        "image",
        "reconstruction",
    ]
    x, y = panels[1].lines[0].get_data()
    assert list(x) == [1, 2] and list(y) == [2.0, 1.5]


def test_chance_is_dashed_in_the_colour_of_its_curve() -> None:
    curve, chance, other, *_ = curves(EVENTS).get_axes()[-1].lines
    assert chance.get_linestyle() == "--" and list(chance.get_ydata()) == [0.1]
    assert chance.get_color() == curve.get_color() != other.get_color()


def test_a_resumed_run_overwrites_its_epochs() -> None:
    rows = [{"epoch": 2, "loss": 9.0}, {"epoch": 3, "loss": 1.0}, *EVENTS]
    x, y = curves(rows).get_axes()[0].lines[0].get_data()
    assert list(x) == [1, 2, 3] and list(y) == [3.0, 2.0, 1.0]


def test_losses_alone_are_enough() -> None:
    assert len(curves(EVENTS[:2]).get_axes()) == 3


def test_events_without_known_names_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"events must hold a loss or R@1, got \['epoch', 'los'\]"):
        curves([{"epoch": 1, "los": 2.0}])
