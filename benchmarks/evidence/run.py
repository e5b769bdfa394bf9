"""Runs what plan.yaml names, by the bundles' own training and evaluation; one JSON a run.

python benchmarks/evidence/run.py ../shared/data --budget smoke|cpu|gpu
    [--only 'hippocampus-unet-default-*'] [--dry_run] [--jobs 8] [--out DIR]

A finished run is never repeated, and a training that was killed goes on from its last epoch. A run
that fails leaves its error in its JSON and is tried again with --retry. The JSONs are in
results/BUDGET/; weights are in DIR. Tables and figures: tables.py.
"""

from __future__ import annotations

import csv
import fnmatch
import gc
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fire
import torch
import yaml

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import differences  # noqa: E402
from common import device_name  # noqa: E402
from planning import Run, case_lists, planned  # noqa: E402

from med3dinsight_ext.io.files import write_atomic  # noqa: E402
from med3dinsight_ext.quickstart import bundle_run  # noqa: E402
from med3dinsight_ext.training.history import read_history  # noqa: E402


def peak_megabytes(reset: bool = False) -> float:
    """Peak memory of this process since the last reset; the device's where there is one."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def circumstances() -> dict[str, Any]:
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "monai", "pytorch-ignite", "transformers", "numpy")
    return {
        "commit": commit, "device": device_name(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "versions": {name: version(name) for name in packages},
    }  # fmt: skip


def steps_of(run: Run, results: Path) -> int:
    """Steps of a training; of a matched one as many as fit into the time it may spend."""
    steps = run.settings["steps"]
    if run.matched:
        # Of a CPU only our own share counts, whatever else the machine does.
        key = "train_seconds" if torch.cuda.is_available() else "cpu_seconds"
        seconds = [load(results, name)[key] for name in run.matched]
        steps *= sum(seconds) / seconds[1]
    epoch = run.settings["epoch_steps"]
    return max(1, round(steps / epoch)) * epoch


def carry_out(run: Run, plan: dict[str, Any], root: Path, out: Path, results: Path) -> Any:
    """Train and evaluate; what the JSON says of it."""
    failed = [name for name in run.needs if "error" in load(results, name)]
    if failed:
        raise ValueError(f"runs must have what they start from, but {failed[0]} failed")
    files, folder = case_lists(plan, run, root, out), out / run.name
    steps, epoch = steps_of(run, results), run.settings["epoch_steps"]
    settings = run.overrides | {
        "bundle_root": str(folder), "dataset_dir": str(out), "max_epochs": steps // epoch,
        "train::sampler": {
            "_target_": "torch.utils.data.RandomSampler",  # goes round the cases until it has them
            "data_source": "@train::dataset", "num_samples": epoch * run.settings["batch_size"],
        },
    }  # fmt: skip
    if run.bundle == "pretrain":
        store = {"captions": files["captions"], "store_dir": str(out.parent / "store")}
        settings = store | settings
        both = ["train.json", "embed.json"]  # first, so that training's time is training's
        bundle_run(run.bundle, both, datalist=files["train"], **settings)
    elif run.pretraining:
        settings["pretrained"] = str(weights(out, run.pretraining))
    already = len(read_history(folder / "eval" / "history.jsonl")) * epoch
    begin = time.process_time()
    bundle_run(run.bundle, ["train.json"], datalist=files["train"], **settings)
    cost = folder / "cpu_seconds_a_step.json"
    if already < steps:
        cost.write_text(json.dumps((time.process_time() - begin) / (steps - already)))
    overlays = ["train.json", "evaluate.json"]
    bundle_run(run.bundle, overlays, datalist=files["judge"], subset="all", **settings)
    history, found = read_history(folder / "eval" / "history.jsonl"), folder / "eval"
    report: dict[str, Any] = {
        "steps": sum(row["steps"] for row in history),
        "train_seconds": sum(row["seconds"] for row in history),
        "cpu_seconds": json.loads(cost.read_text()) * steps,
        "resumed_at": already,
        "first_epoch": history[0] if history else None,  # a probe has no epochs
        "last_epoch": history[-1] if history else None,
    }  # fmt: skip
    if run.bundle == "pretrain":
        return report | {"retrieval": json.loads((found / "retrieval.json").read_text())}
    transfer = json.loads((found / "transfer.json").read_text())
    transfer |= {"file": run.pretraining or "", "loaded": len(transfer["loaded"])}
    with (found / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return report | {
        "transfer": transfer,
        "metrics": json.loads((found / "metrics.json").read_text()),
        "cases": [_case(row, root) for row in rows],
    }


def _case(row: dict[str, str], root: Path) -> dict[str, Any]:
    """A row of cases.csv with numbers, and with the image's path below the data root."""
    known: dict[str, Any] = {"case": row["image"].removeprefix(f"{root}/")}
    for key, value in row.items():
        if key not in ("case", "image"):
            try:
                known[key] = float(value)
            except ValueError:
                known[key] = value
    return known


def rounded(report: dict[str, Any]) -> dict[str, Any]:
    """The same with five digits, and None for what is not a number."""
    text = json.dumps(report)
    return json.loads(
        text, parse_float=lambda x: float(f"{float(x):.5g}"), parse_constant=lambda _: None
    )


def weights(out: Path, name: str) -> Path:
    return out / name / "models" / "model.pt"


