"""Segmentation with few labels: what the three bundles give, run many at a time.

Development cases only: a fifth of them is scored, the others are the pool of labelled cases, and
that pool with the cases without labels is pre-trained on. Every job is one bundle run in a process
of its own; a result appears as soon as there is one, and a job with a result is not run again.

python benchmarks/dense/runs.py table NAME DATA WORK [--slots 8]  # make a table of the page
python benchmarks/dense/runs.py run DATA WORK [--slots 8] [--seconds 500] [--only NAME]
python benchmarks/dense/runs.py run DATA WORK --task hippocampus
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, LoadImaged, Orientationd, Spacingd
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from common import machine  # noqa: E402
from med3dinsight_ext.data.volumes import ScaleByModalityd  # noqa: E402
from med3dinsight_ext.teachers.efficientnet import EfficientNetLite0  # noqa: E402
from med3dinsight_ext.teachers.teacher import Teacher, pair  # noqa: E402
from med3dinsight_ext.teachers.towers import TextTower  # noqa: E402
from med3dinsight_ext.training.launch import bundle_run  # noqa: E402


class Task(NamedTuple):
    """A data set, the grid of its trainings, and their length beside that of the plan."""

    name: str
    modality: str
    classes: list[str]
    spacing: list[float]  # mm
    patch: list[int]
    scored: int
    labelled: int  # cases of a draw
    scale: float = 1.0


TASKS = {
    "headneck": Task(
        "headneck", "CT", ["background", "Brainstem", "SpinalCord", "RightParotid", "LeftParotid"],
        [3.0, 3.0, 2.5], [64, 64, 48], scored=21, labelled=5,
    ),
    "hippocampus": Task(
        "hippocampus", "MR", ["background", "Anterior", "Posterior"],
        [1.0, 1.0, 1.0], [32, 48, 32], scored=28, labelled=3, scale=0.5,
    ),
}  # fmt: skip
TASK = TASKS["headneck"]  # ``main`` sets it
LEARNING_RATE = 3e-3  # of fine-tuning the U-Net: the best of three from scratch
BACKBONES: dict[str, dict[str, Any]] = {
    "unet": {
        "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@out_channels",
        "channels": [16, 32, 64, 128], "strides": [2, 2, 2], "num_res_units": 2, "norm": "INSTANCE",
    },
    "resenc": {
        "_target_": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "input_channels": 1, "num_classes": "@out_channels", "n_stages": 4,
        "features_per_stage": [32, 64, 128, 256], "strides": [1, 2, 2, 2], "kernel_sizes": 3,
        "n_blocks_per_stage": [1, 3, 4, 6], "n_conv_per_stage_decoder": [1, 1, 1],
        "conv_op": "$torch.nn.Conv3d", "conv_bias": True, "norm_op": "$torch.nn.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": "$torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "unetr": {
        "_target_": "UNETR", "in_channels": 1, "out_channels": "@out_channels",
        "img_size": "@patch_size", "feature_size": 16, "hidden_size": 384, "mlp_dim": 1536,
        "num_heads": 6,
    },
}  # fmt: skip
BACKBONES["resenc16"] = BACKBONES["resenc"] | {"features_per_stage": [16, 32, 64, 128]}  # CPUs


class NoTexts(TextTower):
    """No text encoder: nothing here has captions."""

    fingerprint = "none"


def images_only(random: int | None = None, weights: str | None = None) -> Teacher:
    """The bundled image encoder: with random weights of a seed, adapted ones, or its own."""
    teacher = pair(EfficientNetLite0(), NoTexts(), weights=weights)
    if random is not None:
        teacher.image.randomize(random)
    return teacher


class Job(NamedTuple):
    """One run: its name, its function, what must be there before, and its settings."""

    name: str
    run: str
    after: Sequence[str]
    settings: dict[str, Any]


# ---------------------------------------------------------------- cases


def split(root: Path) -> dict[str, list[str]]:
    """Names of the cases: scored, pool (labelled), pretrain (pool and unlabelled)."""
    names = sorted(json.loads((root / "split.json").read_text())["development"])
    order = np.random.RandomState(20261126).permutation(len(names))
    scored, pool = [
        [names[i] for i in part] for part in (order[: TASK.scored], order[TASK.scored :])
    ]
    extra = sorted(path.name.split(".")[0] for path in (root / "imagesTs").glob("*.nii.gz"))
    return {"scored": scored, "pool": pool, "pretrain": [*pool, *extra]}


def write_lists(root: Path, work: Path, draws: int, volumes: int | None) -> None:
    """Datalists: all of the pool, draws of labelled cases, what is pre-trained on."""
    parts = {name: names[:volumes] for name, names in split(root).items()}

    def item(name: str, labelled: bool) -> dict[str, str]:
        folder = "imagesTr" if (root / "imagesTr" / f"{name}.nii.gz").exists() else "imagesTs"
        found = {"image": str(root / folder / f"{name}.nii.gz"), "modality": TASK.modality}
        return found | ({"label": str(root / f"labelsTr/{name}.nii.gz")} if labelled else {})

    lists = {"pretrain": [item(name, False) for name in parts["pretrain"]]}
    lists["all"] = [item(name, True) for name in parts["pool"]]
    for draw in range(draws):
        picked = np.random.RandomState(draw).permutation(len(parts["pool"]))[: TASK.labelled]
        lists[f"draw{draw}"] = [item(parts["pool"][i], True) for i in picked]
        names = {Path(i["image"]).name for i in lists[f"draw{draw}"]}
        for name, count in (("one", 1), ("two", 2)):
            lists[f"{name}{draw}"] = lists[f"draw{draw}"][:count]
        lists[f"others{draw}"] = [
            i for i in lists["pretrain"] if Path(i["image"]).name not in names
        ]
    (work / "lists").mkdir(parents=True, exist_ok=True)
    for name, items in lists.items():
        (work / "lists" / f"{name}.json").write_text(json.dumps(items))


Case = tuple[str, Tensor, Tensor]
SCORED_CASES: list[Case] = []


def load_cases(root: Path, names: Sequence[str]) -> list[Case]:
    """Name, image (1, x, y, z) and label (x, y, z) of cases on the grid of training."""
    load = Compose(
        [
            LoadImaged(["image", "label"], reader="NibabelReader", ensure_channel_first=True),
            Orientationd(["image", "label"], "RAS", labels=None),
            ScaleByModalityd("image"),
            Spacingd(["image", "label"], TASK.spacing, mode=["bilinear", "nearest"]),
        ]
    )
    found = []
    for name in names:
        paths = {k: str(root / f"{k}sTr" / f"{name}.nii.gz") for k in ("image", "label")}
        data = load({**paths, "modality": TASK.modality})
        image, label = (data[k].as_tensor() for k in ("image", "label"))
        found.append((name, image, label[0].to(torch.uint8)))
    return found


def dice(guess: Tensor, label: Tensor) -> list[float]:
    """Of each organ."""
    found = []
    for k in range(1, len(TASK.classes)):
        a, b = guess == k, label == k
        found.append(round(float(2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1)), 4))
    return found


@torch.no_grad()
def score(network: nn.Module, device: torch.device) -> dict[str, Any]:
    """Dice of each organ and scored case."""
    network.eval()
    inferer = SlidingWindowInferer(TASK.patch, 8, overlap=0.5, mode="gaussian")
    cases = {}
    for name, image, label in SCORED_CASES:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            guess = inferer(image[None].to(device), network)[0].argmax(0)
        cases[name] = dice(guess, label.to(device))
    table = np.array(list(cases.values()))
    return {"dice": float(table.mean()), "organs": table.mean(0).round(4).tolist(), "cases": cases}


# ---------------------------------------------------------------- runs


def length(steps: int) -> dict[str, int]:
    """About ``steps`` in ten epochs."""
    return {"steps_per_epoch": max(1, steps // 10), "max_epochs": min(steps, 10)}


def fill(work: Path, name: str, tag: str, part: str, **_: Any) -> dict[str, Any]:
    """Feature grids of a part of the volumes (``a/b``), or the first few for the whitening."""
    from med3dinsight_ext.embeddings.grids import GridStore

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    items = json.loads((work / "lists" / "pretrain.json").read_text())
    teacher = images_only(**teacher_settings(work, tag))
    store = GridStore(work / "store", teacher, "auto", device=device)
    number, of = map(int, part.split("/"))
    chosen = whitened(items) if of == 0 else items[number::of]
    begin = time.time()
    store.fill(chosen)
    return {"volumes": len(chosen), "fill_s": time.time() - begin, "dims": store.dims}


def whitened(items: list[dict[str, str]]) -> list[dict[str, str]]:
    """The few volumes that are stored first, so that the codes are whitened by them."""
    return items[:: len(items) // 16 or 1]


def teacher_settings(work: Path, tag: str) -> dict[str, Any]:
    """Arguments of ``images_only``: "imagenet", "random", or "adapted" by the run ``adapt``."""
    if tag == "random":
        return {"random": 0}
    weights = str(work / "runs/adapt/models/teacher/adapted.safetensors")
    return {"weights": weights} if tag == "adapted" else {}


def overlay_teacher(work: Path, tag: str) -> dict[str, Any]:
    return {"_target_": "runs.images_only", **teacher_settings(work, tag)}


def adapt(work: Path, name: str, steps: int = 200, seed: int = 0, **_: Any) -> dict[str, Any]:
    """The image encoder adapted to the slices of all volumes that are pre-trained on."""
    bundle_run(
        "pretrain", ["train.json", "adapt_teacher.yaml"], bundle_root=str(work / "runs" / name),
        datalist=str(work / "lists/pretrain.json"), store_dir=str(work / "store"), seed=seed,
        teacher=overlay_teacher(work, "imagenet"), num_workers=2, **length(steps),
    )  # fmt: skip
    history = work / "runs" / name / "models/teacher/history.jsonl"
    return {"last": json.loads(history.read_text().splitlines()[-1])}


def pretrain(
    work: Path, name: str, tag: str = "imagenet", dense: float = 1.0, reconstruction: float = 100.0,
    steps: int = 2000, seed: int = 0, backbone: str = "unet", shuffled: bool = False,
    lr: float = 1e-3, workers: int = 1, **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """Dense teaching, masked reconstruction, or both: the pretrain bundle with dense.yaml."""
    data = "@train_items"
    if shuffled:
        others = "@train_items[1:] + @train_items[:1]"
        data = f"[dict(a, grids=b['grids']) for a, b in zip(@train_items, {others})]"
    bundle_run(
        "pretrain", ["train.json", "dense.yaml"],
        bundle_root=str(work / "runs" / name), datalist=str(work / "lists/pretrain.json"),
        store_dir=str(work / "store"), teacher=overlay_teacher(work, tag), spacing=TASK.spacing,
        patch_size=TASK.patch, backbone=BACKBONES[backbone], num_workers=workers, seed=seed,
        val_fraction=0.0, warmup_epochs=1, learning_rate=lr,
        **{
            **length(steps),
            "loss::dense_weight": dense,
            "loss::reconstruction_weight": reconstruction,
            "train::dataset::data": f"${data}",
            "grid_store::seed": 0,  # the same slices for each pre-training: they are stored once
        },
    )  # fmt: skip
    history = (work / "runs" / name / "eval" / "history.jsonl").read_text().splitlines()
    return {"last": json.loads(history[-1])}


def best_rate(work: Path, backbone: str) -> float:
    """The learning rate of the best run ``BACKBONE_rate_*``."""
    paths = (work / "results").glob(f"{backbone}_rate_*.json")
    found = max((json.loads(path.read_text()) for path in paths), key=lambda row: row["dice"])
    return float(found["lr"])


def finetune(
    work: Path, name: str, init: str = "", labelled: str = "draw0", steps: int = 600, seed: int = 0,
    backbone: str = "unet", lr: float | None = None, soft: str = "", soft_weights: str = "",
    **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """The seg-finetune bundle; ``soft`` teaches unlabelled volumes.

    Args:
        work: folder of all runs.
        name: of the run.
        init: run whose weights it starts from.
        labelled: list of labelled cases.
        steps: of the optimiser.
        seed: of the run.
        backbone: one of ``BACKBONES``.
        lr: learning rate; default: the best from scratch of those that were tried.
        soft: "head", "network" or "both" make soft labels; or "mean_teacher".
        soft_weights: run whose network makes them.
    """
    overlays = ["train.json"]
    more: dict[str, Any] = {}
    rate = lr or (LEARNING_RATE if backbone == "unet" else best_rate(work, backbone))
    if soft:
        more["unlabelled"] = str(work / "lists" / f"others{labelled[-1]}.json")  # of the same draw
    if soft == "mean_teacher":
        overlays.append("mean_teacher.yaml")
    elif soft:
        overlays.append("unlabelled.yaml")
        more |= {
            "store_dir": str(work / "store"), "soft_head": soft in ("head", "both"),
            "teacher": overlay_teacher(work, "imagenet"),
        }  # fmt: skip
        if soft in ("network", "both"):
            more["soft_weights"] = str(work / "runs" / soft_weights / "models/model.pt")
    if init:
        more["pretrained"] = str(work / "runs" / init / "models/model.pt")
    root = work / "runs" / name
    flow = bundle_run(
        "seg-finetune", overlays, bundle_root=str(root), label_names=TASK.classes,
        datalist=str(work / "lists" / f"{labelled}.json"), spacing=TASK.spacing,
        patch_size=TASK.patch,
        backbone=BACKBONES[backbone], num_workers=2, seed=seed, val_fraction=0.0,
        warmup_epochs=1, learning_rate=rate, **length(steps), **more,
    )  # fmt: skip
    network = flow.parser.get_parsed_content("network_def")
    device = flow.parser.get_parsed_content("device")
    return {"lr": rate, **score(network, device)}


def readout(work: Path, name: str, init: str, labelled: str, **_: Any) -> dict[str, Any]:
    """A light head on the frozen features of the run ``init``, or of what ``links`` names."""
    from dense import links

    return links.run(work, init, labelled)


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "adapt": adapt, "fill": fill, "pretrain": pretrain, "finetune": finetune, "readout": readout
}  # fmt: skip


def pack(work: str, out: str) -> None:
    """Write the weights that later questions need to OUT, in half precision, a few in each file."""
    names = [f"{arm}_p0" for arm in ("both", "recon")]
    names += [f"{arm}_d{d}" for arm in ("scratch_s0", "recon_p0", "both_p0") for d in range(3)]
    paths = [(name, Path(work) / "runs" / name / "models" / "model.pt") for name in names]
    found = [(name, path) for name, path in paths if path.exists()]
    for n in range(0, len(found), 5):
        states = {
            name: {k: v.half() for k, v in torch.load(path, weights_only=True).items()}
            for name, path in found[n : n + 5]
        }
        torch.save(states, Path(out) / f"weights_{n // 5}.pt")


def collect(work: str, task: str = "headneck") -> None:
    """Add the results in WORK to those of TASK on record, in place of earlier ones of that name."""
    target = Path(__file__).parent / "results" / f"{task}.jsonl"
    paths = sorted((Path(work) / "results").glob("*.json"))
    lines = target.read_text().splitlines() if target.exists() else []
    lines += [path.read_text() for path in paths if not path.name.startswith("fill")]
    rows = {}
    for line in lines:
        row = json.loads(line)
        rows[row["kind"], row["name"]] = line
    target.write_text("".join(f"{line}\n" for line in rows.values()))


def child(job: Job, work: Path) -> None:
    """Run one job; its result or its error goes to a file."""
    torch.set_num_threads(1)
    with (work / "logs" / f"{job.name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        begin, cpu = time.time(), time.process_time()
        try:
            found = RUNS[job.run](work, job.name, **job.settings)
        except BaseException:
            traceback.print_exc()
            log.flush()
            os._exit(1)
        line = {
            "task": TASK.name, "name": job.name, "kind": job.run, **job.settings, **found,
            "wall_s": round(time.time() - begin, 1), "cpu_s": round(time.process_time() - cpu, 1),
            **machine(),
        }  # fmt: skip
        draft = work / "results" / f"{job.name}.part"
        draft.write_text(json.dumps(line))
        draft.replace(draft.with_suffix(".json"))


# ---------------------------------------------------------------- plan


def plan(scale: float = 1.0, shards: int = 6) -> list[Job]:
    """All jobs, those that matter most first."""
    jobs = []

    def add(name: str, run: str, after: Sequence[str] = (), **settings: Any) -> str:
        if "steps" in settings:
            settings["steps"] = max(2, round(settings["steps"] * scale))
        jobs.append(Job(name, run, after, settings))
        return name

    for rate in (3e-4, 3e-3):  # the rate of all arms was chosen by these
        for draw in range(2):
            add(f"rate_{rate}_d{draw}", "finetune", labelled=f"draw{draw}", steps=600, lr=rate)
    for draw in range(3):
        name = f"scratch_s0_d{draw}_1e-3"
        add(name, "finetune", labelled=f"draw{draw}", seed=0, steps=600, lr=1e-3)
    filled = {}
    add("adapt", "adapt", steps=200)
    for tag in ("imagenet", "random", "adapted"):
        before = ["adapt"] if tag == "adapted" else []
        first = add(f"fill_{tag}_0", "fill", before, tag=tag, part="0/0")
        filled[tag] = [
            add(f"fill_{tag}_{n + 1}", "fill", [first], tag=tag, part=f"{n}/{shards}")
            for n in range(shards)
        ]
    arms: dict[str, dict[str, Any]] = {
        "recon": {"dense": 0.0},
        "both": {},
        "dense": {"reconstruction": 0.0},
        "random": {"tag": "random"},
        "dense_random": {"tag": "random", "reconstruction": 0.0},
        "dense_adapted": {"tag": "adapted", "reconstruction": 0.0},
    }
    for arm in ("recon", "both"):  # three times as long
        name = f"{arm}_6000_p0"
        add(name, "pretrain", filled["imagenet"], steps=6000, workers=2, **arms[arm])
    for seed in range(3):
        for arm, settings in arms.items():
            add(
                f"{arm}_p{seed}", "pretrain", filled[settings.get("tag", "imagenet")],
                seed=seed, steps=2000, **settings,
            )  # fmt: skip
    add("shuffled_p0", "pretrain", filled["imagenet"], steps=2000, shuffled=True)
    for seed in range(3):
        for draw in range(3):
            add(
                f"scratch_s{seed}_d{draw}", "finetune", labelled=f"draw{draw}", seed=seed, steps=600
            )
    for seed in range(3):
        for arm in arms:
            for draw in range(3):
                add(
                    f"{arm}_p{seed}_d{draw}", "finetune", [f"{arm}_p{seed}"],
                    init=f"{arm}_p{seed}", labelled=f"draw{draw}", seed=seed, steps=600,
                )  # fmt: skip
        for draw in range(3):
            if seed == 0:
                longer = f"longer_d{draw}"
                add(longer, "finetune", labelled=f"draw{draw}", steps=1200)
                add(
                    f"soft_head_d{draw}", "finetune", filled["imagenet"],
                    labelled=f"draw{draw}", steps=600, soft="head",
                )  # fmt: skip
                for soft, name in (("network", "scratch"), ("both", "both")):
                    add(
                        f"soft_{name}_d{draw}", "finetune",
                        [*filled["imagenet"], f"scratch_s0_d{draw}"], labelled=f"draw{draw}",
                        steps=600, soft=soft, soft_weights=f"scratch_s0_d{draw}",
                    )  # fmt: skip
                add(
                    f"mean_teacher_d{draw}", "finetune", labelled=f"draw{draw}", steps=600,
                    soft="mean_teacher",
                )  # fmt: skip
    for arm in ("recon_6000", "both_6000"):
        for draw in range(3):
            add(
                f"{arm}_p0_d{draw}", "finetune", [f"{arm}_p0"], init=f"{arm}_p0",
                labelled=f"draw{draw}", steps=600,
            )  # fmt: skip
    for arm in ("both", "dense"):
        add(
            f"{arm}_p0_lr1_d0", "finetune", [f"{arm}_p0"], init=f"{arm}_p0", labelled="draw0",
            steps=600, lr=1e-3,
        )  # fmt: skip
    for draw in range(3):  # what pre-training gives who has time for few steps
        for arm in ("scratch", "recon", "dense"):
            init = "" if arm == "scratch" else f"{arm}_p0"
            for steps in (150, 300):
                add(
                    f"{arm}_{steps}_d{draw}", "finetune", [init] if init else [], init=init,
                    labelled=f"draw{draw}", steps=steps,
                )  # fmt: skip
    for labelled in (f"{count}{draw}" for count in ("one", "two") for draw in range(3)):
        add(f"scratch_{labelled}", "finetune", labelled=labelled, steps=600)
        add(f"longer_{labelled}", "finetune", labelled=labelled, steps=1200)
        for arm in ("recon", "dense"):
            add(
                f"{arm}_p0_{labelled}", "finetune", [f"{arm}_p0"], init=f"{arm}_p0",
                labelled=labelled, steps=600, lr=1e-3,
            )  # fmt: skip
    for labelled in (f"{count}{draw}" for count in ("one", "two") for draw in range(3)):
        for arm, first in (("soft_scratch", "scratch"), ("soft_again", "soft_scratch")):
            start = f"{first}_{labelled}"
            add(
                f"{arm}_{labelled}", "finetune", [start], labelled=labelled, steps=600,
                soft="network", soft_weights=start,
            )  # fmt: skip
    for draw in range(3):
        add(
            f"shuffled_p0_d{draw}", "finetune", ["shuffled_p0"], init="shuffled_p0",
            labelled=f"draw{draw}", steps=600,
        )  # fmt: skip
    add("scratch_all_600", "finetune", labelled="all", steps=600)  # what more labels give
    for arm in ("scratch", "recon", "both", "dense"):
        for seed in range(2):
            init = "" if arm == "scratch" else f"{arm}_p{seed}"
            add(
                f"{arm}_all_{seed}", "finetune", [init] if init else [], init=init, labelled="all",
                seed=seed, steps=1200,
            )  # fmt: skip
    add_backbones(add, filled["imagenet"], {arm: arms[arm] for arm in ("recon", "dense")})
    networks = [f"{arm}_p{seed}" for arm in arms for seed in range(3)]
    codes = {"codes": ["fill_imagenet_0"], "untrained": []}  # they fill what else they read
    codes |= {f"{tag}_codes": [f"fill_{tag}_0"] for tag in ("random", "adapted")}
    for init in (*codes, "shuffled_p0", *networks):
        for draw in range(3):
            add(
                f"readout_{init}_d{draw}", "readout", codes.get(init, [init]), init=init,
                labelled=f"draw{draw}",
            )  # fmt: skip
    return jobs


def add_backbones(
    add: Callable[..., str], filled: Sequence[str], arms: dict[str, dict[str, Any]]
) -> None:
    """Jobs of other networks; each draw has a seed and, of the wide ones, its own pre-training."""
    draws = [f"{part}{n}" for part in ("one", "draw") for n in range(3)]
    rates_of = {"resenc": (3e-4, 1e-3, 3e-3), "unetr": (1e-4, 3e-4, 1e-3), "resenc16": (1e-3, 3e-3)}
    for net, rates in rates_of.items():
        trainings = 1 if net == "resenc16" else 3
        tried = [
            add(f"{net}_rate_{r}", "finetune", labelled="draw0", steps=600, backbone=net, lr=r)
            for r in rates
        ]
        for seed in range(trainings):
            for arm, weights in arms.items():
                add(
                    f"{net}_{arm}_p{seed}", "pretrain", filled, seed=seed, steps=1000,
                    backbone=net, **weights,
                )  # fmt: skip
        for labelled in (*draws, "all"):
            n, steps = (0, 1200) if labelled == "all" else (int(labelled[-1]), 600)
            same: dict[str, Any] = {"labelled": labelled, "seed": n, "backbone": net}
            scratch = add(f"{net}_scratch_{labelled}", "finetune", tried, steps=steps, **same)
            trained = {arm: f"{net}_{arm}_p{n % trainings}" for arm in arms}
            for init in trained.values():
                add(
                    f"{init}_{labelled}", "finetune", [*tried, init], steps=steps, init=init, **same
                )
            if labelled == "all":
                continue
            add(f"{net}_longer_{labelled}", "finetune", tried, steps=2 * steps, **same)
            after_dense = f"{trained['dense']}_{labelled}"
            for arm, first in (("scratch", scratch), ("dense", after_dense)):
                init = "" if arm == "scratch" else trained[arm]
                add(
                    f"{net}_soft_{arm}_{labelled}", "finetune", [first], steps=steps, init=init,
                    soft="network", soft_weights=first, **same,
                )  # fmt: skip


def with_needs(jobs: Sequence[Job], names: Iterable[str]) -> list[Job]:
    """The jobs of these names and all that come before them."""
    by_name, wanted, open_names = {job.name: job for job in jobs}, set(), list(names)
    while open_names:
        name = open_names.pop()
        if name not in wanted:
            wanted.add(name)
            open_names += by_name[name].after
    return [job for job in jobs if job.name in wanted]


def reproduce(table: str, data: str, work: str, slots: int = 8, **settings: Any) -> None:
    """Make the runs of one table of the page, with all that they need, and print that table.

    Args:
        table: one of ``tables.TABLES``.
        data: folder of the cases.
        work: folder of all runs; what is done there is not done again.
        slots: jobs at a time, a core each.
        settings: see ``main``.
    """
    from dense import tables

    task = settings.get("task", "headneck")
    if table not in tables.TABLES:
        raise SystemExit(f"No table {table!r}; there are {', '.join(tables.TABLES)}.")
    rows = tables.read(task)
    recorded = [row for row in rows if tables.TABLES[table].uses(row)]
    jobs = with_needs(
        plan(settings.get("scale", 1.0) * TASKS[task].scale), [row["name"] for row in recorded]
    )
    names = {job.name for job in jobs}
    hours = sum(row.get("wall_s", 0.0) for row in rows if row["name"] in names) / 3600
    print(f"{len(jobs)} runs; those on record took {hours:.1f} hours in all", flush=True)
    main(data, work, slots, float("inf"), only=f"^({'|'.join(names)})$", **settings)
    made = []
    for row in recorded:
        path = Path(work) / "results" / f"{row['name']}.json"
        if path.exists():  # its place in the table is that of the run at scale 1
            steps = {"steps": row["steps"]} if "steps" in row else {}
            made.append(json.loads(path.read_text()) | steps)
    print(f"\n{tables.TABLES[table].write(made)}")
    if len(made) < len(recorded):
        raise SystemExit(f"{len(recorded) - len(made)} runs failed, see {Path(work) / 'logs'}.")


def main(
    data: str, work: str, slots: int = 8, seconds: float = 500.0, scale: float = 1.0,
    only: str = "", scored: int | None = None, volumes: int | None = None, task: str = "headneck",
) -> None:  # fmt: skip
    """Run the jobs whose name matches ``only`` until all are done or the time is over."""
    global TASK  # children are forked with it
    TASK = TASKS[task]
    begin, root, folder = time.time(), Path(data).resolve(), Path(work).resolve()
    for part in ("logs", "results", "runs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write_lists(root, folder, 3, volumes)
    SCORED_CASES.extend(load_cases(root, split(root)["scored"][:scored]))
    print(f"{len(SCORED_CASES)} cases loaded in {time.time() - begin:.0f} s", flush=True)
    context = multiprocessing.get_context(
        "fork"
    )  # shares imports and cases; only children use CUDA
    waiting = [job for job in plan(scale * TASK.scale) if re.search(only, job.name)]
    running: dict[str, tuple[Any, float]] = {}
    failed: set[str] = set()

    def done(name: str) -> bool:
        return (folder / "results" / f"{name}.json").exists()

    waiting = [job for job in waiting if not done(job.name)]
    while waiting or running:
        for name, (process, started) in list(running.items()):
            if not process.is_alive():
                del running[name]
                state = "done" if done(name) else "FAILED"
                if done(name):
                    found = json.loads((folder / "results" / f"{name}.json").read_text())
                    state += f" {found['dice']:.3f}" if "dice" in found else ""
                if not done(name):
                    failed.add(name)
                spent = time.time() - started
                print(f"{time.time() - begin:6.0f} s {state} {name} in {spent:.0f} s", flush=True)
        waiting = [job for job in waiting if not failed.intersection(job.after)]
        if time.time() - begin > seconds:
            break
        ready = [job for job in waiting if all(map(done, job.after))]
        if not ready and not running:
            break  # what is left waits for jobs that were not asked for
        for job in ready[: max(0, slots - len(running))]:
            waiting.remove(job)
            process = context.Process(target=child, args=(job, folder))
            process.start()
            running[job.name] = (process, time.time())
        time.sleep(0.1)
    for process, _ in running.values():
        process.terminate()
    print(
        f"{len(waiting) + len(running)} not done, {len(failed)} failed: {sorted(failed)}",
        flush=True,
    )


if __name__ == "__main__":
    sys.modules["runs"] = sys.modules["dense.runs"] = sys.modules["__main__"]
    fire.Fire({"table": reproduce, "run": main, "pack": pack, "collect": collect})
