"""Losses that pull a slice's token to the teacher's embedding of it.

Each is a pure function of n pairs: row i of ``student`` belongs to row i of ``teacher``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.losses import DeepSupervisionLoss
from torch import Tensor, nn

from med3dinsight_ext.losses.transport import solve

if TYPE_CHECKING:
    from med3dinsight_ext.embeddings.targets import SliceTargets
    from med3dinsight_ext.models.student import StudentOutput

KINDS = ("siglip", "info_nce", "cosine", "regression", "partial_transport")
DELTA = 1e-4  # of the Mahalanobis matrix: keeps it positive definite


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"student and teacher must share one shape (n, d), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; build the student with the store's embedding_dims"
        )
    if len(student) < 2:
        raise ValueError(
            f"pairs must be at least two, got {len(student)}; raise slices or batch_size"
        )


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine; pairs do not see each other.

    Args:
        student: (n, d), any length.
        teacher: (n, d), any length.
    """
    _check(student, teacher)
    return (1 - F.cosine_similarity(student, teacher)).mean()


def regression(student: Tensor, residual: Tensor) -> Tensor:
    """Mean squared error to standardised residuals: the share of their variance left unexplained.

    Args:
        student: (n, d), estimates.
        residual: (n, d), from ``Residual``.
    """
    _check(student, residual)
    return F.mse_loss(student, residual)


class Residual(nn.Module):
    """What of an embedding its plane and depth do not tell, standardised.

    Embeddings of similar slices have nearly one direction, and plane and depth tell most of the
    rest. So the mean of all targets seen at a plane and depth is taken away, and each dimension is
    divided by its deviation.

    Args:
        length: d of the embeddings.
        bins: of the position, each with its own mean.
    """

    total: Tensor
    count: Tensor
    square: Tensor

    def __init__(self, length: int, bins: int = 8) -> None:
        super().__init__()
        self.bins = bins
        self.register_buffer("total", torch.zeros(3 * bins, length))
        self.register_buffer("count", torch.zeros(3 * bins))
        self.register_buffer("square", torch.zeros(length))

    def forward(self, teacher: Tensor, plane: Tensor, position: Tensor) -> Tensor:
        """Residuals (n, d) of embeddings (n, d); in training mode they are counted in.

        Args:
            teacher: (n, d).
            plane: (n,) long.
            position: (n,) in [0, 1].
        """
        cell = plane * self.bins + (position * self.bins).long().clamp(max=self.bins - 1)
        if self.training:
            self.total.index_add_(0, cell, teacher)
            self.count.index_add_(0, cell, torch.ones_like(position))
        rest = teacher - self.total[cell] / self.count[cell].clamp(min=1)[:, None]
        if self.training:
            self.square += rest.square().sum(0)
        return rest / (self.square / self.count.sum().clamp(min=1)).sqrt().clamp(min=1e-6)


def info_nce(
    student: Tensor, teacher: Tensor, temperature: float = 0.07, allowed: Tensor | None = None
) -> Tensor:
    """Symmetric cross-entropy over the cosine matrix (v1; Oord et al., 2018, arXiv:1807.03748).

    Args:
        student: (n, d).
        teacher: (n, d).
        temperature: > 0.
        allowed: (n, n) bool, which pairs may be negatives; the diagonal always counts.
    """
    _check(student, teacher)
    logits = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).mT / temperature
    if allowed is not None:
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(~(allowed | own), -math.inf)
    label = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, label) + F.cross_entropy(logits.mT, label)) / 2


def siglip(
    student: Tensor, teacher: Tensor, log_scale: Tensor, bias: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """Sigmoid loss of every pair on its own, a sum over pairs per slice (arXiv:2303.15343).

    Args:
        student: (n, d).
        teacher: (n, d).
        log_scale: () log of the factor on the cosine.
        bias: () added to the logit.
        allowed: (n, n) bool, which pairs may be negatives; the diagonal always counts.
    """
    _check(student, teacher)
    logits = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).mT * log_scale.exp() + bias
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    loss = -F.logsigmoid(torch.where(own, logits, -logits))
    if allowed is not None:
        loss = loss.masked_fill(~(allowed | own), 0)
    return loss.sum() / len(logits)


def mahalanobis(student: Tensor, teacher: Tensor, root: Tensor, delta: float = DELTA) -> Tensor:
    """Distances (n, n) under M = AᵀA + δI, by matrix products alone.

    Args:
        student: (n, d).
        teacher: (n, d).
        root: (d, d) A.
        delta: δ > 0; also keeps the square root's gradient finite at distance zero.
    """

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.mT

    total = squared(student @ root.mT, teacher @ root.mT) + delta * squared(student, teacher)
    return (total.clamp(min=0) + 1e-8).sqrt()


