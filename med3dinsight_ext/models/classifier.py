"""Any 3D network as a classifier, and probes of what it knows while frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.visualize import GradCAM
from torch import Tensor, nn
from tqdm import tqdm

from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.models.features import evaluating, features_of, find_features
from med3dinsight_ext.models.probes import fit_linear, knn_probe

logger = logging.getLogger(__name__)
HEADS = ("pooled", "neighbours", "own")


class KNNHead(nn.Module):
    """Class scores by a vote of the nearest training cases: the log of kNN's probabilities.

    The cases' features and labels are part of its state dict.

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

    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Take training cases: features (n, c) and labels (n,)."""
        self.features, self.labels = features.to(self.features), labels.to(self.labels)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("features", "labels"):  # as many cases as the file has
            if prefix + name in state:
                own = getattr(self, name)
                setattr(self, name, own.new_zeros(len(state[prefix + name]), *own.shape[1:]))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities (b, classes) of features (b, c)."""
        if not len(self.features):
            return features.new_zeros(len(features), self.out_channels)
        vote = knn_probe(self.features, self.labels, features.float(), self.k)
        missing = vote.new_zeros(len(vote), self.out_channels - vote.shape[1])
        return torch.cat([vote, missing], 1).clamp_min(1e-8).log()


class Classifier(nn.Module):
    """A network's deepest features, their mean and maximum over the volume, and a linear layer.

    Args:
        network: any module that maps (b, 1, x, y, z) to something; left as it is, so that weights
            arrive by name.
        out_channels: number of classes.
        patch_size: (x, y, z) of the input that the features are looked up with, in voxels.
        feature_layer: "auto" for the deepest features, or a module path in ``network``.
        head: "pooled" for a linear layer, "neighbours" for kNN, or "own" for the classes that
            ``network`` itself returns as (b, classes).
        dropout: of the pooled features.

    Raises:
        ValueError: head "own" and the network's output is no class score.
    """

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
        if head not in HEADS:
            raise ValueError(f"head must be one of {HEADS}, got {head!r}")
        self.network = network
        self.own = head == "own"
        self.features = find_features(network, patch_size, feature_layer)
        self.grid = nn.Identity()  # what Grad-CAM looks at
        self.dropout = nn.Dropout(dropout)
        channels = 2 * self.features.channels
        self.head: nn.Module = {
            "pooled": lambda: nn.Linear(channels, out_channels),
            "neighbours": lambda: KNNHead(channels, out_channels),
            "own": nn.Identity,
        }[head]()
        if self.own:
            with evaluating(network):
                device = next(network.parameters(), torch.empty(0)).device
                output = _first(network(torch.zeros(1, 1, *patch_size, device=device)))
            if not isinstance(output, Tensor) or output.shape != (1, out_channels):
                raise ValueError(
                    f"head must be pooled unless the network returns (b, {out_channels}), got "
                    f"{getattr(output, 'shape', type(output).__name__)} from "
                    f"{type(network).__name__}; set head to pooled"
                )

    def encode(self, volume: Tensor) -> Tensor:
        """Deepest features (b, c, x', y', z') of volumes (b, 1, x, y, z)."""
        return self.grid(features_of(self.network, self.features, volume, stop=True)[0])

    def pooled(self, volume: Tensor) -> Tensor:
        """Mean and greatest value of each feature, (b, 2 c).

        The mean alone says little where instance norm has set it to zero.
        """
        features = self.encode(volume)
        return torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Class scores (b, classes), before the softmax, of volumes (b, 1, x, y, z)."""
        if self.own:
            return _first(self.network(volume))
        return self.head(self.dropout(self.pooled(volume)))


def _first(output: Any) -> Any:
    """A network's output, or its first one: MONAI's ViT returns its layers too."""
    return output[0] if isinstance(output, (tuple, list)) else output


def grad_cam(classifier: Classifier) -> Callable[[Tensor, int], Tensor] | None:
    """Maps of what speaks for a class (Selvaraju et al., 2017, arXiv:1610.02391).

    Args:
        classifier: with pooled features.

    Returns:
        A function of a volume (1, 1, x, y, z) and a class index that gives a map of the same size
        in [0, 1]; None for a network's own head, whose features may be no grid.
    """
    if classifier.own:
        return None

    def call(volume: Tensor, index: int) -> Tensor:
        device = next(classifier.parameters()).device
        # MONAI's own postprocessing maps the highest value to 0.
        cam = GradCAM(nn_module=classifier, target_layers="grid", postprocessing=lambda x: x)
        with torch.enable_grad():
            # The gradient has to reach the features even where all weights are frozen.
            heat = cam(volume.to(device).requires_grad_(True), class_idx=index).detach().cpu()
        return heat / heat.max().clamp_min(1e-12)

    return call


def pooled_features(
    classifier: Classifier, loader: Iterable[dict[str, Any]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pooled features (n, 2 c) and labels (n,) of all cases, with the classifier frozen."""
    rows, labels = [], []
    classifier.eval()
    with torch.no_grad():
        for batch in tqdm(loader, "features", disable=None):
            volume = batch["image"].as_subclass(Tensor).to(device)
            rows.append(classifier.pooled(volume).float().cpu())
            labels.append(torch.as_tensor(batch["label"]).as_subclass(Tensor).long().flatten())
    return torch.cat(rows), torch.cat(labels)


