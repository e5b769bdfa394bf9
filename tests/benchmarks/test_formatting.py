"""Numbers and templates of the page of benchmarks."""

from __future__ import annotations

import pytest

from formatting import duration, fill, percents, span


def test_numbers_are_formatted_with_their_spread() -> None:
    assert span({"median": 1.0, "min": 0.5, "max": 2.25}, 1) == "1.0 (0.5–2.2)"
    assert percents({"a": 0.5, "b": 0.25, "c": 0.75}, "a", "b", "c") == "50.0 (25.0–75.0)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(119, "119 s"), (120, "2 minutes"), (7200, "2 hours"), (200_000, "2 days")],
)
def test_duration_is_in_the_largest_unit_of_which_there_are_two(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_template_without_a_value_is_an_error() -> None:
    with pytest.raises(KeyError, match="where"):
        fill("served")
