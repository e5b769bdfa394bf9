"""Ranks share validation volumes, each scored once."""

from __future__ import annotations

import ignite.distributed as idist
import pytest

from med3dinsight_ext.training.ranks import rank_sampler


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)


@pytest.mark.parametrize(("count", "share"), [(2, [1]), (5, [1, 3]), (6, [1, 3, 5])])
def test_each_volume_is_on_one_rank(two_ranks: None, count: int, share: list[int]) -> None:
    sampler = rank_sampler(range(count))
    assert sampler is not None and list(sampler) == share


def test_no_volumes_need_no_sampler(two_ranks: None) -> None:
    assert rank_sampler([]) is None


@pytest.mark.parametrize(("kind", "key"), [("validation", "val_fraction"), ("training", "max_ca")])
def test_a_rank_without_volumes_is_an_error(two_ranks: None, kind: str, key: str) -> None:
    message = f"{kind} volumes .* got 1 for 2; start fewer processes, .*{key}"
    with pytest.raises(ValueError, match=message):
        rank_sampler([0], kind)
