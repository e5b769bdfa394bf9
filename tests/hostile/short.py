"""The short, seeded part of the hostile inputs.

python tests/hostile/short.py OUT.json INPUTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fuzz  # sets the path
from cases import CASES, run

if __name__ == "__main__":
    out, inputs = Path(sys.argv[1]), int(sys.argv[2])
    readers = {name: fuzz.fuzz(name, inputs=inputs, seed=7) for name in fuzz.READERS}
    out.write_text(json.dumps({"cases": run(list(CASES)), "readers": readers}))
