"""Circumstances of a measurement (commit, device, versions), timing and result files."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(call: Callable[[], Any], synchronise: bool = True) -> float:
    """Seconds that a call takes."""
    begin = perf_counter()
    call()
    if synchronise and torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - begin


def device_name() -> str:
    """Name of the GPU, or of the CPU and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def machine() -> dict[str, Any]:
    """Commit, device and versions."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    packages = ("torch", "monai", "pytorch-ignite", "transformers", "numpy")
    return {
        "commit": commit,
        "device": device_name(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def write(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write results/<name>.json with the circumstances of the measurement."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(machine() | figures, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")
    print(text)
