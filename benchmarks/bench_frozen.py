"""Frozen 2D features with logistic regression (cls-finetune's teacher.yaml) on adrenal.

  python benchmarks/bench_frozen.py choose ../shared/data   # features compared on development cases
  python benchmarks/bench_frozen.py test ../shared/data     # those chosen, on test cases

Labelled cases are drawn as in evidence/, whose trainings stand beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from common import write  # noqa: E402
from evidence import results  # noqa: E402
from evidence.differences import Outcome, difference, level, outcome  # noqa: E402
from formatting import load  # noqa: E402
from med3dinsight_ext.data.datalists import datalist  # noqa: E402
from med3dinsight_ext.data.slicing import PLANES  # noqa: E402
from med3dinsight_ext.data.splits import take  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.io.configs import with_shared  # noqa: E402
from med3dinsight_ext.metrics.classification import class_scores  # noqa: E402
from med3dinsight_ext.models.classifier import pooled_features  # noqa: E402
from med3dinsight_ext.models.probes import fit_linear, select_l2  # noqa: E402
from med3dinsight_ext.models.teacher_classifier import TeacherFeatures  # noqa: E402
from med3dinsight_ext.teachers.dense import encode_grids  # noqa: E402
from med3dinsight_ext.teachers.teacher import Teacher, bundled, untrained  # noqa: E402

NAMES = ["normal", "hyperplasia"]
DRAWS = {12: 10, 119: 5, None: 3}  # labelled cases: draws, as many as seeds of the evidence
CHOICE_CASES, RANDOM = 300, 32  # development cases, random projections
PARTS = ("choice", "test_cases", "volume_seconds", "fit_seconds", "arms")
EVIDENCE = ("scratch", "reconstruction", "default", "default_reconstruction_100")


def update(figures: dict[str, Any]) -> None:
    """Write results/frozen.json anew, with what else it holds."""
    before = load("frozen") or {}
    write("frozen", {key: before[key] for key in PARTS if key in before} | figures)


def items_of(data: str, subset: str) -> list[dict[str, Any]]:
    return datalist(Path(data) / "adrenal/adrenalmnist3d_64.npz", subset=subset)


def bundle(items: list[dict[str, Any]]) -> ConfigParser:
    """The bundle with teacher.yaml, at the resolution of the archive."""
    folder = bundles_dir() / "cls-finetune" / "configs"
    files = [*with_shared(folder / "train.json"), folder / "teacher.yaml"]
    config = ConfigParser.load_config_files([str(file) for file in files])
    config |= {"class_names": NAMES, "spacing": [1.0] * 3, "patch_size": [64] * 3}
    config |= {"device": torch.device("cpu"), "num_workers": 0}
    config["probe_loader"]["dataset"]["data"] = items
    return ConfigParser(config)


def fitted(rows: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Probabilities (m, classes) as by ``mode: linear``."""
    l2 = select_l2(rows, labels, len(NAMES))
    return fit_linear(rows, labels, l2, len(NAMES))(others).detach().softmax(1)


def draw(items: list[dict[str, Any]], count: int | None, seed: int) -> Tensor:
    """Rows of the labelled cases."""
    place = {item["image"]: i for i, item in enumerate(items)}
    return torch.tensor([place[item["image"]] for item in take(items, count, seed)])


