"""Train networks for a given time, with and without simulated clicks, and score clicks on them.

python benchmarks/bench_clicks.py arm hippocampus DATA OUT --method click --seconds 170
python benchmarks/bench_clicks.py arm headneck DATA OUT --method deepedit --labelled 5
python benchmarks/bench_clicks.py score headneck DATA OUT --method click --subset test
python benchmarks/bench_clicks.py collect hippocampus OUT
python benchmarks/bench_clicks.py seconds

An arm is one process; it trains on the GPU if there is one, scores on the validation cases, and
writes OUT/<arm>/validation.json. A finished training is not repeated. Clicks are simulated in the
largest error, at its most interior voxel, in the stored file's voxels. ``seconds`` needs no
trained network, and an idle machine.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import SaveImaged
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from click_scores import CLICKS, ROUNDS, Answer, correct, statistics  # noqa: E402
from common import machine, spread, timed, write  # noqa: E402
from med3dinsight_ext.data.splits import partition  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.training.checkpoints import load_weights  # noqa: E402
from med3dinsight_ext.training.click_inferer import ClickInferer, History  # noqa: E402
from med3dinsight_ext.training.launch import bundle_run  # noqa: E402
from timed_training import timed_overlay  # noqa: E402

CONFIGS = bundles_dir() / "seg-finetune" / "configs"
TRAINING: dict[str, dict[str, Any]] = {
    "hippocampus": {"val_fraction": 0},
    "headneck": {},
}
METHODS: dict[str, tuple[list[Any], list[Any]]] = {
    "plain": ([], []),
    "click": (["click.yaml"], ["click_inference.yaml"]),
    "deepedit": ([HERE / "deepedit.yaml"], [HERE / "deepedit_inference.yaml"]),
}


def source(data: str) -> dict[str, Any]:
    root = Path(data)
    return {
        "dataset_dir": data,
        "datalist": str(root / "dataset.json"),
        "split": str(root / "split.json"),
    }


def train(
    dataset: str,
    data: str,
    folder: Path,
    method: str,
    labelled: int | None,
    seconds: float,
    settings: dict[str, Any],
) -> None:
    """Train for some seconds without validation, unless done."""
    record = folder / "training.json"
    if record.exists():
        return
    files = ["train.json", str(HERE / f"{dataset}.yaml"), *map(str, METHODS[method][0])]
    overlay = folder.resolve() / "timing.json"
    overlay.write_text(json.dumps(timed_overlay(seconds)))
    files.append(str(overlay))
    begin = perf_counter()
    workflow = bundle_run(
        "seg-finetune",
        files,
        bundle_root=str(folder),
        **source(data)
        | {"max_cases": labelled, "val_items": [], "max_epochs": 100_000, "ema_decay": 0.99}
        | TRAINING[dataset]
        | settings,
    )
    state = workflow.trainer.state
    figures = {
        "seconds": perf_counter() - begin,
        "epochs": state.epoch,
        "iterations": state.iteration,
        "cases": len(workflow.train_dataset_data),
        "settings": settings,
    }
    record.write_text(json.dumps(figures))


def segmenter(overlays: list[Any], **overrides: Any) -> tuple[ConfigParser, Answer]:
    """The inference configs, and the function from an item to class numbers on its file's grid."""
    files = [CONFIGS / "inference.json", *overlays]
    parser = ConfigParser(ConfigParser.load_config_files([str(CONFIGS / file) for file in files]))
    parser.update(overrides)
    network, inferer, before, after = (
        parser.get_parsed_content(key)
        for key in ("network", "inferer", "preprocessing", "postprocessing")
    )
    network.eval()
    after.transforms = [t for t in after.transforms if not isinstance(t, SaveImaged)]
    device = parser.get_parsed_content("device")

    @torch.no_grad()
    def answer(item: dict) -> np.ndarray:
        data = before(item)
        data["pred"] = inferer(data["image"][None].to(device), network)[0].float().cpu()
        return after(data)["pred"][0].numpy().astype(int)

    return parser, answer


def name_of(dataset: str, method: str, labelled: int | None, tag: str) -> str:
    return "_".join(str(part) for part in (dataset, method, labelled, tag) if part)


