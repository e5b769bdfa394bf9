from __future__ import annotations

import pytest

from med3dinsight_ext.embeddings.shards import part_of, rank_share, without


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_an_invalid_shard_is_an_error(shard: str) -> None:
    with pytest.raises(ValueError, match=f"shard must be 1/n to n/n, got '{shard}'"):
        part_of([], shard)


def test_shards_partition_the_items() -> None:
    items = [{"image": str(i)} for i in range(7)]
    parts = [part_of(items, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(i["image"] for part in parts for i in part) == [str(i) for i in range(7)]
    assert [len(part) for part in parts] == [3, 2, 2]


def test_a_process_of_several_without_a_group_does_not_go_on_with_a_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="form a group, got WORLD_SIZE=3 .*multi_gpu_train.json"):
        rank_share(7)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rank_share(7) == range(7)


def test_every_bad_volume_is_named() -> None:
    items = [{"image": name} for name in ("a.nii", "b.nii", "c.nii")]
    bad = {"a.nii": "volume must vary", "b.nii": "header must be short, got b.nii"}
    with pytest.raises(ValueError) as caught:
        without(items, bad, skip_bad=False)
    assert "\n  a.nii: volume must vary" in str(caught.value)
    assert "\n  header must be short, got b.nii" in str(caught.value)
