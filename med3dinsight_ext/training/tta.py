"""Test-time augmentation (TTA): predictions averaged over mirror images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

from med3dinsight_ext.data.laterality import LEFT_RIGHT, Pair, swap


class FlipInferer(Inferer):
    """Averages a network's predictions for a volume and for its mirror images.

    Args:
        inferer: runs the network on each.
        axes: spatial axes (0 x, 1 y, 2 z) to mirror, in all combinations; none changes nothing.
        pairs: classes that swap in a left–right mirror image, in the output and in the channels
            that follow the image's, a group of all classes each: clicks and the earlier answer.
    """

    def __init__(
        self, inferer: Inferer, axes: Sequence[int] = (), pairs: Sequence[Pair] = ()
    ) -> None:
        self.inferer = inferer
        self.pairs = pairs
        self.flips = [
            [axis + 2 for axis in chosen]
            for count in range(len(axes) + 1)
            for chosen in itertools.combinations(axes, count)
        ]

    def __call__(
        self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The mean: volumes (b, c, x, y, z) flipped back, class scores (b, c) as they are."""
        plain = inputs.as_subclass(Tensor)  # metadata slows every layer
        outputs: list[Tensor] = []
        for flip in self.flips:
            mirrored, pairs = plain.flip(flip), self.pairs if LEFT_RIGHT + 2 in flip else ()
            if pairs:  # channels of clicks and of an earlier answer
                for first in range(1, plain.shape[1], outputs[0].shape[1]):
                    mirrored = mirrored[:, swap(pairs, plain.shape[1], first)]
            output = self.inferer(mirrored, network, *args, **kwargs)
            output = output.flip(flip) if output.ndim == inputs.ndim else output
            outputs.append(output[:, swap(pairs, output.shape[1])] if pairs else output)
        found = outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(0)
        if not found.isfinite().all():  # its class would be the first
            names = getattr(inputs, "meta", {}).get("filename_or_obj", "this batch")
            raise ValueError(
                f"prediction must be finite, got NaN or infinity of {names}; run with --amp false"
            )
        return found
