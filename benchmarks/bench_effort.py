"""Effort of a simulated annotator in MONAI Label, before and after a round of training.

ENV/bin/python benchmarks/bench_effort.py ../shared/data/hippocampus OUT --arm ARM [--cases 10]

ENV is the environment of ``label-install``; ARM is a folder of ``bench_clicks.py`` with a trained
click network. The annotator segments validation cases over REST, clicks in the largest error until
mean Dice is GOAL or there are 10 clicks, and draws the rest by hand: the case's label is saved.
Then a round of training, and as many other cases. Writes results/effort.json, and
docs/guides/figures/rounds.png if there is a chromium.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[0] / "tests")]
import label_running  # noqa: E402

from bench_clicks import source  # noqa: E402
from bench_label import ask, granted, start  # noqa: E402
from click_scores import CLICKS, interval, mean_dice, next_clicks  # noqa: E402
from common import write  # noqa: E402
from med3dinsight_ext.data.datalists import datalist  # noqa: E402
from med3dinsight_ext.data.splits import partition  # noqa: E402
from med3dinsight_ext.monailabel.label_bundle import label_bundle  # noqa: E402
from med3dinsight_ext.monailabel.server import class_names  # noqa: E402

GOAL = 0.85
NAME = "deepedit_hippocampus"
CHANNELS = [16, 32, 64, 128]  # of the arm's network
RATE = 1e-3  # of a round, lower than of a training from scratch
PICTURE = HERE.parent / "docs" / "guides" / "figures" / "rounds.png"


def annotate(server: label_running.Server, item: dict, names: list[str]) -> dict[str, Any]:
    """Segment, click and save one case."""
    case = Path(item["image"]).name.removesuffix(".nii.gz")
    file: Any = nib.load(item["label"])
    label = np.asarray(file.dataobj).astype(int)
    clicks: dict[str, Any] = {name.lower(): [] for name in names}
    dice: list[float] = []
    for step in range(CLICKS + 1):
        params = {**clicks, "client_id": "simulated"}
        answer = gzip.decompress(ask(server, NAME, case, "image", params))
        found = np.asarray(nib.Nifti1Image.from_bytes(answer).dataobj).astype(int)
        dice.append(mean_dice(found, label, len(names)))
        if dice[-1] >= GOAL or step == CLICKS:
            break
        for number, place in next_clicks(found, label, len(names), False):
            clicks[names[number].lower()].append(list(place))
    form = {"params": '{"client_id": "simulated"}', "label": Path(item["label"])}
    path = f"/datastore/label?image={case}&tag=final"
    granted(server.ask("PUT", path, **form), server)
    return {"case": case, "dice": dice}


def shoot(url: str) -> None:
    """A picture of a page."""
    if not (browser := shutil.which("chromium")):
        return
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1000,1560"]
    words = [browser, *options, f"--screenshot={PICTURE}", url]
    subprocess.run(words, check=True, capture_output=True, timeout=120)


def part(rows: list[dict[str, Any]], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the cases of one part."""
    chosen = [row for row in rows if row["image"] in {case["case"] for case in cases}]
    dice = [case["dice"] for case in cases]
    return {
        "cases": len(cases),
        "clicks": interval([float(row["clicks"]) for row in chosen]),
        "waited": interval([row["waited"] for row in chosen]),
        "first_dice": interval([row[0] for row in dice]),
        "last_dice": interval([row[-1] for row in dice]),
        "reached": sum(row[-1] >= GOAL for row in dice),
    }


def main(data: str, out: str, arm: str, cases: int = 10, epochs: int = 20) -> None:
    """Measure and write results/effort.json.

    Args:
        data: folder of hippocampus.
        out: new folder.
        arm: folder with models/model.pt.
        cases: before the round, and after it.
        epochs: of the round.
    """
    root = Path(out).absolute()
    studies = root / "studies"
    studies.mkdir(parents=True)
    bundle = root / NAME
    shutil.copy(Path(arm) / "models" / "model.pt", root)  # without the record of a timed training
    size = root / "size.json"
    size.write_text(json.dumps({"backbone::channels": CHANNELS, "learning_rate": RATE}))
    overlays = [str(HERE / "hippocampus.yaml"), str(size)]
    label_bundle(str(bundle), str(root / "model.pt"), overlays, click=True)
    given = source(data)
    items = datalist(given["datalist"], data, given["split"], "development")
    items = partition(items, 0.2, None)[1][: 2 * cases]
    for item in items:
        shutil.copy(item["image"], studies)
    names = class_names(bundle)
    server = start(root / "server", [bundle], studies, 1)
    try:
        before = [annotate(server, item, names) for item in items[:cases]]
        granted(server.start_training(NAME, max_epochs=epochs, val_split=0.34), server)
        running = ("SUBMITTED", "RUNNING")
        server.wait(lambda: server.ask("GET", "/train/").body["status"] not in running, 3600)
        if server.ask("GET", "/train/").body["status"] != "DONE":
            raise ValueError(f"the training must end well, got an error; read {server.log}")
        after = [annotate(server, item, names) for item in items[cases:]]
        rows = granted(server.ask("GET", "/rounds/effort"), server)
        scores = granted(server.ask("GET", "/rounds/models"), server)[NAME]
        shoot(f"{server.url}/rounds/")
    finally:
        server.stop()
    write(
        "effort",
        {
            "goal": GOAL,
            "at_most": CLICKS,
            "epochs": epochs,
            "scores": scores,
            "before": part(rows, before),
            "after": part(rows, after),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    fire.Fire(main)
