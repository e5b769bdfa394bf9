"""Volume-level teaching (pretrain's volume.yaml) on adrenal: what its features tell few labels.

  python benchmarks/bench_volume.py train ../shared/data OUT    # pre-train on all training cases
  python benchmarks/bench_volume.py choose ../shared/data OUT   # features on development cases
  python benchmarks/bench_volume.py test ../shared/data OUT     # on test cases, once

No label is used before the logistic regression, which is that of cls-finetune's ``mode: linear``.
The frozen 2D features stand beside it, read from OUT (bench_frozen.py's) or computed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fire
import torch
import yaml
from monai.bundle import ConfigParser
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from bench_frozen import CHOICE_CASES, NAMES, draw, features, fitted, items_of, scored  # noqa: E402
from common import write  # noqa: E402
from evidence.differences import Outcome, difference, level  # noqa: E402
from formatting import load  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.io.configs import with_shared  # noqa: E402
from med3dinsight_ext.metrics.classification import class_scores  # noqa: E402
from med3dinsight_ext.models.classifier import pooled_features  # noqa: E402
from med3dinsight_ext.teachers.teacher import Teacher, bundled, untrained  # noqa: E402
from med3dinsight_ext.training.launch import bundle_run  # noqa: E402

DRAWS = {12: 10, 119: 5}
ARMS = {"volume": "trained", "volume_random": "random"}  # networks, and their teachers
EPOCHS = 18


def random_teacher() -> Teacher:
    return untrained(bundled(128))


def backbone() -> dict[str, Any]:
    """The evidence's network for classification."""
    plan = yaml.safe_load((HERE / "evidence" / "plan.yaml").read_text("utf-8"))
    return {**plan["backbones"]["unet_batch"]["backbone"], "out_channels": 1}


def train(data: str, out: str, arm: str = "volume", epochs: int = EPOCHS) -> None:
    """Pre-train a network on all training cases, without labels."""
    root = Path(out, arm).resolve()
    given: dict[str, Any] = {}
    if ARMS[arm] == "random":
        given["teacher"] = {"_target_": "bench_volume.random_teacher"}
    bundle_run(
        "pretrain",
        ["train.json", "volume.yaml"],
        bundle_root=str(root),
        dataset_dir=str(Path(data) / "adrenal/adrenalmnist3d_64.npz"),
        subset="train",
        spacing=[1.0] * 3,
        patch_size=[64] * 3,
        backbone=backbone(),
        val_fraction=0.0,
        max_epochs=epochs,
        warmup_epochs=1,
        num_workers=0,
        device="cpu",
        **given,
    )


def network_features(items: list[dict[str, Any]], weights: Path | None) -> Tensor:
    """Mean and maximum of the deepest features (n, 2 c); of random weights without a file."""
    folder = bundles_dir() / "cls-finetune" / "configs"
    config = ConfigParser.load_config_files(
        [str(file) for file in with_shared(folder / "train.json")]
    )
    config |= {"class_names": NAMES, "spacing": [1.0] * 3, "patch_size": [64] * 3}
    config |= {"device": torch.device("cpu"), "num_workers": 0, "backbone": backbone()}
    config["probe_loader"]["dataset"]["data"] = items
    torch.manual_seed(0)
    parser = ConfigParser(config)
    classifier = parser.get_parsed_content("network_def")
    if weights:
        classifier.network.load_state_dict(torch.load(weights, weights_only=True))
    rows, *_ = pooled_features(
        classifier, parser.get_parsed_content("probe_loader"), torch.device("cpu")
    )
    return rows


def arms(items: list[dict[str, Any]], out: str) -> dict[str, Tensor]:
    """Features of each arm: networks whose weights are there, the teacher, and both."""
    frozen, _ = features(items, bundled(128), Path(out, f"trained{len(items)}.pt"))
    found = {"frozen": frozen, "untrained": network_features(items, None)}
    for arm in ARMS:
        path = Path(out, arm, "models", "model.pt")
        if path.exists():
            found[arm] = network_features(items, path)
    if "volume" in found:
        found["joined"] = torch.cat([frozen, found["volume"]], 1)
    return found


def choose(data: str, out: str) -> None:
    """AUROC on the development cases that are not labelled; all of them were pre-trained on."""
    items = items_of(data, "train")[:CHOICE_CASES]
    labels = torch.tensor([item["label"] for item in items])
    report: dict[str, dict[str, list[float]]] = {}
    for arm, rows in arms(items, out).items():
        for count, draws in DRAWS.items():
            for seed in range(draws):
                chosen = draw(items, count, seed)
                rest = torch.ones(len(items), dtype=torch.bool)
                rest[chosen] = False
                p = fitted(rows[chosen], labels[chosen], rows[rest])
                value = class_scores(p, labels[rest])["auroc"]
                report.setdefault(arm, {}).setdefault(str(count), []).append(round(value, 5))
        print(arm, {n: round(sum(v) / len(v), 4) for n, v in report[arm].items()}, flush=True)
    update({"choice": {"cases": len(items), "auroc": report}})


def test(data: str, out: str) -> None:
    """AUROC on the test cases, each arm beside the frozen features."""
    train_items, test_items = (items_of(data, subset) for subset in ("train", "test"))
    labels = torch.tensor([item["label"] for item in train_items])
    rows = arms(train_items, out), arms(test_items, out)
    outcomes: dict[str, dict[int, list[Outcome]]] = {}
    for arm in rows[0]:
        for count, draws in DRAWS.items():
            outcomes.setdefault(arm, {})[count] = [
                scored(
                    train_items,
                    labels,
                    draw(train_items, count, seed),
                    test_items,
                    (rows[0][arm], rows[1][arm]),
                    seed,
                )
                for seed in range(draws)
            ]
    report: dict[str, Any] = {}
    for arm, by_count in outcomes.items():
        for count, found in by_count.items():
            value, (low, high) = level(found)
            row = {"auroc": [x.value for x in found], "mean": value, "low": low, "high": high}
            gain = difference(found, outcomes["frozen"][count]) if arm != "frozen" else None
            if gain:
                row["above_frozen"] = {
                    "mean": gain.above,
                    "low": gain.both[0],
                    "high": gain.both[1],
                }
            report.setdefault(arm, {})[str(count)] = row
        print(arm, {n: round(row["mean"], 4) for n, row in report[arm].items()}, flush=True)
    update({"test_cases": len(test_items), "epochs": EPOCHS, "arms": report})


def update(figures: dict[str, Any]) -> None:
    """Write results/volume.json anew, with what else it holds."""
    before = load("volume") or {}
    kept = {key: before[key] for key in ("choice", "test_cases", "epochs", "arms") if key in before}
    write("volume", kept | figures)


if __name__ == "__main__":
    sys.modules["bench_volume"] = sys.modules["__main__"]
    fire.Fire({"train": train, "choose": choose, "test": test})
