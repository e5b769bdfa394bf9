import logging
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Compose, Lambdad, RandScaleIntensityd

from med3dinsight_ext.data import cache
from med3dinsight_ext.data.cache import MemoryDataset, memory_of, quarter_of_memory

LOADED: list[int] = []


def load(index: int) -> torch.Tensor:
    LOADED.append(index)
    return torch.full((1, 50, 50, 100), float(index))  # 1 MB


def dataset(count: int = 8, **changes: Any) -> MemoryDataset:
    LOADED.clear()
    transform = Compose([Lambdad("image", load), RandScaleIntensityd("image", 0.0, prob=0.0)])
    return MemoryDataset([{"image": i} for i in range(count)], transform, **changes)


@pytest.mark.parametrize(
    ("gigabytes", "share", "kept"), [(0.0045, 1, 4), (0.0045, 0.5, 2), (0, 1, 0)]
)
def test_no_more_is_kept_than_the_limit(
    gigabytes: float, share: float, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data = dataset(gigabytes=gigabytes, share=share)
    assert len(LOADED) <= kept + 2  # threads
    assert (f"{kept} of 8 volumes stay in memory" in caplog.text) == bool(kept)
    LOADED.clear()
    assert [int(data[i]["image"].max()) for i in range(8)] == list(range(8))
    assert LOADED == list(range(kept, 8))


def test_everything_is_kept_where_it_fits() -> None:
    data = dataset(gigabytes=1)
    LOADED.clear()
    assert [int(data[i]["image"].max()) for i in range(8)] == list(range(8)) and not LOADED


def test_items_of_the_same_hash_are_kept_once() -> None:
    data = dataset(hash_as_key=True, gigabytes=0.0025)
    LOADED.clear()
    assert [int(data[i]["image"].max()) for i in range(8)] == list(range(8))
    assert LOADED == list(range(2, 8))


def test_processes_of_one_machine_share_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert dataset(gigabytes=0.012).cache_num == 2


def test_the_default_is_a_quarter_of_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "total_memory", lambda: 10**7)
    assert quarter_of_memory() == 0.0025
    assert dataset().cache_num == 2


def test_a_negative_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match="cache_gb must be at least 0, got -1; 0 keeps nothing"):
        dataset(gigabytes=-1)


def test_memory_of_an_item_is_that_of_its_arrays() -> None:
    item = {
        "a": torch.zeros(3, 4),
        "b": [np.zeros(5), "text"],
        "c": ({"d": torch.zeros(2).half()},),
    }
    assert memory_of(item) == 48 + 40 + 4
