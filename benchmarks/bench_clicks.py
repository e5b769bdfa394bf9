"""Train with simulated clicks, then click on the test cases through the inference configs.

python benchmarks/bench_clicks.py score ../shared/data/hippocampus [--out DIR]
python benchmarks/bench_clicks.py score ../shared/data/hippocampus --labelled 14 --epochs 60
python benchmarks/bench_clicks.py seconds

Each click goes into the largest error, at its most interior voxel, in the stored file's voxels.
A finished training is not repeated. ``seconds`` needs no trained network, and an idle machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import fire
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import SaveImaged
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from common import spread, timed, write  # noqa: E402
from med3dinsight_ext.data.clicks import corrective_click  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.metrics.segmentation import case_scores, mean_scores, summary  # noqa: E402
from med3dinsight_ext.training.checkpoints import load_weights  # noqa: E402
from med3dinsight_ext.training.launch import bundle_run  # noqa: E402

CONFIGS = bundles_dir() / "seg-finetune" / "configs"
OVERLAY = str(Path(__file__).parent / "hippocampus.yaml")
CLICKS = 5
FIGURES = Path(__file__).parent / "figures"


def inference(overlay: str, **overrides: Any) -> ConfigParser:
    """The inference configs of a network with these settings that takes clicks."""
    files = [CONFIGS / "inference.json", overlay, CONFIGS / "click_inference.yaml"]
    parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    parser.update(overrides)
    return parser


def segmenter(parser: ConfigParser) -> Callable[[dict], np.ndarray]:
    """Function from an item to class numbers on its file's grid, as MONAI Label calls a bundle."""
    network, inferer, before, after = (
        parser.get_parsed_content(key)
        for key in ("network", "inferer", "preprocessing", "postprocessing")
    )
    network.eval()
    after.transforms = [t for t in after.transforms if not isinstance(t, SaveImaged)]

    @torch.no_grad()
    def answer(item: dict) -> np.ndarray:
        data = before(item)
        data["pred"] = inferer(data["image"][None], network)[0]
        return after(data)["pred"][0].cpu().numpy().astype(int)

    return answer


def correct(answer: Callable[[dict], np.ndarray], item: dict, names: list[str]) -> list[dict]:
    """Scores of one case after 0 to CLICKS clicks."""
    file: Any = nib.load(item["label"])
    label = np.asarray(file.dataobj).astype(int)
    spacing = [float(mm) for mm in file.header.get_zooms()[:3]]
    clicks: dict[str, list] = {name: [] for name in names}
    rows = []
    for _ in range(CLICKS + 1):
        found = answer({key: item[key] for key in ("image", "modality")} | clicks)
        ours, theirs = (torch.from_numpy(x)[None] for x in (found, label))
        rows.append(case_scores(ours, theirs, spacing, names))
        if click := corrective_click(found, label):
            clicks[names[click[0]]].append(list(click[1]))
    return rows


def draw(path: Path, steps: list[dict[str, Any]], title: str) -> None:
    """Mean Dice after each number of clicks, with its interval."""
    mean, low, high = (np.array([step[key] for step in steps]) for key in ("mean", "low", "high"))
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.errorbar(range(len(steps)), mean, (mean - low, high - mean), marker="o", capsize=3)
    axes.set(xlabel="clicks", ylabel="mean Dice", title=title)
    figure.savefig(path, dpi=150)


def score(
    data: str, out: str = "clicks_run", labelled: int | None = None, epochs: int = 14
) -> None:
    """Train on development cases, all or ``labelled`` of them; score clicks on 60 test cases."""
    root, name = Path(data), f"clicks_{labelled}" if labelled else "clicks"
    out = f"{out}_{labelled}" if labelled else out
    source = {
        "dataset_dir": data, "datalist": str(root / "dataset.json"),
        "split": str(root / "split.json"),
    }  # fmt: skip
    record = Path(out) / "seconds.json"
    if not record.exists():
        begin = perf_counter()
        files = ["train.json", OVERLAY, "click.yaml"]
        more = {"bundle_root": out, "max_epochs": epochs, "max_cases": labelled}
        bundle_run("seg-finetune", files, **more, **source)
        record.write_text(json.dumps(perf_counter() - begin))
    parser = inference(OVERLAY, bundle_root=out, **source)
    names, items = (parser.get_parsed_content(key) for key in ("label_names", "items"))
    answer = segmenter(parser)
    network, weights = (parser.get_parsed_content(key) for key in ("network_def", "checkpoint"))
    load_weights(network, weights)
    cases = [correct(answer, item, names) for item in tqdm(items, "Clicking")]
    steps = [summary([case[n] for case in cases])["mean"] for n in range(CLICKS + 1)]
    gain = [mean_scores(c[-1])["dice"] - mean_scores(c[0])["dice"] for c in cases]
    figures = {
        "train_seconds": json.loads(record.read_text()),
        "labelled": labelled,
        "epochs": epochs,
        "cases": len(cases),
        "clicks": {str(n): step for n, step in enumerate(steps)},
        "gain_of_dice": {"mean": float(np.mean(gain)), **spread(gain)},
    }
    write(name, figures)
    title = (
        f"Hippocampus, {len(cases)} test cases; trained on {labelled or 'all'} development cases"
    )
    draw(FIGURES / f"{name}.png", [step["dice"] for step in steps], title)


def seconds() -> None:
    """Seconds of a click on 128 x 128 x 128 voxels: reading, transforms, inference, inversion."""
    times = {}
    with TemporaryDirectory() as folder:
        path = f"{folder}/volume.nii.gz"
        volume = np.random.default_rng(0).random((128, 128, 128), dtype=np.float32)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
        item = {"image": path, "modality": "MR", "background": [[60, 61, 62]]}
        for overlay in (CONFIGS / "quickstart.yaml", Path(OVERLAY)):
            whole: dict[str, Any] = {"spacing": [1.0] * 3, "patch_size": [128] * 3, "tta_axes": []}
            answer = segmenter(inference(str(overlay), **whole))
            answer(item)
            found = [timed(partial(answer, item), False) for _ in range(7)]
            times[overlay.stem] = spread(found)
    write("click_seconds", {"seconds": times})


if __name__ == "__main__":
    fire.Fire({"score": score, "seconds": seconds})
