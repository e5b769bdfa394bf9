"""Train from scratch and score on test cases with the fine-tuning bundles.

python benchmarks/bench_finetune.py hippocampus ../shared/data/hippocampus [--out DIR]
python benchmarks/bench_finetune.py adrenal ../shared/data/adrenal/adrenalmnist3d_64.npz

A finished run is not repeated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import fire

sys.path.insert(0, str(Path(__file__).parent))
from common import write  # noqa: E402
from med3dinsight_ext.training.launch import bundle_run  # noqa: E402

HERE = Path(__file__).parent


def trained(name: str, bundle: str, out: str, train: dict[str, Any], test: dict[str, Any]) -> Path:
    """Train and evaluate with the overlay <name>.yaml unless done; the file of scores."""
    folder, overlay = Path(out), str(HERE / f"{name}.yaml")
    scores = folder / "eval" / ("retrieval" if bundle == "pretrain" else "metrics")
    scores, record = scores.with_suffix(".json"), folder / "seconds.json"
    if not record.exists():
        begin = perf_counter()
        bundle_run(bundle, ["train.json", overlay], bundle_root=out, **train)
        record.write_text(json.dumps(perf_counter() - begin))
    if not scores.exists():
        bundle_run(bundle, ["train.json", overlay, "evaluate.json"], bundle_root=out, **test)
    return scores


def measure(name: str, bundle: str, out: str, train: dict[str, Any], test: dict[str, Any]) -> None:
    """Train and evaluate one config, and write results/<name>.json."""
    metrics = json.loads(trained(name, bundle, out, train, test).read_text())
    seconds = json.loads((Path(out) / "seconds.json").read_text())
    write(name, {"train_seconds": seconds, "test": metrics})


def hippocampus(data: str, out: str = "hippocampus_run") -> None:
    """140 development cases, 60 test cases."""
    root = Path(data)
    source = {
        "dataset_dir": data,
        "datalist": str(root / "dataset.json"),
        "split": str(root / "split.json"),
    }
    measure("hippocampus", "seg-finetune", out, source, source)


def adrenal(data: str, out: str = "adrenal_run") -> None:
    """MedMNIST's own split: train (a tenth of it for validation) and test."""
    measure(
        "adrenal",
        "cls-finetune",
        out,
        {"dataset_dir": data, "subset": "train"},
        {"dataset_dir": data, "subset": "test"},
    )


if __name__ == "__main__":
    fire.Fire({"hippocampus": hippocampus, "adrenal": adrenal})
