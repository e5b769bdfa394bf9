"""Weighted sum of the image, text and reconstruction losses of pre-training."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from med3dinsight_ext.losses.cosine import cosine_loss
from med3dinsight_ext.losses.info_nce import info_nce_loss
from med3dinsight_ext.losses.pairs import BLOCK
from med3dinsight_ext.losses.partial_transport import partial_transport_loss
from med3dinsight_ext.losses.reconstruction import squared_error
from med3dinsight_ext.losses.regression import Residual, regression_loss
from med3dinsight_ext.losses.siglip import prior_bias, siglip_loss

if TYPE_CHECKING:
    from med3dinsight_ext.embeddings.targets import SliceTargets
    from med3dinsight_ext.models.student import StudentOutput

logger = logging.getLogger(__name__)

KINDS = ("siglip", "info_nce", "cosine", "regression", "partial_transport")


class LossParts(NamedTuple):
    """Parts of a loss, unweighted, and their weighted sum ``loss``; scalars without gradient."""

    loss: Tensor
    image: Tensor
    text: Tensor
    reconstruction: Tensor


class AlignmentLoss(nn.Module):
    """Weighted sum of the image, text and reconstruction parts.

    The image and text parts compare slice tokens with the teacher's embeddings by one ``kind`` of
    loss; slices with equal targets (drawn twice, or with the same caption) are no negatives of
    each other. Under torch.distributed the pairs of all ranks count. A part of fewer than two
    valid slices is zero.

    Args:
        kind: "siglip", "info_nce" (v1), "cosine", "regression" or "partial_transport" (v2).
        image_weight: of slice token to image embedding.
        text_weight: of slice token to caption embedding.
        reconstruction_weight: of the reconstruction, where the network gives one.
        temperature: of "info_nce", and the initial one of "siglip"; > 0.
        mass: of "partial_transport", in (0, 1].
        epsilon: of "partial_transport", > 0.
        cost: of "partial_transport", "cosine" or "mahalanobis" (learned).
        dims: length of each target space, {"image": d, …}, for the Mahalanobis matrices and for
            "regression".
        negatives: "all", or "same_plane": only slices of the same plane and nearby depth, which
            plane and position cannot distinguish.
        depth_window: with "same_plane", the largest difference of position, in (0, 1].

    Raises:
        ValueError: an argument is out of range, or ``dims`` is missing.

    Examples:
        >>> from med3dinsight_ext.embeddings.targets import SliceTargets
        >>> from med3dinsight_ext.models.student import StudentOutput
        >>> unit, yes, zero = torch.eye(4)[None], torch.ones(1, 4).bool(), torch.zeros(1, 4)
        >>> volume = torch.zeros(1, 1, 2, 2, 2)
        >>> plane = modality = patient = zero.long()
        >>> target = SliceTargets(unit, -unit, yes, yes, plane, zero, modality, volume, patient)
        >>> loss = AlignmentLoss("cosine", text_weight=0.5)
        >>> loss(StudentOutput({"joint": unit}, volume + 2, None), target)
        tensor(5.)
        >>> loss.latest
        LossParts(loss=tensor(5.), image=tensor(0.), text=tensor(2.), reconstruction=tensor(4.))
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
        learned_cost = kind == "partial_transport" and cost == "mahalanobis"
        lengths = dict(dims or {})
        if (learned_cost or kind == "regression") and not lengths:
            what = "the Mahalanobis cost" if learned_cost else "regression"
            raise ValueError(f"dims must be given for {what}; set '$@store.embedding_dims'")
        self.kind = kind
        self.weights = (image_weight, text_weight, reconstruction_weight)
        self.temperature, self.mass, self.epsilon = temperature, mass, epsilon
        self.negatives, self.depth_window = negatives, depth_window
        self.logits, self.roots = nn.ParameterDict(), nn.ParameterDict()
        self.residuals = nn.ModuleDict()
        for name in ("image", "text"):
            if kind == "siglip":  # logarithm of the scale, and what is added to `prior_bias`
                self.logits[name] = nn.Parameter(torch.tensor([math.log(1 / temperature), 0.0]))
            size = lengths.get(name, lengths.get("joint"))
            if kind == "regression" and size:
                self.residuals[name] = Residual(size)
        if learned_cost:
            for name, size in lengths.items():
                self.roots[name] = nn.Parameter(torch.eye(size))
        self.latest = LossParts(*torch.zeros(4))
        self._warned = False

    def _pair_loss(self, name: str, student: Tensor, teacher: Tensor, allowed: Tensor) -> Tensor:
        """The chosen loss of n pairs of the "image" or "text" target."""
        if self.kind == "cosine":
            return cosine_loss(student, teacher)
        if self.kind == "info_nce":
            return info_nce_loss(student, teacher, self.temperature, allowed)
        if self.kind == "siglip":
            log_scale, offset = self.logits[name]
            bias = prior_bias(allowed) + offset
            return siglip_loss(student, teacher, log_scale, bias, allowed)
        if self.kind == "regression":
            return regression_loss(student, teacher)
        root = None
        if len(self.roots):
            root = self.roots[name if name in self.roots else "joint"]
        return partial_transport_loss(student, teacher, self.mass, self.epsilon, root, allowed)

    def _alignment(
        self, name: str, pred: StudentOutput, target: SliceTargets, rows: Tensor
    ) -> Tensor:
        """Image or text part over the slices that ``rows`` (b, s) marks, on all ranks."""
        tokens = pred.tokens.get(name, pred.tokens.get("joint"))
        if tokens is None:
            return pred.tokens[next(iter(pred.tokens))].sum() * 0
        columns = (tokens.float(), getattr(target, name).float(), target.plane, target.position)
        rows = gather(rows).flatten()
        slots, rows = len(rows), rows.nonzero().flatten()  # once: each use of a mask waits for it
        student, teacher, plane, position = (gather(x).flatten(0, 1)[rows] for x in columns)
        if len(student) < 2 <= slots:  # one alone has no negatives
            if name == "image" and not self._warned:  # captions may be rare
                self._warned = True
                logger.warning(
                    f"{len(student)} of a step's {slots} slices are in its crops: such steps have "
                    "no image part; raise per_plane, patch_size or batch_size"
                )
            return tokens.sum() * 0
        if name in self.residuals:
            teacher = self.residuals[name](teacher, plane, position)
        unit = F.normalize(teacher.double(), dim=1)  # TF32 would tell equal captions apart
        blocks = unit.split(max(1, BLOCK // max(1, len(unit))))
        allowed = torch.cat([block @ unit.mT < 1 - 1e-5 for block in blocks])
        if self.negatives == "same_plane":
            near = (position[:, None] - position).abs() <= self.depth_window
            allowed = allowed & near & (plane[:, None] == plane)
        return self._pair_loss(name, student, teacher, allowed)

    def forward(self, pred: StudentOutput, target: SliceTargets) -> Tensor:
        """Weighted sum of the parts, in float32 under any autocast; ``latest`` has the parts.

        Raises:
            ValueError: a batch of fewer than two slices, or shapes that do not fit.
        """
        parts = list(torch.zeros(3, device=target.volume.device))
        image, text, reconstruction = self.weights
        with torch.autocast(target.volume.device.type, enabled=False):
            if image:
                parts[0] = self._alignment("image", pred, target, target.valid)
            if text:
                parts[1] = self._alignment("text", pred, target, target.valid & target.has_text)
            if reconstruction and pred.reconstruction is not None:
                # As `masked_mse`, over the voxels of all ranks.
                volume, guess = target.volume.float(), pred.reconstruction.float()
                error, count = (
                    gather(x[None]).sum() for x in squared_error(guess, volume, pred.mask)
                )
                parts[2] = error / count.clamp(min=1)
            total = image * parts[0] + text * parts[1] + reconstruction * parts[2]
        self.latest = LossParts(*(part.detach() for part in (total, *parts)))
        return total


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
