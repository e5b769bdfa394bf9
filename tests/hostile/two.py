"""Two processes that run one command on one folder at once.

python tests/hostile/two.py all|SCENARIO[,SCENARIO] [--out benchmarks/results/two.json]

Both begin together, or the second a little later; a third one runs the command again. Allowed are
results that equal those of one undisturbed run, and errors whose text says what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults  # sets the path
from faults import SCENARIOS as WRITERS
from faults import Scenario, settings, tensors, told, trained, volumes

DELAYS = (0.0, 0.5)  # seconds by which the second begins later
MEASURED = rb"of \d+ GiB and [\d.]+ s here|about \d+ min"  # in the reasons of a plan
SMALL = {"device": "$torch.device('cpu')", "max_epochs": 2, "num_workers": 0}


def front_door(name: str, *words: str, **more: Any) -> Callable[[Path], Any]:
    """A command of the package, in the folder."""

    def run(folder: Path) -> None:
        from med3dinsight_ext import workflows
        from med3dinsight_ext.planning import plan

        os.chdir(folder)
        plan.CPU = plan.Machine(16**3, 0, 1, 2, 1, 2, 4)
        getattr(workflows, name)(*words, quiet=True, **more)

    return run


def quickstart(folder: Path) -> None:
    from med3dinsight_ext.quickstart import quickstart as run

    os.chdir(folder)
    run("in", out="out", max_epochs=1)


def scans(folder: Path) -> None:
    volumes(3)(folder)
    (folder / "in" / "classification.json").unlink()
    (folder / "in" / "segmentation.json").unlink()


def trained_scans(folder: Path) -> None:
    """Scans and the folder of a training."""
    scans(folder)
    front_door("finetune", "in", out="given", **SMALL)(folder)


def files(name: str) -> Callable[[Path], dict[str, Any]]:
    """Hashes of the files in a folder; weights by their values, without what depends on time."""

    def results(folder: Path) -> dict[str, Any]:
        found = {}
        for path in sorted((folder / name).rglob("[!.]*")):
            relative = path.relative_to(folder).as_posix()
            if path.suffix == ".pt":
                found[relative] = tensors(path)
            elif path.suffix in (".yaml", ".gz", ".b2", ".json") and path.name != "run.json":
                content = path.read_bytes()
                if path.suffix == ".gz":
                    import nibabel as nib

                    content = nib.load(path).get_fdata().tobytes()  # type: ignore[attr-defined]
                elif path.name == "plan.yaml":
                    content = re.sub(MEASURED, b"", content)
                found[relative] = hashlib.sha256(content).hexdigest()
            elif path.name == "history.jsonl":
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                found[relative] = [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
        return found

    return results


def prepare(folder: Path) -> None:
    import running

    given = settings("seg-finetune", folder) | {"prepared": str(folder / "out" / "copy")}
    shared = faults.ROOT / "bundles" / "shared" / "prepare.json"
    running.run("seg-finetune", ["train.json", shared], **given)


SCENARIOS = {
    "plan": Scenario(scans, front_door("plan", "in"), files("runs")),
    "prepare": Scenario(volumes(3), prepare, files("out/copy")),
    "finetune": Scenario(scans, front_door("finetune", "in", **SMALL), files("runs")),
    "predict": Scenario(
        trained_scans,
        front_door("predict", "given", "in/v0.nii.gz", device=SMALL["device"]),
        files("given/predictions"),
    ),
    "pretrain": Scenario(*WRITERS["pretrain"][:2], lambda folder: trained(folder)),
    "quickstart": Scenario(scans, quickstart, files("out")),
    "publish": WRITERS["publish"],
    "store": WRITERS["store"],
    "answers": WRITERS["answers"],
    "evidence": WRITERS["evidence"],
}


def start(call: Callable[[Path], Any], folder: Path, delay: float = 0.0) -> tuple[int, int]:
    """Begin a call in a fork: its process, and a pipe that will hold its outcome."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        found = ("done", "")
        time.sleep(delay)
        try:
            call(folder)
        except BaseException as error:
            found = ("error", f"{type(error).__name__}: {faults._chain(error)}")
        os.write(write, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(write)
    return pid, read


def end(process: tuple[int, int]) -> tuple[str, str]:
    """Wait for a call: "done", "error" or "killed", and the error's text."""
    pid, read = process
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    state, why = json.loads(text) if text else ("killed", "")
    return state, why


def race(name: str, delays: tuple[float, ...] = DELAYS) -> dict[str, Any]:
    """Outcomes of one scenario, one for each delay, and those that are not allowed."""
    scenario, counts, open_ = SCENARIOS[name], Counter[str](), []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        work, kept = Path(place) / "work", Path(place) / "kept"
        work.mkdir()
        done = end(start(scenario.prepare, work))
        if done[0] == "done":
            shutil.copytree(work, kept)
            done = end(start(scenario.run, work))
        if done[0] != "done":
            raise ValueError(f"{name} must run alone, got {done[1]}")
        wanted = scenario.results(work)
        for delay in delays:
            shutil.rmtree(work)
            shutil.copytree(kept, work)
            both = [start(scenario.run, work), start(scenario.run, work, delay)]
            ended = [end(process) for process in both]
            first = _verdict(scenario, work, wanted, ended)
            again = _verdict(scenario, work, wanted, [end(start(scenario.run, work))])
            verdict = f"{first}; again {again}"
            counts[verdict] += 1
            if "OPEN" in verdict:
                texts = [why[:400] for _, why in ended]
                open_.append({"delay": delay, "verdict": verdict, "errors": texts})
    return {
        "tried": len(delays),
        "seconds": round(time.monotonic() - begin, 1),
        "outcomes": dict(sorted(counts.items())),
        "open": open_,
    }


def _verdict(
    scenario: Scenario, work: Path, wanted: dict[str, Any], ended: list[tuple[str, str]]
) -> str:
    for state, why in ended:
        if state != "done" and not told(why):
            return "OPEN: an error does not say what to do"
    try:
        found = scenario.results(work)
    except Exception as fault:
        return f"OPEN: results are broken: {type(fault).__name__}: {fault}"
    if found != wanted:
        names = [key for key in {*found, *wanted} if found.get(key) != wanted.get(key)]
        return f"OPEN: results differ: {sorted(names)[:4]}"
    return f"{' and '.join(sorted(state for state, _ in ended))}, equal"


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(faults.record(race, SCENARIOS, faults.arguments(__doc__, SCENARIOS).parse_args()))
