"""Click networks of few labelled cases, from pre-trained weights and from scratch.

python benchmarks/click_pretraining.py hippocampus DATA OUT [--labelled 10] [--draws 3]

Pre-training sees the images of the development cases that are not scored. For each draw of labelled
cases both networks are trained for the same seconds, and clicks are simulated on the validation
cases. What is done is not repeated; writes benchmarks/results/click_pretraining.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fire
import numpy as np
from monai.bundle import ConfigParser

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from bench_clicks import name_of, score, source, train  # noqa: E402
from click_scores import ROUNDS, interval  # noqa: E402
from common import write  # noqa: E402
from med3dinsight_ext.data.datalists import datalist  # noqa: E402
from med3dinsight_ext.data.splits import partition  # noqa: E402
from med3dinsight_ext.training.launch import bundle_run  # noqa: E402
from timed_training import timed_overlay  # noqa: E402

CHANNELS = [16, 32, 64, 128]
ARMS = ("scratch", "pretrained")


def pretrain(dataset: str, items: list[dict], folder: Path, seconds: float) -> dict[str, Any]:
    """Pre-train the benchmark's U-Net for so long, unless done; what was done."""
    done = folder / "pretraining.json"
    if done.exists():
        return json.loads(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    images = [{key: item[key] for key in ("image", "modality")} for item in items]
    (folder / "images.json").write_text(json.dumps(images))
    own = ConfigParser.load_config_files([str(HERE / f"{dataset}.yaml")])
    shape = {key: own[key] for key in ("spacing", "patch_size", "backbone")}
    overlay = folder.resolve() / "overlay.json"
    overlay.write_text(json.dumps(shape | timed_overlay(seconds)))
    bundle_run(
        "pretrain",
        ["train.json", str(overlay)],
        bundle_root=str(folder),
        datalist=str(folder / "images.json"),
        num_workers=0,
        val_fraction=0.0,
        max_epochs=100_000,
        **{"backbone::channels": CHANNELS},
    )
    facts = {"volumes": len(items), "seconds": seconds}
    done.write_text(json.dumps(facts))
    return facts


def compared(out: Path, dataset: str, labelled: int, draws: int) -> dict[str, Any]:
    """Dice after 0, 1 and ``ROUNDS`` clicks of both arms, and their difference by case and draw.

    Intervals are over cases, each with the mean of its draws.
    """
    found: dict[str, Any] = {}
    tables = {}
    for arm in ARMS:
        rows = []
        for draw in range(draws):
            folder = out / name_of(dataset, "click", labelled, f"{arm}_{draw}")
            text = json.loads((folder / "validation.json").read_text().replace(str(out), "OUT"))
            rows.append(text["one"]["dice_of_cases"])
            found.setdefault("training", {})[f"{arm}_{draw}"] = text["training"]
        tables[arm] = np.array(rows)  # draw, case, clicks
    differences = tables["pretrained"] - tables["scratch"]
    for name, table in (*tables.items(), ("difference", differences)):
        found[name] = {}
        for clicks in (0, 1, ROUNDS):
            values = table[:, :, clicks]
            found[name][str(clicks)] = {
                **interval(values.mean(0).tolist()),
                "draws": values.mean(1).round(4).tolist(),
            }
    return found


def main(
    dataset: str,
    data: str,
    out: str,
    labelled: int = 10,
    draws: int = 3,
    seconds: float = 200,
    pretrain_seconds: float = 500,
) -> None:
    """Train, score and compare.

    Args:
        dataset: hippocampus or headneck.
        data: its folder.
        out: of all arms.
        labelled: cases of a draw.
        draws: of labelled cases, each with a seed of its own.
        seconds: of each click network.
        pretrain_seconds: of the pre-training.
    """
    place = source(data)
    items = datalist(place["datalist"], data, place["split"], "development", "auto")
    pool, scored = partition(items, None, None)
    start = Path(out) / f"{dataset}_pretraining"
    facts = pretrain(dataset, pool, start, pretrain_seconds)
    weights = str(start / "models" / "model.pt")
    for draw in range(draws):
        chosen = np.random.RandomState(draw).permutation(len(pool))[:labelled]
        path = Path(out).resolve() / f"{dataset}_{labelled}_draw{draw}.json"
        path.write_text(json.dumps([pool[i] for i in chosen]))
        for arm in ARMS:
            tag = f"{arm}_{draw}"
            folder = Path(out) / name_of(dataset, "click", labelled, tag)
            folder.mkdir(parents=True, exist_ok=True)
            settings: dict[str, Any] = {
                "datalist": str(path), "split": None, "val_fraction": 0, "seed": draw,
                "batch_size": 2, "learning_rate": 0.002, "backbone::channels": CHANNELS,
            }  # fmt: skip
            settings |= {"pretrained": weights} if arm == "pretrained" else {}
            train(dataset, data, folder, "click", None, seconds, settings)
            if not (folder / "validation.json").exists():
                own: dict[str, Any] = {"backbone::channels": CHANNELS}
                score(dataset, data, out, "click", labelled, tag, **own)
        done = compared(Path(out), dataset, labelled, draw + 1)
        result = {
            "dataset": dataset, "labelled": labelled, "scored": len(scored), "draws": draw + 1,
            "seconds": seconds, "pretrain": facts,
        }  # fmt: skip
        write("click_pretraining", result | done)


if __name__ == "__main__":
    fire.Fire(main)