def score(
    dataset: str,
    data: str,
    out: str,
    method: str = "click",
    labelled: int | None = None,
    tag: str = "",
    subset: str = "validation",
    part: str = "",
    cases: int | None = None,
    **settings: Any,
) -> None:
    """Score a trained arm with simulated clicks and write OUT/<arm>/<subset>[_<part>].json.

    Args:
        dataset: hippocampus or headneck.
        data: its folder.
        out: of all arms.
        method: plain, click or deepedit.
        labelled: development cases that it was trained on; None for all.
        tag: of its name.
        subset: validation or test.
        part: of the file's name.
        cases: to score; None for all.
        settings: of inference.
    """
    folder = Path(out) / name_of(dataset, method, labelled, tag)
    overlays = [HERE / f"{dataset}.yaml", *METHODS[method][1]]
    chosen = "test" if subset == "test" else "development"
    given = source(data) | {"bundle_root": str(folder), "subset": chosen, **settings}
    parser, answer = segmenter(overlays, **given)
    network, weights = (parser.get_parsed_content(key) for key in ("network_def", "checkpoint"))
    load_weights(network, weights)
    names, items = (parser.get_parsed_content(key) for key in ("label_names", "items"))
    items = items if subset == "test" else partition(items, None, None)[1]
    items = items[:cases]
    inferer = parser.get_parsed_content("inferer")
    steps = {"plain": 0}.get(method, CLICKS)
    protocols = {"one": (steps, False)}
    if method != "plain" and len(names) > 3:
        protocols["each"] = (ROUNDS, True)
    figures: dict[str, Any] = {"cases": len(items), "settings": settings}
    figures["training"] = json.loads((folder / "training.json").read_text())
    for protocol, (count, each) in protocols.items():
        found = []
        for item in tqdm(items, f"{folder.name} {protocol}", mininterval=5):
            if isinstance(inferer, ClickInferer):
                inferer.history = History()
            found.append(correct(answer, item, names, count, each))
        figures[protocol] = statistics(found, names)
        name = f"{subset}_{part}" if part else subset
        (folder / f"{name}.json").write_text(json.dumps(machine() | figures, indent=1) + "\n")


def arm(
    dataset: str,
    data: str,
    out: str,
    method: str = "click",
    labelled: int | None = None,
    seconds: float = 170,
    tag: str = "",
    validate: bool = True,
    cases: int | None = None,
    **settings: Any,
) -> None:
    """Train one arm, and score it on the validation cases.

    Args:
        dataset: hippocampus or headneck.
        data: its folder.
        out: of all arms.
        method: plain, click or deepedit.
        labelled: development cases to train on; None for all.
        seconds: of training.
        tag: of its name.
        validate: score too.
        cases: to score; None for all.
        settings: of training; those that inference has too are given to it.
    """
    folder = Path(out) / name_of(dataset, method, labelled, tag)
    folder.mkdir(parents=True, exist_ok=True)
    files = [CONFIGS / name for name in ("inference.json", "click_inference.yaml")]
    keys = ConfigParser.load_config_files(list(map(str, files)))
    shared = {key: value for key, value in settings.items() if key.split("::")[0] in keys}
    settings.pop("refine_radius", None)
    train(dataset, data, folder, method, labelled, seconds, settings)
    if validate:
        score(dataset, data, out, method, labelled, tag, cases=cases, **shared)


def collect(dataset: str, out: str) -> None:
    """Write results/clicks_<dataset>.json: all arms in OUT, by name, that have scores.

    Args:
        dataset: hippocampus or headneck.
        out: of all arms.
    """
    arms: dict[str, Any] = {}
    for path in sorted(Path(out).glob(f"{dataset}_*/*.json")):
        found = json.loads(path.read_text().replace(str(Path(out)), "OUT"))
        if "one" in found:
            used = found["training"]["settings"]
            if (start := Path(used.get("pretrained", ""))).is_absolute():
                used["pretrained"] = str(Path(*start.parts[-4:]))  # no folder of this machine
            name = path.parent.name.removeprefix(f"{dataset}_")
            timing = json.loads((path.parent / "timing.json").read_text())
            budget = {"budget": timing["train_handlers::timing"]["seconds"]}
            arms.setdefault(name, {"training": found["training"] | budget})[path.stem] = {
                key: found[key]
                for key in ("commit", "cases", "settings", "one", "each")
                if key in found
            }
    if not arms:
        raise ValueError(f"out must have arms of {dataset}, got none in {out}; score them first")
    write(f"clicks_{dataset}", {"dataset": dataset, "arms": arms})


def seconds() -> None:
    """Seconds of an answer: reading, transforms, inference, inversion; write click_seconds.json.

    By the network of hippocampus.yaml with windows of 96 x 96 x 96 voxels; the first answer for a
    volume is without clicks, each further one to one more click.
    """
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for shape in ((128, 128, 128), (256, 256, 128)):
            path = f"{folder}/volume.nii.gz"
            volume = np.random.default_rng(0).integers(0, 1000, shape, dtype=np.int16)
            nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
            given: dict[str, Any] = {"spacing": [1.0] * 3, "patch_size": [96] * 3}
            parser, answer = segmenter([HERE / "hippocampus.yaml", "click_inference.yaml"], **given)
            inferer: Any = parser.get_parsed_content("inferer")
            inferer.history = History()
            item: dict[str, Any] = {"image": path, "modality": "MR", "background": []}
            first = timed(partial(answer, item), False)
            clicks = []
            for place in np.random.default_rng(1).integers(0, shape, (7, 3)).tolist():
                item["background"].append(place)
                clicks.append(timed(partial(answer, item), False))
            found["x".join(map(str, shape))] = {"first": first, "click": spread(clicks)}
    write("click_seconds", {"seconds": found})


if __name__ == "__main__":
    fire.Fire({"arm": arm, "score": score, "collect": collect, "seconds": seconds})
