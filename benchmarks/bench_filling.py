"""Two processes against one, Ray against one, and workers killed at random moments.

python benchmarks/bench_filling.py [PART ...] [--folder DIR] [--small]

- processes: volumes a minute by one process and by two, in turn: of pure computation (what the
  machine gives two processes at that moment), reading, preparing, and filling the store.
- ray: from the first entry of the store to the last, by Ray with two actors on two cores, and by
  the plain run with two readers and two threads, in turn.
- kills, prepare_kills, ray_kills: a process that fills or prepares is killed at a seeded moment
  of its time, and the job is started again; or an actor of Ray is killed, and Ray goes on. The
  files are compared byte for byte with those of an undisturbed run.

The store's teacher is ``bundled`` (extra demo), and one without weights in the kills.
results/filling.json keeps the parts that a run does not measure again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from bench_gpu import volumes  # noqa: E402
from common import RESULTS, machine, spread  # noqa: E402
from med3dinsight_ext.captions.sources import TemplateCaptions  # noqa: E402
from med3dinsight_ext.data.prepared import PreparedCopy  # noqa: E402
from med3dinsight_ext.data.volumes import (  # noqa: E402
    ReadVolumed,
    ScaleByModalityd,
    read_volume,
)
from med3dinsight_ext.embeddings import cluster  # noqa: E402
from med3dinsight_ext.embeddings.store import Store  # noqa: E402
from med3dinsight_ext.teachers.teacher import Teacher, bundled  # noqa: E402
from med3dinsight_ext.teachers.towers import ImageTower, TextTower  # noqa: E402

KILLS = 10


class Pixels(ImageTower):
    """A teacher without weights, so that a killed process is seldom one that loads them."""

    size, mean, std, fingerprint = 16, (0.0,) * 3, (1.0,) * 3, "pixels"

    def embed(self, pixels: Tensor) -> Tensor:
        return pixels.mean(1).flatten(1) + 0.1


class Lengths(TextTower):
    fingerprint = "lengths"

    def fits(self, text: str) -> bool:
        return True

    def embed(self, texts: list[str]) -> Tensor:
        return torch.tensor([[float(len(text)), 1.0] for text in texts])


@lru_cache(maxsize=1)
def network() -> Teacher:
    """The small bundled teacher; processes that are forked later share its weights."""
    teacher = bundled()
    teacher.encode_image(torch.zeros(1, 1, teacher.image.size, teacher.image.size))
    teacher.encode_text(["image"])
    return teacher


def build(root: Path, readers: int = 1) -> Store:
    return Store(root, network(), TemplateCaptions(), per_plane=8, readers=readers)


def build_light(root: Path, pids: Path | None = None) -> Store:
    """A store that costs little; an actor leaves its number in ``pids``."""
    if pids is not None:
        (pids / str(os.getpid())).touch()
    return Store(root, Teacher(Pixels(), Lengths()), TemplateCaptions(), per_plane=8)


def prepared(root: Path) -> PreparedCopy:
    from monai.transforms import Spacingd

    load = [ReadVolumed("image"), ScaleByModalityd("image"), Spacingd("image", [1.5] * 3)]
    return PreparedCopy(root, load)


def compute(root: Path, items: Sequence[dict]) -> None:
    values = np.random.default_rng(0).random(200_000)
    for _ in items:
        for _ in range(30):
            np.sort(values)


def read(root: Path, items: Sequence[dict]) -> None:
    for item in items:
        read_volume(item["image"])


def prepare(root: Path, items: Sequence[dict]) -> None:
    prepared(root).check([dict(item) for item in items])


def fill(root: Path, items: Sequence[dict]) -> None:
    build(root).fill(items)


def fill_light(root: Path, items: Sequence[dict]) -> None:
    build_light(root).fill(items)


WORK: dict[str, Callable[[Path, Sequence[dict]], None]] = {
    "pure computation": compute,
    "reading": read,
    "preparing": prepare,
    "filling the store": fill,
}


def child(start: Any, work: Callable[[], None]) -> None:
    """One thread, as a worker of a data loader has."""
    torch.set_num_threads(1)
    start.wait()
    work()


def seconds_of(work: Sequence[Callable[[], None]]) -> tuple[float, float]:
    """Seconds that forked processes take together, and the seconds of the processor of each."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(len(work) + 1)
    jobs = [context.Process(target=child, args=(start, one)) for one in work]
    for job in jobs:
        job.start()
    start.wait()
    begin, before = time.perf_counter(), os.times()
    for job in jobs:
        job.join()
        if job.exitcode:
            raise RuntimeError(f"a process ended with {job.exitcode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user
    return time.perf_counter() - begin, (cpu - before.children_system) / len(work)


def processes(root: Path, small: bool) -> dict[str, Any]:
    """Rates of one process and of two, in turn, with the share of a core that each got."""
    torch.set_num_threads(1)
    network()
    items = volumes(root, 4 if small else 8, (64, 64, 32) if small else (256, 256, 128))
    size = os.path.getsize(items[0]["image"]) / 1e6
    found: dict[str, Any] = {
        "volumes": len(items),
        "megabytes_nii_gz": size,
        "load_average": os.getloadavg()[0],
        "kinds": {},
    }
    for name, work in WORK.items():
        rates: dict[int, list[float]] = {1: [], 2: []}
        shares: dict[int, list[float]] = {1: [], 2: []}
        cpu: dict[int, list[float]] = {1: [], 2: []}
        for n in (1, 2) * (1 if small else 3):
            shutil.rmtree(root / "out", ignore_errors=True)
            seconds, own = seconds_of([partial(work, root / "out", items[k::n]) for k in range(n)])
            rates[n].append(60 * len(items) / seconds)
            shares[n].append(own / seconds)
            cpu[n].append(own * n / len(items))
        found["kinds"][name] = {
            "volumes_per_minute": {str(n): spread(row) for n, row in rates.items()},
            "ratio": spread([b / a for a, b in zip(rates[1], rates[2], strict=True)]),
            "share_of_a_core": {str(n): spread(row) for n, row in shares.items()},
            "cpu_seconds_per_volume": {str(n): spread(row) for n, row in cpu.items()},
            "megabytes_per_volume": sum(map(len, files(root / "out").values())) / 1e6 / len(items),
        }
    return found | {"load_average_at_the_end": os.getloadavg()[0]}


def entry_rate(root: Path, skip: int = 2) -> float:
    """Volumes a minute between two entries of a store: without the start of any process."""
    times = sorted(path.stat().st_mtime for path in root.glob("*/*.safetensors"))
    return 60 * (len(times) - 1 - skip) / (times[-1] - times[skip])


def start_ray() -> Any:
    import ray

    path = os.pathsep.join(str(Path(__file__).parents[k]) for k in (0, 1))
    os.environ["PYTHONPATH"] = path  # of the actors
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False)
    return ray


