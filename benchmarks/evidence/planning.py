"""Runs of plan.yaml and their cases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from med3dinsight_ext.data import datalists, splits
from med3dinsight_ext.io.bundles import bundles_dir
from med3dinsight_ext.io.configs import with_shared
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.io.overrides import check_overrides
from med3dinsight_ext.io.reading import read_rows

STEPS = ("steps", "epoch_steps")  # settings of run.py, not of a bundle
TASK = ("bundle", "data", "corpus")  # keys of a task that are no overrides
HELD_OUT = 0.25  # share of the development cases


class Run(NamedTuple):
    """A training and its evaluation.

    Attributes:
        about: fields that the tables group by.
        data: keys of the plan's ``data``.
        settings: overrides of the bundle, and ``STEPS``.
        pretraining: name of the run whose weights it starts from.
        matched: names of a pre-training and of a training from scratch; their times together are
            the run's time.
        pinned: settings that an older record may lack.
        renamed: old and new names of settings.
    """

    name: str
    bundle: str
    about: dict[str, Any]
    data: list[str]
    settings: dict[str, Any]
    pretraining: str | None = None
    matched: tuple[str, str] | None = None
    pinned: dict[str, Any] = {}
    renamed: dict[str, str] = {}

    @property
    def needs(self) -> list[str]:
        return [name for name in (self.pretraining, *(self.matched or ())) if name]

    @property
    def overrides(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings.items() if key not in STEPS}


def planned(plan: dict[str, Any], budget: str) -> dict[str, Run]:
    """All runs of a budget by name, each after those it needs.

    Raises:
        ValueError: the plan has no such budget, or gives two different runs one name.
        SystemExit: an override is not a key of its bundle.
    """
    if budget not in plan["budgets"]:
        raise ValueError(f"budget must be one of {list(plan['budgets'])}, got {budget!r}")
    runs: dict[str, Run] = {}
    for block in plan["budgets"][budget]:
        for run in sorted(_runs(plan, block), key=_order):
            if runs.setdefault(run.name, run) != run:
                raise ValueError(
                    f"name must belong to one run, got two {run.name}; rename a variant"
                )
    for run in runs.values():
        config = with_shared(bundles_dir() / run.bundle / "configs" / "train.json")
        given = [f"--{key}={value!r}" for key, value in run.overrides.items()]
        check_overrides([f"--config_file={config}", *given])
    return runs


def _order(run: Run) -> tuple[int, int]:
    """Seeds first, so that all arms have a first result early."""
    return run.about["seed"], 0 if run.bundle == "pretrain" else 1 + len(run.needs)


def _runs(plan: dict[str, Any], block: dict[str, Any]) -> Iterator[Run]:
    """The fine-tuning runs of a block, and a pre-training for each that needs one."""
    first = block.get("first_seed", 0)
    for task, backbone, arm, cases in product(
        block["tasks"], block["backbones"], block["arms"], block["labels"]
    ):
        for seed, (variant, change) in product(
            range(first, first + block["labels"][cases]), block.get("vary", {"": {}}).items()
        ):
            run = _finetuning(plan, block, task, backbone, arm, cases, seed, variant, change)
            how = plan["arms"][arm]
            if how is None:
                yield run
                continue
            before = _pretraining(plan, block, task, backbone, how.get("matched", arm), seed)
            yield before
            if "matched" in how:
                scratch = run.name.replace(f"-{arm}-", "-scratch-")
                yield run._replace(matched=(before.name, scratch))
            else:
                yield run._replace(pretraining=before.name)


def _finetuning(
    plan: dict[str, Any],
    block: dict[str, Any],
    task: str,
    backbone: str,
    arm: str,
    cases: int | None,
    seed: int,
    variant: str,
    change: dict[str, Any],
) -> Run:
    content = plan["tasks"][task]
    about = {
        "task": task,
        "backbone": backbone,
        "arm": arm,
        "labels": cases,
        "seed": seed,
        "variant": variant,
        "score": block["score"],
    }
    pinned, names = plan["pinned"]["finetune"], plan["renamed"]
    settings = (
        pinned
        | plan["finetune"]
        | {key: value for key, value in content.items() if key not in TASK}
        | plan["backbones"][backbone]
        | block.get("finetune", {})
        | change
        | {"max_cases": cases, "seed": seed}
    )
    parts = [task, backbone, arm, f"n{cases or 'all'}", variant, f"s{seed}"]
    name = "-".join(part for part in parts if part)
    data = [content["data"]]
    return Run(name, content["bundle"], about, data, settings, pinned=pinned, renamed=names)


def _pretraining(
    plan: dict[str, Any], block: dict[str, Any], task: str, backbone: str, arm: str, seed: int
) -> Run:
    """The pre-training of a fine-tuning seed; several seeds may share one."""
    corpus = plan["tasks"][task]["corpus"]
    content, own = plan["corpora"][corpus], seed % block["pretrain_seeds"]
    about = {
        "corpus": corpus,
        "backbone": backbone,
        "arm": arm,
        "seed": own,
        "score": block["score"],
    }
    pinned, names = plan["pinned"]["pretrain"], plan["renamed"]
    settings = (
        pinned
        | plan["pretrain"]
        | {key: value for key, value in content.items() if key != "data"}
        | plan["backbones"][backbone]
        | block.get("pretrain", {})
        | plan["arms"][arm]
        | {"seed": own}
    )
    name = f"{corpus}-{backbone}-{arm}-pretrain-s{own}"
    return Run(name, "pretrain", about, content["data"], settings, pinned=pinned, renamed=names)


def renamed(value: Any, names: dict[str, str]) -> Any:
    """Settings of an older record with the keys and values of today."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def items_of(about: dict[str, Any], root: Path, score: str) -> tuple[list[Any], list[Any]]:
    """Training cases and evaluation cases of a data set."""
    folder = root / about["folder"]
    split = folder / about["split"] if "split" in about else None
    parts = []
    for subset in about.get("subsets", ["development", "test"]):
        items = datalists.datalist(folder / about["datalist"], folder, split, subset)
        keep = about.get("keep", {}).items()
        parts.append([item for item in items if all(item.get(key) == v for key, v in keep)])
    train, evaluation = splits.hold_out(parts[0], HELD_OUT) if score == "held_out" else parts
    first = about.get("first")
    return splits.take(train, first), splits.take(evaluation, first)


def case_lists(plan: dict[str, Any], run: Run, root: Path, out: Path) -> dict[str, str | None]:
    """Write the lists of training cases, evaluation cases and captions; their paths."""
    rows: dict[str, list[Any]] = {"train": [], "evaluation": [], "captions": []}
    for about in (plan["data"][name] for name in run.data):
        train, evaluation = items_of(about, root, run.about["score"])
        rows["train"] += train
        rows["evaluation"] += evaluation
        if "captions" in about:
            folder = root / about["folder"]
            for _, row in read_rows(folder / about["captions"]):
                rows["captions"].append(row | {"image": str(folder / row["image"])})
    if run.bundle == "pretrain":  # fields that all data sets have, since a batch needs the same
        for part in ("train", "evaluation"):
            rows[part] = [{key: row[key] for key in ("image", "modality")} for row in rows[part]]
    files = {part: out / run.name / f"{part}.jsonl" for part in rows if rows[part]}
    for part, path in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows[part])
        write_atomic(path, lambda draft, text=text: draft.write_text(text))
    return {part: str(files[part]) if part in files else None for part in rows}
