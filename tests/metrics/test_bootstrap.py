from __future__ import annotations

import pytest
import torch

from med3dinsight_ext.metrics.bootstrap import bootstrap, percentiles, resamples


def test_bootstrap_has_its_nominal_coverage() -> None:
    g = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):
        volume = torch.arange(40).repeat_interleave(3)
        values = 0.3 + torch.randn(40, generator=g)[volume] + 0.1 * torch.randn(120, generator=g)
        mean, low, high = bootstrap(values, volume, draws=300)
        inside += low < 0.3 < high
    assert 0.88 < inside / 200 < 0.98  # slices drawn one by one would cover about 0.7


def test_bootstrap_is_seeded_and_leaves_the_global_state() -> None:
    values, volume = torch.rand(30), torch.arange(30) // 3
    state = torch.get_rng_state()
    assert bootstrap(values, volume) == bootstrap(values, volume)
    assert bootstrap(values, volume) != bootstrap(values, volume, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_bootstrap_mean_is_that_of_the_values() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 0.0])
    mean, low, high = bootstrap(values, torch.tensor([0, 0, 0, 1]))
    assert (mean, low, high) == (0.75, 0.0, 1.0)


def test_one_volume_has_no_interval() -> None:
    mean, low, high = bootstrap(torch.tensor([0.0, 1.0]), torch.zeros(2))
    assert mean == 0.5 and low != low and high != high


@pytest.mark.parametrize("chunk", [2**22, 7, 1])
def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("med3dinsight_ext.metrics.bootstrap.CHUNK", chunk)
    expected = torch.randint(5, (9, 5), generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat(list(resamples(5, 9, seed=3))), expected)


def test_percentiles_leave_out_nan() -> None:
    values = torch.arange(41).double()
    with_nan = torch.cat([values, torch.full((9,), float("nan"), dtype=torch.float64)])
    assert percentiles(with_nan) == percentiles(values) == (1.0, 39.0)


def test_a_thousand_draws_of_seed_zero_give_the_interval_of_95_percent_by_default() -> None:
    values, volume = torch.rand(50, generator=torch.Generator().manual_seed(0)), torch.arange(50)
    drawn = torch.randint(50, (1000, 50), generator=torch.Generator().manual_seed(0))
    ends = values.double()[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    found = bootstrap(values, volume)
    assert (found.low, found.high) == pytest.approx(tuple(ends.tolist()), abs=1e-6)
    narrow = bootstrap(values, volume, level=0.5)
    assert found.low < narrow.low < found.mean < narrow.high < found.high
