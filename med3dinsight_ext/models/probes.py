"""What frozen features know of a class: nearest neighbours and logistic regression."""

from __future__ import annotations

from collections.abc import Callable

import ignite.distributed as idist
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.metrics import compute_roc_auc
from torch import Tensor, nn
from torch.nn import functional as F


def knn_probe(train: Tensor, labels: Tensor, test: Tensor, k: int = 20) -> Tensor:
    """Class probabilities (m, classes) by a vote of the k most similar, softmax at 0.07.

    Args:
        train: (n, d) frozen features, any length.
        labels: (n,) long, their classes.
        test: (m, d) features to classify.
        k: neighbours; all of ``train`` if there are fewer.
    """
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).mT
    near, index = similarity.topk(min(k, len(train)))
    votes = test.new_zeros(len(test), int(labels.max()) + 1)
    return votes.scatter_add(1, labels[index], (near / 0.07).softmax(1))


def fit_linear(
    train: Tensor, labels: Tensor, l2: float | None = None, classes: int | None = None
) -> nn.Linear:
    """Logistic regression on standardised features, as a layer that takes them as they are.

    Minimises the summed cross-entropy + l2 / 2 · ‖weight‖² (scikit-learn's C is 1 / l2).

    Args:
        train: (n, d) frozen features.
        labels: (n,) long, their classes.
        l2: penalty on the weights of the standardised features, >= 0; the bias is free. Default: d,
            by which a score's prior deviation is about 1 however many features there are.
        classes: number of them; default: the highest label + 1.
    """
    mean, scale = train.double().mean(0), train.double().std(0, correction=0)
    scale = torch.where(scale > 1e-6, scale, 1)  # a constant feature says nothing
    x = (train - mean) / scale
    l2 = x.shape[1] if l2 is None else l2
    weight = x.new_zeros(classes or int(labels.max()) + 1, x.shape[1], requires_grad=True)
    bias = x.new_zeros(len(weight), requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        fit = F.cross_entropy(F.linear(x, weight, bias), labels, reduction="sum")
        value = (fit + l2 / 2 * weight.square().sum()) / len(x)
        value.backward()
        return value

    search.step(loss)
    layer = nn.Linear(x.shape[1], len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight / scale)
        layer.bias.copy_(bias - F.linear(mean / scale, weight))
    return layer


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, l2: float | None = None) -> Tensor:
    """Class probabilities (m, classes) by ``fit_linear``.

    Args:
        train: (n, d) frozen features.
        labels: (n,) long, their classes.
        test: (m, d) features to classify.
        l2: as in ``fit_linear``.
    """
    return fit_linear(train, labels, l2).to(test.dtype)(test).detach().softmax(1)


def class_scores(probability: Tensor, labels: Tensor) -> dict[str, float]:
    """Balanced accuracy and AUROC (one class against the rest, mean of the classes present).

    Args:
        probability: (m, classes).
        labels: (m,) long; at least two classes.
    """
    present = labels.unique()
    if len(present) < 2:
        raise ValueError(
            f"labels must hold two classes, got only class {present.tolist()}; "
            "test on a split that has both"
        )
    if int(present.max()) >= probability.shape[1]:
        raise ValueError(
            f"test labels must be among the {probability.shape[1]} classes fitted, got class "
            f"{int(present.max())}; put cases of it into the training split"
        )
    hit = (probability.argmax(1) == labels).double()
    recall = torch.stack([hit[labels == c].mean() for c in present])
    aucs = [compute_roc_auc(probability[:, c], (labels == c).long()) for c in present]
    auroc = torch.tensor(aucs, dtype=torch.float64)
    return {"balanced_accuracy": float(recall.mean()), "auroc": float(auroc.mean())}


class Probe(Metric):
    """Fits a probe on the rows marked ``fit`` and scores it on the others.

    ``compute`` returns ``<prefix>_balanced_accuracy`` and ``<prefix>_auroc``.

    Args:
        output_transform: engine output to features (b, d), label (b,) and fit (b,) bool, where
            one loader gives the training and the test cases.
    """

    prefix: str

    def __init__(self, output_transform: Callable = lambda output: output) -> None:
        super().__init__(output_transform, skip_unrolling=True)

    def reset(self) -> None:
        self.kept: list[tuple[Tensor, ...]] = []

    def update(self, output: tuple[Tensor, Tensor, Tensor]) -> None:
        features, label, fit = (row.detach().as_subclass(Tensor).cpu() for row in output)
        self.kept.append((features.float(), label.long().flatten(), fit.bool().flatten()))

    def probability(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        parts = [part for rank in idist.all_gather(self.kept) for part in rank]
        if not parts:
            raise NotComputableError("probed cases must be at least two, got none")
        features, label, fit = (torch.cat(column) for column in zip(*parts, strict=True))
        if fit.all() or not fit.any():
            raise ValueError(
                f"fit must mark some rows and leave some, got {int(fit.sum())} of {len(fit)}; "
                "give the evaluator training and test cases"
            )
        scores = class_scores(
            self.probability(features[fit], label[fit], features[~fit]), label[~fit]
        )
        return {f"{self.prefix}_{key}": value for key, value in scores.items()}


class KNNProbe(Probe):
    """``knn_probe`` as a metric."""

    prefix = "knn"

    def __init__(self, k: int = 20, output_transform: Callable = lambda output: output) -> None:
        self.k = k
        super().__init__(output_transform)

    def probability(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        return knn_probe(train, labels, test, self.k)


class LinearProbe(Probe):
    """``linear_probe`` as a metric."""

    prefix = "linear"

    def __init__(
        self, l2: float | None = None, output_transform: Callable = lambda output: output
    ) -> None:
        self.l2 = l2
        super().__init__(output_transform)

    def probability(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        return linear_probe(train, labels, test, self.l2)
