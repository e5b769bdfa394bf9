"""The commands of the front door as a user gives them: seconds, and scores on test cases.

python benchmarks/bench_commands.py planned hippocampus ../shared/data/hippocampus [--out DIR]
python benchmarks/bench_commands.py by_hand ../shared/data/headneck benchmarks/headneck_by_hand.yaml
python benchmarks/bench_commands.py newcomer headneck ../shared/data/headneck
python benchmarks/bench_commands.py one_file RUN VOLUME
python benchmarks/bench_commands.py quickstart

``newcomer`` has a folder of 20 development images with labels for 8. Nothing is chosen on the test
cases. A finished command is not repeated.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

BEGIN = perf_counter()

import fire  # noqa: E402
import torch  # noqa: E402

IMPORTED = perf_counter() - BEGIN  # of torch, which MONAI imports first

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from common import RESULTS, spread, write  # noqa: E402

HERE = Path(__file__).parent
PROGRAM = (sys.executable, "-m", "med3dinsight_ext")
IMAGES, LABELLED, NEW = 20, 8, 5
TRIED = ("spacing", "patch_size", "batch_size", "learning_rate", "ema_decay", "steps", "max_epochs")


def command(folder: Path, name: str, *words: str, program: tuple[str, ...] = PROGRAM) -> None:
    """Run a command in a folder unless it was run; NAME.json has its words and seconds."""
    record = folder / f"{name}.json"
    if record.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(
            [*program, *words], cwd=folder, env=environment, stdout=log, stderr=log, check=True
        )
    seconds, after = perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = {"words": len(words) + 3, "seconds": seconds, "cpu_seconds": used}
    row |= {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    record.write_text(json.dumps(row))


def commands(folder: Path, *names: str) -> dict[str, Any]:
    """What ``command`` recorded."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def record(name: str, row: dict[str, Any]) -> None:
    """Add a row to results/commands.json."""
    path = RESULTS / "commands.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    write("commands", {"rows": rows | {name: row}})


def scores(folder: Path) -> dict[str, Any]:
    """Means and classes of an evaluation."""
    found = json.loads((folder / "metrics.json").read_text())
    return {key: found[key] for key in ("cases", "mean", "classes")}


def best(run: Path) -> dict[str, Any]:
    """Steps of a training, and its best mean Dice on validation cases."""
    from med3dinsight_ext.training.history import read_history  # ``predicted`` times the imports

    rows = read_history(run / "eval" / "history.jsonl")
    dice = [row["val_mean_dice"] for row in rows if "val_mean_dice" in row]
    return {"steps": sum(row["steps"] for row in rows), "validation_dice": max(dice, default=None)}


def finetuned(folder: Path, data: str, *options: str, test: bool = True) -> dict[str, Any]:
    """``finetune``, its validation, and its scores on the test cases."""
    data = str(Path(data).resolve())
    command(folder, "finetune", "finetune", data, *options, "--out", "run")
    row = commands(folder, "finetune") | best(folder / "run")
    if test:
        command(folder, "evaluate", "evaluate", "run", data, "--out", "test")
        row |= commands(folder, "evaluate") | {"test": scores(folder / "test")}
    return row


def planned(name: str, data: str, out: str = "commands_run") -> None:
    """``finetune`` with the plan alone."""
    folder = Path(out).resolve() / f"{name}_planned"
    record(folder.name, finetuned(folder, data))


def by_hand(data: str, plan: str, out: str = "commands_run", test: bool = True) -> None:
    """``finetune`` with an overlay by hand; ``test`` False: on validation cases alone."""
    path = Path(plan).resolve()
    row = finetuned(Path(out).resolve() / path.stem, data, "--plan", str(path), test=test)
    from med3dinsight_ext.planning.plan import read_plan

    settings = read_plan(path)
    record(path.stem, row | {"settings": {key: settings.get(key, "default") for key in TRIED}})


def newcomer(name: str, data: str, out: str = "commands_run") -> None:
    """Three commands on a folder of 20 images with labels for 8, and predictions of 5 others."""
    folder, root = Path(out).resolve() / f"{name}_newcomer", Path(data).resolve()
    cases = json.loads((root / "split.json").read_text())["development"]
    ending = next((root / "imagesTr").iterdir()).name.split(".", 1)[1]
    for case in cases[:IMAGES]:
        copied(root / "imagesTr" / f"{case}.{ending}", folder / "scans" / "imagesTr")
    for case in cases[:LABELLED]:
        copied(root / "labelsTr" / f"{case}.{ending}", folder / "scans" / "labelsTr")
    for case in cases[IMAGES : IMAGES + NEW]:
        copied(root / "imagesTr" / f"{case}.{ending}", folder / "new")
    copied(root / "dataset.json", folder / "scans")
    command(folder, "pretrain", "pretrain", "scans")
    command(folder, "finetune", "finetune", "scans", "--pretrained", "runs/scans/pretrain")
    command(folder, "predict", "predict", "runs/scans/finetune", "new")
    command(folder, "evaluate", "evaluate", "runs/scans/finetune", str(root), "--out", "test")
    row = commands(folder, "pretrain", "finetune", "predict", "evaluate")
    record(
        f"{name}_newcomer",
        row
        | best(folder / "runs/scans/finetune")
        | {
            "images": IMAGES,
            "labelled": LABELLED,
            "predicted": NEW,
            "test": scores(folder / "test"),
        },
    )


def copied(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)


def one_file(model: str, volume: str, repeats: int = 5, out: str = "commands_run") -> None:
    """``predict`` of one file: seconds beside those of MONAI's import and of the network alone."""
    folder, rows = Path(out).resolve() / "one_file", []
    words = [
        str(HERE / "bench_commands.py"),
        "predicted",
        *(str(Path(p).resolve()) for p in (model, volume)),
    ]
    for i in range(repeats):
        command(folder, f"predict_{i}", *words, str(folder / f"{i}"), program=(sys.executable,))
        inner = json.loads((folder / f"{i}" / "seconds.json").read_text())
        whole = json.loads((folder / f"predict_{i}.json").read_text())["seconds"]
        rows.append(inner | {"whole": whole, "beyond": whole - sum(inner.values())})
    record("one_file", {key: spread([row[key] for row in rows]) for key in rows[0]})


def predicted(model: str, volume: str, out: str) -> None:
    """Apply a network to a volume in this process, and write the seconds of imports and network."""
    begin = perf_counter()
    from monai.bundle import ConfigWorkflow  # noqa: F401 (what any bundle imports)
    from monai.inferers import SlidingWindowInferer

    seconds = {"import": perf_counter() - begin + IMPORTED, "network": 0.0}
    plain = SlidingWindowInferer.__call__

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = perf_counter()
        found = plain(*args, **kwargs)
        seconds["network"] += perf_counter() - begin
        return found

    SlidingWindowInferer.__call__ = timed
    import med3dinsight_ext

    med3dinsight_ext.predict(model, volume, out=out, quiet=True)
    (Path(out) / "seconds.json").write_text(json.dumps(seconds))


def quickstart(out: str = "commands_run") -> None:
    """The whole method on the demo cohort, from an empty folder."""
    folder = Path(out).resolve() / "quickstart"
    command(folder, "quickstart", "quickstart")
    record("quickstart", commands(folder, "quickstart"))


if __name__ == "__main__":
    fire.Fire()
