"""Write constraints.txt: a version of every package that the package and its extras depend on.

python docs/release/constraints.py

The versions are those of this environment; what it lacks (open_clip and torchvision) is resolved
by pip, which asks the package index.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def normal(name: str) -> str:
    """A distribution's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    """What setup.cfg requires, with all extras."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def pins(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """Versions of these distributions and of all that they require; and what is not installed."""
    found: dict[str, str] = {}
    missing: list[str] = []
    todo = [(name, "") for name in names]
    seen = set()
    while todo:
        text, extra = todo.pop()
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *need.extras):
            name = normal(need.name)
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                installed = distribution(name)
            except PackageNotFoundError:
                missing.append(text)
                continue
            found[name] = installed.version.partition("+")[0]
            todo += [(line, wanted) for line in installed.requires or []]
    return found, missing


def resolved(missing: list[str], found: dict[str, str]) -> dict[str, str]:
    """Versions that pip would install beside those that were found."""
    fixed = [f"{name}=={version}" for name, version in found.items() if name in ("torch", "numpy")]
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--report", "-"]
    done = subprocess.run([*command, *missing, *fixed], check=True, capture_output=True, text=True)
    rows = [row["metadata"] for row in json.loads(done.stdout)["install"]]
    return {normal(row["name"]): row["version"] for row in rows}


if __name__ == "__main__":
    found, missing = pins(requirements())
    if missing:
        found |= resolved(missing, found)
    text = "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))
    head = "# A known-good set, written by docs/release/constraints.py\n"
    (ROOT / "constraints.txt").write_text(head + text)
    print(f"{len(found)} packages, of them resolved by pip: {', '.join(missing) or 'none'}")
