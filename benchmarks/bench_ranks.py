"""Training from a prepared copy: waiting for data, and two ranks against one.

python benchmarks/bench_ranks.py [--folder DIR]

``seg-finetune`` with its own network, 96^3 patches of CT-like volumes, one thread and two loader
workers a rank, on two cores; the first epoch, in which workers start, is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import fire
import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from bench_gpu import volumes  # noqa: E402
from common import spread, write  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.io.configs import with_shared  # noqa: E402

VOLUMES, SIZE, EPOCHS, REPEATS = 6, (256, 256, 128), 2, 2


class Waiting:
    """Adds a line an epoch to a file: steps, seconds, and seconds that waited for a batch.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.ask)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self.get)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end)

    def start(self, engine: Engine) -> None:
        self.begin, self.waited, self.steps = perf_counter(), 0.0, 0

    def ask(self, engine: Engine) -> None:
        self.asked = perf_counter()

    def get(self, engine: Engine) -> None:
        self.waited += perf_counter() - self.asked
        self.steps += 1

    def end(self, engine: Engine) -> None:
        row = {"steps": self.steps, "seconds": perf_counter() - self.begin, "waited": self.waited}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def trained(root: Path, ranks: int, number: int) -> dict[str, float]:
    """Patches a second of all ranks, and the share of time that rank 0 waited for data."""
    out = root / f"{ranks}-{number}"
    out.mkdir()
    waiting = {"_target_": "bench_ranks.Waiting", "path": f"$'{out}/' + str(@rank) + '.jsonl'"}
    overlay = out / "waiting.json"
    overlay.write_text(
        json.dumps({"rank": "$ignite.distributed.get_rank()", "train_handlers::waiting": waiting})
    )
    configs = bundles_dir() / "seg-finetune" / "configs"
    files = with_shared(str(configs / "train.json"))
    files += [str(configs / "multi_gpu_train.json")] if ranks > 1 else []
    options = {
        "bundle_root": out, "datalist": root / "list.jsonl", "prepared": root / "copy",
        "val_fraction": 0, "batch_size": 1, "patches_per_volume": 1, "num_workers": 2,
        "max_epochs": EPOCHS, "steps_per_epoch": VOLUMES // ranks, "device": "$torch.device('cpu')",
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    subprocess.run(
        [sys.executable, "-m", *(launcher if ranks > 1 else ()), "monai.bundle", "run"]
        + ["--config_file", str([*files, str(overlay)]), *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"},
    )
    lines = [path.read_text().splitlines()[1:] for path in sorted(out.glob("?.jsonl"))]
    rows = [[json.loads(line) for line in of_rank] for of_rank in lines]
    seconds = sum(row["seconds"] for row in rows[0])
    steps = sum(row["steps"] for of_rank in rows for row in of_rank)
    waited = sum(row["waited"] for row in rows[0])
    return {"patches_per_second": steps / seconds, "waiting": waited / seconds}


def main(folder: str | None = None) -> None:
    """Write results/ranks.json."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        items = volumes(root, VOLUMES, SIZE)
        for i, item in enumerate(items):
            image: Any = nib.load(item["image"])
            item["label"] = str(root / f"label{i}.nii.gz")
            label = (np.asarray(image.dataobj) > 0).astype(np.uint8)
            nib.save(nib.Nifti1Image(label, image.affine), item["label"])
        (root / "list.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        trained(root, 1, REPEATS)  # prepares the copy
        load = os.getloadavg()[0]
        runs = {ranks: [trained(root, ranks, i) for i in range(REPEATS)] for ranks in (1, 2)}
        found = {
            ranks: {key: spread([row[key] for row in rows]) for key in rows[0]}
            for ranks, rows in runs.items()
        }
        rate = {ranks: row["patches_per_second"]["median"] for ranks, row in found.items()}
        write("ranks", {"ranks": found, "ratio": rate[2] / rate[1], "load_average": load})


if __name__ == "__main__":
    fire.Fire(main)
