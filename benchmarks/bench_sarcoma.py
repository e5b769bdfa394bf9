"""Retrieval of slices on sarcoma patients held out from pre-training, three seeds.

python benchmarks/bench_sarcoma.py DATA [--out DIR] [--seeds 3]

A finished seed is not repeated.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from time import perf_counter

import fire

sys.path.insert(0, str(Path(__file__).parent))
from common import machine, write  # noqa: E402
from med3dinsight_ext.training.launch import bundle_run  # noqa: E402

OVERLAY = str(Path(__file__).parent / "sarcoma.yaml")
PROMPTS = ["a large soft-tissue mass in the thigh", "hip joint, femoral head", "ribs and lung"]
FIGURES = Path(__file__).parent / "figures"
KEYS = ("image_all_r1", "image_within_r1", "image_within_r5", "text_all_r10", "text_within_r1")


def main(data: str, out: str = "sarcoma_runs", seeds: int = 3) -> None:
    root = Path(data)
    runs = []
    patient = json.loads((root / "split.json").read_text())["test"][0]  # for the prompts
    for seed in range(seeds):
        folder = Path(out) / f"seed{seed}"
        table = folder / "eval" / "retrieval.json"
        record = folder / "seconds.json"
        settings = {
            "bundle_root": str(folder),
            "store_dir": str(Path(out) / "store"),
            "dataset_dir": str(root),
            "datalist": str(root / "index.json"),
            "split": str(root / "split.json"),
            "captions": str(root / "captions.jsonl"),
            "seed": seed,
            "store::seed": 0,  # one store for all
        }
        if not record.exists():
            begin = perf_counter()
            bundle_run("pretrain", ["train.json", OVERLAY], **settings)
            seconds, commit = perf_counter() - begin, machine()["commit"]
            record.write_text(json.dumps({"train_seconds": seconds, "train_commit": commit}))
        if not table.exists():
            bundle_run("pretrain", ["train.json", OVERLAY, "evaluate.json"], **settings)
        runs.append({"seed": seed} | json.loads(record.read_text()) | json.loads(table.read_text()))
        if seed == 0:
            images = [str(root / patient / f"{name}.nii.gz") for name in ("CT", "MR_T1")]
            listed = Path(out) / "prompted.json"
            listed.write_text(json.dumps([{"image": image} for image in images]))
            options = {
                "bundle_root": str(folder),
                "dataset_dir": str(root),
                "datalist": str(listed),
                "prompts": PROMPTS,
                "output_dir": str(Path(out) / "text"),
            }
            bundle_run("pretrain", ["inference.json", OVERLAY], **options)
            FIGURES.mkdir(exist_ok=True)
            for image in ("CT", "MR_T1"):
                png = Path(out) / "text" / patient / f"{image}_text.png"
                shutil.copy(png, FIGURES / f"sarcoma_{image}_text.png")
    summary = {}
    for key in KEYS:
        ours = [run["student"][key] for run in runs]
        zero = [run["volume_zero"][key] for run in runs]
        summary[key] = {
            "student": {"mean": statistics.mean(ours), "min": min(ours), "max": max(ours)},
            "volume_zero": {"mean": statistics.mean(zero), "min": min(zero), "max": max(zero)},
            "chance": statistics.mean(run["student"][f"{key}_chance"] for run in runs),
        }
    figures = {"test_patients": 12, "seeds": seeds, "patient": patient}
    write("sarcoma", figures | {"summary": summary, "runs": runs})


if __name__ == "__main__":
    fire.Fire(main)
