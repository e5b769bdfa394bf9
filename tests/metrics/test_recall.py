from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from med3dinsight_ext.metrics import recall
from med3dinsight_ext.metrics.recall import expected_recall, recall_at_k
from med3dinsight_ext.metrics.retrieval import depth_group


def pairs(n: int = 40, d: int = 6, seed: int = 0) -> tuple[Tensor, ...]:
    """Noisy tokens, targets, plane, position, modality and volume of n slices."""
    g = torch.Generator().manual_seed(seed)
    targets = F.normalize(torch.randn(n, d, generator=g), dim=1)
    tokens = targets + 0.5 * torch.randn(n, d, generator=g)
    plane, position = torch.randint(3, (n,), generator=g), torch.rand(n, generator=g)
    return tokens, targets, plane, position, torch.zeros(n).long(), torch.arange(n) // 4


def naive_recall(tokens: Tensor, targets: Tensor, group: list[int], k: int) -> list[float]:
    """Sort every query's candidates in a Python loop; no ties expected."""
    found = []
    for i in range(len(tokens)):
        pool = [j for j in range(len(tokens)) if group[j] == group[i]]
        pool.sort(key=lambda j: -float(F.cosine_similarity(tokens[i], targets[j], dim=0)))
        found.append(float(any(torch.equal(targets[j], targets[i]) for j in pool[:k])))
    return found


@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_equals_sorting_each_query(k: int) -> None:
    tokens, targets, plane, position, *_ = pairs()
    targets[7] = targets[3]
    group = depth_group(plane, position, 2)
    assert recall_at_k(tokens, targets, group, (k,)).recall[:, 0].tolist() == naive_recall(
        tokens, targets, group.tolist(), k
    )


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, targets, plane, *_ = pairs()
    whole = recall_at_k(tokens, targets, plane)
    monkeypatch.setattr(recall, "CHUNK", 50)
    for a, b in zip(whole, recall_at_k(tokens, targets, plane), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [5000, 300, 10])
def test_memory_stays_below_the_full_matrix(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    amax = Tensor.amax
    monkeypatch.setattr(
        Tensor, "amax", lambda x, *a, **k: seen.append(x.numel()) or amax(x, *a, **k)
    )
    monkeypatch.setattr(recall, "CHUNK", chunk)
    tokens, targets, *_ = pairs(300)
    recall_at_k(tokens, targets, torch.zeros(300, dtype=torch.long))
    assert len(seen) > 1 and max(seen) <= max(chunk, 300)  # at least one row


def test_ties_between_different_targets_share_the_places() -> None:
    targets = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]])
    tokens = torch.tensor(
        [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]
    )  # the first two cannot be told apart
    recall = recall_at_k(tokens, targets, torch.zeros(3, dtype=torch.long), (1, 2)).recall
    assert recall.tolist() == [[0.5, 1.0], [0.5, 1.0], [1.0, 1.0]]


def test_the_same_caption_on_another_slice_is_a_hit() -> None:
    targets = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [0.0, 1.0]])
    tokens = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]])
    found = recall_at_k(tokens, targets, torch.zeros(3, dtype=torch.long), (1,))
    assert found.recall[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert found.chance[:, 0].tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("above", "tied", "right", "k"), [(1, 3, 2, 3), (0, 4, 1, 5), (3, 0, 1, 3)]
)
def test_expected_recall_equals_all_orders(above: int, tied: int, right: int, k: int) -> None:
    level = [False] * tied + [True] * right
    orders = [[False] * above + list(p) for p in itertools.permutations(level)]
    share = sum(any(order[:k]) for order in orders) / len(orders)
    one = torch.ones(1, dtype=torch.long)
    assert float(expected_recall(above * one, tied * one, right * one, k)) == pytest.approx(share)


@pytest.mark.parametrize("bins", [0, 2], ids=["all", "within"])
def test_random_tokens_reach_chance(bins: int) -> None:
    _, targets, plane, position, *_ = pairs()
    group = depth_group(plane, position, bins) if bins else torch.zeros(40).long()
    g = torch.Generator().manual_seed(1)
    draws = [recall_at_k(torch.randn(40, 6, generator=g), targets, group) for _ in range(100)]
    mean = torch.stack([found.recall.mean(0) for found in draws]).mean(0)
    torch.testing.assert_close(mean, draws[0].chance.mean(0), atol=0.02, rtol=0)


def test_chance_equals_random_orders_of_repeated_captions() -> None:
    caption = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4])
    found = recall_at_k(
        torch.zeros(8, 5), F.one_hot(caption, 5).float(), torch.zeros(8).long(), (1, 3)
    )
    g = torch.Generator().manual_seed(0)
    orders = torch.stack([caption[torch.randperm(8, generator=g)] for _ in range(4000)])
    for column, k in enumerate((1, 3)):
        share = (orders[:, :k, None] == caption).any(1).double().mean(0)
        torch.testing.assert_close(found.chance[:, column], share, atol=0.03, rtol=0)


@pytest.mark.parametrize(("gap", "expected"), [(0.7e-6, 0.5), (1.4e-6, 0.0)])
def test_scores_within_float_noise_are_ties(gap: float, expected: float) -> None:
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    tokens = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    tokens[0, 1] += 2**0.5 * gap  # the wrong one scores higher
    found = recall_at_k(tokens, targets, torch.zeros(2, dtype=torch.long), (1,))
    assert float(found.recall[0, 0]) == expected


@pytest.mark.parametrize(("apart", "same"), [(0.7e-5, True), (1.5e-5, False)])
def test_targets_of_nearly_one_direction_are_one(apart: float, same: bool) -> None:
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, (2 * apart) ** 0.5, 0.0], [0.0, 0.0, 1.0]])
    found = recall_at_k(torch.rand(3, 3), targets, torch.zeros(3, dtype=torch.long), (1,))
    assert float(found.chance[0, 0]) == pytest.approx(2 / 3 if same else 1 / 3)


def test_ranks_one_five_and_ten_count_by_default() -> None:
    tokens, targets, *_ = pairs()
    group = torch.zeros(40, dtype=torch.long)
    for a, b in zip(
        recall_at_k(tokens, targets, group),
        recall_at_k(tokens, targets, group, (1, 5, 10)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["tokens", "targets"])
def test_rows_that_are_not_finite_are_counted(name: str) -> None:
    tokens, targets, plane, *_ = pairs()
    {"tokens": tokens, "targets": targets}[name][[3, 8], 2] = float("nan")
    with pytest.raises(ValueError, match=f"{name} must be finite, got NaN or Inf in 2 of 40 rows"):
        recall_at_k(tokens, targets, plane)


def test_tokens_of_another_width_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"one shape \(n, d\), got \(4, 3\) and \(4, 6\); build"):
        recall_at_k(torch.zeros(4, 3), torch.zeros(4, 6), torch.zeros(4).long())


def test_candidates_are_those_of_the_group() -> None:
    tokens, targets, *_ = pairs(6)
    found = recall_at_k(tokens, targets, torch.tensor([0, 2, 2, 0, 2, 1]))
    assert found.candidates.tolist() == [2, 3, 3, 2, 3, 1]
