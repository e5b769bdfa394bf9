"""Checks of a published folder's Python files and of the packages that they need."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from med3dinsight_ext.publishing.checks.folder import (
    METADATA,
    PACKAGES,
    PublishedFolder,
    Skipped,
    settle,
)
from med3dinsight_ext.publishing.zoo import (
    LINE,
    NAMED_OTHERWISE,
    PACKAGE,
    PINS,
    imported,
    teacher_pins,
)

FORMAT: dict[str, tuple[str, ...]] = {  # the zoo's settings
    "isort": (
        "--check-only", "--profile", "black", "--line-length", str(LINE), "--settings-path", "."
    ),
    "black": (
        "--check", "--skip-magic-trailing-comma", "--line-length", str(LINE),
        "--config", "none.toml",
    ),
    "flake8": (
        "--isolated", "--max-line-length", str(LINE), "--select", "B,C,E,F,N,P,T4,W,B9",
        "--ignore", "E203,E741,W503,W504,C408,N812,B023",
        "--per-file-ignores", "__init__.py:F401,__main__.py:F401",
    ),
}  # fmt: skip


def check_packages(folder: PublishedFolder) -> str:
    """Exact pins cover everything that configs and code import."""
    metadata = folder.metadata()
    pins = {name: metadata.get(key) for name, key in PINS.items()}
    for key in PACKAGES:
        pins |= {canonicalize_name(name): pin for name, pin in metadata.get(key, {}).items()}
    faults = [
        f"{METADATA} pins {name} to {pin}, which is not an exact version"
        for name, pin in pins.items()
        if not _exact(pin)
    ]
    files = folder.names(".py")
    wanted = {name: file for file in files for name in imported(folder.text(file))}
    tops = {name.split(".")[0]: where for name, where in {**folder.needed(), **wanted}.items()}
    here = (Path(file).parts[0].removesuffix(".py") for file in files)
    own = {PACKAGE, *sys.stdlib_module_names, *here}
    third = {top: where for top, where in tops.items() if top not in own}
    loose = {
        top: where
        for top, where in sorted(third.items())
        if canonicalize_name(NAMED_OTHERWISE.get(top, top)) not in pins
    }
    installed = packages_distributions() if loose else {}
    for top, where in loose.items():
        if not any(canonicalize_name(name) in pins for name in installed.get(top, [])):
            faults.append(f"{where} needs {top}, which no pin of {METADATA} covers")
    faults += [
        f"{file} needs {name}, which no pin of {METADATA} covers"
        for file, config in folder.configs().items()
        for name in teacher_pins(config)
        if name not in pins
    ]
    other = [name for name, pin in pins.items() if _installed(name) not in (None, pin)]
    note = f"; these checks ran with other versions of {', '.join(other)}" if other else ""
    return settle(faults, f"{len(pins)} exact pins cover {len(third)} imports{note}")


def _exact(pin: Any) -> bool:
    try:
        return Version(str(pin)).local is None  # 2.13.0+cpu is on no index that all can reach
    except InvalidVersion:
        return False


def _installed(name: str) -> str | None:
    try:
        return str(Version(version(name)).public)
    except PackageNotFoundError:
        return None


def check_syntax(folder: PublishedFolder) -> str:
    """Python 3.10 can read every Python file."""
    files, faults = folder.names(".py"), []
    for name in files:
        try:
            ast.parse(folder.text(name), feature_version=(3, 10))
        except SyntaxError as error:
            faults.append(f"{name}:{error.lineno} {error.msg}")
    return settle(faults, f"{len(files)} files")


def check_format(folder: PublishedFolder) -> str:
    """The zoo's formatters and linter accept every Python file."""
    files, faults = folder.names(".py"), []
    missing = [tool for tool in FORMAT if importlib.util.find_spec(tool) is None]
    with tempfile.TemporaryDirectory() as scratch:  # away from the settings of a folder above
        copy = Path(scratch).resolve()
        (copy / "none.toml").touch()
        for name in files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.root / name, copy / name)
        for tool in [tool for tool in FORMAT if tool not in missing] if files else []:
            ended = subprocess.run(
                [sys.executable, "-m", tool, *FORMAT[tool], *files],
                cwd=copy,
                text=True,
                capture_output=True,
                env={**os.environ, "BLACK_CACHE_DIR": scratch},
            )
            if ended.returncode:
                lines = (ended.stdout + ended.stderr).replace(f"{copy}{os.sep}", "").splitlines()
                about = [line for line in lines if ".py" in line] or lines or ["no output"]
                faults += [f"{tool}: {line}" for line in about]
    if missing and not faults:
        raise Skipped(f"needs {', '.join(missing)}; pip install {' '.join(missing)}")
    return settle(faults, f"{', '.join(FORMAT)} have nothing against {len(files)} files")