def ray(root: Path, small: bool) -> dict[str, Any]:
    """Rates of Ray with two actors and of the plain run on two cores, in turn."""
    import bench_filling  # the actors find it by this name

    items = volumes(root, 12 if small else 32, (64, 64, 32) if small else (256, 256, 128))
    cluster.PART = 2 if small else 4
    rates: dict[str, list[float]] = {"plain": [], "ray": []}
    running = start_ray()
    load = os.getloadavg()[0]
    try:
        for k in range(1 if small else 3):
            torch.set_num_threads(2)
            plain, other = root / f"plain{k}", root / f"ray{k}"
            build(plain, 2).fill(items)
            rates["plain"].append(entry_rate(plain))
            torch.set_num_threads(1)
            cluster.fill(build(other), items, partial(bench_filling.build, other), workers=2)
            rates["ray"].append(entry_rate(other))
    finally:
        running.shutdown()
    ratios = [b / a for a, b in zip(rates["plain"], rates["ray"], strict=True)]
    return {
        "volumes": len(items),
        "volumes_per_minute": {name: spread(row) for name, row in rates.items()},
        "ratio": spread(ratios),
        "load_average": load,
        "load_average_at_the_end": os.getloadavg()[0],
    }


def files(root: Path) -> dict[str, bytes]:
    """Entries by name; drafts of killed processes and lists of hashes are left out."""
    paths = (p for p in root.rglob("*") if p.is_file() and p.suffix != ".jsonl")
    return {str(p.relative_to(root)): p.read_bytes() for p in paths if p.name[0] != "."}


