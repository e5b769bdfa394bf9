"""Metrics equal an independent implementation: plain loops over voxels, pairs and ranks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from med3dinsight_ext.metrics.classification import scores
from med3dinsight_ext.metrics.recall import recall_at_k
from med3dinsight_ext.metrics.retrieval import retrieval
from med3dinsight_ext.metrics.segmentation import case_scores

SEED = st.integers(0, 100_000)
SHAPE = st.tuples(*[st.integers(1, 5)] * 3)
SPACING = st.tuples(*[st.sampled_from([0.5, 1.0, 1.7, 3.0])] * 3)


def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels of a mask with a face neighbour that is not in it, or lies outside the volume."""
    steps = [tuple(s * (a == axis) for a in range(3)) for axis in range(3) for s in (-1, 1)]

    def held(voxel: tuple[int, ...]) -> bool:
        return all(0 <= i < n for i, n in zip(voxel, mask.shape, strict=True)) and bool(mask[voxel])

    return [
        tuple(map(int, voxel))
        for voxel in np.argwhere(mask)
        if not all(held(tuple(np.add(voxel, step))) for step in steps)
    ]


def distances(
    one: list[tuple[int, ...]], other: list[tuple[int, ...]], spacing: tuple[float, ...]
) -> list[float]:
    """From each voxel of ``one`` to the nearest of ``other``, in mm."""
    return [
        min(math.dist(np.multiply(a, spacing), np.multiply(b, spacing)) for b in other) for a in one
    ]


def brute_force(
    a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...], tolerance: float
) -> dict[str, float]:
    """Dice, NSD and HD95 of two masks that both mark something."""
    there, back = (distances(surface(x), surface(y), spacing) for x, y in ((a, b), (b, a)))
    near = sum(d <= tolerance for d in there + back)
    return {
        "dice": 2 * int((a & b).sum()) / (int(a.sum()) + int(b.sum())),
        "nsd": near / len(there + back),
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
    }


@given(SHAPE, SPACING, SEED, st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([0.3, 1.2, 2.1]))
def test_segmentation_scores_equal_loops_over_the_surface(
    shape: tuple[int, ...], spacing: tuple[float, ...], seed: int, density: float, tolerance: float
) -> None:
    random = np.random.default_rng(seed)
    maps = [(random.random(shape) < density) * random.integers(1, 3, shape) for _ in range(2)]
    found = case_scores(
        *(torch.from_numpy(x)[None] for x in maps), spacing, ["background", "a", "b"], tolerance
    )
    for number, name in enumerate("ab", 1):
        a, b = (x == number for x in maps)
        if a.any() and b.any():
            assert found[name] == pytest.approx(brute_force(a, b, spacing, tolerance), abs=1e-5)
        elif a.any() or b.any():
            diagonal = math.dist(np.multiply(shape, spacing), (0, 0, 0))
            assert found[name] == pytest.approx({"dice": 0, "nsd": 0, "hd95": diagonal})
        else:
            assert all(math.isnan(value) for value in found[name].values())


def counted(probability: np.ndarray, label: np.ndarray, c: int) -> float:
    """Share of pairs of a case of class ``c`` and another in the right order, ties half."""
    pairs = [
        (probability[i, c], probability[j, c])
        for i, j in itertools.product(range(len(label)), repeat=2)
        if label[i] == c and label[j] != c
    ]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs) if pairs else math.nan


@given(st.integers(2, 14), st.integers(2, 4), SEED)
def test_classification_scores_equal_counts_of_pairs_and_bins(n: int, k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    label = random.integers(0, k, n)
    probability = random.integers(0, 5, (n, k)) + 0.125 * np.eye(k)[random.integers(0, k, n)]
    probability += (probability.sum(1, keepdims=True) == 0) / k
    probability /= probability.sum(1, keepdims=True)
    found = scores(
        torch.from_numpy(probability), torch.from_numpy(label), [str(c) for c in range(k)], 0
    )
    called = probability.argmax(1)
    aurocs = [counted(probability, label, c) for c in (range(k) if k > 2 else [1])]
    recalls = [float(np.mean(called[label == c] == c)) for c in range(k) if (label == c).any()]
    defined = [value for value in aurocs if not math.isnan(value)]
    assert found["auroc"] == pytest.approx(
        sum(defined) / len(defined) if defined else math.nan, nan_ok=True
    )
    assert found["balanced_accuracy"] == pytest.approx(sum(recalls) / len(recalls))
    error = 0.0
    for number in range(15):  # bins (number / 15, (number + 1) / 15]
        sure = 15 * probability.max(1)
        rows = [i for i in range(n) if number < sure[i] <= number + 1]
        gap = sum(probability[i].max() - (called[i] == label[i]) for i in rows)
        error += abs(gap) / n
    assert found["ece"] == pytest.approx(error)
    for c in range(k):
        row = found["per_class"][str(c)]
        true, hit = int((label == c).sum()), int(((label == c) & (called == c)).sum())
        false = int(((label != c) & (called == c)).sum())
        assert row["n"] == true and found["confusion"][c][c] == hit
        assert row["auroc"] == pytest.approx(counted(probability, label, c), nan_ok=True)
        sensitivity = hit / true if true else math.nan
        assert row["sensitivity"] == pytest.approx(sensitivity, nan_ok=True)
        specificity = 1 - false / (n - true) if n > true else math.nan
        assert row["specificity"] == pytest.approx(specificity, nan_ok=True)


@given(st.integers(2, 12), st.integers(1, 4), SEED)
def test_recall_equals_a_loop_over_the_ranking(n: int, k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens, targets = random.normal(size=(2, n, 3))
    group = random.integers(0, 3, n)
    found = recall_at_k(*map(torch.from_numpy, (tokens, targets, group)), (k,))

    def cosine(i: int, j: int) -> float:
        return tokens[i] @ targets[j] / np.linalg.norm(tokens[i]) / np.linalg.norm(targets[j])

    for i in range(n):
        rivals = [j for j in range(n) if group[j] == group[i]]
        above = sum(cosine(i, j) > cosine(i, i) for j in rivals)
        assert float(found.recall[i, 0]) == (above < k)
        assert float(found.chance[i, 0]) == pytest.approx(min(1, k / len(rivals)))
        assert int(found.candidates[i]) == len(rivals)


@given(st.integers(4, 12), SEED, st.integers(1, 4))
def test_retrieval_equals_a_loop_over_modality_plane_and_depth(
    n: int, seed: int, bins: int
) -> None:
    random = np.random.default_rng(seed)
    tokens, targets = random.normal(size=(2, n, 3))
    plane, modality, volume = random.integers(0, 3, n), random.integers(0, 2, n), np.arange(n) // 2
    position = random.random(n)
    place = [(modality[i], plane[i], min(int(position[i] * bins), bins - 1)) for i in range(n)]
    compared = [i for i in range(n) if place.count(place[i]) >= 2]
    if not compared:
        return
    found = retrieval(
        *map(torch.from_numpy, (tokens, targets, plane, position, modality, volume)),
        ks=(1,),
        depth_bins=bins,
    )
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    score = unit @ (targets / np.linalg.norm(targets, axis=1, keepdims=True)).T
    hits = [
        score[i, i] >= max(score[i, j] for j in range(n) if place[j] == place[i]) for i in compared
    ]
    assert found["r1"] == pytest.approx(np.mean(hits))
    assert found["r1_chance"] == pytest.approx(
        np.mean([1 / place.count(place[i]) for i in compared])
    )
    assert found["queries"] == len(compared)
