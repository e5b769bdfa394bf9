import pytest

from dense import tables


def test_the_page_of_the_dense_pilot_is_written_from_its_results() -> None:
    assert (tables.HERE / "README.md").read_text("utf-8") == tables.readme()


def runs_of(arm: str, dice: list[float]) -> dict:
    """A run on each of two draws for each pre-training, with ``dice`` in both cases."""
    rows = [
        {"name": f"{arm}_p{n}", "labelled": draw, "cases": {"a": [value], "b": [value]}}
        for draw in tables.DRAWS[:2]
        for n, value in enumerate(dice)
    ]
    return tables.by_draw(rows)


def test_intervals_hold_the_spread_between_pre_trainings() -> None:
    scratch = runs_of("scratch", [0.5])
    mean, low, high = tables.difference(runs_of("dense", [0.4, 0.5, 0.7]), scratch)
    assert mean == pytest.approx(100 / 30)
    assert low == pytest.approx(-10, abs=1) and high == pytest.approx(20, abs=1)
    turned = tables.difference(scratch, runs_of("dense", [0.4, 0.5, 0.7]))
    assert turned == pytest.approx((-mean, -high, -low), abs=1)
    paired = tables.difference(runs_of("dense", [0.4, 0.6]), runs_of("recon", [0.3, 0.5]))
    assert paired == pytest.approx((10, 10, 10))  # by pre-training
