"""Two nodes of one rank, over loopback, are one node of two ranks and one process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import environment, free_port

PROGRAM = str(Path(__file__).with_name("node_step.py"))


def launch(nodes: int, ranks: int, *words: str, timeout: float = 240) -> tuple[list[int], str]:
    """Exit statuses of the program as so many nodes of so many ranks, and their errors.

    Args:
        nodes: launched on this machine.
        ranks: of each node.
        words: arguments of the program.
        timeout: seconds after which a node that still runs fails the test.
    """
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
        errors = [job.communicate(timeout=timeout)[1] for job in jobs]
    finally:
        for job in jobs:
            job.terminate()  # torchrun ends its ranks; nothing where it has ended
    return [job.returncode for job in jobs], "".join(errors)


def start(nodes: int, ranks: int, *words: str) -> None:
    """``launch`` of nodes that end well."""
    codes, errors = launch(nodes, ranks, *words)
    assert codes == [0] * nodes, errors[-3000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a training of two nodes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    start(2, 1, "train", "never", str(folder))
    return folder


@pytest.mark.slow
def test_losses_and_gradients_do_not_depend_on_the_nodes(tmp_path: Path) -> None:
    for name, nodes, ranks in (("one", 1, 1), ("ranks", 1, 2), ("nodes", 2, 1)):
        start(nodes, ranks, "step", "siglip,info_nce", str(tmp_path / name))
    one, ranks, nodes = (torch.load(tmp_path / name) for name in ("one", "ranks", "nodes"))
    assert one.keys() == ranks.keys() == nodes.keys() == {"siglip", "info_nce"}
    for kind, values in one.items():
        assert values["heads.image.weight"].abs().sum() > 0
        for name, value in values.items():
            assert torch.equal(ranks[kind][name], nodes[kind][name])
            assert torch.allclose(value, nodes[kind][name], rtol=1e-5, atol=1e-7), (kind, name)


@pytest.mark.slow
def test_two_nodes_go_on_within_an_epoch_as_if_nothing_had_happened(
    tmp_path: Path, whole: Path
) -> None:
    for end in ("all:4", "never"):
        start(2, 1, "train", end, str(tmp_path / "cut"))
    same_model(whole, tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_ends_the_other_and_the_next_start_goes_on(
    lost: int, tmp_path: Path, whole: Path
) -> None:
    codes, errors = launch(2, 1, "train", f"{lost}:4", str(tmp_path / "cut"), timeout=90)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
    assert "gloo/transport/tcp" in errors  # its own error, not that of the lost node
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert saved["position"]["step"] == 3 and saved["trainer"]["epoch_length"] == 5
    start(2, 1, "train", "never", str(tmp_path / "cut"))
    same_model(whole, tmp_path / "cut")


def same_model(folder: Path, other: Path) -> None:
    one, two = (torch.load(path / "model.pt") for path in (folder, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["0.weight"], torch.zeros(3, 2))
