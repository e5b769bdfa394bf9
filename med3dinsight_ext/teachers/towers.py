"""Base classes of 2D image and text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


def redraw(network: nn.Module, seed: int) -> nn.Module:
    """Initialise a network's weights anew (matrices as in He et al., 2015) and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        for parameter in network.parameters():
            if parameter.ndim > 1:  # torch's own default shrinks activations layer by layer
                nn.init.kaiming_normal_(parameter)
    return network


class Tower:
    """A frozen encoder that is loaded at its first use; no submodule, so in no checkpoint.

    Subclasses implement ``load``, ``fingerprint`` and ``embed``.

    Attributes:
        fingerprint: identifies the weights; found without loading them.
        device: where the model computes.
    """

    fingerprint: str
    device = torch.device("cpu")
    _seed: int | None = None

    def load(self) -> nn.Module:
        """The network with its trained weights."""
        raise NotImplementedError

    @cached_property
    def network(self) -> nn.Module:
        """The frozen network, loaded here."""
        network = self.load() if self._seed is None else redraw(self.load(), self._seed)
        return network.eval().requires_grad_(False)

    @property
    def model(self) -> Any:
        """The frozen network, on ``device``."""
        return self.network.to(self.device)

    def on(self, device: str | torch.device) -> None:
        """Compute on ``device``."""
        self.device = torch.device(device)

    def randomize(self, seed: int) -> None:
        """Replace the weights by random ones, drawn at the first use."""
        self._seed = seed
        self.fingerprint = f"{self.fingerprint}-random-{seed}"


class ImageTower(Tower):
    """Pixels to embeddings.

    Attributes:
        size: pixels a side of its input.
        mean: of each channel, which the input is normalised by.
        std: of each channel.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings (n, d) of normalised pixels (n, 3, size, size)."""
        raise NotImplementedError


class TextTower(Tower):
    """Texts to embeddings."""

    def fits(self, text: str) -> bool:
        """Whether the encoder takes the whole text."""
        raise NotImplementedError

    def embed(self, texts: list[str]) -> Tensor:
        """Embeddings (n, d) of texts that fit."""
        raise NotImplementedError