def kills(root: Path, small: bool, work: Callable[[Path, Sequence[dict]], None]) -> dict[str, Any]:
    """Processes that are killed at seeded moments, and started again."""
    items = volumes(root, 6, (64, 64, 32))
    random = np.random.default_rng(0)
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    work(root / "first", items[:1])  # imports what forked processes share
    whole, _ = seconds_of([partial(work, root / "whole", items)])
    expected, rows = files(root / "whole"), []
    for moment in random.uniform(0, 1, 2 if small else KILLS):
        shutil.rmtree(root / "out", ignore_errors=True)
        start = context.Barrier(2)
        job = context.Process(target=child, args=(start, partial(work, root / "out", items)))
        job.start()
        start.wait()
        time.sleep(moment * whole)
        os.kill(job.pid or 0, signal.SIGKILL)
        job.join()
        there = len(files(root / "out")) if (root / "out").exists() else 0
        seconds_of([partial(work, root / "out", items)])
        equal = files(root / "out") == expected
        row = {"moment": moment, "files_at_the_kill": there, "equal": equal}
        rows.append(row | {"killed": job.exitcode == -signal.SIGKILL})
    return {"files": len(expected), "kills": rows}


def ray_kills(root: Path, small: bool) -> dict[str, Any]:
    """Actors that are killed at seeded moments after the first entry."""
    import bench_filling

    items = volumes(root, 12, (64, 64, 32))
    random = np.random.default_rng(0)
    cluster.PART = 2
    torch.set_num_threads(1)
    build_light(root / "whole").fill(items)
    expected, rows = files(root / "whole"), []
    times = sorted(p.stat().st_mtime for p in (root / "whole").glob("*/*.safetensors"))
    running = start_ray()
    try:
        for k in range(2 if small else KILLS):
            out, pids = root / f"out{k}", root / f"pids{k}"
            pids.mkdir()
            moment, first = float(random.uniform(0, 1)), bool(random.integers(2))
            killed: list[int] = []

            def kill(
                out: Path = out, pids: Path = pids, moment: float = moment,
                first: bool = first, killed: list[int] = killed,
            ) -> None:  # fmt: skip
                while not list(out.glob("*/*.safetensors")):
                    time.sleep(0.01)
                time.sleep(moment * (times[-1] - times[0]) / 2)
                names = sorted(int(path.name) for path in pids.iterdir())
                os.kill(names[0 if first else -1], signal.SIGKILL)
                killed.append(len(list(out.glob("*/*.safetensors"))))

            thread = threading.Thread(target=kill, daemon=True)
            thread.start()
            make = partial(bench_filling.build_light, out, pids)
            cluster.fill(build_light(out), items, make, workers=2)
            thread.join(60)
            equal = files(out) == expected
            entries = killed[0] if killed else None
            row = {"moment": moment, "entries_at_the_kill": entries, "equal": equal}
            rows.append(row | {"actors": len(list(pids.iterdir()))})
    finally:
        running.shutdown()
    return {"volumes": len(items), "files": len(expected), "kills": rows}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "processes": processes,
    "kills": partial(kills, work=fill_light),
    "prepare_kills": partial(kills, work=prepare),
    "ray": ray,
    "ray_kills": ray_kills,
}


def main(*parts: str, folder: str | None = None, small: bool = False) -> None:
    path = RESULTS / "filling.json"
    for part in parts or tuple(PARTS):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            row = PARTS[part](Path(name), small)
        figures = json.loads(path.read_text()) if path.exists() else {}
        figures = machine() | {k: v for k, v in figures.items() if k in PARTS} | {part: row}
        print(json.dumps({part: row}, indent=1), flush=True)
        if not small:
            path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
