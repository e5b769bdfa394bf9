"""MONAI's DeepEdit recipe for ``bench_clicks.py``, with its own simulation and guidance.

As in MONAI Label's radiology app: in half of the steps clicks are drawn in the errors of one
prediction, in the others there are none. Without the app's initial seed points, which need
scikit-image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.apps.deepedit.interaction import Interaction
from monai.apps.deepedit.transforms import (
    AddGuidanceSignalDeepEditd,
    AddRandomGuidanceDeepEditd,
    FindDiscrepancyRegionsDeepEditd,
)
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import Activationsd, AsDiscreted, MapTransform, ToNumpyd, ToTensord
from torch import Tensor

from med3dinsight_ext.data.clicks import META


class EmptyGuidanced(MapTransform):
    """Appends empty guidance channels."""

    def __init__(self, keys: str, label_names: Sequence[str]) -> None:
        super().__init__(keys)
        self.classes = len(label_names)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        item = {key: torch.as_tensor(data[key]) for key in ("image", "label")}
        empty = torch.zeros(self.classes, *item["image"].shape[1:])
        return item | {"image": torch.cat([item["image"], empty])}


class DrawnClicksd:
    """DeepEdit's click transforms, for an item without clicks."""

    def __init__(self, label_names: Sequence[str]) -> None:
        self.names = {name: number for number, name in enumerate(label_names)}
        self.random = AddRandomGuidanceDeepEditd("NA")
        self.before: list[Callable[[Any], Any]] = [
            Activationsd("pred", softmax=True),
            AsDiscreted("pred", argmax=True),
            ToNumpyd(("image", "label", "pred")),
            FindDiscrepancyRegionsDeepEditd("label"),
        ]
        self.after: list[Callable[[Any], Any]] = [
            AddGuidanceSignalDeepEditd("image"),
            ToTensord(("image", "label")),
        ]

    def __call__(self, data: Any) -> Any:
        data |= {"guidance": {name: [] for name in self.names}, "label_names": self.names}
        self.random.guidance = {name: [] for name in self.names}  # else those of the item before
        for transform in (*self.before, self.random, *self.after):
            data = transform(data)
        return {key: data[key] for key in ("image", "label")}


def interaction(label_names: Sequence[str]) -> Interaction:
    """The trainer's ``iteration_update``."""
    return Interaction(0.5, [DrawnClicksd(label_names)], True)


class WholeVolume(Inferer):
    """Segments the whole volume again with all clicks."""

    def __init__(self, inferer: Inferer, label_names: Sequence[str]) -> None:
        self.inferer = inferer
        self.names = list(label_names)
        self.signal = AddGuidanceSignalDeepEditd("image")

    def __call__(
        self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        clicks = inputs.meta[META] if isinstance(inputs, MetaTensor) else torch.zeros(0, 4)
        volume = inputs.as_subclass(Tensor)
        found = []
        for number in range(len(self.names)):
            points = clicks[clicks[:, 0] == number].round().int().numpy()
            found.append(self.signal._get_signal(np.empty((1, *volume.shape[2:])), points))
        guidance = torch.from_numpy(np.concatenate(found)).to(volume)[None]
        return self.inferer(torch.cat([volume, guidance], 1), network, *args, **kwargs)
