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


def network_run(init: str, lr: float, dice: float, labelled: str = "draw0") -> dict:
    """A run of the residual encoder, with ``dice`` in its one case."""
    return {
        "task": "headneck", "kind": "finetune", "name": f"{init}_{labelled}_{lr}", "init": init,
        "labelled": labelled, "backbone": "resenc", "lr": lr, "steps": 600, "dice": dice,
        "cases": {"a": [dice]},
    }  # fmt: skip


def test_another_network_is_compared_with_its_own_best_rate_from_scratch() -> None:
    rows = [network_run("", 0.001, 0.6), network_run("", 0.003, 0.5)]
    rows += [network_run("resenc_dense_p0", 0.001, 0.7), network_run("resenc_recon_p0", 0.001, 0.8)]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in tables.networks(rows).splitlines()[2:]
    ]
    same = "(+10.0 to +10.0)"
    assert lines == [
        ["residual encoder, from scratch, 0.001", "0.600", "–", "–", "", ""],
        ["residual encoder, from scratch, 0.003", "0.500", "–", "–"]
        + [f"-10.0 {same.replace('+', '-')}", ""],
        ["residual encoder, masked reconstruction, 0.001", "0.800", "–", "–"]
        + ["+20.0 (+20.0 to +20.0)", ""],
        ["residual encoder, dense teaching alone, 0.001", "0.700", "–", "–"]
        + [f"+10.0 {same}", f"-10.0 {same.replace('+', '-')}"],
    ]
    assert tables.networks(rows[2:3])  # one that was made without any from scratch
