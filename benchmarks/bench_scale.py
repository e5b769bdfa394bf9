"""Prepared copies, memory and start-up at the scale of many volumes.

python benchmarks/bench_scale.py [chunks|prepare|memory|start_seg|start_pretrain ...] [--folder DIR]

- chunks: 96^3 patches of a 512 x 512 x 300 int16 CT from .nii.gz, blosc2 and zarr, warm page cache.
- prepare: volumes a minute with one process and with two, in turn.
- memory: resident memory over an epoch of 5,000 small volumes, direct and prepared.
- start_seg, start_pretrain: a run with a list of 100,000 volumes, to the end of its first step,
  and resumed. Volumes and entries are hard links to a few files; the recorded hashes are invented.
  CPU seconds are those of all its processes.

results/scale.json keeps the parts that a run does not measure again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from bench_gpu import ct, volumes  # noqa: E402
from common import RESULTS, machine, spread, timed  # noqa: E402
from med3dinsight_ext.data.prepared import PreparedCopy, RandReadPreparedd  # noqa: E402
from med3dinsight_ext.data.volumes import ReadVolumed, ScaleByModalityd  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.io.configs import with_shared  # noqa: E402
from med3dinsight_ext.io.images import open_volume  # noqa: E402

PATCH = (96, 96, 96)
BASES = 4  # files that the simulated ones are links to


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def reading(read: Callable[[], Any], count: int) -> dict[str, Any]:
    """Patches a second and megabytes a patch of ``count`` reads, three times."""
    read()
    begin = bytes_read()
    rates = [count / timed(lambda: [read() for _ in range(count)]) for _ in range(3)]
    return {
        "patches_per_second": spread(rates),
        "megabytes_read": (bytes_read() - begin) / (3 * count * 1e6),
    }


def chunks(root: Path) -> dict[str, Any]:
    """The candidates for the format of a prepared copy, and the transform itself."""
    import blosc2
    import zarr
    from monai.transforms import RandSpatialCropd
    from zarr.codecs import BloscCodec, Crc32cCodec

    blosc2.set_nthreads(1)
    volume = ct((512, 512, 300), 0)
    random = np.random.default_rng(0)

    def place() -> tuple[slice, ...]:
        starts = (int(random.integers(n - p + 1)) for n, p in zip(volume.shape, PATCH, strict=True))
        return tuple(slice(a, a + p) for a, p in zip(starts, PATCH, strict=True))

    path = root / "ct.nii.gz"
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    found = {
        "nii.gz, decoded whole": reading(lambda: np.asarray(open_volume(path).dataobj)[place()], 2)
    }
    found["nii.gz, decoded whole"]["megabytes"] = path.stat().st_size / 1e6
    for side, block in ((32, 32), (64, 32), (64, 16)):
        name = root / f"{side}_{block}.b2nd"
        settings = blosc2.CParams(
            codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.BITSHUFFLE], nthreads=1
        )
        blosc2.asarray(volume, chunks=(side,) * 3, blocks=(block,) * 3, cparams=settings,
                       urlpath=str(name))  # fmt: skip
        row = reading(lambda f=name: blosc2.open(str(f), "r")[place()], 40)  # type: ignore[misc]
        found[f"blosc2, chunk {side}, block {block}"] = row | {
            "megabytes": name.stat().st_size / 1e6
        }
    for side in (32, 64):
        folder = root / f"{side}.zarr"
        codecs = [
            BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=2),
            Crc32cCodec(),
        ]
        array = zarr.create_array(
            folder, shape=volume.shape, dtype="i2", chunks=(side,) * 3, compressors=codecs
        )
        array[:] = volume
        row = reading(lambda f=folder: zarr.open_array(f, mode="r")[place()], 20)  # type: ignore[misc]
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
        found[f"zarr v3, chunk {side}, crc32c"] = row | {"megabytes": size}
    item = {"image": str(path), "modality": "CT"}
    copy = PreparedCopy(root / "copy", [ReadVolumed("image"), ScaleByModalityd("image")])
    copy.check([item])
    read = RandReadPreparedd(copy, [], RandSpatialCropd("image", PATCH, random_size=False))
    row = reading(lambda: read(item), 40)
    size = copy.path(item["prepared"], "image").stat().st_size / 1e6
    found["prepared copy, with checksums, as MetaTensor"] = row | {"megabytes": size}
    return found


def prepare(root: Path, count: int = 8) -> dict[str, Any]:
    """Volumes a minute by one process and by two: 256 x 256 x 128, 1 x 1 x 2 mm to 1.5 mm."""
    from monai.transforms import Spacingd

    size = (256, 256, 128)
    items = volumes(root, count, size)
    rates: dict[int, list[float]] = {1: [], 2: []}
    load = [ReadVolumed("image"), ScaleByModalityd("image"), Spacingd("image", [1.5] * 3)]
    for _ in range(3):
        for workers in rates:
            shutil.rmtree(root / "copy", ignore_errors=True)
            copy = PreparedCopy(root / "copy", load, workers)
            seconds = timed(lambda copy=copy: copy.check([dict(item) for item in items]))  # type: ignore[misc]
            rates[workers].append(60 * count / seconds)
    stored = sum(p.stat().st_size for p in (root / "copy").rglob("*.b2nd")) / count
    return {
        "size": size,
        "volumes_per_minute": {str(n): spread(row) for n, row in rates.items()},
        "ratio": spread([b / a for a, b in zip(rates[1], rates[2], strict=True)]),
        "megabytes_per_volume": stored / 1e6,
        "megabytes_nii_gz": os.path.getsize(items[0]["image"]) / 1e6,
        "load_average": os.getloadavg()[0],
    }


def resident() -> float:
    """Megabytes of this process and its children that are in memory; shared pages count once."""
    names = [f"/proc/{pid}" for pid in os.listdir("/proc") if pid.isdigit()]
    total, mine = 0.0, os.getpid()
    for name in names:
        try:
            parent = int(Path(name, "stat").read_text().rsplit(")", 1)[1].split()[1])
            if mine in (parent, int(name.rpartition("/")[2])):
                text = Path(name, "smaps_rollup").read_text()
                total += int(text.split("Pss:")[1].split()[0]) / 1e3
        except (OSError, IndexError):
            continue
    return total


def memory(root: Path, count: int = 5000) -> dict[str, Any]:
    """Memory over an epoch of small volumes with two workers."""
    from monai.data import DataLoader
    from monai.transforms import Compose, RandSpatialCropd

    from med3dinsight_ext.data.cache import MemoryDataset

    random = np.random.default_rng(0)
    array = random.integers(-1000, 1000, (64, 64, 40), dtype=np.int16)
    items = []
    for i in range(count):
        path = root / f"m{i}.nii"
        nib.save(nib.Nifti1Image(np.roll(array, i % 64, 0), np.eye(4)), path)
        items.append({"image": str(path), "modality": "CT"})
    load = [ReadVolumed("image"), ScaleByModalityd("image")]
    crop = RandSpatialCropd("image", (32, 32, 32), random_size=False)
    copy = PreparedCopy(root / "mcopy", load, 2)
    copy.check(items)
    found: dict[str, Any] = {"volumes": count, "cache_gb": 0.2}
    for name, transforms, limit in (
        ("direct", [*load, crop], 0.2),
        ("prepared", [RandReadPreparedd(copy, [], crop)], 0.0),
    ):
        data = MemoryDataset(items, Compose(transforms), limit)
        seen = []
        for step, _ in enumerate(DataLoader(data, batch_size=2, num_workers=2, shuffle=True)):
            if step % (count // 80) == 0:
                seen.append(resident())
        rest = seen[len(seen) // 10 :]
        found[name] = {
            "megabytes": {"first": rest[0], "last": rest[-1], "min": min(rest), "max": max(rest)},
            "growth": rest[-1] / rest[0] - 1,
            "range": max(rest) / min(rest) - 1,
            "most_megabytes": max(seen),
            "limit_megabytes": 1000 * limit + 1500,
            "kept": data.cache_num,
        }
    return found


def simulated(root: Path, bundle: str, count: int) -> dict[str, Any]:
    """A dataset, its prepared copy and its store, of hard links; settings of the bundle."""
    from monai.bundle import ConfigWorkflow

    (root / "images").mkdir()
    keys = ["image", "label"] if bundle == "seg-finetune" else ["image"]
    random = np.random.default_rng(0)
    for base in range(BASES):
        label: np.ndarray = np.zeros((40, 40, 40), np.uint8)
        label[10:30, 10:30, 10:30] = 1
        for key, array in (
            ("image", random.integers(-500, 500, label.shape, np.int16)),
            ("label", label),
        ):
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / f"base{base}.{key}.nii.gz")
    rows = []
    for i in range(count):
        row = {key: f"images/{i}.{key}.nii.gz" for key in keys}
        for key in keys:
            os.link(root / f"base{i % BASES}.{key}.nii.gz", root / row[key])
        rows.append(row)
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "bundle_root": str(root), "dataset_dir": str(root), "prepared": str(root / "prepared"),
        "modality": "CT", "spacing": [1.0] * 3, "patch_size": [32] * 3, "batch_size": 2,
        "steps_per_epoch": 1, "val_fraction": 0.0, "max_epochs": 1, "num_workers": 2,
    }  # fmt: skip
    few = root / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:BASES]))
    files = with_shared(bundles_dir() / bundle / "configs" / "train.json")
    made = ConfigWorkflow(
        files, logging_file=False, workflow_type="train", datalist=str(few), **settings
    )
    made.initialize()
    get = made.parser.get_parsed_content
    copy, store = get("prepared_copy"), get("store") if bundle == "pretrain" else None
    items = get("items")
    copy.check(items)
    done = store.fill(items) if store else []
    if store:
        print("teacher", store.embedding_dims)
    links, index, lines = [], [], []
    for i, row in enumerate(rows):
        for key in keys:
            path = str(root / row[key])
            stat = os.stat(path)
            digest = f"{i:060x}{key[:4].encode().hex()[:4]}"
            lines.append(json.dumps([path, stat.st_size, stat.st_mtime_ns, digest]))
    for place in ("prepared", "store"):
        (root / place).mkdir(exist_ok=True)
        (root / place / "files.jsonl").write_text("\n".join(lines))
    copy._load_index()
    if store:
        store._hashes.__init__(root / "store" / "files.jsonl")
    for i, row in enumerate(rows):
        item = {**{key: str(root / row[key]) for key in keys}, "modality": "CT"}
        old = copy._records[items[i % BASES]["prepared"]]
        index.append(json.dumps(old | {"entry": copy.entry(item), "image": item["image"]}))
        new = json.loads(index[-1])["entry"]
        links += [(copy.path(old["entry"], key), copy.path(new, key)) for key in keys]
        if store:
            for suffix in (".safetensors", ".json"):
                source = Path(done[i % BASES]["targets"]).with_suffix(suffix)
                links.append((source, store.path(item).with_suffix(suffix)))
    for source, target in links:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    (root / "prepared" / "index.jsonl").write_text("\n".join(index))
    return {**settings, "datalist": str(root / "list.jsonl"), "skip_bad": False}


RUN = """
import json, resource, sys, time
begin = time.perf_counter()
from monai.bundle import ConfigWorkflow
files, settings = json.loads(sys.argv[1])
made = ConfigWorkflow(files, logging_file=False, workflow_type="train", **settings)
made.initialize()
made.run()
own = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e6
children = resource.getrusage(resource.RUSAGE_CHILDREN)
row = {
    "seconds": time.perf_counter() - begin,
    "cpu_seconds": time.process_time() + children.ru_utime + children.ru_stime,
    "gigabytes": own,
    "worker_gigabytes": children.ru_maxrss / 1e6,
}
print(json.dumps(row))
"""


def start(root: Path, bundle: str, count: int = 100_000) -> dict[str, Any]:
    """Seconds and memory of a run of one step, and of the same run resumed for one more."""
    found: dict[str, Any] = {"volumes": count}
    settings = simulated(root, bundle, count)
    files = with_shared(bundles_dir() / bundle / "configs" / "train.json")
    for name, epochs in (("start", 1), ("resume", 2)):
        text = json.dumps([files, {**settings, "max_epochs": epochs}])
        done = subprocess.run(
            [sys.executable, "-c", RUN, text], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-6000:])
        row = json.loads(done.stdout.strip().splitlines()[-1])
        found[name] = row | {"load_average": os.getloadavg()[0]}
    return found


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "chunks": chunks,
    "prepare": prepare,
    "memory": memory,
    "start_seg": partial(start, bundle="seg-finetune"),
    "start_pretrain": partial(start, bundle="pretrain"),
}


def main(*parts: str, folder: str | None = None, count: int | None = None) -> None:
    path = RESULTS / "scale.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    for part in parts or tuple(PARTS):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            row = PARTS[part](Path(name), **({"count": count} if count else {}))
        figures = machine() | {k: v for k, v in figures.items() if k in PARTS} | {part: row}
        print(json.dumps({part: row}, indent=1), flush=True)
        if count is None:
            path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
