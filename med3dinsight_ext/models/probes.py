"""What frozen features know of a class: nearest neighbours and logistic regression."""

from __future__ import annotations

import torch
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
