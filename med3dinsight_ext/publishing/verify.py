"""The Model Zoo's premerge checks of a published folder, one line a check.

What needs only files is checked here. What needs the network runs in another process, which imports
the folder's own ``med3dinsight_ext`` and no installed one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from med3dinsight_ext.publishing.checks import code, contents, documents, network
from med3dinsight_ext.publishing.checks.folder import Check, PublishedFolder, outcome

SOURCE = Path(__file__).parents[2]
CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from med3dinsight_ext.publishing.checks.network import write_report
del sys.path[0]
write_report(*json.load(sys.stdin))
"""
FILE_CHECKS: dict[str, Callable[[PublishedFolder], str]] = {
    "files": documents.check_files, "name": documents.check_name,
    "README sections": documents.check_readme, "version": documents.check_version,
    "packages": code.check_packages, "large files": contents.check_large,
    "paths": contents.check_paths, "Python 3.10": code.check_syntax, "format": code.check_format,
    "checkpoints": contents.check_checkpoints, "record": documents.check_record,
}  # fmt: skip


def verify(folder: str, schema: str | None = None) -> None:
    """Print the results of the Model Zoo's premerge checks of a published folder.

    Args:
        folder: of the bundle, as ``publish`` writes it. Nothing in it is changed.
        schema: file of the metadata's JSON schema; without it that check is skipped.

    Raises:
        ValueError: there is no such folder.
        SystemExit: a check failed.
    """
    count = {"ok": 0, "skip": 0, "FAIL": 0}
    for name, state, text in checks(folder, schema):
        count[state] += 1
        print(f"{state:<4}  {name + ':':<21}{text}", flush=True)
    print(f"{count['ok']} ok, {count['skip']} skipped, {count['FAIL']} failed")
    if count["FAIL"]:
        raise SystemExit(1)


def checks(folder: str, schema: str | None = None) -> Iterator[Check]:
    """Every check of a published folder, in the order of the report.

    Args:
        folder: of the bundle.
        schema: file of the metadata's JSON schema.

    Raises:
        ValueError: there is no such folder.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise ValueError(
            f"folder must be a published bundle, got {folder}; make it with "
            "python -m med3dinsight_ext publish"
        )
    yield from file_checks(root, schema)
    yield from network_checks(root)


def file_checks(root: Path, schema: str | None = None) -> Iterator[Check]:
    """The checks that need only the files; arguments as in ``checks``."""
    folder = PublishedFolder(root)
    for name, check in FILE_CHECKS.items():
        yield outcome(name, check, folder)
    yield outcome("schema", documents.check_schema, folder, schema)


def network_checks(root: Path) -> Iterator[Check]:
    """The checks that build the network, from another process."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.jsonl"
        report.touch()
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        ended = subprocess.run(
            [sys.executable, "-c", CHILD, str(SOURCE)],
            cwd=scratch,
            text=True,
            capture_output=True,
            input=json.dumps([str(root), str(report)]),
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        found = [Check(*json.loads(line)) for line in report.read_text("utf-8").splitlines()]
    yield from found
    last = (ended.stderr.strip().splitlines() or ["no output"])[-1]
    for name in list(network.CHECKS)[len(found) :]:
        yield Check(name, "FAIL", f"the process ended with {ended.returncode}: {last}")
