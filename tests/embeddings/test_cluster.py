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
from types import SimpleNamespace
from typing import Any

import fakes
import pytest
from embeddings.test_store_laws import entries
from ray_store import build, deadly
from running import command, environment, run, settings

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


def test_a_worker_without_the_folder_fills_no_store_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="store_dir must be absolute where a node has no /no/such"):
        Filler(partial(build, Path("store")), "/no/such/folder")
    assert Filler(partial(build, Path("store")), str(tmp_path)).store.root == Path("store")


def test_without_ray_the_extra_is_named(
    items: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    store = build(tmp_path / "store")
    with pytest.raises(ValueError, match=r"package ray, got none; pip install .*ext\[ray\]"):
        fill(store, items, partial(build, tmp_path / "store"), 2)


class Died(Exception):
    """Ray's RayActorError."""


class NeverBegan(Died):
    """Ray's ActorDiedError."""


class Actors:
    """Ray, but each actor lives in this process, and dies of the volumes ``deadly``."""

    error: Exception = Died("The actor died unexpectedly")

    def __init__(self, has: dict[str, float], deadly: str = "none") -> None:
        self.has, self.deadly, self.made, self.retries = has, deadly, 0, 0
        errors = {"RayActorError": Died, "OutOfMemoryError": MemoryError}
        errors["ActorDiedError"] = NeverBegan
        self.exceptions = SimpleNamespace(**errors)
        self.util = SimpleNamespace(ActorPool=Pool)
        self.init = self.kill = self.shutdown = lambda *args, **options: None

    def is_initialized(self) -> bool:
        return False

    def cluster_resources(self) -> dict[str, float]:
        return self.has

    def remote(self, max_task_retries: int, **options: Any) -> Any:
        self.retries = max_task_retries
        return lambda kind: SimpleNamespace(remote=partial(self.actor, kind))

    def actor(self, kind: Any, *args: Any) -> Any:
        self.made += 1
        filler = kind(*args)

        def fill(part: list[dict]) -> str:
            if any(self.deadly in item["image"] for item in part):
                raise self.error
            return filler.fill(part)

        return SimpleNamespace(fill=SimpleNamespace(remote=lambda part: partial(fill, part)))


class Pool:
    """Ray's ActorPool, one task at a time."""

    def __init__(self, actors: list[Any]) -> None:
        self.actors, self.tasks = actors, []

    def submit(self, call: Any, part: Any) -> None:
        self.tasks.append(call(self.actors[0], part))

    def get_next_unordered(self) -> str:
        return self.tasks.pop(0)()


@pytest.mark.parametrize(
    ("has", "made"),
    [({"CPU": 2.0}, 2), ({"CPU": 8.0, "GPU": 1.0}, 1), ({"CPU": 9.0}, 5), ({}, 1)],
)
def test_no_more_workers_are_made_than_the_cluster_has_places_for(
    has: dict[str, float], made: int, items: list[dict], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    ray = Actors(has)
    monkeypatch.setitem(sys.modules, "ray", ray)
    store = build(tmp_path / "store")
    assert len(fill(store, items, partial(build, tmp_path / "store"), 5)) == VOLUMES
    assert ray.made == made
    assert ("5 workers are more than" in caplog.text) == (made < 5)
    assert len(fill(store, items, partial(build, tmp_path / "store"), 5, "a cluster")) == VOLUMES
    assert ray.made == made + 5  # it may grow


def test_a_part_that_kills_its_workers_is_left_for_the_end_and_named(
    items: list[dict], whole: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(cluster, "PART", 2)
    ray = Actors({"CPU": 1.0}, "/5.nii.gz")
    monkeypatch.setitem(sys.modules, "ray", ray)
    store = build(tmp_path / "store")
    assert len(fill(store, items, partial(build, tmp_path / "store"), 1)) == VOLUMES
    assert entries(tmp_path / "store") == whole and ray.retries == 2
    died, left = [row.message for row in caplog.records if row.levelname == "WARNING"][:2]
    assert died == "a worker died 3 times: The actor died unexpectedly"
    assert left.endswith(f"{items[4]['image']}, {items[5]['image']}")


def test_a_worker_that_cannot_build_the_store_ends_the_job(
    items: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Actors({"CPU": 1.0}, "/5.nii.gz")
    ray.error = NeverBegan("The actor died because of an error\nValueError: no such model")
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(RuntimeError, match="must build the store, got ValueError: no such model"):
        fill(build(tmp_path / "store"), items, partial(build, tmp_path / "store"), 1)


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
def test_a_deadly_volume_ends_no_filling_and_workers_have_places(
    ray: Any, items: list[dict], whole: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(cluster, "PART", 2)
    make = partial(deadly, tmp_path / "store", os.getpid())
    ray.init(include_dashboard=False, num_cpus=1, log_to_driver=False)
    assert len(fill(make(), items, make, workers=3)) == VOLUMES
    assert {k: v for k, v in entries(tmp_path / "store").items() if "/." not in k} == whole
    own = [record.message for record in caplog.records if record.name == cluster.__name__]
    many, died, left = own
    assert "places for: 1" in many and died.startswith("a worker died 3 times: ")
    assert left.endswith(f"{items[4]['image']}, {items[5]['image']}")


@pytest.mark.parametrize("dry", [True, False])
def test_the_overlay_takes_a_shard_and_can_run_dry(
    dry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings("pretrain", tmp_path, fakes.write_volumes(tmp_path / "volumes", 4))
    asked: list[int] = []
    monkeypatch.setattr(cluster, "embed", lambda store, items, *_: asked.append(len(items)))
    files = ["train.json", "embed.json", "ray.yaml"]
    run("pretrain", files, **given, shard="1/3", dry_run=dry)
    out = capsys.readouterr().out
    assert asked == ([] if dry else [2]) and ("2 volumes, 2 of them not in" in out) == dry


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
