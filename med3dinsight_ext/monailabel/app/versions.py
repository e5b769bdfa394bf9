"""Which weights answer a request, and the answers that they have given."""

from __future__ import annotations

from collections import OrderedDict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from med3dinsight_ext.training.click_inferer import History
from med3dinsight_ext.training.record import read_record


def weights_of(bundle: Path) -> dict[str, Any]:
    """Date, epochs and validation score of a bundle's weights; None where nothing is recorded."""
    path = bundle / "models" / "model.pt"
    try:
        record = read_record(path) or {}
    except ValueError:  # of other weights
        record = {}
    metric = record.get("best_metric")
    return {
        "saved": f"{datetime.fromtimestamp(path.stat().st_mtime, timezone.utc):%Y-%m-%d %H:%M} UTC",
        "epochs": record.get("epochs"),
        "validation": {metric[0]: round(metric[1], 4)} if metric else None,
    }


class Versions:
    """``weights_of`` a bundle, read again when its model.pt changes, and its latest histories.

    Args:
        bundle: its folder.
        most: largest number of images with a history, which holds the scores of a volume in half
            precision.
    """

    def __init__(self, bundle: Path, most: int = 4) -> None:
        self.bundle = bundle
        self.most = most
        self._weights: tuple[int, dict[str, Any]] = (0, {})
        self._histories: OrderedDict[tuple[Any, ...], History] = OrderedDict()

    def _changed(self) -> int:
        return (self.bundle / "models" / "model.pt").stat().st_mtime_ns

    @property
    def weights(self) -> dict[str, Any]:
        if self._weights[0] != (changed := self._changed()):
            self._weights = changed, weights_of(self.bundle)
        return self._weights[1]

    def history(self, image: str) -> History:
        """The answers of these weights for an image file with this content so far."""
        stat = Path(image).stat()
        key = image, stat.st_mtime_ns, stat.st_size, self._changed()
        found = self._histories.setdefault(key, History())
        self._histories.move_to_end(key)
        while len(self._histories) > self.most:
            self._histories.popitem(last=False)
        return found

    def text(self) -> str:
        """A sentence for viewers."""
        weights = self.weights
        score = ", ".join(f"{k} {v:.3f}" for k, v in (weights["validation"] or {}).items())
        return f"Weights of {weights['saved']}; validation: {score or 'not recorded'}."
