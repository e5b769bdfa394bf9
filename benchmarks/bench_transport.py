"""Partial optimal transport against POT: speed, agreement, memory.

python benchmarks/bench_transport.py [--repeats 5]
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import fire
import numpy as np
import ot
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import spread, timed, write  # noqa: E402
from med3dinsight_ext.losses.partial_transport import partial_transport_loss  # noqa: E402
from med3dinsight_ext.losses.transport import solve  # noqa: E402

GOAL = 1e-3  # largest error, in units of 1 / n


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


def nodes(loss: Tensor) -> int:
    """Operations that autograd recorded."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def speed(repeats: int, n: int = 256, d: int = 512) -> dict[str, Any]:
    z, y = pairs(n, d)
    leaf = z.requires_grad_()
    ours = lambda: partial_transport_loss(leaf, y, 0.95, 0.03).backward()  # noqa: E731
    theirs = lambda: pots_loss(leaf, y).backward()  # noqa: E731
    ours(), theirs()  # the first call allocates memory
    both = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    return {
        "n": n,
        "d": d,
        "ours_seconds": spread([a for a, _ in both]),
        "pot_seconds": spread([b for _, b in both]),
        "speedup": spread([b / a for a, b in both]),
        "ours_recorded_operations": nodes(partial_transport_loss(leaf, y, 0.95, 0.03)),
        "pot_recorded_operations": nodes(pots_loss(leaf, y)),
    }


def costs(n: int) -> dict[str, Tensor]:
    """Float64 costs: cosine, and distance divided by its largest value."""
    z, y = (F.normalize(value.double(), dim=1) for value in pairs(n, 16, n))
    distance = (2 - 2 * z @ y.mT).clamp(min=0).sqrt()
    return {"cosine": 1 - z @ y.mT, "distance": distance / distance.max()}


def oracle(cost: Tensor, mass: float, epsilon: float) -> tuple[np.ndarray, str, float, float]:
    """POT's plan, its solver, its last change and its excess over a marginal (times n).

    Where the plain solver exceeds a marginal by more than GOAL, because its kernel underflows or it
    has not converged, POT's solver in the log domain is used.
    """
    n = len(cost)
    share = np.full(n, 1 / n)
    for method, limit in (("sinkhorn", 50_000), ("sinkhorn_log", 200_000)):
        with np.errstate(all="ignore"):
            plan, log = ot.partial.entropic_partial_wasserstein(
                share,
                share,
                cost.numpy(),
                reg=epsilon,
                m=mass,
                method=method,
                numItermax=limit,
                stopThr=1e-13,
                log=True,
            )
        excess = float(n * max(plan.sum(0).max(), plan.sum(1).max()) - 1)
        if excess < GOAL:
            break
    return plan, method, float(log["err"][-1]), max(0.0, excess)


def agreement() -> dict[str, Any]:
    """Largest difference of a plan's entry from POT's in float64, times n, over a grid."""
    rows: list[list[Any]] = []
    for n in (2, 3, 8, 33, 128):
        for kind, cost in costs(n).items():
            for mass in (0.3, 0.8, 0.95, 1.0):
                for epsilon in (0.01, 0.03, 0.1, 1.0):
                    found = solve(cost[None].float(), mass, epsilon)
                    plan, method, move, excess = oracle(cost, mass, epsilon)
                    error = np.abs(found.log_plan[0].double().exp().numpy() - plan).max() * n
                    row = [float(error), float(found.residual), move, excess, method]
                    rows.append([kind, n, mass, epsilon, *row])
    return {
        "columns": ["cost", "n", "mass", "epsilon", "error times n", "residual", "POT's last move"],
        "worst_error_times_n": max(row[4] for row in rows),
        "worst_residual": max(row[5] for row in rows),
        "rows": rows,
    }


def peak(n: int = 4096, d: int = 512) -> None:
    """Print the rise of a new process's peak memory by forward and backward at n, in MB."""
    z, y = pairs(64, d)
    partial_transport_loss(z.requires_grad_(), y).backward()  # loads the libraries
    z, y = pairs(n, d)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    partial_transport_loss(z.requires_grad_(), y, 0.95, 0.1).backward()
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
            "pot_version": ot.__version__,
            "speed": speed(repeats),
            "peak_mb_at_4096": float(done.stdout.split()[-1]),
            "agreement": agreement(),
        },
    )


if __name__ == "__main__":
    fire.Fire(main)
