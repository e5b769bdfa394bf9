"""Run a budget of plan.yaml with the bundles' own training and evaluation.

python benchmarks/evidence/run.py ../shared/data --budget smoke|cpu|gpu
    [--only 'hippocampus-unet-default-*'] [--dry_run] [--jobs 8] [--out DIR]

A finished run is never repeated, and a training that was killed goes on from its last epoch. A run
that fails leaves its error in its record and is tried again with --retry. Records are in
results/BUDGET.jsonl.gz; weights are in DIR. Tables and figures: tables.py.
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
sys.path.insert(0, str(HERE.parent))
from common import device_name  # noqa: E402
from evidence import results as run_store  # noqa: E402
from evidence.planning import Run, case_lists, planned, renamed  # noqa: E402
from evidence.results import Record  # noqa: E402
from med3dinsight_ext.training.history import read_history  # noqa: E402
from med3dinsight_ext.training.launch import bundle_run  # noqa: E402

EARLIER = "earlier"  # records of earlier tries, in the folder of the weights


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
    """Commit, device and versions."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "monai", "pytorch-ignite", "transformers", "numpy")
    return {
        "commit": commit,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def steps_of(run: Run, needed: dict[str, Record]) -> int:
    """Steps of a training; a matched one has as many as fit into the time of its two runs."""
    steps = run.settings["steps"]
    if run.matched:
        # On a CPU the process's own seconds, which do not depend on the machine's load.
        key = "train_seconds" if torch.cuda.is_available() else "cpu_seconds"
        seconds = [needed[name][key] for name in run.matched]
        steps *= sum(seconds) / seconds[1]
    epoch = run.settings["epoch_steps"]
    return max(1, round(steps / epoch)) * epoch


def train_and_evaluate(
    run: Run, plan: dict[str, Any], root: Path, out: Path, budget: str, results: Path
) -> Record:
    """The measured part of a run's record.

    Raises:
        ValueError: a run that it needs has failed.
    """
    needed = wait_for(run.needs, budget, results)
    failed = [name for name, record in needed.items() if "error" in record]
    if failed:
        raise ValueError(f"runs must have what they start from, but {failed[0]} failed")
    files, folder = case_lists(plan, run, root, out), out / run.name
    steps, epoch = steps_of(run, needed), run.settings["epoch_steps"]
    settings = run.overrides | {
        "bundle_root": str(folder),
        "dataset_dir": str(out),
        "max_epochs": steps // epoch,
        "train::sampler": {
            "_target_": "torch.utils.data.RandomSampler",  # repeats the cases if there are fewer
            "data_source": "@train::dataset",
            "num_samples": epoch * run.settings["batch_size"],
        },
    }
    if run.bundle == "pretrain":
        store = {"captions": files["captions"], "store_dir": str(out.parent / "store")}
        settings = store | settings
        both = ["train.json", "embed.json"]  # first, so that it is no part of the training's time
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
    bundle_run(run.bundle, overlays, datalist=files["evaluation"], subset="all", **settings)
    history = read_history(folder / "eval" / "history.jsonl")
    return {
        "steps": sum(row["steps"] for row in history),
        "train_seconds": sum(row["seconds"] for row in history),
        "cpu_seconds": json.loads(cost.read_text()) * steps,
        "resumed_at": already,
        "first_epoch": history[0] if history else None,  # a linear probe has no epochs
        "last_epoch": history[-1] if history else None,
        **scores(run, folder / "eval", root),
    }


def scores(run: Run, found: Path, root: Path) -> Record:
    """The files that a bundle's evaluation wrote, as a part of the record."""
    if run.bundle == "pretrain":
        return {"retrieval": json.loads((found / "retrieval.json").read_text())}
    transfer = json.loads((found / "transfer.json").read_text())
    transfer |= {"file": run.pretraining or "", "loaded": len(transfer["loaded"])}
    with (found / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "transfer": transfer,
        "metrics": json.loads((found / "metrics.json").read_text()),
        "cases": [_case(row, root) for row in rows],
    }


def _case(row: dict[str, str], root: Path) -> dict[str, Any]:
    """A row of cases.csv as numbers, with the image's path below the data root."""
    known: dict[str, Any] = {"case": row["image"].removeprefix(f"{root}/")}
    for key, value in row.items():
        if key not in ("case", "image"):
            try:
                known[key] = float(value)
            except ValueError:
                known[key] = value
    return known


def rounded(report: Record) -> Record:
    """The report with five significant digits, and None for NaN and infinity."""
    text = json.dumps(report)
    return json.loads(
        text, parse_float=lambda x: float(f"{float(x):.5g}"), parse_constant=lambda _: None
    )


def weights(out: Path, name: str) -> Path:
    return out / name / "models" / "model.pt"


def wait_for(names: list[str], budget: str, results: Path) -> dict[str, Record]:
    """Records of these runs, once the processes that execute them have added them."""
    while names:
        records = run_store.read(budget, results)
        if all(name in records for name in names):
            return {name: records[name] for name in names}
        time.sleep(2)
    return {}


def execute(
    run: Run, plan: dict[str, Any], root: Path, out: Path, budget: str, results: Path
) -> None:
    """Carry out a run and add its record, whether it works or fails."""
    record: Record = {"name": run.name, "bundle": run.bundle, **run.about, **circumstances()}
    record["settings"] = run.settings
    before = run_store.read(EARLIER, out).get(run.name, {})
    errors = [*before.get("failed_before", []), *([before["error"]] if "error" in before else [])]
    if errors:
        record["failed_before"] = errors
    gc.collect()
    peak_megabytes(reset=True)
    begin = time.perf_counter()
    try:
        record |= rounded(train_and_evaluate(run, plan, root, out, budget, results))
    except (Exception, SystemExit) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = f"{type(cause).__name__}: {cause}"
        record["error"] = text.replace(str(out), "OUT").replace(str(root), "DATA")
        print(f"failed: {run.name}: {text}", flush=True)
    seconds = time.perf_counter() - begin
    record |= rounded({"seconds": seconds, "peak_megabytes": peak_megabytes()})
    run_store.add(budget, record, results)
    if "error" not in record:  # the weights of a pre-training stay for the runs that need them
        (out / run.name / "models" / "last.ckpt").unlink(missing_ok=True)
        if run.bundle != "pretrain":
            shutil.rmtree(out / run.name)


def finished(run: Run, record: Record | None, retry: bool = False) -> bool:
    """Whether a run has its record; with ``retry`` one without an error.

    Raises:
        ValueError: the record was made with other settings.
    """
    if record is None:
        return False
    ours = json.loads(json.dumps(run.settings))
    theirs = run.pinned | renamed(record["settings"], run.renamed)
    if other := [key for key in ours | theirs if theirs.get(key) != ours.get(key)]:
        raise ValueError(
            f"plan must keep the settings of finished runs, got other {', '.join(other)} for "
            f"{run.name}; give the budget another name, or remove its record to run it again"
        )
    return not (retry and "error" in record)


def unfinished(
    runs: dict[str, Run],
    records: dict[str, Record],
    out: Path,
    only: str = "*",
    retry: bool = False,
) -> list[Run]:
    """Runs to do, with those they need: the weights of a finished one may not be here."""
    open_ = [run for run in runs.values() if not finished(run, records.get(run.name), retry)]
    names = {run.name for run in open_ if fnmatch.fnmatch(run.name, only)}
    for run in reversed(runs.values()):
        if run.name in names:
            names |= {run.name for run in open_} & set(run.needs)
            if run.pretraining and not weights(out, run.pretraining).exists():
                names.add(run.pretraining)
    return [run for run in runs.values() if run.name in names]


def expected_seconds(run: Run, records: list[Record]) -> float:
    """Median of finished runs of the same kind; NaN if there is none."""
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
    """Run what is left of a budget.

    Args:
        data: folder that holds the plan's data folders.
        budget: name of a budget of the plan.
        out: folder for stores, weights and unfinished trainings.
        results: folder for the records; default: results/ beside this file.
        plan: YAML file; default: plan.yaml beside this file.
        only: shell pattern of names; runs that they need are included.
        dry_run: only list the runs and their expected times.
        jobs: number of processes.
        retry: run failed runs again.
    """
    content = yaml.safe_load(Path(plan or HERE / "plan.yaml").read_text())
    root, work = Path(data).resolve(), (Path(out) / budget).resolve()
    folder = Path(results or run_store.RESULTS).resolve()
    records = {name: run_store.read(name, folder) for name in [budget, *run_store.budgets(folder)]}
    todo = unfinished(planned(content, budget), records[budget], work, only, retry)
    done = [record for each in records.values() for record in each.values()]
    seconds = [expected_seconds(run, done) for run in todo]
    for run, expected in zip(todo, seconds, strict=True):
        print(f"{run.name}  {expected:.0f} s")
    print(f"{len(todo)} runs to do, {sum(seconds) / 60 / jobs:.0f} minutes")
    if dry_run:
        return
    # Records of an earlier try go, or runs that wait for the new ones would take them.
    for record in run_store.remove(budget, [run.name for run in todo], folder):
        run_store.add(EARLIER, record, work)
    fixed = (content, root, work, budget, folder)
    if jobs == 1:
        for run in todo:
            execute(run, *fixed)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(execute, run, *fixed) for run in todo]:
            future.result()


if __name__ == "__main__":
    fire.Fire(main)
