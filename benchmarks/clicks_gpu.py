"""Run bench_clicks.py's arms side by side on one GPU: choose on validation cases, then test once.

python benchmarks/clicks_gpu.py choose DATA OUT [--seconds 60] [--slots 8]
python benchmarks/clicks_gpu.py final DATA OUT [--seconds 100]

DATA has the folders hippocampus and headneck. ``choose`` trains five kinds of guidance on 112
hippocampus cases and scores them, and the best one with three radii of refinement, on 28 others;
benchmarks/results/click_guidance.json has the choice, by mean Dice over 0 to 5 clicks. ``final``
trains the networks with it, the plain ones and DeepEdit, and scores the test cases. Each arm is a
process with a log beside its results, which are written as soon as they are there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fire
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from click_scores import interval  # noqa: E402
from common import RESULTS, write  # noqa: E402

GUIDANCE: dict[str, dict[str, Any]] = {
    "disc_answer": {"click_shape": "disc", "click_radius": 3.0, "earlier_answer": True},
    "disc": {"click_shape": "disc", "click_radius": 3.0, "earlier_answer": False},
    "gaussian_answer": {"click_shape": "gaussian", "click_radius": 2.0, "earlier_answer": True},
    "gaussian": {"click_shape": "gaussian", "click_radius": 2.0, "earlier_answer": False},
}
GUIDANCE["disc_answer_half"] = GUIDANCE["disc_answer"] | {"automatic_share": 0.5}
RADII = (8.0, 16.0, 64.0)
FAST = {"num_workers": 2, "batch_size": 4}  # of training
Job = tuple[str, list[str], dict[str, Any]]  # name of its log, arguments, options


def together(out: Path, jobs: list[Job], slots: int = 8) -> None:
    """Run commands of bench_clicks.py, so many at the same time."""
    out.mkdir(parents=True, exist_ok=True)

    def run(job: Job) -> str:
        name, words, options = job
        given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        with (out / f"{name}.log").open("a") as log:
            line = [sys.executable, str(HERE / "bench_clicks.py"), *words, *given]
            failed = subprocess.run(line, stdout=log, stderr=log).returncode
        return f"{out / name}.log" if failed else ""

    with ThreadPoolExecutor(slots) as pool:
        if failed := [log for log in pool.map(run, jobs) if log]:
            raise RuntimeError(
                f"all arms must end, got failures in {', '.join(failed)}; start again: trainings "
                "that have ended are kept"
            )


def inferred(options: dict[str, Any]) -> dict[str, Any]:
    """Those that inference has too."""
    return {key: value for key, value in options.items() if key != "automatic_share"}


def dice(path: Path) -> np.ndarray:
    """Of each case, the mean over the numbers of clicks from 0 to 5."""
    return np.array(json.loads(path.read_text())["one"]["dice_of_cases"])[:, :6].mean(1)


def beside(scores: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Means with intervals over cases, of each and of its difference from the first."""
    first = next(iter(scores.values()))
    return {
        name: {"dice": interval(x.tolist()), "difference": interval((x - first).tolist())}
        for name, x in scores.items()
    }


def choose(
    data: str,
    out: str,
    seconds: float = 60,
    cases: int | None = None,
    slots: int = 8,
    **settings: Any,
) -> None:
    """Choose guidance and radius on validation cases of hippocampus.

    Args:
        data: folder of the data sets.
        out: of results.
        seconds: of each training.
        cases: to score; None for all.
        slots: processes at the same time.
        settings: more of each training, such as a smaller network.
    """
    root, words = Path(out), ["hippocampus", f"{data}/hippocampus", out]
    count = {} if cases is None else {"cases": cases}
    more = FAST | settings | count
    jobs: list[Job] = [
        (
            f"choose_{tag}",
            ["arm", *words],
            {"tag": tag, "seconds": seconds, "val_fraction": 0.2, "refine_radius": 64.0}
            | guidance
            | more,
        )
        for tag, guidance in GUIDANCE.items()
    ]
    together(root, jobs, slots)
    folder = {tag: root / f"hippocampus_click_{tag}" for tag in GUIDANCE}
    found = {tag: dice(path / "validation.json") for tag, path in folder.items()}
    best = max(found, key=lambda tag: found[tag].mean())
    together(
        root,
        [
            (
                f"choose_radius_{radius:.0f}",
                ["score", *words],
                {"tag": best, "part": f"radius_{radius:.0f}"}
                | inferred(GUIDANCE[best])
                | {key: value for key, value in settings.items() if key.startswith("backbone")}
                | count
                | {"refine_radius": radius},
            )
            for radius in RADII
        ],
        slots,
    )
    radii = {r: dice(folder[best] / f"validation_radius_{r:.0f}.json") for r in RADII}
    choice = GUIDANCE[best] | {"refine_radius": max(radii, key=lambda r: radii[r].mean())}
    start = settings.get("pretrained")
    record = json.loads((Path(start).parents[1] / "training.json").read_text()) if start else None
    figures = {
        "choice": choice,
        "seconds": seconds,
        "cases": len(found[best]),
        "settings": {key: value for key, value in settings.items() if key != "pretrained"},
        "start": record,
        "guidance": beside(found),
        "radii": beside({f"{radius:.0f}": x for radius, x in radii.items()}),
    }
    write("click_guidance", figures)


def final(
    data: str, out: str, seconds: float = 100, cases: int | None = None, **settings: Any
) -> None:
    """Train with the choice, beside plain networks and DeepEdit; score the test cases.

    Args:
        data: folder of the data sets.
        out: of results.
        seconds: of each training.
        cases: to score; None for all.
        settings: more of each training, such as a smaller network.
    """
    root = Path(out)
    choice = json.loads((RESULTS / "click_guidance.json").read_text())["choice"]
    count = {} if cases is None else {"cases": cases}
    few = {"labelled": 5, "train_items": "$@checked_partition[0] * 12"}
    arms = [
        ("hippocampus", {}, ("plain", "click", "deepedit")),
        ("headneck", {}, ("plain", "click", "deepedit")),
        ("headneck", few, ("plain", "click")),
    ]
    trainings: list[Job] = []
    scores: list[Job] = []
    for dataset, some, methods in arms:
        for method in methods:
            name = "_".join([dataset, method, *(["5"] if some else [])])
            words = [dataset, f"{data}/{dataset}", out]
            own = choice if method == "click" else {}
            one = {"method": method, **own, **settings}
            seen = {"method": method, **inferred(own), **settings}
            trainings.append(
                (
                    name,
                    ["arm", *words],
                    {"seconds": seconds, "validate": False, **some, **FAST, **one},
                )
            )
            given = count | ({"labelled": 5} if some else {})
            scores.append((f"{name}_test", ["score", *words], {"subset": "test", **given, **seen}))
            if dataset == "headneck":
                scores.append((f"{name}_validation", ["score", *words], {**given, **seen}))
    together(root, trainings)
    together(root, scores)


if __name__ == "__main__":
    fire.Fire({"choose": choose, "final": final})
