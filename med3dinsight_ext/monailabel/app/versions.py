"""Which weights answer a request, those before them, and the answers that they have given."""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.training.click_inferer import History
from med3dinsight_ext.training.record import FILE, read_record

WEIGHTS = "model.pt"
ROUND = "round"  # folder in models/ of a training that has not ended
EARLIER = "earlier"  # folder in models/ of the weights that a round has replaced
BUSY = ".training"  # file in models/ that a training locks

MOST = 4  # images with a history, which holds the scores of a volume in half precision


def weights_of(models: Path) -> dict[str, Any]:
    """Date, epochs and validation score of the weights in a folder; None where not recorded.

    ``start`` is the score of the weights before the round, on the same cases.
    """
    path = models / WEIGHTS
    try:
        record = read_record(path) or {}
    except ValueError:  # of other weights
        record = {}
    metric, start = (record.get(key) for key in ("best_metric", "start_metric"))
    return {
        "saved": f"{datetime.fromtimestamp(path.stat().st_mtime, timezone.utc):%Y-%m-%d %H:%M} UTC",
        "epochs": record.get("epochs"),
        "validation": {metric[0]: round(metric[1], 4)} if metric else None,
        "start": {start[0]: round(start[1], 4)} if start else None,
    }


def has_weights(models: Path) -> bool:
    return (models / WEIGHTS).is_file()


def adopt_round(models: Path) -> bool:
    """Serve the weights of a round that has ended, and keep those before it.

    Without a record beside them no epoch was better, and nothing changes.

    Args:
        models: folder of a bundle.

    Returns:
        Whether the weights are new.
    """
    draft = models / ROUND
    found = has_weights(draft) and (draft / FILE).is_file()
    if found:
        with FileLock(models / ".weights"):
            _copy(models, models / EARLIER)
            _copy(draft, models)
    shutil.rmtree(draft, ignore_errors=True)
    return found


def go_back(models: Path) -> None:
    """Exchange the weights and the earlier ones; a second time leads to the newer ones again.

    Raises:
        ValueError: there are no earlier ones.
        Timeout: a training is running, which would replace them at its end.
    """
    if not has_weights(models / EARLIER):
        raise ValueError(
            f"weights must have earlier ones, got none in {models.parent.name}; a round of "
            "training keeps those before it"
        )
    busy = FileLock(models / BUSY, timeout=0)
    with busy, FileLock(models / ".weights"), tempfile.TemporaryDirectory(dir=models) as kept:
        _copy(models, Path(kept))
        _copy(models / EARLIER, models)
        _copy(Path(kept), models / EARLIER)


def _copy(source: Path, target: Path) -> None:
    """Replace weights and their record by those of another folder, with their date."""
    for name in (WEIGHTS, FILE):
        if (path := source / name).is_file():
            write_atomic(target / name, lambda draft, path=path: shutil.copy2(path, draft))
        else:
            (target / name).unlink(missing_ok=True)


class Versions:
    """``weights_of`` a folder, read again when its files change, and its latest histories.

    Args:
        models: the folder.
    """

    def __init__(self, models: Path) -> None:
        self.models = models
        self._weights: tuple[tuple[int, ...], dict[str, Any]] = ((), {})
        self._histories: OrderedDict[tuple[Any, ...], History] = OrderedDict()

    def _changed(self) -> int:
        return (self.models / WEIGHTS).stat().st_mtime_ns

    @property
    def weights(self) -> dict[str, Any]:
        record = self.models / FILE
        changed = (self._changed(), record.stat().st_mtime_ns if record.is_file() else 0)
        if self._weights[0] != changed:
            self._weights = changed, weights_of(self.models)
        return self._weights[1]

    def history(self, image: str) -> History:
        """The answers of these weights for an image file with this content so far."""
        stat = Path(image).stat()
        key = image, stat.st_mtime_ns, stat.st_size, self._changed()
        found = self._histories.setdefault(key, History())
        self._histories.move_to_end(key)
        while len(self._histories) > MOST:
            self._histories.popitem(last=False)
        return found

    def text(self) -> str:
        """A sentence for viewers."""
        weights = self.weights
        score = ", ".join(f"{k} {v:.3f}" for k, v in (weights["validation"] or {}).items())
        return f"Weights of {weights['saved']}; validation: {score or 'not recorded'}."
