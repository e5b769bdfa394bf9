"""A round: training on the labels so far, in a process of its own."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from monailabel.interfaces.datastore import Datastore
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.utils.async_tasks.utils import tasks

from med3dinsight_ext.data.labels import read_label
from med3dinsight_ext.io.memory import total_memory
from med3dinsight_ext.monailabel.app.datastores import on_grid
from med3dinsight_ext.monailabel.app.requests import check_training
from med3dinsight_ext.monailabel.app.versions import ROUND, adopt_round, weights_of
from med3dinsight_ext.monailabel.server import class_names
from med3dinsight_ext.training.history import read_history

logger = logging.getLogger(__name__)
GIB = 2**30
NICE = 5  # inference goes first
# Not for clients: which expression of the config runs, from which file, and where results are sent
OWN = {"run_id": "run", "model_filename": "model.pt", "tracking_uri": ""}


def end_with(server: int) -> None:
    """End this process when the server is gone: a killed server's training must not go on."""
    while os.getppid() == server:
        time.sleep(0.5)
    os._exit(1)


def memory(process: psutil.Process) -> int:
    """Bytes of a process and its children; pages that they share count once where known."""
    found = 0
    for part in (process, *process.children(recursive=True)):
        try:
            info = part.memory_full_info()
        except psutil.Error:  # it has ended
            continue
        found += getattr(info, "pss", info.rss)
    return found


def end_above(limit: float) -> None:
    """End this process when it needs more memory than this, in GiB."""
    process = psutil.Process()
    while (used := memory(process)) <= limit * GIB:
        time.sleep(1)
    print(
        f"ValueError: memory of a training must be at most {limit:g} GiB, got "
        f"{used / GIB:.1f}; lower batch_size in the bundle's train.json, or raise memory_gb in the "
        "training's options; the model stays as it was",
        flush=True,
    )
    os._exit(1)


class Training(BundleTrainTask):
    """A bundle's train.json on the labels so far, from its model.pt.

    The weights are written into a folder of their own and replace model.pt at the end, so that no
    annotator's model changes during a training, and a training that is stopped changes nothing.
    """

    @property
    def models(self) -> Path:
        return Path(self.bundle_path) / "models"

    def config(self) -> dict[str, Any]:
        half = max(1, round(total_memory() / GIB / 2))
        options = super().config() | {"model_filename": ["model.pt"], "memory_gb": half}
        return {key: value for key, value in options.items() if key not in ("run_id", "tracking_uri")}

    def stats(self) -> dict[str, Any]:
        """Progress and score, as viewers show them."""
        score = weights_of(self.models)["validation"] or {}
        found: dict[str, Any] = {"best_metric": next(iter(score.values()))} if score else {}
        name = Path(self.bundle_path).name
        for task in tasks("train"):
            if task["status"] == "RUNNING" and task["request"].get("model") == name:
                begin = datetime.fromisoformat(task["start_ts"]).timestamp()
                path = Path(self.bundle_path) / "eval" / "history.jsonl"
                fresh = path.exists() and path.stat().st_mtime >= begin
                rows = read_history(path) if fresh else []
                found["epoch"] = rows[-1]["epoch"] if rows else 0
                found["total_epochs"] = task["request"].get("max_epochs", 50)
        return found

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> Any:
        check_training(request)
        if not request.get("pretrained", True):
            raise ValueError("pretrained must be true, got false; train from scratch by the bundle")
        limit = request.get("memory_gb") or self.config()["memory_gb"]
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise ValueError(f"memory_gb must be above 0, got {limit!r}")
        lock = FileLock(self.models / ".training")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"trainings of a bundle must not overlap, got a second one of {self.bundle_path}; "
                "wait until the other server's has ended"
            ) from error
        threading.Thread(target=end_above, args=(limit,), daemon=True).start()
        os.nice(NICE)
        with lock:
            shutil.rmtree(self.models / ROUND, ignore_errors=True)  # of one that was stopped
            super().__call__(request | OWN, datastore)
            kept = "now serves the new weights" if adopt_round(self.models) else "keeps its weights"
            logger.info("%s %s", Path(self.bundle_path).name, kept)
        return {}

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        overrides["ckpt_dir"] = str(self.models / ROUND)
        return overrides

    def _fetch_datalist(self, request: dict[str, Any], datastore: Datastore) -> Any:
        names = class_names(Path(self.bundle_path))
        items = []
        for item in super()._fetch_datalist(request, datastore):
            if item["label"].endswith(".nrrd"):
                item["label"] = on_grid(item["label"], item["image"])
            try:
                read_label(item, names)
            except ValueError as error:
                logger.warning("left out: %s", error)
            else:
                items.append(item)
        if not items:
            raise ValueError("labels must be there for a training, got none; save one first")
        return items
