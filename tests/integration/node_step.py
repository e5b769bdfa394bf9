"""Started by torchrun: one step of a student, or a training that is cut off and resumed."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, DistributedSampler
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from med3dinsight_ext.losses.alignment import AlignmentLoss
from med3dinsight_ext.models.student import StudentOutput
from med3dinsight_ext.training import engine
from med3dinsight_ext.training.checkpoints import checkpoint
from med3dinsight_ext.training.ranks import finalize
from med3dinsight_ext.training.seeding import EpochSeed

LEFT = 9  # exit status


class Heads(nn.Module):
    """Tokens of two spaces from features, as DDP wraps a student."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"image": nn.Linear(7, 6), "text": nn.Linear(7, 5)})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {name: head(features) for name, head in self.heads.items()}


def step(kind: str) -> dict[str, Tensor]:
    """A loss and its gradients for this rank's rows of one batch."""
    from losses.test_alignment import batch

    torch.manual_seed(0)
    network, (_, target) = Heads(), batch(b=4)
    features = torch.randn(4, 4, 7, generator=torch.Generator().manual_seed(5))
    rank, ranks = idist.get_rank(), idist.get_world_size()
    mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    model = nn.parallel.DistributedDataParallel(network) if ranks > 1 else network
    loss = AlignmentLoss(kind)
    value = loss(
        StudentOutput(model(features[mine]), None, None), type(target)(*(x[mine] for x in target))
    )
    value.backward()
    return {"loss": value.detach(), **{name: p.grad for name, p in network.named_parameters()}}


def lose_node() -> None:
    """Kill torchrun and this rank of it, as a node without power."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def train(end: str, path: Path) -> None:
    """Train with checkpoints after every step.

    Args:
        end: "never"; "all:4", all ranks stop at step 4; or "1:4", the node of rank 1 is lost then.
        path: folder of the checkpoints.
    """
    torch.manual_seed(7)
    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    data = Dataset(
        [{"image": torch.full((2,), float(i)), "label": torch.ones(1)} for i in range(10)]
    )
    sampler = DistributedSampler(data, even_divisible=True, shuffle=True)
    loader = DataLoader(data, sampler=sampler)
    model = nn.parallel.DistributedDataParallel(network)
    trainer = SupervisedTrainer("cpu", 2, loader, model, optimizer, nn.MSELoss())

    who, _, step = end.partition(":")

    def cut_off(running: Engine) -> None:
        if str(running.state.iteration) != step:
            return
        if who == "all":
            os._exit(0)
        if who == str(idist.get_rank()):
            lose_node()

    trainer.add_event_handler(Events.ITERATION_STARTED, cut_off)
    EpochSeed(3, loader).attach(trainer)
    best = checkpoint({"model": network}, path, "model.pt")
    state = {"network": network, "optimizer": optimizer, "trainer": trainer, "best": best}
    engine.CHECK_STEPS = 1
    engine.run(trainer, None, [best], state, path, minutes=1e-9)


def no_threads_left() -> None:
    """Exit with LEFT if a thread of the process group lives while Python ends; it may abort."""
    tasks = Path("/proc/self/task").glob("*/comm")
    if names := [name for task in tasks if "gloo" in (name := task.read_text())]:
        print("left", names, file=sys.stderr, flush=True)
        os._exit(LEFT)


if __name__ == "__main__":
    what, argument, where = sys.argv[1:]
    atexit.register(no_threads_left)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        idist.sync()
    if what == "step":
        found = {kind: step(kind) for kind in argument.split(",")}
        if idist.get_rank() == 0:
            torch.save(found, where)
    else:
        train(argument, Path(where))
    finalize()
