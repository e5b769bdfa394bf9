"""Cost of a dense step beside a reconstruction step of the bare network.

python benchmarks/dense/speed.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from monai.networks.nets import SegResNet, UNet
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import write  # noqa: E402
from med3dinsight_ext.embeddings.grid_targets import GridTargets  # noqa: E402
from med3dinsight_ext.losses.dense import DenseLoss  # noqa: E402
from med3dinsight_ext.models.dense import DenseStudent  # noqa: E402
from med3dinsight_ext.models.student import block_mask  # noqa: E402

SIZE, BATCH, POINTS, DIMS = (64, 64, 64), 2, 1024, [24, 40, 64]
NETWORKS = {
    "unet": lambda: UNet(3, 1, 1, [32, 64, 128, 256], [2, 2, 2], num_res_units=2, norm="INSTANCE"),
    "segresnet": lambda: SegResNet(init_filters=16, in_channels=1, out_channels=1),
}


def cpu_seconds(step: Callable[[], None], repeats: int = 5) -> float:
    """Median process time of a step, after one that warms up."""
    found = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        step()
        found.append(time.process_time() - begin)
    return statistics.median(found[1:])


def measure(name: str) -> dict[str, float]:
    torch.manual_seed(0)
    network: nn.Module = NETWORKS[name]()
    volume = torch.rand(BATCH, 1, *SIZE)
    points = torch.rand(BATCH, len(DIMS), POINTS, 3) * (torch.tensor(SIZE) - 1)
    target = GridTargets(
        [torch.randn(BATCH, POINTS, d) for d in DIMS],
        [torch.ones(BATCH, POINTS, dtype=torch.bool)] * len(DIMS),
        points,
        volume,
    )
    student, loss = DenseStudent(network, DIMS, SIZE), DenseLoss(reconstruction_weight=100.0)

    def bare() -> None:
        mask = block_mask(volume, 0.3, 8)
        network(volume.masked_fill(mask, 0)).sub(volume).square()[mask].mean().backward()

    def dense() -> None:
        loss(student(volume, points), target).backward()

    one, two = cpu_seconds(bare), cpu_seconds(dense)
    return {"bare_s": one, "dense_s": two, "ratio": two / one}


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = {"size": SIZE, "batch": BATCH, "points": POINTS, "dims": DIMS}
    figures = settings | {name: measure(name) for name in NETWORKS}
    write("speed", figures, Path(__file__).parent / "results")
