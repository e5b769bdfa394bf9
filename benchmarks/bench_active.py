"""Active learning: which cases to label first, with a small network.

python benchmarks/bench_active.py run ../shared/data/hippocampus OUT [--seeds 5] [--seconds 1200]
python benchmarks/bench_active.py collect OUT

``run`` trains a U-Net from scratch for the same number of steps on 5, 10 and 20 of four fifths of
the development cases, chosen at random, by k-center greedy in the space of the frozen 2D teacher,
or by the entropy of the network's answers (the first 5 then at random), and scores it on the other
fifth. A seed draws the first cases and the weights. The folder's name, hippocampus or headneck,
names the task. OUT/TASK.jsonl has a line a training; a complete seed is not repeated, so that it
can run in pieces.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from click_scores import interval, mean_dice  # noqa: E402
from common import write  # noqa: E402
from med3dinsight_ext.data.splits import partition  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.io.configs import with_shared  # noqa: E402
from med3dinsight_ext.models.teacher_classifier import TeacherFeatures  # noqa: E402
from med3dinsight_ext.monailabel.app.kcenter_greedy import kcenter_greedy  # noqa: E402
from med3dinsight_ext.teachers.teacher import bundled  # noqa: E402

STRATEGIES = ("random", "kcenter", "entropy")
COUNTS = (5, 10, 20)
Cases = list[tuple[Tensor, Tensor]]  # image and label, (1, x, y, z) each


class Task(NamedTuple):
    """Settings of a data set, coarse, so that many trainings are cheap.

    ``channels`` are those of the U-Net, ``spacing`` is in mm, ``patch`` in voxels; ``flips`` tells
    whether left and right are alike; ``centered`` is the share of the crops whose middle is a
    labelled voxel.
    """

    classes: int
    channels: list[int]
    spacing: list[float]
    patch: tuple[int, int, int]
    flips: bool
    centered: float


TASKS = {
    "hippocampus": Task(3, [8, 16, 32, 64], [2.0] * 3, (24, 32, 24), flips=True, centered=0.0),
    "headneck": Task(5, [16, 32, 64, 128], [4.0] * 3, (48, 32, 32), flips=False, centered=0.7),
}


def task_of(data: str) -> Task:
    """The task that a folder's name tells."""
    return TASKS[Path(data).name]


def read(data: str) -> tuple[Cases, Cases]:
    """The pool and the validation cases, on the bundle's grid, padded to the patch."""
    task = task_of(data)
    folder = bundles_dir() / "seg-finetune" / "configs"
    files = [*with_shared(folder / "train.json"), HERE / f"{Path(data).name}.yaml"]
    config = ConfigParser.load_config_files([str(file) for file in files])
    root = Path(data)
    config |= {"spacing": task.spacing, "patch_size": list(task.patch)}
    config |= {"dataset_dir": data, "datalist": str(root / "dataset.json")}
    config |= {"split": str(root / "split.json"), "device": torch.device("cpu")}
    parser = ConfigParser(config)
    parts = partition(parser.get_parsed_content("items"), 0.2, None)
    loaded = parser.get_parsed_content("validate::preprocessing")
    found = []
    for part in parts:
        items = (loaded(item) for item in tqdm(part, "reading", mininterval=5))
        found.append([(item["image"].as_tensor(), item["label"].as_tensor()) for item in items])
    return found[0], found[1]


