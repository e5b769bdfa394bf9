"""The bundles on two ranks of torchrun: trained, one of them killed, and with few volumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from running import BUNDLES, NETWORKS, command, environment, settings

FAILED = 1  # exit status


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 6)


def train(
    bundle: str,
    root: Path,
    volumes: Path,
    meanwhile: Callable[[subprocess.Popen], None] = lambda job: None,
    overlay: str = "multi_gpu_train.json",
    **changes: Any,
) -> tuple[int, str]:
    """Exit status and errors of a training on two ranks.

    Args:
        bundle: its folder's name.
        root: bundle_root.
        volumes: from ``fakes.write_volumes``.
        meanwhile: called with the running torchrun.
        overlay: of train.json.
        changes: overrides.
    """
    given = settings(bundle, root, volumes, **{**NETWORKS[bundle], **changes})
    del given["device"]
    words = command(bundle, ["train.json", overlay], given)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with (root.parent / f"{root.name}.log").open("w+") as log:
        job = subprocess.Popen([*torchrun, *words], env=environment(), stdout=log, stderr=log)
        try:
            meanwhile(job)
            code = job.wait(200)
        finally:
            job.terminate()
        log.seek(0)
        return code, log.read()


def epochs(root: Path) -> list[int]:
    path = root / "eval" / "history.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return [json.loads(row)["epoch"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_two_ranks_train_the_bundle(bundle: str, tmp_path: Path, volumes: Path) -> None:
    share = 0.5 if bundle == "cls-finetune" else 0.4  # 3 volumes: one rank scores more of them
    code, log = train(bundle, tmp_path / "run", volumes, max_epochs=2, val_fraction=share)
    assert code == 0, [x for x in log.splitlines() if "rror" in x][:12]
    assert epochs(tmp_path / "run") == [1, 2]
    assert (tmp_path / "run" / "models" / "model.pt").exists()


@pytest.mark.slow
def test_two_ranks_fill_the_store_and_name_bad_volumes_of_both(
    tmp_path: Path, volumes: Path
) -> None:
    copy = shutil.copytree(volumes, tmp_path / "volumes")
    images = sorted(copy.glob("*.nii.gz"))
    for bad in (images[0], images[1]):
        bad.write_bytes(b"no volume")
    code, log = train("pretrain", tmp_path / "run", copy, overlay="embed.json")
    assert code != 0
    assert all(f"{bad.name}" in log for bad in images[:2]), log[-3000:]
    entries = list((tmp_path / "run" / "store").glob("??/*.safetensors"))
    assert len(entries) == len(images) - 2


def rank_of(job: subprocess.Popen, rank: int) -> int:
    """Process id of a rank of torchrun."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    mark = f"RANK={rank}".encode()
    (found,) = (
        pid for pid in children if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    return int(found)


@pytest.mark.slow
def test_a_killed_rank_ends_the_training_and_the_next_start_goes_on(
    tmp_path: Path, volumes: Path
) -> None:
    changes: dict[str, Any] = {"max_epochs": 6, "val_interval": 2, "val_fraction": 0.4}
    cut, times = tmp_path / "cut", []

    def kill(job: subprocess.Popen) -> None:
        end = time.monotonic() + 120
        while not epochs(cut) and job.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(rank_of(job, 1), signal.SIGKILL)  # within the epoch that follows
        times.append(time.monotonic())

    code, log = train("pretrain", cut, volumes, kill, **changes)
    assert code == FAILED and "Signal 9 (SIGKILL)" in log, log[-3000:]
    assert time.monotonic() - times[0] < 60
    assert epochs(cut) < [1, 2, 3, 4, 5, 6]
    for root in (cut, tmp_path / "whole"):
        code, log = train("pretrain", root, volumes, **changes)
        assert code == 0, log[-3000:]
        assert epochs(root) == [1, 2, 3, 4, 5, 6]
    one, other = (
        torch.load(root / "models" / "last.ckpt", weights_only=True)
        for root in (cut, tmp_path / "whole")
    )
    for part in ("student", "loss"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())


@pytest.mark.slow
def test_fewer_validation_volumes_than_ranks_name_the_key(tmp_path: Path, volumes: Path) -> None:
    code, log = train("seg-finetune", tmp_path / "run", volumes, val_fraction=0.2)
    assert code == FAILED
    assert "ValueError: validation volumes must be at least as many as the processes, got 1" in log
    few = {"val_fraction": 0, "batch_size": 4}  # of 5 volumes a rank has 3
    code, log = train("seg-finetune", tmp_path / "run", volumes, **few)
    assert code == 0 and epochs(tmp_path / "run") == [1], log[-3000:]
    code, log = train("seg-finetune", tmp_path / "other", volumes, val_fraction=0)
    assert code == 0, log[-3000:]