def fit_head(
    classifier: Classifier, loader: Iterable[dict[str, Any]], device: torch.device
) -> None:
    """Set the head from the features of the frozen network: the probe's, or the vote's cases.

    Args:
        classifier: with the head "pooled" or "neighbours"; nothing else of it is changed.
        loader: of training cases, without augmentation; of each process its own share.
        device: to run on.
    """
    found = idist.all_gather(pooled_features(classifier.to(device), loader, device))
    features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    if isinstance(classifier.head, KNNHead):
        classifier.head.remember(features, labels)
    elif isinstance(classifier.head, nn.Linear):
        layer = fit_linear(features, labels, classes=classifier.head.out_features)
        for own, fitted in zip(classifier.head.parameters(), layer.parameters(), strict=True):
            # All processes must start from the same weights, to the last bit.
            own.data.copy_(idist.broadcast(fitted.data.to(device), src=0))
    logger.info(f"fitted the head to {len(labels)} cases with {features.shape[1]} features")


class LinearProbeInit:
    """Starts fine-tuning from the linear probe's head.

    LP-FT (Kumar et al., 2022, arXiv:2202.10054): the gradients of a random head spoil what the
    encoder has learnt before they follow the data. A resumed training keeps its own head.

    Args:
        classifier: as in ``fit_head``.
        loader: as in ``fit_head``.
        device: as in ``fit_head``.
    """

    def __init__(
        self, classifier: Classifier, loader: Iterable[dict[str, Any]], device: torch.device
    ) -> None:
        self.fit = partial(fit_head, classifier, loader, device)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.epoch == 0:
            self.fit()


def probe(
    classifier: Classifier,
    loader: Iterable[dict[str, Any]],
    device: torch.device,
    mode: str,
    ckpt_dir: str | Path,
) -> None:
    """``fit_head``, and write model.pt.

    Args:
        classifier: as in ``fit_head``.
        loader: as in ``fit_head``.
        device: as in ``fit_head``.
        mode: "linear" for logistic regression, "knn" for a vote of the nearest training cases.
        ckpt_dir: folder of model.pt.
    """
    heads = {"linear": nn.Linear, "knn": KNNHead}
    if mode not in heads or not isinstance(classifier.head, heads[mode]):
        raise ValueError(
            f"mode must be finetune, linear (head pooled) or knn (head neighbours), got {mode!r} "
            f"with the head {type(classifier.head).__name__}; leave head at its default"
        )
    fit_head(classifier, loader, device)
    path = Path(ckpt_dir) / "model.pt"
    write_atomic(path, lambda draft: torch.save(classifier.state_dict(), draft))
    logger.info(f"wrote {path}")
