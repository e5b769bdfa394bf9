"""Any 3D network as a classifier, and probes of its frozen features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.visualize import GradCAM
from torch import Tensor, nn

from med3dinsight_ext.data.patients import patient_name
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.models.features import (
    dry_run,
    extract_features,
    find_features,
    first_output,
)
from med3dinsight_ext.models.probes import KNNHead, fit_linear, select_l2

logger = logging.getLogger(__name__)
HEADS = ("pooled", "neighbours", "own")


def build_head(head: str, channels: int, out_channels: int) -> nn.Module:
    """The head "pooled", "neighbours" or "own" of a `Classifier`.

    Raises:
        ValueError: ``head`` is another one.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {HEADS}, got {head!r}")
    if head == "own":
        return nn.Identity()
    kind = nn.Linear if head == "pooled" else KNNHead
    return kind(channels, out_channels)


class Classifier(nn.Module):
    """A network's deepest features, their mean and maximum over the volume, and a linear layer.

    Args:
        network: any module that maps (b, 1, x, y, z) to something; it stays as it is, so that
            pre-trained weights fit by name.
        out_channels: number of classes.
        patch_size: (x, y, z) of the input that the features are looked up with, in voxels.
        feature_layer: "auto" for the deepest features, or a module path in ``network``.
        head: "pooled" for a linear layer, "neighbours" for kNN, or "own" for the classes that
            ``network`` itself returns as (b, classes).
        dropout: of the pooled features.

    Raises:
        ValueError: ``head`` is unknown, or "own" and the network's output is not (b, classes).

    Examples:
        >>> network = nn.Sequential(nn.Conv3d(1, 4, 2, stride=2), nn.ReLU())
        >>> classifier = Classifier(network, out_channels=3, patch_size=(8, 8, 8))
        >>> classifier(torch.zeros(2, 1, 8, 8, 8)).shape, classifier.head.in_features
        (torch.Size([2, 3]), 8)
    """

    has_grid = True  # for Grad-CAM

    def __init__(
        self,
        network: nn.Module,
        out_channels: int,
        patch_size: Sequence[int],
        feature_layer: str = "auto",
        head: str = "pooled",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.own = head == "own"
        self.features = find_features(network, patch_size, feature_layer)
        self.grid = nn.Identity()  # the target layer of Grad-CAM
        self.dropout = nn.Dropout(dropout)
        self.head = build_head(head, 2 * self.features.channels, out_channels)
        if self.own:
            output = first_output(dry_run(network, patch_size))
            if not isinstance(output, Tensor) or output.shape != (1, out_channels):
                raise ValueError(
                    f"head must be pooled unless the network returns (b, {out_channels}), got "
                    f"{getattr(output, 'shape', type(output).__name__)} from "
                    f"{type(network).__name__}; set head to pooled"
                )

    def encode(self, volume: Tensor) -> Tensor:
        """Deepest features (b, c, x', y', z') of volumes (b, 1, x, y, z)."""
        return self.grid(extract_features(self.network, self.features, volume, stop=True)[0])

    def pooled(self, volume: Tensor) -> Tensor:
        """Mean and maximum of each feature, (b, 2 c).

        The mean alone carries no information where instance norm has set it to zero.
        """
        features = self.encode(volume)
        return torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Class scores (b, classes), before the softmax, of volumes (b, 1, x, y, z)."""
        if self.own:
            return first_output(self.network(volume))
        pooled = self.pooled(volume)
        with torch.autocast(volume.device.type, enabled=False):  # heads are fitted in float32
            own = next(chain(self.head.parameters(), self.head.buffers())).dtype
            return self.head(self.dropout(pooled.to(own)))


def grad_cam(classifier: Classifier) -> Callable[[Tensor, int], Tensor] | None:
    """Class activation maps by Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391).

    Args:
        classifier: with pooled features.

    Returns:
        A function of a volume (1, 1, x, y, z) and a class index that returns a map of the same
        shape in [0, 1]; None for a network's own head or 2D features, which may be no grid.
    """
    if classifier.own or not classifier.has_grid:
        return None

    def call(volume: Tensor, index: int) -> Tensor:
        device = next(classifier.parameters()).device
        # MONAI's own postprocessing maps the highest value to 0.
        cam = GradCAM(nn_module=classifier, target_layers="grid", postprocessing=lambda x: x)
        with torch.enable_grad():
            # The gradient must reach the features even where all weights are frozen.
            heat = cam(volume.to(device).requires_grad_(True), class_idx=index).detach().cpu()
        return heat / heat.max().clamp_min(1e-12)

    return call


def pooled_features(
    classifier: Classifier, loader: Iterable[dict[str, Any]], device: torch.device
) -> tuple[Tensor, Tensor, list[str]]:
    """Pooled features (n, 2 c), labels (n,) and patients of all cases on the CPU, in eval mode.

    Args:
        classifier: already on ``device``; stays in eval mode.
        loader: of batches with an "image" (b, 1, x, y, z) and a "label" (b,).
        device: to run on.
    """
    rows, labels = [], []
    patients: list[str] = []
    classifier.eval()
    with torch.no_grad():
        for batch in Bar(loader, "features"):
            image = batch["image"]
            found = classifier.pooled(image.as_subclass(Tensor).to(device)).float().cpu()
            if not found.isfinite().all():
                names = getattr(image, "meta", {}).get("filename_or_obj", "a batch")
                raise ValueError(
                    f"features must be finite, got NaN or infinity from {names}; leave the case "
                    "out, or give other weights"
                )
            rows.append(found)
            unknown = [f"case {idist.get_rank()} {len(patients) + n}" for n in range(len(found))]
            named = zip(batch.get("patient", unknown), unknown, strict=True)
            patients += [patient_name({"patient": name}, default) for name, default in named]
            labels.append(torch.as_tensor(batch["label"]).as_subclass(Tensor).long().flatten())
    return torch.cat(rows), torch.cat(labels), patients


def fit_head(
    classifier: Classifier,
    loader: Iterable[dict[str, Any]],
    device: torch.device,
    search: bool = False,
) -> None:
    """Fit the head to the features of the frozen network, by logistic regression or as kNN.

    Args:
        classifier: with the head "pooled" or "neighbours"; only the head changes.
        loader: of training cases, without augmentation; each process has its own share.
        device: to run on.
        search: choose the penalty of the logistic regression by `select_l2`.
    """
    found = idist.all_gather(pooled_features(classifier.to(device), loader, device))
    features, labels = (torch.cat([part[n] for part in found]) for n in range(2))
    patients = [name for part in found for name in part[2]]
    message = f"fitted the head to {len(labels)} cases with {features.shape[1]} features"
    if isinstance(classifier.head, KNNHead):
        classifier.head.set_cases(features, labels)
    elif isinstance(classifier.head, nn.Linear):
        classes = classifier.head.out_features
        l2 = float(features.shape[1])
        if search:
            l2 = select_l2(features, labels, classes, patients=patients)
        message += f" and C = {(2 if classes == 2 else 1) / l2:.2g}"
        layer = fit_linear(features, labels, l2, classes)
        for own, fitted in zip(classifier.head.parameters(), layer.parameters(), strict=True):
            # All processes must start from bit-equal weights.
            own.data.copy_(idist.broadcast(fitted.data.to(device), src=0))
    logger.info(message)


class LinearProbeInit:
    """Handler that starts fine-tuning from the linear probe's head.

    LP-FT (Kumar et al., 2022, arXiv:2202.10054): the gradients of a random head distort the
    pre-trained features. A resumed training keeps its own head. Arguments as those of `fit_head`.
    """

    def __init__(
        self, classifier: Classifier, loader: Iterable[dict[str, Any]], device: torch.device
    ) -> None:
        self.fit = partial(fit_head, classifier, loader, device)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration == 0:
            self.fit()
