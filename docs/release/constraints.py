"""Write constraints.txt: the versions of this environment that the package's dependencies have.

python docs/release/constraints.py
"""

from __future__ import annotations

import re
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
EXTRAS = ("demo", "publish", "served")


def pins(names: list[str]) -> dict[str, str]:
    """Versions of these distributions and of all that they require, by normalised name."""
    found: dict[str, str] = {}
    while names:
        need = Requirement(names.pop())
        name = re.sub(r"[-_.]+", "-", need.name).lower()
        if name in found or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = installed.version.partition("+")[0]
        names += installed.requires or []
    return dict(sorted(found.items()))


if __name__ == "__main__":
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"]]
    texts += [setup["options.extras_require"][extra] for extra in EXTRAS]
    names = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    text = "".join(f"{name}=={version}\n" for name, version in pins(names).items())
    head = "# A known-good set, written by docs/release/constraints.py\n"
    (ROOT / "constraints.txt").write_text(head + text)
