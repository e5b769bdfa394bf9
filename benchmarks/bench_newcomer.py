"""Three commands of the first screen on a folder of 20 CTs with labels for 8.

python benchmarks/bench_newcomer.py ../shared/data/headneck [--steps 24]

The folder is made of development cases. So few steps show the time around the training, not a
useful network.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import fire

sys.path.insert(0, str(Path(__file__).parent))
from common import write  # noqa: E402

IMAGES, LABELS = 20, 8


def make_folder(data: Path, folder: Path) -> None:
    """Copy images and labels of development cases into images/ and labels/."""
    ids = json.loads((data / "split.json").read_text())["development"][:IMAGES]
    for name, source, chosen in (
        ("images", "imagesTr", ids),
        ("labels", "labelsTr", ids[:LABELS]),
    ):
        (folder / name).mkdir(parents=True)
        for id_ in chosen:
            shutil.copy(data / source / f"{id_}.nii.gz", folder / name)


def run(words: list[str], folder: Path) -> dict[str, Any]:
    """Seconds of a command, on the clock and of the processor."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    subprocess.run([sys.executable, "-m", "med3dinsight_ext", *words], cwd=folder, check=True)
    seconds, after = perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"words": len(words) + 3, "seconds": seconds, "processor_seconds": used}


def main(data: str, steps: int = 24) -> None:
    """Run the commands and write results/newcomer.json."""
    home, length = "runs/scans", ["--steps", str(steps)]
    commands = {
        "pretrain": ["pretrain", "scans", *length],
        "finetune": ["finetune", "scans", "--pretrained", f"{home}/pretrain", *length],
        "predict": ["predict", f"{home}/finetune", "scans"],
    }
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(data), Path(folder, "scans"))
        figures = {name: run(words, Path(folder)) for name, words in commands.items()}
        written = sorted(path.name for path in Path(folder, home, "finetune/predictions").iterdir())
    predicted = sum(name.endswith("_seg.nii.gz") for name in written)
    page = "predictions.html" in written
    found = {"images": IMAGES, "labels": LABELS, "steps": steps, "commands": figures}
    write("newcomer", found | {"predictions": predicted, "page": page})


if __name__ == "__main__":
    fire.Fire(main)
