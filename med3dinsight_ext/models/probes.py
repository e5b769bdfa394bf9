"""Probes of frozen features: k-nearest neighbours and logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PENALTIES = (-2, -1, 0, 1, 2)  # powers of ten that `select_l2` tries
REPEATED = 100  # cases that are enough for one round of folds


def knn_probe(train: Tensor, labels: Tensor, test: Tensor, k: int = 20) -> Tensor:
    """Class probabilities (m, classes) by a vote of the k nearest, weighted as in arXiv:1805.01978.

    The weights are a softmax over the neighbours' cosine similarities at temperature 0.07.

    Args:
        train: (n, d) frozen features, of any length.
        labels: (n,) long, their classes.
        test: (m, d) features to classify.
        k: neighbours; all of ``train`` if there are fewer.

    Examples:
        >>> train, labels = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
        >>> knn_probe(train, labels, torch.tensor([[0.0, 5.0], [1.0, 1.0]]), k=2)[0]
        tensor([0., 1.])
    """
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).mT
    near, index = similarity.topk(min(k, len(train)))
    votes = test.new_zeros(len(test), int(labels.max()) + 1)
    return votes.scatter_add(1, labels[index], (near / 0.07).softmax(1))


def fit_linear(
    train: Tensor, labels: Tensor, l2: float | None = None, classes: int | None = None
) -> nn.Linear:
    """Logistic regression on standardised features, as a layer that takes them as they are.

    Minimises the summed cross-entropy + l2 / 2 · ‖weight‖². scikit-learn's C is 1 / l2; of two
    classes, for which it has one row of weights instead of two, 2 / l2.

    Args:
        train: (n, d) frozen features.
        labels: (n,) long, their classes.
        l2: penalty on the weights of the standardised features, >= 0; the bias is free. Default: d,
            by which a score's prior deviation is about 1 for any number of features.
        classes: number of them; default: the highest label + 1.

    Returns:
        Linear layer from d features to class scores, before the softmax.
    """
    mean, scale = train.double().mean(0), train.double().std(0, correction=0)
    scale = torch.where(scale > 1e-6, scale, 1)  # constant features become zero
    rows, basis = _rotated((train - mean) / scale)
    classes = classes or int(labels.max()) + 1
    weight, bias = _logistic(rows, labels, train.shape[1] if l2 is None else l2, classes)
    weight = weight @ basis / scale
    layer = nn.Linear(train.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias - weight @ mean)
    return layer


def _rotated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (n, r) of rows (n, d) in an orthonormal basis (r, d) of their span, r <= n.

    Neither scores nor penalty change by a rotation, and no fit leaves the span.
    """
    if len(x) >= x.shape[1]:
        return x, torch.eye(x.shape[1]).to(x)
    value, vector = torch.linalg.eigh(x @ x.mT)
    kept = value > 1e-10 * value[-1].clamp_min(1e-12)
    rows = vector[:, kept] * value[kept].sqrt()
    return rows, (vector[:, kept] / value[kept].sqrt()).mT @ x


def _logistic(x: Tensor, labels: Tensor, l2: float, classes: int) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias (classes,) of logistic regression on rows (n, d) as they are."""
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        fit = F.cross_entropy(F.linear(x, weight, bias), labels, reduction="sum")
        value = (fit + l2 / 2 * weight.square().sum()) / len(x)
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    return weight.detach(), bias.detach()


def select_l2(
    train: Tensor,
    labels: Tensor,
    classes: int | None = None,
    folds: int = 5,
    seed: int = 0,
    patients: Sequence[str] | None = None,
) -> float:
    """The penalty of `fit_linear` with the least cross-entropy in cross-validation.

    Every class has its patients spread over the folds, as many as its smallest class has patients.

    Args:
        train: (n, d) frozen features.
        labels: (n,) long, their classes.
        classes: as in `fit_linear`.
        folds: at most.
        seed: of the folds.
        patients: of the cases, (n,); those of one are in one fold. None: each case is one.

    Returns:
        d times a power of ten of ``PENALTIES``; d if a class has one patient.
    """
    whose = torch.arange(len(labels))
    if patients is not None:
        known = {name: n for n, name in enumerate(dict.fromkeys(patients))}
        whose = torch.tensor([known[name] for name in patients])
    first = torch.full((int(whose.max()) + 1,), len(labels)).scatter_reduce(
        0, whose, torch.arange(len(labels)), "amin"
    )
    kind = labels[first]  # class of each patient's first case
    counts = kind.bincount()
    folds = min(folds, int(counts[counts > 0].min()))
    if folds < 2:
        return float(train.shape[1])
    x = train.double() - train.double().mean(0)
    scale = x.std(0, correction=0)
    rows, _ = _rotated(x / torch.where(scale > 1e-6, scale, 1))
    classes = classes or int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    totals = dict.fromkeys((10.0**k * train.shape[1] for k in PENALTIES), 0.0)
    for _ in range(max(1, REPEATED // len(labels))):
        order = torch.randperm(len(kind), generator=generator)
        order = order[kind[order].argsort(stable=True)]
        fold = torch.empty_like(kind)
        fold[order] = torch.arange(len(kind)) % folds
        fold = fold[whose]
        for held in range(folds):
            kept = fold != held
            for l2 in totals:
                weight, bias = _logistic(rows[kept], labels[kept], l2, classes)
                scores = F.linear(rows[~kept], weight, bias)
                totals[l2] += F.cross_entropy(scores, labels[~kept], reduction="sum").item()
    return min(totals, key=totals.__getitem__)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, l2: float | None = None) -> Tensor:
    """Class probabilities (m, classes) by `fit_linear`.

    Args:
        train: (n, d) frozen features.
        labels: (n,) long, their classes.
        test: (m, d) features to classify.
        l2: as in `fit_linear`.
    """
    return fit_linear(train, labels, l2).to(test.dtype)(test).detach().softmax(1)


class KNNHead(nn.Module):
    """Logarithms of `knn_probe`'s probabilities as a head; the cases are part of its state dict.

    Args:
        in_channels: of the features.
        out_channels: number of classes.
        k: neighbours.
    """

    features: Tensor
    labels: Tensor

    def __init__(self, in_channels: int, out_channels: int, k: int = 20) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.k = k
        self.register_buffer("features", torch.zeros(0, in_channels))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long))

    def set_cases(self, features: Tensor, labels: Tensor) -> None:
        """Set the training cases: features (n, c) and labels (n,)."""
        self.features, self.labels = features.to(self.features), labels.to(self.labels)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("features", "labels"):  # as many cases as the file has
            if prefix + name in state:
                own = getattr(self, name)
                setattr(self, name, own.new_zeros(len(state[prefix + name]), *own.shape[1:]))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities (b, classes) of features (b, c); zeros while there are no cases."""
        if not len(self.features):
            return features.new_zeros(len(features), self.out_channels)
        vote = knn_probe(self.features, self.labels, features.float(), self.k)
        missing = vote.new_zeros(len(vote), self.out_channels - vote.shape[1])
        return torch.cat([vote, missing], 1).clamp_min(1e-8).log()
