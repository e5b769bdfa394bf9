"""Loss of dense teaching: the teacher's codes at hidden points, and masked reconstruction."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dinsight_ext.losses.reconstruction import masked_mse

if TYPE_CHECKING:
    from med3dinsight_ext.embeddings.grid_targets import GridTargets
    from med3dinsight_ext.models.dense import DenseOutput

KINDS = ("smooth_l1", "cosine")


class DenseParts(NamedTuple):
    """The weighted sum and its parts, before their weights."""

    total: Tensor
    dense: Tensor
    reconstruction: Tensor


def code_loss(student: Tensor, teacher: Tensor, weight: Tensor, kind: str) -> Tensor:
    """Weighted mean over points of the distance between codes.

    Args:
        student: (b, p, k).
        teacher: (b, p, k), about unit variance.
        weight: (b, p), >= 0; 0 where nothing counts.
        kind: "smooth_l1" or "cosine".
    """
    if kind == "cosine":
        each = 1 - F.cosine_similarity(student, teacher, dim=-1)
    else:
        each = F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    return (each * weight).sum() / weight.sum().clamp(min=1e-6)


class DenseLoss(nn.Module):
    """Mean of ``code_loss`` over network levels and teacher layers, plus reconstruction.

    Args:
        kind: "smooth_l1" or "cosine".
        dense_weight: of the codes.
        reconstruction_weight: of the masked squared error of intensities.
        visible_weight: of points whose voxel the student saw, against 1 for hidden ones.
    """

    def __init__(
        self,
        kind: str = "smooth_l1",
        dense_weight: float = 1.0,
        reconstruction_weight: float = 0.0,
        visible_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        weights = (dense_weight, reconstruction_weight, visible_weight)
        if min(weights) < 0 or not dense_weight + reconstruction_weight:
            raise ValueError(f"weights must be >= 0 and one of them above, got {weights}")
        self.kind = kind
        self.dense_weight, self.reconstruction_weight, self.visible_weight = weights
        zero = torch.zeros(())
        self.latest = DenseParts(zero, zero, zero)

    def forward(self, pred: DenseOutput, target: GridTargets) -> Tensor:
        """Weighted sum of the parts, in float32 under any autocast; ``latest`` has the parts."""
        with torch.autocast(target.volume.device.type, enabled=False):
            parts = []
            for level in pred.codes:
                for n, guess in enumerate(level):
                    weight = target.valid[n].float()
                    if pred.hidden is not None:
                        seen = ~pred.hidden[:, n]
                        weight = torch.where(seen, weight * self.visible_weight, weight)
                    parts.append(
                        code_loss(guess.float(), target.codes[n].float(), weight, self.kind)
                    )
            dense = torch.stack(parts).mean()
            reconstruction = torch.zeros_like(dense)
            if self.reconstruction_weight and pred.reconstruction is not None:
                reconstruction = masked_mse(
                    pred.reconstruction.float(), target.volume.float(), pred.mask
                )
            total = self.dense_weight * dense + self.reconstruction_weight * reconstruction
        self.latest = DenseParts(total.detach(), dense.detach(), reconstruction.detach())
        return total
