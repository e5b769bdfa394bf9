"""Mutation tests of the core modules: does a test fail for every small fault in a module?

    nice python benchmarks/mutation.py               # all modules; resumes from the log
    nice python benchmarks/mutation.py losses.transport --minutes 30

A mutant runs in a process forked after the imports, against the tests that reach its line, the
fastest first; mutmut and cosmic-ray start a process a mutant, which imports for ten seconds. Writes
results/mutation.json, where a module that is not in the log keeps its row. mutation.yaml names the
tests of each module and the mutants that no test can kill, each with its reason. In the log a
killed mutant counts while its function is unchanged, a survivor only while the tests are unchanged
too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import yaml

import common
from mutants import Mutant, mutants
from mutation_session import Session, collect

ROOT = Path(__file__).parents[1]
MODULES = yaml.safe_load(Path(__file__).with_name("mutation.yaml").read_text())
HEAVY = ("monai.bundle", "monai.engines", "monai.transforms", "monai.networks.nets", "monai.losses",
         "monai.metrics", "monai.inferers", "monai.handlers", "ignite.engine", "transformers",
         "matplotlib.pyplot", "nibabel", "scipy.stats", "ot", "einops")  # fmt: skip
LIBRARIES = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
LIBRARIES -= {"med3dinsight_ext"}
EXAMPLES = "tests/test_docstring_examples.py::test_examples_in_docstrings_are_right"
MEMORY = 24 * 2**30  # of a process, in bytes of address space


def forked(work: Callable[[], bool], limit: float) -> str:
    """Run ``work`` in a child: "survived" if it returns True, else "killed" or "timeout".

    Args:
        work: what the child does.
        limit: seconds of the processor; on the clock 20 times as many, since a busy machine must
            not kill mutants.
    """
    folder = tempfile.mkdtemp()
    child = os.fork()
    if not child:
        try:
            os.setpgrp()  # not setsid: a new session would leave the scheduling group of nice
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
            os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.tempdir = folder
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0,) if "MUTATION_DEBUG" in os.environ else (0, 1, 2):
                os.dup2(null, stream)
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + 20 * limit
    try:
        while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout"
            time.sleep(0.005)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if os.WIFSIGNALED(found[1]) and os.WTERMSIG(found[1]) == signal.SIGXCPU:
        return "timeout"
    return "killed" if found[1] else "survived"


def function_code(code: CodeType, name: str, line: int) -> CodeType | None:
    """The code of a function within the code of its module."""
    for inner in (c for c in code.co_consts if isinstance(c, CodeType)):
        if (inner.co_name, inner.co_firstlineno) == (name, line):
            return inner
        if (found := function_code(inner, name, line)) is not None:
            return found
    return None


def exchange(mutant: Mutant, file: str) -> Callable[[], None] | None:
    """A function that changes the code of the imported module; None if it must be imported anew."""
    if mutant.function is None or (code := function_code(mutant.code, *mutant.function)) is None:
        return None
    found = [
        f
        for f in gc.get_objects()
        if type(f) is FunctionType
        and f.__code__.co_filename == file
        and (f.__code__.co_name, f.__code__.co_firstlineno) == mutant.function
    ]
    if not found or any(f.__code__.co_freevars != code.co_freevars for f in found):
        return None

    def apply() -> None:
        for function in found:
            function.__code__ = code

    return apply


class Changed(importlib.machinery.SourceFileLoader):
    """Imports one module with another code."""

    def __init__(self, name: str, file: str, code: CodeType) -> None:
        super().__init__(name, file)
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)


class Run:
    """The mutants of one module and its log.

    Args:
        name: of the module, within the package.
        log: JSONL file, a line for each mutant that was tried.
        until: time at which to stop.
        most: mutants to try, drawn at random but always the same ones; None tries all. Those in
            the log are tried again in any case.
    """

    def __init__(self, name: str, log: Path, until: float, most: int | None = None) -> None:
        self.name, self.log, self.until, self.most = name, log, until, most
        self.module = f"med3dinsight_ext.{name}"
        paths = []
        for pattern in MODULES[name]["tests"]:
            if not (found := sorted(ROOT.glob(f"tests/{pattern}"))):
                raise SystemExit(f"tests of {name} must be files, got {pattern}; correct them")
            paths += found
        words = [str(path.relative_to(ROOT)) for path in paths]
        path = ROOT / f"{self.module.replace('.', '/')}.py"
        if ">>>" in path.read_text():
            words.append(f"{EXAMPLES}[{self.module}]")
        self.tests = " ".join(words)
        self.file, self.mutants = str(path), list(mutants(path))
        self.state = digest(paths)
        self.results: dict[str, dict[str, str]] = {}
        sources = {mutant.key: mutant.source for mutant in self.mutants}
        for line in log.read_text().splitlines() if log.exists() else ():
            row = json.loads(line)
            if row["module"] == name and row["source"] == sources.get(row["mutant"]):
                self.results[row["mutant"]] = row

    def open(self) -> list[Mutant]:
        """Mutants that were not tried, or survived other tests than today's."""
        done = {
            key
            for key, row in self.results.items()
            if row["status"] != "survived" or row["tests"] == self.state
        }
        drawn = sorted(
            self.mutants, key=lambda mutant: hashlib.sha256(mutant.key.encode()).digest()
        )
        chosen = {mutant.key for mutant in drawn[: self.most]} | self.results.keys()
        return [mutant for mutant in drawn if mutant.key in chosen - done]

    def record(self, mutant: Mutant, status: str) -> None:
        row = {
            "module": self.name,
            "mutant": mutant.key,
            "status": status,
            "source": mutant.source,
            "tests": self.state,
        }
        with self.log.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.results[mutant.key] = row

    def attempt(
        self, mutant: Mutant, times: dict[str, Any], work: Callable[[set[str]], bool], start: float
    ) -> None:
        """Run the tests that reach a mutant's lines, and record it."""
        if time.time() > self.until:
            return
        ids = {i for i, (_, lines) in times.items() if not mutant.lines.isdisjoint(lines)}
        ids = ids or set(times)
        limit = start + 30 + 10 * sum(times[i][0] for i in ids)
        self.record(mutant, forked(lambda: work(ids), limit))

    def whole(self, folder: Path) -> None:
        """Try all open mutants: first those within functions, then those that need an import."""
        traced, anew = folder / "traced.json", folder / "anew.json"
        times: dict[str, Any] = {}

        def within(session: Session) -> None:
            def trace() -> bool:
                found = {"times": session.trace(self.file), "modules": list(sys.modules)}
                return bool(traced.write_text(json.dumps(found)))

            if forked(trace, 1800) != "survived":
                raise ValueError(f"tests of {self.name} must pass on the unchanged module")
            times.update(load(traced))
            session.items.sort(key=lambda item: times[item.nodeid][0])
            left = []
            for mutant in self.open():
                apply = exchange(mutant, self.file)
                if apply is None:
                    left.append(mutant.key)
                    continue

                def work(ids: set[str], apply: Callable[[], None] = apply) -> bool:
                    apply()
                    return session.run(ids)

                self.attempt(mutant, times, work, 0)
            anew.write_text(json.dumps(left))

        def outer() -> bool:
            collect(self.tests, within, {})
            return True

        forked(outer, 1e6)
        if not anew.exists():
            raise SystemExit(f"tests of {self.name} must pass unchanged; run {self.tests}")
        times = load(traced)
        left = json.loads(anew.read_text())
        seconds = {i: time_ for i, (time_, _) in times.items()}
        for mutant in [m for m in self.mutants if m.key in left]:

            def work(ids: set[str], mutant: Mutant = mutant) -> bool:
                sys.meta_path.insert(0, Changed(self.module, self.file, mutant.code))
                passed = []
                collect(self.tests, lambda session: passed.append(session.run(ids)), seconds)
                return passed == [True]

            self.attempt(mutant, times, work, 60)


