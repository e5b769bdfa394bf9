"""What a large dataset costs: a CT prepared, embedded and trained on; the losses of many pairs.

python benchmarks/bench_costs.py [volume|losses ...] [--small]

- volume: seconds of the processor, by one thread, of a 512 x 512 x 300 CT of 0.8 x 0.8 x 1 mm
  with the defaults of the bundle pretrain: the prepared copy at 1.5 mm, the store with the small
  teacher and templates as captions (extra demo), and a training step that reads the copy.
- losses: forward and backward of each alignment loss over n pairs of one target space, as every
  rank computes it of the gathered tokens; memory at most beyond the tokens.

results/costs.json keeps the part that a run does not measure again.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from bench_gpu import ct  # noqa: E402
from common import RESULTS, machine, spread  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.io.configs import with_shared  # noqa: E402
from med3dinsight_ext.losses.alignment import KINDS, AlignmentLoss  # noqa: E402

PAIRS, LENGTH, SLICES = (4096, 16_384), 512, 16


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Seconds of the processor that a call takes in this process: other jobs take none of them."""
    begin = process_time()
    call()
    return process_time() - begin


def status(name: str) -> float:
    """Megabytes of this process: VmRSS now, VmHWM at most since ``forget_peak``."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) / 1e3


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def volume(root: Path, small: bool) -> dict[str, Any]:
    """Costs of one volume, of three: in the copy, in the store, and in training."""
    from ignite.engine import Events
    from monai.bundle import ConfigWorkflow

    torch.set_num_threads(1)
    size, voxel = ((64, 64, 40) if small else (512, 512, 300)), (0.8, 0.8, 1.0)
    base, count, steps = ct(size, 0), 3, 3
    (root / "images").mkdir()
    for i in range(count):
        image = nib.Nifti1Image(np.roll(base, i, 2), np.diag([*voxel, 1.0]))
        nib.save(image, root / "images" / f"{i}.nii.gz")
    config = ConfigWorkflow(
        with_shared(bundles_dir() / "pretrain" / "configs" / "train.json"),
        workflow_type="train",
        logging_file=False,
        bundle_root=str(root),
        dataset_dir=str(root / "images"),
        prepared=str(root / "copy"),
        modality="CT",
        num_workers=0,
        val_fraction=0.0,
        steps_per_epoch=steps,
        device="$torch.device('cpu')",
        **({"patch_size": [32] * 3} if small else {}),
    )
    epochs = config.parser["max_epochs"]
    config.parser["max_epochs"] = 1
    config.initialize()
    get = config.parser.get_parsed_content
    copy, store, items = get("prepared_copy"), get("store"), get("items")
    store.embedding_dims  # noqa: B018  loads the teacher
    gc.collect()
    forget_peak()
    before = status("VmRSS")
    preparing = [cpu_seconds(lambda item=item: copy.make(item)) for item in items]  # type: ignore[misc]
    peak = status("VmHWM") - before
    filling = [cpu_seconds(lambda item=item: store.fill([item])) for item in items]  # type: ignore[misc]
    entry = Path(store.fill(items[:1])[0]["targets"])
    slices = store.entries.cut(items[0], entry, None).slices
    encoding = [cpu_seconds(lambda: store.teacher.encode_image(slices)) for _ in items]
    moments: list[float] = []
    trainer = get("train::trainer")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: moments.append(process_time()))
    config.run()
    stored = [p.stat().st_size for p in (root / "copy").rglob("*.b2nd")]
    entries = [p.stat().st_size for p in (root / "store").rglob("*") if p.stem == entry.stem]
    return {
        "size": size,
        "voxel_mm": voxel,
        "teacher": store.teacher.fingerprint.split("\n")[0][:60],
        "slices": len(slices),
        "batch": get("batch_size"),
        "epochs": epochs,
        "patch": get("patch_size"),
        "megabytes": {
            "nii.gz": (root / "images" / "0.nii.gz").stat().st_size / 1e6,
            "copy": sum(stored) / count / 1e6,
            "store": sum(entries) / 1e6,
        },
        "cpu_seconds": {
            "preparing": spread(preparing),
            "filling": spread(filling),
            "encoding": spread(encoding),
            "step": spread(np.diff(moments).tolist()),
        },
        "preparing_peak_megabytes": peak,
    }


def loss(kind: str, n: int) -> None:
    """Print a line: seconds of the processor and megabytes of one loss and its gradient."""
    from med3dinsight_ext.embeddings.targets import SliceTargets
    from med3dinsight_ext.models.student import StudentOutput

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def compute(n: int) -> None:
        shape = (n // SLICES, SLICES)
        yes, zero = torch.ones(shape, dtype=torch.bool), torch.zeros(shape)
        unit = F.normalize(torch.randn(*shape, LENGTH), dim=-1)
        tokens = torch.randn(*shape, LENGTH, requires_grad=True)
        module = AlignmentLoss(kind, text_weight=0, dims={"joint": LENGTH})
        number, volume = zero.long(), torch.zeros(shape[0], 1, 1, 1, 1)
        target = SliceTargets(unit, unit, yes, yes, number, zero, number, volume, number)
        output = StudentOutput({"joint": tokens}, None, None)
        gc.collect()
        forget_peak()
        before = status("VmRSS")
        seconds = cpu_seconds(lambda: module(output, target).backward())
        row = {"cpu_seconds": seconds, "megabytes": status("VmHWM") - before}
        print(json.dumps(row), flush=True)

    compute(64)  # loads the libraries
    compute(n)


def losses(root: Path, small: bool) -> dict[str, Any]:
    """``loss`` of each kind and n, in a process of its own."""
    rows = []
    for n in (256, 512) if small else PAIRS:
        for kind in KINDS:
            if kind == "partial_transport" and n > 4096:
                continue  # 64 times the time of 4096
            words = [sys.executable, __file__, "loss", kind, str(n)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            row = {"kind": kind, "pairs": n, **json.loads(done.stdout.splitlines()[-1])}
            print(row, flush=True)
            rows.append(row)
    return {"length": LENGTH, "rows": rows}


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {"volume": volume, "losses": losses}


def main(*parts: str, small: bool = False) -> None:
    if parts[:1] == ("loss",):
        return loss(parts[1], int(parts[2]))
    path = RESULTS / "costs.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    for part in parts or tuple(PARTS):
        with tempfile.TemporaryDirectory() as folder:
            row = PARTS[part](Path(folder), small) | {"load_average": os.getloadavg()[0]}
        figures = machine() | {k: v for k, v in figures.items() if k in PARTS} | {part: row}
        print(json.dumps({part: row}, indent=1), flush=True)
        if not small:
            path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
