"""Two processes that run one command on one folder at once.

python tests/hostile/two.py all|SCENARIO[,SCENARIO] [--out benchmarks/results/two.json]

Both begin together, or the second a little later; a third one runs the command again. Allowed are
results that equal those of one undisturbed run, and errors whose text says what to do.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faults
from faults import Ended, end, start
from scenarios import Scenario

DELAYS = (0.0, 0.5)  # seconds by which the second begins later


def race(name: str, delays: Iterable[float] = DELAYS) -> dict[str, Any]:
    """Outcomes of one scenario, one for each delay, and those that are not allowed."""
    counts, open_ = Counter[str](), []
    begin = time.monotonic()
    with faults.undisturbed(name) as (scenario, work, renew, wanted):
        for delay in delays:
            renew()
            both = [start(scenario.run, work), start(scenario.run, work, delay=delay)]
            ended = [end(process) for process in both]
            first = _verdict(scenario, work, wanted, ended)
            again = _verdict(scenario, work, wanted, [end(start(scenario.run, work))])
            verdict = f"{first}; again {again}"
            counts[verdict] += 1
            if "OPEN" in verdict:
                texts = [run.why[:400] for run in ended]
                open_.append({"delay": delay, "verdict": verdict, "errors": texts})
    return {
        "tried": counts.total(),
        "seconds": round(time.monotonic() - begin, 1),
        "outcomes": dict(sorted(counts.items())),
        "open": open_,
    }


def _verdict(scenario: Scenario, work: Path, wanted: dict[str, Any], ended: list[Ended]) -> str:
    if any(run.state != "done" and not faults.told(run.why) for run in ended):
        return "OPEN: an error does not say what to do"
    found = faults.compared(scenario, work, wanted)
    states = " and ".join(sorted(run.state for run in ended))
    return f"{states}, equal" if found == "equal" else found


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    given = faults.arguments(__doc__).parse_args()
    sys.exit(faults.record(((name, race(name)) for name in faults.names(given)), given.out))
