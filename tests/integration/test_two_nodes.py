"""Two nodes of one rank, over loopback, are one node of two ranks and one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import environment, free_port

PROGRAM = str(Path(__file__).with_name("node_step.py"))


def start(nodes: int, ranks: int, *words: str) -> None:
    """Run the program on this machine as so many nodes of so many ranks."""
    launches = [[sys.executable, PROGRAM, *words]]
    if nodes * ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--master_addr", "127.0.0.1"]
        shape = ["--master_port", str(free_port()), "--nnodes", str(nodes)]
        launches = [
            [*torchrun, *shape, "--nproc_per_node", str(ranks), "--node_rank", str(node)]
            + launches[0][1:]
            for node in range(nodes)
        ]
    jobs = [
        subprocess.Popen(x, env=environment(), stderr=subprocess.PIPE, text=True) for x in launches
    ]
    try:
        errors = [job.communicate(timeout=240)[1] for job in jobs]
    finally:
        for job in jobs:
            job.terminate()  # torchrun ends its ranks; nothing where it has ended
    assert [job.returncode for job in jobs] == [0] * nodes, errors[0][-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["siglip", "info_nce"])
def test_loss_and_gradients_do_not_depend_on_the_nodes(kind: str, tmp_path: Path) -> None:
    for name, nodes, ranks in (("one", 1, 1), ("ranks", 1, 2), ("nodes", 2, 1)):
        start(nodes, ranks, "step", kind, str(tmp_path / name))
    one, ranks, nodes = (torch.load(tmp_path / name) for name in ("one", "ranks", "nodes"))
    assert one.keys() == ranks.keys() == nodes.keys() and one["heads.image.weight"].abs().sum() > 0
    for name, value in one.items():
        assert torch.equal(ranks[name], nodes[name])
        assert torch.allclose(value, nodes[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.slow
def test_two_nodes_go_on_within_an_epoch_as_if_nothing_had_happened(tmp_path: Path) -> None:
    start(2, 1, "train", "0", str(tmp_path / "whole"))
    for kill in ("4", "0"):
        start(2, 1, "train", kill, str(tmp_path / "killed"))
    one, other = (torch.load(tmp_path / name / "model.pt") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["0.weight"], torch.zeros(3, 2))
