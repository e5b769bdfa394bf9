"""Share of the teacher's codes that a dense student explains."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import torch
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from monai.handlers import from_engine
from torch import Tensor


class ExplainedVariance(Metric):
    """1 - squared error / squared codes, the mean over network levels and teacher layers.

    Codes have no mean and about unit variance, so 0 is what a constant reaches.
    """

    def __init__(self) -> None:
        super().__init__(output_transform=from_engine(["pred", "label"]))

    def reset(self) -> None:
        self._error: Tensor | None = None
        self._total: Tensor | None = None

    def update(self, output: Any) -> None:
        """Add a batch.

        Args:
            output: a ``DenseOutput`` and ``GridTargets``.
        """
        for pred, target in zip(*output, strict=True) if isinstance(output[0], list) else [output]:
            weight = [valid[..., None].double() for valid in target.valid]
            total = torch.stack(
                [(c.double().square() * w).sum() for c, w in zip(target.codes, weight, strict=True)]
            )
            error = torch.stack(
                [
                    torch.stack(
                        [
                            ((guess.double() - c.double()).square() * w).sum()
                            for guess, c, w in zip(level, target.codes, weight, strict=True)
                        ]
                    )
                    for level in pred.codes
                ]
            )
            self._error = error if self._error is None else self._error + error
            self._total = total if self._total is None else self._total + total

    def compute(self) -> float:
        """Raises NotComputableError without a valid point."""
        if self._error is None or self._total is None:
            raise NotComputableError("ExplainedVariance must see a batch before it is computed")
        error, total = idist.all_reduce(self._error), idist.all_reduce(self._total)
        return float((1 - error / total.clamp(min=1e-12)).mean())