def partial_transport(
    student: Tensor,
    teacher: Tensor,
    mass: float = 0.95,
    epsilon: float = 0.1,
    root: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Negative log of the plan's diagonal, -Σᵢ log(πᵢᵢ) / n (v2).

    The target is the whole identity, so leaving a pair out (mass < 1) is punished, not allowed:
    docs/method.md. What tolerates wrong pairs is a large ``epsilon``.

    Args:
        student: (n, d).
        teacher: (n, d).
        mass: share of the mass to move, in (0, 1].
        epsilon: strength of the entropy, > 0, in units of the largest cost.
        root: (d, d) for the Mahalanobis cost; None for the cosine cost.
        allowed: (n, n) bool, which pairs may be matched; others get the largest cost.
    """
    _check(student, teacher)
    student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    if root is None:
        cost = (1 - student @ teacher.mT) / 2  # in [0, 1]
    else:
        cost = mahalanobis(student, teacher, root)
        cost = cost / cost.amax().clamp(min=1e-6)
    if allowed is not None:
        own = torch.eye(len(cost), dtype=torch.bool, device=cost.device)
        cost = cost.masked_fill(~(allowed | own), 1.0)
    return -solve(cost[None], mass, epsilon).log_plan[0].diagonal().mean()


def masked_mse(reconstruction: Tensor, volume: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over the hidden voxels; over all of them without a mask.

    Args:
        reconstruction: (b, 1, x, y, z).
        volume: (b, 1, x, y, z).
        mask: (b, 1, x, y, z) bool, True where the network did not see the volume.
    """
    total, count = _squared_error(reconstruction, volume, mask)
    return total / count.clamp(min=1)


def _squared_error(
    reconstruction: Tensor, volume: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum over the hidden voxels, and their number."""
    if reconstruction.shape != volume.shape:
        raise ValueError(
            f"reconstruction must have the shape of the volume {tuple(volume.shape)}, got "
            f"{tuple(reconstruction.shape)}; the network needs out_channels 1 and the input's size"
        )
    error = (reconstruction - volume).square()
    hidden = torch.ones_like(error) if mask is None else mask.to(error.dtype)
    return (error * hidden).sum(), hidden.sum()


def gather(values: Tensor) -> Tensor:
    """Rows of all ranks, with gradient; the tensor itself where there is one process.

    Every rank then computes the same loss of all pairs, but reaches only its own rows, and DDP
    takes the mean over ranks: hence the factor on the gradient, which leaves the values alone.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    ranks, own = dist.get_world_size(), values.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own)
    if values.requires_grad:
        parts[dist.get_rank()] = own + ranks * (values - own)
    return torch.cat(parts)


class Parts(NamedTuple):
    """Parts of a loss, unweighted, and their weighted sum ``loss``."""

    loss: Tensor
    image: Tensor
    text: Tensor
    reconstruction: Tensor


class AlignmentLoss(nn.Module):
    """Weighted sum of the image, text and reconstruction parts.

    Args:
        kind: "siglip", "info_nce" (v1), "cosine", "regression" or "partial_transport" (v2).
        image_weight: of slice token to image embedding.
        text_weight: of slice token to caption embedding.
        reconstruction_weight: of the reconstruction, where the network gives one.
        temperature: of "info_nce", and where "siglip" starts.
        mass: of "partial_transport", in (0, 1].
        epsilon: of "partial_transport", > 0.
        cost: of "partial_transport", "cosine" or "mahalanobis" (learned).
        dims: length of each target space, {"image": d, …}, for the Mahalanobis matrices and for
            "regression".
        negatives: "all", or "same_plane": only slices of the same plane and nearby depth, which
            plane and position cannot tell apart.
        depth_window: with "same_plane", the largest difference of position, in (0, 1].
    """

    def __init__(
        self,
        kind: str = "siglip",
        image_weight: float = 1.0,
        text_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        temperature: float = 0.07,
        mass: float = 0.95,
        epsilon: float = 0.1,
        cost: str = "cosine",
        dims: Mapping[str, int] | None = None,
        negatives: str = "all",
        depth_window: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("kind", kind, KINDS),
            ("cost", cost, ("cosine", "mahalanobis")),
            ("negatives", negatives, ("all", "same_plane")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}; try 0.07")
        self.kind = kind
        self.weights = (image_weight, text_weight, reconstruction_weight)
        self.temperature, self.mass, self.epsilon = temperature, mass, epsilon
        self.negatives, self.depth_window = negatives, depth_window
        self.scales = nn.ParameterDict()
        self.roots = nn.ParameterDict()
        if kind == "siglip":  # one scale and bias for each of image and text
            for name in ("image", "text"):
                start = torch.tensor([math.log(1 / temperature), -10.0])
                self.scales[name] = nn.Parameter(start)
        self.residuals = nn.ModuleDict()
        learned = kind == "partial_transport" and cost == "mahalanobis"
        lengths = dict(dims or {})
        if (learned or kind == "regression") and not lengths:
            what = "the Mahalanobis cost" if learned else "regression"
            raise ValueError(f"dims must be given for {what}; set '$@store.embedding_dims'")
        if kind == "regression":
            for name in ("image", "text"):
                if size := lengths.get(name, lengths.get("joint")):
                    self.residuals[name] = Residual(size)
        if learned:
            for name, length in lengths.items():
                self.roots[name] = nn.Parameter(torch.eye(length))
        zero = torch.zeros(())
        self.latest = Parts(zero, zero, zero, zero)

    def pairs(self, name: str, student: Tensor, teacher: Tensor, allowed: Tensor | None) -> Tensor:
        """The chosen loss of n pairs of the "image" or "text" target."""
        if self.kind == "cosine":
            return cosine(student, teacher)
        if self.kind == "info_nce":
            return info_nce(student, teacher, self.temperature, allowed)
        if self.kind == "siglip":
            log_scale, bias = self.scales[name]
            return siglip(student, teacher, log_scale, bias, allowed)
        if self.kind == "regression":
            return regression(student, teacher)
        root = None
        if len(self.roots):
            root = self.roots[name if name in self.roots else "joint"]
        return partial_transport(student, teacher, self.mass, self.epsilon, root, allowed)

    def _part(self, name: str, pred: StudentOutput, target: SliceTargets, rows: Tensor) -> Tensor:
        tokens = pred.tokens.get(name, pred.tokens.get("joint"))
        if tokens is None:
            return pred.tokens[next(iter(pred.tokens))].sum() * 0
        rows = gather(rows).flatten()
        student, teacher, plane, position = (
            gather(values).flatten(0, 1)[rows]
            for values in (
                tokens.float(),
                getattr(target, name).float(),
                target.plane,
                target.position,
            )
        )
        if name == "text" and len(student) < 2:
            return tokens.sum() * 0  # captions may be rare; one alone has nothing to differ from
        if name in self.residuals:
            teacher = self.residuals[name](teacher, plane, position)
        # A slice drawn twice and a caption used twice are no negatives of each other.
        unit = F.normalize(teacher, dim=1)
        allowed = unit @ unit.mT < 1 - 1e-5
        if self.negatives == "same_plane":
            near = (position[:, None] - position).abs() <= self.depth_window
            allowed = allowed & near & (plane[:, None] == plane)
        return self.pairs(name, student, teacher, allowed)

    def _reconstruction(self, guess: Tensor, mask: Tensor | None, target: SliceTargets) -> Tensor:
        """Like `masked_mse`, over the voxels of all ranks."""
        parts = _squared_error(guess.float(), target.volume.float(), mask)
        total, count = (gather(part[None]).sum() for part in parts)
        return total / count.clamp(min=1)

    def forward(self, pred: StudentOutput, target: SliceTargets) -> Tensor:
        """Weighted sum of the parts, in float32 under any autocast; ``latest`` has the parts."""
        device = target.volume.device.type
        with torch.autocast(device, enabled=False):
            zero = torch.zeros((), device=target.volume.device)
            image, text, reconstruction = self.weights
            parts = (
                self._part("image", pred, target, target.valid) if image else zero,
                self._part("text", pred, target, target.valid & target.has_text) if text else zero,
                self._reconstruction(pred.reconstruction, pred.mask, target)
                if reconstruction and pred.reconstruction is not None
                else zero,
            )
            total = sum(
                (weight * part for weight, part in zip(self.weights, parts, strict=True) if weight),
                zero,
            )
        self.latest = Parts(*(part.detach() for part in (total, *parts)))
        return total


class DeepSupervision(DeepSupervisionLoss):
    """MONAI's deep supervision for every form in which networks return their levels.

    A tensor is one level, a list or tuple several, and DynUNet's stack (b, levels, c, x, y, z) too.
    """

    def forward(self, input: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Weighted sum of the loss over the levels; weights 1, 1/2, 1/4, … unless set."""
        if isinstance(input, Tensor) and input.ndim == target.ndim + 1:
            input = input.unbind(1)
        return super().forward(input, target)
