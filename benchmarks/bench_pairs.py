"""Time and memory of the alignment losses of many pairs, as under many ranks.

python benchmarks/bench_pairs.py

Forward and backward over n pairs of one target space, as each rank computes them of the gathered
tokens, by one thread, in a process of its own: seconds of the processor, and memory at most
beyond the tokens. ``partial_transport``, whose time grows with n³, is measured at 4096 alone.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from time import process_time

import fire
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from common import write  # noqa: E402
from med3dinsight_ext.embeddings.targets import SliceTargets  # noqa: E402
from med3dinsight_ext.losses.alignment import KINDS, AlignmentLoss  # noqa: E402
from med3dinsight_ext.models.student import StudentOutput  # noqa: E402

PAIRS, LENGTH, SLICES = (4096, 16_384), 512, 16


def megabytes(name: str) -> float:
    """Memory of this process: VmRSS now, VmHWM at most since it was set back."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) / 1e3


def compute(kind: str, n: int) -> dict[str, float]:
    """Costs of one loss and its gradient."""
    shape = (n // SLICES, SLICES)
    yes, zero = torch.ones(shape, dtype=torch.bool), torch.zeros(shape)
    unit = F.normalize(torch.randn(*shape, LENGTH), dim=-1)
    tokens = torch.randn(*shape, LENGTH, requires_grad=True)
    module = AlignmentLoss(kind, text_weight=0, dims={"joint": LENGTH})
    number, volume = zero.long(), torch.zeros(shape[0], 1, 1, 1, 1)
    target = SliceTargets(unit, unit, yes, yes, number, zero, number, volume, number)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    before, begin = megabytes("VmRSS"), process_time()
    module(StudentOutput({"joint": tokens}, None, None), target).backward()
    return {"cpu_seconds": process_time() - begin, "megabytes": megabytes("VmHWM") - before}


def main(kind: str | None = None, pairs: int = 0) -> None:
    if kind:
        torch.set_num_threads(1)
        compute(kind, 64)  # loads the libraries
        print(json.dumps(compute(kind, pairs)))
        return
    rows = []
    for n in PAIRS:
        for kind in KINDS if n == PAIRS[0] else [k for k in KINDS if k != "partial_transport"]:
            words = [sys.executable, __file__, kind, str(n)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            rows.append({"kind": kind, "pairs": n, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    write("pairs", {"length": LENGTH, "rows": rows})


if __name__ == "__main__":
    fire.Fire(main)
