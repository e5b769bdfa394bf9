from __future__ import annotations

import pytest

from med3dinsight_ext.embeddings.shards import part_of, rank_share


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_an_invalid_shard_is_an_error(shard: str) -> None:
    with pytest.raises(ValueError, match=f"shard must be 1/n to n/n, got '{shard}'"):
        part_of([], shard)


def test_shards_partition_the_items() -> None:
    items = [{"image": str(i)} for i in range(7)]
    parts = [part_of(items, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(i["image"] for part in parts for i in part) == [str(i) for i in range(7)]
    assert [len(part) for part in parts] == [3, 2, 2]


def test_torchruns_ranks_partition_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares += rank_share(7)
    assert sorted(shares) == list(range(7))