def batch(cases: Cases, random: np.random.RandomState, task: Task) -> list[Tensor]:
    """Four random crops, turned over and shifted in brightness at random."""
    images, labels = [], []
    for i in random.randint(len(cases), size=4):
        image, label = cases[i]
        sides = list(zip(image.shape[1:], task.patch, strict=True))
        starts = [random.randint(n - p + 1) for n, p in sides]
        if task.centered and random.rand() < task.centered:
            voxels = label[0].nonzero()
            middle = voxels[random.randint(len(voxels))].tolist()
            starts = [
                min(max(m - p // 2, 0), n - p) for m, (n, p) in zip(middle, sides, strict=True)
            ]
        crop = (slice(None), *(slice(a, a + p) for a, p in zip(starts, task.patch, strict=True)))
        flip = [1] if task.flips and random.rand() < 0.5 else []
        images.append(
            (image[crop] * random.uniform(0.8, 1.2) + random.uniform(-0.1, 0.1)).flip(flip)
        )
        labels.append(label[crop].flip(flip))
    return [torch.stack(images).float(), torch.stack(labels).float()]


def train(cases: Cases, seed: int, steps: int, task: Task) -> nn.Module:
    """A small U-Net from scratch."""
    torch.manual_seed(seed)
    random = np.random.RandomState(seed)
    network = UNet(3, 1, task.classes, task.channels, [2, 2, 2], num_res_units=1, norm="INSTANCE")
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1)
    loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    for _ in range(steps):
        image, label = batch(cases, random, task)
        optimizer.zero_grad()
        loss(network(image), label).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def probabilities(network: nn.Module, image: Tensor) -> Tensor:
    """(classes, x, y, z) of a volume (1, x, y, z), whose sides are padded to multiples of 8."""
    pad = [side for n in image.shape[:0:-1] for side in (0, -n % 8)]
    found = network(nn.functional.pad(image[None].float(), pad)).softmax(1)[0]
    x, y, z = image.shape[1:]
    return found[:, :x, :y, :z]


def entropy(network: nn.Module, image: Tensor) -> float:
    """Mean over the voxels, in nats."""
    found = probabilities(network, image)
    return float(-(found * found.clamp_min(1e-9).log()).sum(0).mean())


def score(network: nn.Module, cases: Cases, classes: int) -> list[float]:
    """Mean Dice of each case."""
    found = []
    for image, label in cases:
        answer = probabilities(network, image).argmax(0).numpy()
        found.append(mean_dice(answer, label[0].numpy().astype(int), classes))
    return found


def teacher_space(cases: Cases, spacing: list[float]) -> Tensor:
    """Features (n, d) of the frozen 2D teacher."""
    features = TeacherFeatures(bundled(), spacing)
    with torch.no_grad():
        return torch.cat([features(image[None].float().clamp(0, 1)) for image, _ in tqdm(cases)])


def choose(
    strategy: str,
    chosen: Sequence[int],
    count: int,
    order: Sequence[int],
    rows: Tensor,
    network: nn.Module | None,
    pool: Cases,
) -> list[int]:
    """More cases, until there are ``count``; the first one is that of the random order."""
    found = list(chosen)
    if strategy == "entropy" and network is not None:
        free = [i for i in range(len(pool)) if i not in found]
        unsure = sorted(free, key=lambda i: -entropy(network, pool[i][0]))
        return found + unsure[: count - len(found)]
    if strategy == "kcenter":
        found = found or [order[0]]
        while len(found) < count:
            found.append(kcenter_greedy(rows, found))
        return found
    return list(order[:count])


def run(data: str, out: str, seeds: int = 5, steps: int = 400, seconds: float = 1e9) -> None:
    """Train and score what is not there yet.

    Args:
        data: folder of hippocampus or headneck.
        out: folder of the results.
        seeds: number of them.
        steps: of a training.
        seconds: after which no other seed is begun.
    """
    begin, task = perf_counter(), task_of(data)
    path = Path(out) / f"{Path(data).name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    pool, validation = read(data)
    if not (space := path.with_suffix(".pt")).exists():
        torch.save(teacher_space(pool, task.spacing), space)
    rows = torch.load(space, weights_only=True)
    for seed in range(seeds):
        if perf_counter() - begin > seconds:
            return
        keys = [
            {"strategy": strategy, "seed": seed, "count": count, "steps": steps}
            for strategy in STRATEGIES
            for count in COUNTS
        ]
        if all(any(key.items() <= line.items() for line in done) for key in keys):
            continue
        order = np.random.RandomState(seed).permutation(len(pool)).tolist()
        shared: dict[tuple[int, ...], nn.Module] = {}
        for strategy in STRATEGIES:
            chosen: list[int] = []
            for count in COUNTS:
                key = {"strategy": strategy, "seed": seed, "count": count, "steps": steps}
                network = shared.get(tuple(chosen)) if chosen else None
                chosen = choose(strategy, chosen, count, order, rows, network, pool)
                cpu = process_time()
                if tuple(chosen) not in shared:
                    shared[tuple(chosen)] = train([pool[i] for i in chosen], seed, steps, task)
                dice = score(shared[tuple(chosen)], validation, task.classes)
                line = key | {
                    "pool": len(pool),
                    "chosen": chosen,
                    "dice": dice,
                    "cpu_seconds": process_time() - cpu,
                }
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(strategy, seed, count, f"{np.mean(dice):.4f}", flush=True)


def compared(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the seeds that are complete, and differences from random, paired by seed."""
    means = {
        (line["strategy"], line["count"], line["seed"]): float(np.mean(line["dice"]))
        for line in lines
    }
    complete = [
        seed
        for seed in sorted({line["seed"] for line in lines})
        if all((s, c, seed) in means for s in STRATEGIES for c in COUNTS)
    ]

    def arm(strategy: str, count: int) -> dict[str, Any]:
        found = [means[strategy, count, seed] for seed in complete]
        above = [means[strategy, count, s] - means["random", count, s] for s in complete]
        return {
            "dice": interval(found),
            "of_seeds": [round(dice, 4) for dice in found],
            "above_random": interval(above),
        }

    return {
        "seeds": len(complete),
        "steps": lines[0]["steps"],
        "pool": lines[0]["pool"],
        "cases": len(lines[0]["dice"]),
        "arms": {s: {str(count): arm(s, count) for count in COUNTS} for s in STRATEGIES},
    }


def collect(out: str) -> None:
    """Write results/active_learning.json from the tasks that were run."""
    files = {task: Path(out) / f"{task}.jsonl" for task in TASKS}
    tasks = {
        task: compared([json.loads(line) for line in path.read_text().splitlines()])
        for task, path in files.items()
        if path.exists()
    }
    write("active_learning", {"tasks": tasks})


if __name__ == "__main__":
    fire.Fire({"run": run, "collect": collect})
