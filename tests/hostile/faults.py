"""Fail or kill small runs at every call that changes a file, then run them again.

python tests/hostile/faults.py all|SCENARIO[,SCENARIO] [--faults kill,ENOSPC] [--every 1]
    [--out benchmarks/results/faults.json]

A library that is loaded before libc's (faults.c, so a C compiler is needed) counts the calls below
the run's folder: files opened for writing, writes, renames, removals. For each of them and each
fault a child process runs the command, and a second one runs it again without faults. Allowed are
a second run whose results equal those of an undisturbed run, or an error whose text says what to
do. ENOSPC, EROFS and EACCES last from the chosen call on; kill writes half of the data first.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
FAULTS = ("kill", "ENOSPC", "EIO", "EINTR", "EROFS", "EACCES")
SEEN = "MED3D_FAULTS"  # path of the library, in the process that has loaded it


class Scenario(NamedTuple):
    """A command and its results.

    Attributes:
        prepare: writes the inputs, once.
        run: the command.
        results: what must be equal, by name.
    """

    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    results: Callable[[Path], dict[str, Any]]


def library(folder: Path) -> Path:
    """Compile the library; FileNotFoundError where there is no compiler."""
    path = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(path), "-ldl"], check=True
    )
    return path


# Scenarios: imports are inside, so that tests list them without cost


def volumes(count: int) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        import fakes

        fakes.write_volumes(folder / "in", count)

    return prepare


def tensors(path: Path) -> str:
    import torch
    from safetensors.torch import load_file

    found = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    )
    parts = [
        f"{k} {v.dtype} {tuple(v.shape)} {v.double().numpy().tobytes().hex()}"
        for k, v in sorted(found.items())
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def fill(folder: Path) -> None:
    import fakes

    from med3dinsight_ext.captions.sources import TemplateCaptions
    from med3dinsight_ext.data.datalists import datalist
    from med3dinsight_ext.embeddings.store import Store

    store = Store(folder / "store", fakes.teacher(), TemplateCaptions(), per_plane=2)
    store.fill(datalist(folder / "in", modality="MR"))
    store.embedding_dims  # noqa: B018


def entries(folder: Path) -> dict[str, Any]:
    store = folder / "store"
    found: dict[str, Any] = {
        str(p.relative_to(store)): tensors(p) for p in store.glob("??/[!.]*.safetensors")
    }
    return found | {str(p.relative_to(store)): p.read_text() for p in store.glob("??/[!.]*.json")}


def ask(folder: Path) -> None:
    import fakes

    from med3dinsight_ext.data.datalists import datalist
    from med3dinsight_ext.embeddings.store import Store

    store = Store(folder / "store", fakes.teacher(), fakes.FakeMllm(), per_plane=2)
    store.fill(datalist(folder / "in", modality="MR"))


def answers(folder: Path) -> dict[str, Any]:
    logs = (folder / "store" / "answers").glob("*/[!.]*.jsonl")
    return entries(folder) | {p.name: sorted(filter(None, p.read_text().split("\n"))) for p in logs}


def settings(bundle: str, folder: Path) -> dict[str, Any]:
    import running

    backbone: dict[str, Any] = {"_target_": "fakes.PlainNet"}
    if bundle == "seg-finetune":
        backbone = {
            "_target_": "UNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": "@out_channels",
            "channels": [4, 8],
            "strides": [2],
        }
    return running.settings(bundle, folder / "out", folder / "in", max_epochs=2, backbone=backbone)


def training(bundle: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> None:
        import running

        running.run(bundle, ["train.json"], **settings(bundle, folder))

    return run


def trained(folder: Path) -> dict[str, Any]:
    out = folder / "out"
    rows = [json.loads(line) for line in (out / "eval" / "history.jsonl").read_text().splitlines()]
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return {p.name: tensors(p) for p in (out / "models").glob("[!.]*.pt")} | {"history": history}


def train_once(folder: Path) -> None:
    volumes(3)(folder)
    training("seg-finetune")(folder)
    shutil.copy(folder / "out" / "models" / "model.pt", folder / "in" / "model.pt")
    shutil.rmtree(folder / "out")
    content = {
        key: settings("seg-finetune", folder)[key] for key in ("backbone", "spacing", "patch_size")
    }
    (folder / "in" / "overlay.json").write_text(json.dumps(content))


def publish_it(folder: Path) -> None:
    from med3dinsight_ext.publishing.publish import publish

    given = folder / "in"
    publish(
        str(ROOT / "bundles" / "seg-finetune"),
        str(given / "model.pt"),
        "ball_ct_segmentation",
        str(folder / "out"),
        overlays=str(given / "overlay.json"),
    )


def published(folder: Path) -> dict[str, Any]:
    files = (p for p in (folder / "out").rglob("*") if p.is_file())
    files = (p for p in files if ".publish-" not in str(p))  # drafts of a killed run
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def add_runs(folder: Path) -> None:
    from evidence import results

    for name in "ab":
        results.add("cpu", {"name": name, "seconds": 1.5}, folder / "out")


def runs(folder: Path) -> dict[str, Any]:
    from evidence import results

    return results.read("cpu", folder / "out")


SCENARIOS = {
    "store": Scenario(volumes(2), fill, entries),
    "answers": Scenario(volumes(1), ask, answers),
    "pretrain": Scenario(volumes(3), training("pretrain"), trained),
    "segmentation": Scenario(volumes(3), training("seg-finetune"), trained),
    "publish": Scenario(train_once, publish_it, published),
    "evidence": Scenario(lambda folder: (folder / "in").mkdir(), add_runs, runs),
}


def child(call: Callable[[Path], Any], folder: Path, k: int, fault: str) -> tuple[str, str, int]:
    """Run in a fork: "done", "error" or "killed", the error's text, the number of calls seen."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        shim = ctypes.CDLL(os.environ[SEEN])
        found = ("done", "")
        shim.fault_arm(f"{folder}/".encode(), k, getattr(errno, fault, 0))
        try:
            call(folder)
        except BaseException as error:
            found = ("error", f"{type(error).__name__}: {_chain(error)}")
        calls = shim.fault_seen()
        os.write(write, json.dumps([*found, calls]).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    state, why, calls = json.loads(text) if text else ("killed", "", 0)
    return state, why, calls


def _chain(error: BaseException) -> str:
    texts = []
    while error is not None:
        texts.append(str(error)[:500])
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " <- ".join(texts)


def told(text: str) -> bool:
    """Whether an error says what is wrong with the disk, or what to do."""
    return any(os.strerror(getattr(errno, name)) in text for name in FAULTS[1:]) or (
        "must" in text and ";" in text
    )


def inject(name: str, faults: list[str], every: int, most: float = 0) -> dict[str, Any]:
    """Outcomes of one scenario.

    Args:
        name: of ``SCENARIOS``.
        faults: of ``FAULTS``.
        every: which calls, 1 for all.
        most: seconds after which no further call is tried; 0 for no limit.
    """
    scenario, counts, open_ = SCENARIOS[name], Counter[str](), []
    begin, tried = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as place:
        work, kept = Path(place) / "work", Path(place) / "kept"
        work.mkdir()
        scenario.prepare(work)
        shutil.copytree(work, kept)
        scenario.run(work)  # children inherit what it imports
        shutil.rmtree(work)
        shutil.copytree(kept, work)
        state, why, calls = child(scenario.run, work, 0, "kill")
        if state != "done":
            raise ValueError(f"{name} must run without faults, got {why}")
        wanted = scenario.results(work)
        rows = [(k, fault) for k in range(1, calls + 1, every) for fault in faults]
        for k, fault in rows:
            if most and time.monotonic() - begin > most:
                break
            tried += 1
            shutil.rmtree(work)
            shutil.copytree(kept, work)
            state, why, _ = child(scenario.run, work, k, fault)
            again, error, _ = child(scenario.run, work, 0, "kill")
            verdict = _verdict(scenario, work, wanted, state, why, again, error)
            counts[f"{fault}: {verdict}"] += 1
            if verdict.startswith("OPEN"):
                open_.append(
                    {
                        "call": k,
                        "fault": fault,
                        "verdict": verdict,
                        "first": why[:300],
                        "second": error[:300],
                    }
                )
    return {
        "calls": calls,
        "every": every,
        "tried": tried,
        "of": len(rows),
        "seconds": round(time.monotonic() - begin, 1),
        "outcomes": dict(sorted(counts.items())),
        "open": open_,
    }


def _verdict(
    scenario: Scenario,
    work: Path,
    wanted: dict[str, Any],
    state: str,
    why: str,
    again: str,
    error: str,
) -> str:
    if state == "error" and not told(why):
        return "OPEN: the first error does not say what to do"
    if again != "done":
        return "the second run says what to do" if told(error) else "OPEN: the second run fails"
    try:
        found = scenario.results(work)
    except Exception as fault:
        return f"OPEN: results are broken: {type(fault).__name__}"
    return f"{state}, then equal" if found == wanted else "OPEN: results differ"


def arguments(doc: str | None, scenarios: Iterable[str]) -> argparse.ArgumentParser:
    """Parser of a command that tries scenarios."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scenario", help="all, or names with commas: " + ", ".join(scenarios))
    parser.add_argument("--out", type=Path, help="JSON file; other scenarios in it are kept")
    return parser


def record(
    attempt: Callable[[str], dict[str, Any]], scenarios: Iterable[str], given: argparse.Namespace
) -> int:
    """Try scenarios, print their outcomes, and write them; 1 if one is not allowed."""
    from common import machine

    bad = 0
    for name in scenarios if given.scenario == "all" else given.scenario.split(","):
        row = attempt(name)
        bad += len(row["open"])
        print(f"{name}: {row['tried']} tried in {row['seconds']} s", flush=True)
        for outcome, count in row["outcomes"].items():
            print(f"    {count:>5} {outcome}", flush=True)
        for fault in row["open"][:12]:
            print(f"    {fault}", flush=True)
        if given.out:
            before = json.loads(given.out.read_text()) if given.out.exists() else {}
            rows = before.get("scenarios", {}) | {name: row}
            given.out.write_text(json.dumps(machine() | {"scenarios": rows}, indent=1) + "\n")
    return int(bad > 0)


def main() -> int:
    parser = arguments(__doc__, SCENARIOS)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--most", type=float, default=0.0, help="seconds a scenario")
    given = parser.parse_args()
    if SEEN not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            path = str(library(Path(folder)))
            more = {SEEN: path, "LD_PRELOAD": path, "OMP_NUM_THREADS": "1"}
            return subprocess.run(
                [sys.executable, *sys.argv], env={**os.environ, **more}
            ).returncode
    words = given.faults.split(","), given.every, given.most
    return record(lambda name: inject(name, *words), SCENARIOS, given)


if __name__ == "__main__":
    sys.exit(main())