def load(traced: Path) -> dict[str, Any]:
    """Times and lines of the tests; imports what they import, so that no mutant has to."""
    found = json.loads(traced.read_text())
    for name in found["modules"]:
        if name not in sys.modules and name.partition(".")[0] in LIBRARIES:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return dict(found["times"])


def digest(paths: list[Path]) -> str:
    """Hash of Python files, whatever their layout and comments."""
    trees = (ast.unparse(ast.parse(p.read_bytes())) for p in sorted(paths))
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:12]


def summary(run: Run, equivalents: dict[str, str]) -> dict[str, Any]:
    """Counts of a module, and its survivors with their lines."""
    rows = [(m, run.results[m.key]) for m in run.mutants if m.key in run.results]
    status = Counter(row["status"] for _, row in rows)

    def verdict(mutant: Mutant, row: dict[str, str]) -> str:
        if mutant.key in equivalents:
            return f"equivalent: {equivalents[mutant.key]}"
        return "open" if row["tests"] == run.state else "tests changed, not tried since"

    survivors = [
        {"line": mutant.line, "change": mutant.key, "verdict": verdict(mutant, row)}
        for mutant, row in rows
        if row["status"] == "survived"
    ]
    equal = sum(mutant.key in equivalents for mutant, row in rows if row["status"] == "survived")
    killed = status["killed"] + status["timeout"]
    return {
        "mutants": len(run.mutants),
        "tried": len(rows),
        "killed": killed,
        "timeouts": status["timeout"],
        "killed_share": round(killed / max(1, len(rows) - equal), 4),
        "survivors": survivors,
    }


def earlier(path: Path) -> dict[str, Any]:
    """Rows on record, each with the commit of its module; of modules that are not in the log."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return {name: {"commit": found["commit"]} | row for name, row in found["modules"].items()}


def main() -> None:
    """Try the mutants of the modules and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "mutation.jsonl")
    parser.add_argument("--minutes", type=float, default=1e5)
    parser.add_argument("--most", type=int, help="mutants of a module, drawn at random")
    options = parser.parse_args()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    until = time.time() + 60 * options.minutes
    os.chdir(ROOT)
    for name in HEAVY if options.minutes else ():
        importlib.import_module(name)
    for name in options.modules:
        run = Run(name, options.log, until, options.most)
        if run.open() and time.time() < until:
            with tempfile.TemporaryDirectory() as folder:
                run.whole(Path(folder))
    tried = {json.loads(line)["module"] for line in options.log.read_text().splitlines()}
    runs = [Run(name, options.log, until) for name in MODULES if name in tried]
    tables = earlier(common.RESULTS / "mutation.json")
    commit = common.machine()["commit"]
    for run in runs:
        tables[run.name] = {
            "commit": commit,
            **summary(run, MODULES[run.name].get("equivalent", {})),
        }
    common.write(
        "mutation", {"modules": {name: tables[name] for name in MODULES if name in tables}}
    )


if __name__ == "__main__":
    main()
