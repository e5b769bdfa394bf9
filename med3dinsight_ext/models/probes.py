"""Probes of frozen features: k-nearest neighbours and logistic regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    Minimises the summed cross-entropy + l2 / 2 · ‖weight‖² (scikit-learn's C is 1 / l2).

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
