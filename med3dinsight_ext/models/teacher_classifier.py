"""Frozen 2D features as a classifier of volumes, without 3D training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dinsight_ext.data.slicing import cut, usable
from med3dinsight_ext.models.classifier import Classifier, build_head
from med3dinsight_ext.models.features import find_features
from med3dinsight_ext.teachers.dense import encode_grids, find_layers
from med3dinsight_ext.teachers.teacher import Teacher

TISSUE = 0.1  # brightness above which a pixel shows tissue


class TeacherFeatures:
    """Features of a frozen 2D image tower, pooled over tissue in the slices of all planes.

    Of every slice and layer, mean and standard deviation over the cells, weighted by the share of
    a cell that is brighter than ``TISSUE``: else the background decides. Then the mean over all
    slices. Layers stand side by side; planes do not, which is better with few labels.

    Args:
        teacher: its image tower is run.
        spacing: voxel size of the volumes along x, y, z in mm.
        per_plane: slices a plane, evenly spread over those with content.
        layers: module paths in the tower, or "auto" for ``find_layers``.

    Raises:
        ValueError: ``per_plane`` is below 1.
    """

    def __init__(
        self,
        teacher: Teacher,
        spacing: Sequence[float],
        per_plane: int = 4,
        layers: Sequence[str] | str = "auto",
    ) -> None:
        if per_plane < 1:
            raise ValueError(f"per_plane must be at least 1, got {per_plane}; raise it")
        self.teacher, self.spacing, self.per_plane = teacher, list(spacing), per_plane
        self.layers = find_layers(teacher.image) if isinstance(layers, str) else list(layers)

    def fingerprint(self) -> bytes:
        """Hash of everything that changes a feature, except the volume."""
        image = self.teacher.image
        parts = [image.fingerprint, image.size, self.spacing, self.per_plane, self.layers, TISSUE]
        return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]

    def __call__(self, volume: Tensor) -> Tensor:
        """Features (b, d), float32, of volumes (b, 1, x, y, z) in [0, 1]."""
        return self.of_slices(volume).mean(1)

    def of_slices(self, volume: Tensor) -> Tensor:
        """Features (b, s, d) of each slice, sagittal ones first, axial ones last."""
        teacher = self.teacher.on(volume.device)
        pictures = torch.cat([self.pictures(one.float()) for one in volume])
        tissue = (pictures > TISSUE).float()
        found = []
        for maps in encode_grids(teacher, pictures, self.layers).values():
            maps = maps.to(volume.device)
            share = F.adaptive_avg_pool2d(tissue, maps.shape[2:])
            weight = share / share.sum((2, 3), keepdim=True).clamp_min(1e-6)
            mean = (maps * weight).sum((2, 3))
            spread = ((maps - mean[..., None, None]).square() * weight).sum((2, 3)).sqrt()
            found += [mean, spread]
        return torch.cat(found, 1).view(len(volume), len(pictures) // len(volume), -1)

    def pictures(self, volume: Tensor) -> Tensor:
        """The slices (s, 1, size, size) of one volume (1, x, y, z)."""
        pictures = []
        for plane, filled in enumerate(usable(volume)):
            # A volume without content, as in a dry run, has pictures too.
            index = (filled if filled.any() else ~filled).nonzero().flatten()
            step = (torch.arange(self.per_plane, device=index.device) + 0.5) / self.per_plane
            position = (index[(step * len(index)).long()] + 0.5) / len(filled)
            size = self.teacher.image.size
            pictures.append(cut(volume, self.spacing, plane, position, size))
        return torch.cat(pictures)


class TeacherClassifier(Classifier):
    """A head on `TeacherFeatures`, beside which a 3D network's pooled features may stand.

    The tower's weights are not in its state dict; a hash of what they are is, and is compared when
    a state dict is loaded.

    Args:
        teacher: as in `TeacherFeatures`.
        out_channels: number of classes.
        patch_size: (x, y, z) of the input in voxels.
        spacing: as in `TeacherFeatures`.
        per_plane: as in `TeacherFeatures`.
        layers: as in `TeacherFeatures`.
        network: as in `Classifier`; None for the teacher alone.
        feature_layer: as in `Classifier`.
        head: "pooled" for a linear layer, or "neighbours" for kNN.
    """

    fingerprint: Tensor
    has_grid = False

    def __init__(
        self,
        teacher: Teacher,
        out_channels: int,
        patch_size: Sequence[int],
        spacing: Sequence[float],
        per_plane: int = 4,
        layers: Sequence[str] | str = "auto",
        network: nn.Module | None = None,
        feature_layer: str = "auto",
        head: str = "pooled",
    ) -> None:
        nn.Module.__init__(self)
        self.teacher_features = TeacherFeatures(teacher, spacing, per_plane, layers)
        digest = list(self.teacher_features.fingerprint())
        self.register_buffer("fingerprint", torch.tensor(digest, dtype=torch.uint8))
        channels = self.teacher_features(torch.zeros(1, 1, *patch_size)).shape[1]
        self.own, self.grid, self.dropout = False, nn.Identity(), nn.Identity()
        self.joined = network is not None
        if network is not None:
            self.network = network
            self.features = find_features(network, patch_size, feature_layer)
            channels += 2 * self.features.channels
        self.head = build_head(head, channels, out_channels)

    def pooled(self, volume: Tensor) -> Tensor:
        """Features (b, d) of volumes (b, 1, x, y, z)."""
        found = self.teacher_features(volume)
        return torch.cat([found, super().pooled(volume)], 1) if self.joined else found

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self.fingerprint.cpu().clone()
        super()._load_from_state_dict(state, prefix, *args)
        given = state.get(prefix + "fingerprint")
        if given is not None and not torch.equal(given.cpu(), own):
            args[-1].append(
                "teacher, its size and layers, spacing and per_plane must be those of the "
                "training, got others; give the settings of the training"
            )
