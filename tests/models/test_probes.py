from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from med3dinsight_ext.models import probes
from med3dinsight_ext.models.probes import PENALTIES, knn_probe, linear_probe, select_l2


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


def test_more_features_than_cases_equal_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    labels = torch.arange(12) % 3
    features = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    features[:, 0] += labels
    mean, std = features.mean(0), features.std(0, correction=0)
    model = linear.LogisticRegression(C=0.5, max_iter=1000, tol=1e-8)
    rows = ((features - mean) / std).double().numpy()
    model.fit(rows, labels.numpy())
    got = linear_probe(features, labels, features * 1.1, l2=2.0)
    test = ((features * 1.1 - mean) / std).double().numpy()
    expected = torch.from_numpy(model.predict_proba(test)).float()
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


def test_the_penalty_follows_the_noise() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    clear = torch.randn(80, 4, generator=g) * 0.1 + labels[:, None]
    noise = torch.randn(80, 4, generator=g)
    assert select_l2(clear, labels) == pytest.approx(0.04)
    assert select_l2(noise, labels) >= 40


@pytest.mark.parametrize("counts", [(1, 9), (2, 10), (3, 3), (0, 2, 2)])
def test_few_cases_have_fewer_folds_or_none(counts: tuple[int, ...]) -> None:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    features = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0))
    found = select_l2(features, labels, classes=3)
    assert found == 6 if 1 in counts else found in {6 * 10.0**k for k in PENALTIES}


def test_every_fold_trains_on_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([0] * 2 + [1] * 9 + [2] * 3)
    seen = []

    def record(x: Tensor, y: Tensor, l2: float, classes: int) -> tuple[Tensor, Tensor]:
        seen.append(set(y.tolist()))
        return torch.zeros(classes, x.shape[1]).double(), torch.zeros(classes).double()

    monkeypatch.setattr(probes, "_logistic", record)
    select_l2(torch.rand(14, 5), labels)
    assert len(seen) == 2 * len(PENALTIES) * (probes.REPEATED // 14)
    assert all(classes == {0, 1, 2} for classes in seen)


def test_the_volumes_of_a_patient_are_in_one_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    patients = [f"p{n // 5}" for n in range(100)]
    labels = torch.arange(20).repeat_interleave(5) % 2
    own = torch.randn(20, 100, generator=g) + 0.1 * (torch.arange(20) % 2)[:, None]
    features = own.repeat_interleave(5, 0) + 0.01 * torch.randn(100, 100, generator=g)
    assert select_l2(features, labels) == 1  # twins in both parts: the least penalty wins
    assert select_l2(features, labels, patients=patients) >= 100
    seen, fit = [], probes._logistic

    def record(x: Tensor, y: Tensor, l2: float, classes: int) -> tuple[Tensor, Tensor]:
        seen.append(len(y))
        return fit(x, y, 100.0, classes)

    monkeypatch.setattr(probes, "_logistic", record)
    select_l2(features, labels, patients=patients)
    assert set(seen) == {80}


def test_c_of_scikit_learn_is_twice_as_large_for_two_classes() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    labels = torch.arange(40) % 2
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    features[:, 0] += labels
    rows = (features - features.mean(0)) / features.std(0, correction=0)
    model = linear.LogisticRegression(C=2 / 4.0, max_iter=1000, tol=1e-8)
    model.fit(rows.double().numpy(), labels.numpy())
    got = linear_probe(features, labels, features, l2=4.0)
    expected = torch.from_numpy(model.predict_proba(rows.double().numpy())).float()
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