def candidates(teacher: Teacher) -> dict[str, Callable[[Tensor], Tensor]]:
    """Features, of any shape, of a volume (1, 1, x, y, z) by name."""
    ours = TeacherFeatures(teacher, [1.0] * 3)
    matrix = torch.randn(RANDOM, 4096, generator=torch.Generator().manual_seed(0))

    def by_plane(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (len(PLANES), -1)).mean(1)

    @lru_cache(maxsize=1)
    def cells(volume: Tensor) -> list[Tensor]:
        """Of each layer (s, c, h * w)."""
        grids = encode_grids(teacher, ours.pictures(volume[0]), ours.layers)
        return [grid.flatten(2) for grid in grids.values()]

    @lru_cache(maxsize=1)
    def tissue(volume: Tensor) -> Tensor:
        return ours.of_slices(volume)[0]

    def pooled(volume: Tensor, second: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([y for x in cells(volume) for y in (x.mean(2), second(x))], 1).mean(0)

    return {
        "last embedding, planes side by side": lambda volume: by_plane(
            teacher.encode_image(ours.pictures(volume[0]))
        ),
        "cells of stride 16 by random projections, planes side by side": lambda volume: by_plane(
            torch.einsum("kc,sch->skh", matrix[:, : cells(volume)[-1].shape[1]], cells(volume)[-1])
        ),
        "strides 4 to 16, mean and maximum": lambda v: pooled(v, lambda x: x.amax(2)),
        "strides 4 to 16, mean and deviation": lambda v: pooled(v, lambda x: x.std(2)),
        "the same of tissue, planes side by side": lambda v: by_plane(tissue(v)),
        "the same of tissue": lambda v: tissue(v).mean(0),
    }


def choose(data: str) -> None:
    """AUROC of each candidate on the development cases that are not labelled."""
    items = items_of(data, "train")[:CHOICE_CASES]
    labels = torch.tensor([item["label"] for item in items])
    loader = bundle(items).get_parsed_content("probe_loader")
    makers = candidates(bundled(128))
    rows: dict[str, list[Tensor]] = {name: [] for name in makers}
    for batch in loader:
        for volume in batch["image"].as_subclass(Tensor):
            for name, make in makers.items():
                rows[name].append(make(volume[None]).flatten())
    found: dict[str, dict[str, list[float]]] = {}
    for name, parts in rows.items():
        features = torch.stack(parts)
        for count, draws in ((12, 10), (119, 5)):
            for seed in range(draws):
                chosen = draw(items, count, seed)
                rest = torch.ones(len(items), dtype=torch.bool)
                rest[chosen] = False
                p = fitted(features[chosen], labels[chosen], features[rest])
                value = class_scores(p, labels[rest])["auroc"]
                found.setdefault(name, {}).setdefault(str(count), []).append(round(value, 5))
        print(name, features.shape[1], found[name], flush=True)
    update({"choice": {"cases": len(items), "auroc": found}})


def scored(
    items: list[dict[str, Any]], labels: Tensor, chosen: Tensor, test: list[dict[str, Any]],
    features: tuple[Tensor, Tensor], seed: int,
) -> Outcome:  # fmt: skip
    """Score of one draw, with the bootstrap of the evidence."""
    p = fitted(features[0][chosen], labels[chosen], features[1])
    truth = torch.tensor([item["label"] for item in test])
    rows = [
        {"case": f"adrenal/{Path(item['image']).name}", "label": NAMES[item["label"]],
         **{f"p_{name}": value for name, value in zip(NAMES, row.tolist(), strict=True)}}
        for item, row in zip(test, p, strict=True)
    ]  # fmt: skip
    metrics = class_scores(p, truth)
    return outcome({"task": "adrenal", "seed": seed, "cases": rows, "metrics": metrics,
                    "settings": {"class_names": NAMES}})  # fmt: skip


def features(items: list[dict[str, Any]], teacher: Teacher, path: Path) -> tuple[Tensor, float]:
    """Features (n, d) of the bundle's classifier, kept in a file, and seconds that they took."""
    if not path.exists():
        config = bundle(items)
        config["teacher"] = teacher
        parts = [
            config.get_parsed_content(key) for key in ("network_def", "probe_loader", "device")
        ]
        begin = perf_counter()
        rows, *_ = pooled_features(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"rows": rows, "seconds": perf_counter() - begin}, path)
    found = torch.load(path, weights_only=True)
    return found["rows"], found["seconds"]


def test(data: str, out: str = "frozen_run") -> None:
    """AUROC on the test cases with trained and with random weights, beside the evidence."""
    parts = [items_of(data, subset) for subset in ("train", "test")]
    labels = torch.tensor([item["label"] for item in parts[0]])
    arms: dict[str, dict[str, list[Outcome]]] = {}
    volume_seconds: dict[str, float] = {}
    fit_seconds: dict[str, float] = {}
    for name, teacher in (("trained", bundled(128)), ("random", untrained(bundled(128)))):
        found = [features(items, teacher, Path(out, f"{name}{len(items)}.pt")) for items in parts]
        volume_seconds[name] = sum(seconds for _, seconds in found) / sum(map(len, parts))
        for count, draws in DRAWS.items():
            begin = perf_counter()
            arms.setdefault(name, {})[str(count)] = [
                scored(parts[0], labels, draw(parts[0], count, seed), parts[1],
                       (found[0][0], found[1][0]), seed)
                for seed in range(draws)
            ]  # fmt: skip
            fit_seconds[str(count)] = (perf_counter() - begin) / draws
    kind = ("adrenal", "unet_batch")
    records = [
        r for r in results.read("cpu").values() if (r.get("task"), r.get("backbone")) == kind
    ]
    for name in EVIDENCE:
        for count in DRAWS:
            same = (r for r in records if r["arm"] == name and r["labels"] == count)
            arms.setdefault(name, {})[str(count)] = [outcome(r) for r in same if "error" not in r]
    report: dict[str, Any] = {}
    for name, by_count in arms.items():
        for labelled, outcomes in by_count.items():
            value, (low, high) = level(outcomes)
            row = {"seeds": [x.seed for x in outcomes], "auroc": [x.value for x in outcomes],
                   "mean": value, "low": low, "high": high}  # fmt: skip
            gain = difference(arms["trained"][labelled], outcomes) if name != "trained" else None
            if gain:
                pairs = len(gain.seeds)
                ends = gain.both if pairs > 1 else gain.cases
                row["trained_above"] = {"mean": gain.above, "low": ends[0], "high": ends[1],
                                        "pairs": pairs}  # fmt: skip
            report.setdefault(name, {})[labelled] = row
    figures = {"test_cases": len(parts[1]), "volume_seconds": volume_seconds,
               "fit_seconds": fit_seconds, "arms": report}  # fmt: skip
    update(figures)


if __name__ == "__main__":
    fire.Fire({"choose": choose, "test": test})
