from __future__ import annotations

import pytest
import torch
from ignite.exceptions import NotComputableError
from torch import Tensor
from torch.nn import functional as F

from med3dinsight_ext.models.probes import (
    KNNProbe,
    LinearProbe,
    class_scores,
    knn_probe,
    linear_probe,
)


def blobs(n: int = 60, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.eye(5)[:classes]
    return centres[labels] + 0.4 * torch.randn(n, 5, generator=g), labels


def test_one_neighbour_copies_the_label_of_the_nearest() -> None:
    features, labels = blobs()
    test, _ = blobs(seed=1)
    nearest = [
        int(
            labels[
                max(range(60), key=lambda j: float(F.cosine_similarity(row, features[j], dim=0)))
            ]
        )
        for row in test
    ]
    assert knn_probe(features, labels, test, k=1).argmax(1).tolist() == nearest


def test_neighbours_vote_by_similarity() -> None:
    train, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]]), torch.tensor([0, 1, 1])
    got = knn_probe(train, labels, torch.tensor([[2.0, 0.0]]), k=20)
    near, far = torch.tensor([1.0, 0.8]).div(0.07).exp().tolist()
    assert got[0].tolist() == pytest.approx([near / (near + 2 * far), 2 * far / (near + 2 * far)])


@pytest.mark.parametrize(("k", "share"), [(4, 0.75), (6, 0.5), (20, 0.5)])
def test_k_neighbours_vote_or_all_there_are(k: int, share: float) -> None:
    train = F.normalize(torch.tensor([[1.0, 0.0]] * 3 + [[1.0, 1e-4]] * 3), dim=1)
    got = knn_probe(train, torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([[1.0, -1e-2]]), k)
    assert float(got[0, 0]) == pytest.approx(share, abs=1e-3)


def test_linear_probe_equals_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs()
    scale = torch.tensor([1.0, 100.0, 0.01, 1.0, 1.0])
    test, _ = blobs(seed=1)
    mean, std = features.mean(0), features.std(0, correction=0)
    model = linear.LogisticRegression(C=0.5, max_iter=1000, tol=1e-8)
    model.fit(((features - mean) / std).double().numpy(), labels.numpy())
    expected = model.predict_proba(((test - mean) / std).double().numpy())
    got = linear_probe(features * scale, labels, test * scale, l2=2.0)
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=2e-4, rtol=0)


def test_linear_probe_works_without_gradient_and_with_a_constant_feature() -> None:
    features, labels = blobs()
    features[:, 4] = 7.0
    with torch.no_grad():
        got = linear_probe(features, labels, features)
    assert got.isfinite().all() and (got.argmax(1) == labels).double().mean() > 0.8


def test_class_scores_of_hand_made_cases() -> None:
    probability = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    got = class_scores(probability, torch.tensor([0, 0, 0, 1]))
    assert got == {
        "balanced_accuracy": pytest.approx((2 / 3 + 0) / 2),
        "auroc": pytest.approx(2 / 3),
    }


def test_class_scores_skip_a_class_that_is_absent() -> None:
    probability = torch.eye(3)[[0, 1, 1]]
    got = class_scores(probability, torch.tensor([0, 1, 1]))
    assert got == {"balanced_accuracy": 1.0, "auroc": 1.0}


def test_one_class_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"two classes, got only class \[1\]"):
        class_scores(torch.rand(3, 2), torch.ones(3, dtype=torch.long))


def test_a_class_never_fitted_is_an_error() -> None:
    with pytest.raises(ValueError, match="among the 2 classes fitted, got class 2"):
        class_scores(torch.rand(3, 2), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("probe", [KNNProbe(k=3), LinearProbe(l2=5.0)], ids=["knn", "linear"])
def test_probe_metric_fits_on_the_marked_rows_only(probe: KNNProbe | LinearProbe) -> None:
    features, labels = blobs(n=90)
    fit = torch.arange(90) % 3 != torch.arange(90) // 30  # two of three cases, every class in both
    probe.reset()
    for rows in torch.arange(90).split(40):
        probe.update((features[rows], labels[rows], fit[rows]))
    chosen = {
        "knn": lambda *a: knn_probe(*a, k=3),
        "linear": lambda *a: linear_probe(*a, l2=5.0),
    }[probe.prefix]
    expected = class_scores(chosen(features[fit], labels[fit], features[~fit]), labels[~fit])
    assert probe.compute() == {f"{probe.prefix}_{k}": v for k, v in expected.items()}


def test_probe_without_test_cases_is_an_error() -> None:
    probe = KNNProbe()
    probe.update((torch.rand(4, 2), torch.arange(4), torch.ones(4)))
    with pytest.raises(ValueError, match="fit must mark some rows and leave some, got 4 of 4"):
        probe.compute()


def test_probe_without_cases_is_an_error() -> None:
    with pytest.raises(NotComputableError, match="probed cases"):
        LinearProbe().compute()
