"""Ray fills the store as one process does, whichever workers die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import fakes
import pytest
from embeddings.test_store_laws import entries
from ray_store import build
from running import command, environment, settings

from med3dinsight_ext.embeddings import cluster
from med3dinsight_ext.embeddings.cluster import Filler, fill

VOLUMES = 12


@pytest.fixture
def items(tmp_path: Path) -> list[dict]:
    return [fakes.volume(tmp_path / f"{i}.nii.gz", i) for i in range(VOLUMES)]


@pytest.fixture
def whole(items: list[dict], tmp_path: Path) -> dict[str, str]:
    build(tmp_path / "whole").fill(items)
    return entries(tmp_path / "whole")


def test_actors_together_make_the_store_of_one_process(
    items: list[dict], whole: dict[str, str], tmp_path: Path
) -> None:
    fillers = [Filler(partial(build, tmp_path / "store"), "/no/such/folder") for _ in range(2)]
    assert [fillers[i % 2].fill(items[i : i + 1]) for i in range(VOLUMES)] == [""] * VOLUMES
    assert entries(tmp_path / "store") == whole
    Path(items[0]["image"]).write_bytes(b"no volume")
    assert "1 bad of 1" in fillers[0].fill(items[:1])


def test_without_ray_the_extra_is_named(
    items: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    store = build(tmp_path / "store")
    with pytest.raises(ValueError, match=r"package ray, got none; pip install .*ext\[ray\]"):
        fill(store, items, partial(build, tmp_path / "store"), 2)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    yield found
    found.shutdown()


@pytest.mark.slow
def test_ray_fills_the_store_though_its_workers_are_killed(
    ray: Any, items: list[dict], whole: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cluster, "PART", 2)
    pids, root = tmp_path / "pids", tmp_path / "store"
    pids.mkdir()
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while len(killed) < 2 and not done.is_set():
            new = [int(p.name) for p in pids.iterdir() if int(p.name) not in killed]
            if new and len(list(root.glob("*/*.safetensors"))) > len(killed):
                os.kill(new[0], signal.SIGKILL)
                killed.append(new[0])
            time.sleep(0.01)

    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        filled = fill(build(root), items, partial(build, root, pids), workers=2)
    finally:
        done.set()
        killer.join()
    assert len(filled) == VOLUMES and killed
    found = entries(root)
    assert {k: v for k, v in found.items() if "/." not in k} == whole


@pytest.mark.slow
def test_the_overlay_fills_the_store_and_names_bad_volumes(
    ray: Any, tmp_path: Path, items: list[dict]
) -> None:
    volumes = fakes.write_volumes(tmp_path / "volumes", 4)
    given = settings("pretrain", tmp_path, volumes)
    keys = ("bundle_root", "dataset_dir", "datalist", "store_dir", "per_plane", "teacher")
    given = {key: value for key, value in given.items() if key in keys}
    words = command(
        "pretrain", ["train.json", "embed.json", "ray.yaml"], given | {"ray_workers": 1}
    )
    ended = subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True
    )
    assert "4 volumes are in" in ended.stdout, ended.stderr[-3000:]
