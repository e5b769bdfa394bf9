"""Left and right parotid on test cases: flips that swap paired classes, and flips that do not.

python benchmarks/bench_headneck.py DATA [--out DIR] [--arms auto,auto_4mm]

A finished run is not repeated; each has the 84 training and 21 validation cases of the defaults.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fire

sys.path.insert(0, str(Path(__file__).parent))
from bench_finetune import trained  # noqa: E402
from common import write  # noqa: E402

COARSE = {"spacing": [4.0, 4.0, 4.0], "patch_size": [64, 64, 48], "val_interval": 5}
ARMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto_4mm": COARSE,
    "plain_4mm": COARSE | {"mirror_axes": [0], "mirror_pairs": []},
}
GOAL = 0.72  # mean Dice of the defaults


def main(data: str, out: str = "headneck_run", arms: str | tuple[str, ...] = tuple(ARMS)) -> None:
    """Train and evaluate each arm, and write results/headneck.json with those that are done."""
    root = Path(data)
    source = {
        "dataset_dir": data,
        "datalist": str(root / "dataset.json"),
        "split": str(root / "split.json"),
    }
    runs = {}
    for arm in [arms] if isinstance(arms, str) else arms:
        folder, settings = str(Path(out) / arm), source | ARMS[arm]
        scores = trained("headneck", "seg-finetune", folder, settings, settings)
        seconds = json.loads((Path(folder) / "seconds.json").read_text())
        runs[arm] = {
            "settings": ARMS[arm],
            "train_seconds": seconds,
            "test": json.loads(scores.read_text()),
        }
        write("headneck", {"goal_dice": GOAL, "runs": runs})


if __name__ == "__main__":
    fire.Fire(main)