def load(results: Path, name: str) -> dict[str, Any]:
    """The JSON of a run; waits for it if a process beside this one is at it."""
    while not (path := results / f"{name}.json").exists():
        time.sleep(2)
    return json.loads(path.read_text())


def execute(run: Run, plan: dict[str, Any], root: Path, out: Path, results: Path) -> None:
    """Carry out a run and write its JSON, whether it works or fails."""
    path, earlier = results / f"{run.name}.json", out / "earlier" / f"{run.name}.json"
    record = {"name": run.name, "bundle": run.bundle, **run.about, **circumstances()}
    record["settings"] = run.settings
    before = json.loads(earlier.read_text()) if earlier.exists() else {}
    errors = [*before.get("failed_before", []), *([before["error"]] if "error" in before else [])]
    if errors:
        record["failed_before"] = errors
    gc.collect()
    peak_megabytes(reset=True)
    begin = time.perf_counter()
    try:
        record |= rounded(carry_out(run, plan, root, out, results))
    except (Exception, SystemExit) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = f"{type(cause).__name__}: {cause}"
        record["error"] = text.replace(str(out), "OUT").replace(str(root), "DATA")
        print(f"failed: {run.name}: {text}", flush=True)
    seconds = time.perf_counter() - begin
    record |= rounded({"seconds": seconds, "peak_megabytes": peak_megabytes()})
    write_atomic(path, lambda draft: draft.write_text(json.dumps(record) + "\n"))
    if "error" not in record:  # keep what others start from
        (out / run.name / "models" / "last.ckpt").unlink(missing_ok=True)
        if run.bundle != "pretrain":
            shutil.rmtree(out / run.name)


def finished(run: Run, results: Path, retry: bool) -> bool:
    """Whether a run has its JSON.

    Raises:
        ValueError: it has one that was made with other settings.
    """
    if not (results / f"{run.name}.json").exists():
        return False
    record, ours = load(results, run.name), json.loads(json.dumps(run.settings))
    theirs = run.pinned | record["settings"]
    if other := [key for key in ours | theirs if theirs.get(key) != ours.get(key)]:
        raise ValueError(
            f"plan must keep the settings of finished runs, got other {', '.join(other)} for "
            f"{run.name}; give the budget another name, or move its JSON away to run it again"
        )
    return not (retry and "error" in record)


def unfinished(runs: dict[str, Run], results: Path, out: Path, only: str, retry: bool) -> list[Run]:
    """Runs to do, with what they need: the weights of a finished one may be on another machine."""
    open_ = [run for run in runs.values() if not finished(run, results, retry)]
    names = {run.name for run in open_ if fnmatch.fnmatch(run.name, only)}
    for run in reversed(runs.values()):
        if run.name in names:
            names |= {run.name for run in open_} & set(run.needs)
            if run.pretraining and not weights(out, run.pretraining).exists():
                names.add(run.pretraining)
    return [run for run in runs.values() if run.name in names]


def expected_seconds(run: Run, records: list[differences.Record]) -> float:
    """From those of the same kind; NaN where there is none yet."""
    names = ("task", "corpus", "backbone")
    kind = [*(run.about.get(name) for name in names), run.settings.get("mode")]
    found = []
    for record in records:
        same = [*(record.get(name) for name in names), record["settings"].get("mode")]
        if same == kind and "error" not in record:
            rest = record["seconds"] - record["train_seconds"]
            step = record["train_seconds"] / max(record["steps"], 1)  # a probe has none
            found.append(step * run.settings["steps"] + rest)
    return statistics.median(found) if found else float("nan")


def main(
    data: str,
    budget: str = "smoke",
    out: str = "evidence_runs",
    results: str | None = None,
    plan: str | None = None,
    only: str = "*",
    dry_run: bool = False,
    jobs: int = 1,
    retry: bool = False,
) -> None:
    """Do what is left of a budget.

    Args:
        data: folder that the plan's data folders are in.
        budget: of the plan.
        out: folder for stores, weights and unfinished trainings.
        results: folder for the JSONs; default: results/ beside this file.
        plan: YAML file; default: plan.yaml beside this file.
        only: shell pattern of names; what they need comes along.
        dry_run: only list the runs, with the time that finished ones let expect.
        jobs: processes side by side.
        retry: failed runs again.
    """
    content = yaml.safe_load(Path(plan or HERE / "plan.yaml").read_text())
    root, work = Path(data).resolve(), (Path(out) / budget).resolve()
    folder = Path(results or HERE / "results").resolve() / budget
    todo = unfinished(planned(content, budget), folder, work, only, retry)
    done = [record for each in folder.parent.glob("*") for record in differences.results(each)]
    seconds = [expected_seconds(run, done) for run in todo]
    for run, expected in zip(todo, seconds, strict=True):
        print(f"{run.name}  {expected:.0f} s")
    print(f"{len(todo)} runs to do, {sum(seconds) / 60 / jobs:.0f} minutes")
    if dry_run:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (work / "earlier").mkdir(parents=True, exist_ok=True)
    for run in todo:  # so that nobody takes it for this one's
        if (before := folder / f"{run.name}.json").exists():
            shutil.move(before, work / "earlier" / before.name)
    fixed = (content, root, work, folder)
    if jobs == 1:
        for run in todo:
            execute(run, *fixed)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(execute, run, *fixed) for run in todo]:
            future.result()


if __name__ == "__main__":
    fire.Fire(main)
