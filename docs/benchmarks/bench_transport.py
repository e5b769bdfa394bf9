"""Partial optimal transport against POT: speed, agreement, memory.

python docs/benchmarks/bench_transport.py [--repeats 5]
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import fire
import ot
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import spread, timed, write  # noqa: E402

from med3dinsight_ext.losses import partial_transport  # noqa: E402
from med3dinsight_ext.transport import solve  # noqa: E402


def pairs(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=random)
    return z, F.normalize(z + torch.randn(n, d, generator=random), dim=1)


def pots_loss(z: Tensor, y: Tensor, mass: float = 0.95, epsilon: float = 0.03) -> Tensor:
    """The v2 loss through POT's solver at its defaults, recorded by autograd."""
    n = len(z)
    cost = (1 - F.normalize(z, dim=1) @ y.mT) / 2
    share = torch.full((n,), 1 / n)
    plan = ot.partial.entropic_partial_wasserstein(
        share, share, cost, reg=epsilon, m=torch.tensor(mass)
    )
    return -(plan + 1e-10).log().diagonal().mean()


def speed(repeats: int, n: int = 256, d: int = 512) -> dict[str, Any]:
    z, y = pairs(n, d)
    leaf = z.requires_grad_()
    ours = lambda: partial_transport(leaf, y, 0.95, 0.03).backward()  # noqa: E731
    theirs = lambda: pots_loss(leaf, y).backward()  # noqa: E731
    ours()
    both = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    return {
        "n": n,
        "d": d,
        "ours_seconds": spread([a for a, _ in both]),
        "pot_seconds": spread([b for _, b in both]),
        "speedup": spread([b / a for a, b in both]),
    }


def agreement() -> dict[str, Any]:
    """Largest difference of a plan's entry from POT's in float64, times n, over a grid."""
    rows = []
    for n in (2, 3, 8, 33, 128):
        z, y = (value.double() for value in pairs(n, 16, n))
        cost = 1 - F.normalize(z, dim=1) @ y.mT
        cost = cost / cost.max()
        share = torch.full((n,), 1 / n, dtype=torch.float64)
        for mass in (0.3, 0.8, 0.95, 1.0):
            for epsilon in (0.01, 0.03, 0.1, 1.0):
                found = solve(cost[None].float(), mass, epsilon)
                plan = ot.partial.entropic_partial_wasserstein(
                    share, share, cost, reg=epsilon,
                    m=torch.tensor(mass, dtype=torch.float64), numItermax=50_000, stopThr=1e-13,
                )  # fmt: skip
                error = float((found.log_plan[0].double().exp() - plan).abs().max()) * n
                rows.append([n, mass, epsilon, error, float(found.residual)])
    return {
        "columns": ["n", "mass", "epsilon", "largest error times n", "residual"],
        "worst_error_times_n": max(row[3] for row in rows),
        "rows": rows,
    }


def peak(n: int = 4096, d: int = 512) -> None:
    """Print by how many MB forward and backward at n raise the peak of a fresh process."""
    z, y = pairs(64, d)
    partial_transport(z.requires_grad_(), y).backward()  # libraries loaded
    z, y = pairs(n, d)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    partial_transport(z.requires_grad_(), y, 0.95, 0.1).backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main(repeats: int = 5, only_peak: bool = False) -> None:
    if only_peak:
        return peak()
    command = [sys.executable, __file__, "--only_peak"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    write(
        "transport",
        {
            "seed": 0,
            "speed": speed(repeats),
            "peak_mb_at_4096": float(done.stdout.split()[-1]),
            "agreement": agreement(),
        },
    )


if __name__ == "__main__":
    fire.Fire(main)
