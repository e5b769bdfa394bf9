"""Base classes of 2D image and text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from med3dinsight_ext.io.files import sha256
from med3dinsight_ext.teachers.adapted import adapted_of, load_adapted


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
    source: Any = None  # of the network, where two towers share one
    _seed: int | None = None
    _adapted: tuple[Path, str] | None = None  # file of weights, and its hash

    @property
    def name(self) -> str:
        """Class and weights."""
        return f"{type(self).__name__}:{self.fingerprint}"

    def load(self) -> nn.Module:
        """The network with its trained weights."""
        raise NotImplementedError

    @cached_property
    def network(self) -> nn.Module:
        """The frozen network, loaded here."""
        network = self.load() if self._seed is None else redraw(self.load(), self._seed)
        if self._adapted is not None:
            load_adapted(network, *self._adapted)
        return network.eval().requires_grad_(False)

    @property
    def model(self) -> Any:
        """The frozen network, on ``device``."""
        return self.network.to(self.device)

    def on(self, device: str | torch.device) -> None:
        """Compute on ``device``."""
        self.device = torch.device(device)

    def free(self) -> None:
        """Let go of the network and its memory; the next use loads it again."""
        self.__dict__.pop("network", None)
        if self.source is not None:
            vars(self.source).pop("network", None)

    def randomize(self, seed: int) -> None:
        """Replace the weights by random ones, drawn at the first use."""
        self._seed, self._adapted = seed, None
        self._change(f"random-{seed}")

    def _change(self, what: str) -> None:
        """Other weights from the next use on."""
        self.__dict__.pop("network", None)
        self.fingerprint = f"{self.fingerprint}-{what}"


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

    @property
    def adapted(self) -> bool:
        """Whether the weights are adapted ones."""
        return self._adapted is not None

    def adapt(self, weights: str | Path) -> None:
        """Replace the weights, at the first use, by those that adapt_teacher.yaml wrote.

        Raises:
            ValueError: no such file, or its training did not start from this tower.
        """
        if (start := adapted_of(weights)["tower"]) != self.name:
            raise ValueError(
                f"weights must be adapted from {self.name}, got {weights} of {start}; name that "
                "teacher, or run adapt_teacher.yaml with this one"
            )
        self._adapted = Path(weights), sha256(Path(weights))
        self._change(f"adapted-{self._adapted[1][:16]}")

    def normalised(self, slices: Tensor) -> Tensor:
        """The input of ``embed`` (n, 3, size, size).

        Args:
            slices: (n, 1 or 3, h, w) in [0, 1].
        """
        if slices.shape[2:] != (self.size, self.size):
            slices = F.interpolate(slices, (self.size,) * 2, mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(v, device=slices.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return (slices - mean) / std

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
