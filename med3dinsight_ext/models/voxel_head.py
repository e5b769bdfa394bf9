"""A light head for each voxel's frozen features: segmentation without a 3D network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = 4e-3  # highest learning rate of the cycle


class VoxelHead(nn.Module):
    """Standardisation and a two-layer perceptron; one layer with ``hidden`` 0.

    Args:
        in_features: numbers a voxel.
        classes: with the background.
        hidden: width of the hidden layer.
    """

    def __init__(self, in_features: int, classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("std", torch.ones(in_features))
        self.mean: Tensor
        self.std: Tensor
        layers: list[nn.Module] = [nn.Linear(in_features, hidden or classes)]
        if hidden:
            layers += [nn.GELU(), nn.Linear(hidden, classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, in_features)."""
        return self.layers((features.float() - self.mean) / self.std)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Probabilities (classes, x, y, z) of features (in_features, x, y, z)."""
        rows = features.flatten(1).mT
        found = torch.cat([self(part).softmax(1) for part in rows.split(2**16)])
        return found.mT.unflatten(1, features.shape[1:])


def fit_voxel_head(
    features: Tensor,
    labels: Tensor,
    hidden: int = 128,
    steps: int = 600,
    batch: int = 4096,
    seed: int = 0,
) -> VoxelHead:
    """Fit a head by cross-entropy and Dice over random voxels.

    Args:
        features: (n, c).
        labels: (n, classes), shares of each class in the voxel, sum 1.
        hidden: width of the hidden layer; 0 for a linear head.
        steps: of AdamW, one cycle.
        batch: voxels a step.
        seed: of the weights and the voxels.
    """
    if len(features) != len(labels) or not len(features):
        raise ValueError(
            f"features and labels must have the same voxels, got {len(features)} and {len(labels)}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = VoxelHead(features.shape[1], labels.shape[1], hidden)
    head.mean.copy_(features.float().mean(0))
    head.std.copy_(features.float().std(0).clamp(min=1e-3))
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, 0.1)
    for _ in range(steps):
        pick = torch.randint(len(features), (batch,), generator=generator)
        goal = labels[pick].float()
        logits = head(features[pick])
        p = logits.softmax(1)
        overlap = (2 * (p * goal).sum(0) + 1) / ((p + goal).sum(0) + 1)
        loss = F.cross_entropy(logits, goal) + (1 - overlap).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval().requires_grad_(False)
