"""Pilot of dense teaching on head and neck, development cases only.

``pretrain`` trains a student on the teacher's codes, ``readout`` a light head on the codes alone,
``finetune`` a U-Net on labelled cases. Every call appends one line to WORK/results.jsonl.

python benchmarks/dense/pilot.py DATA WORK CALLS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from pilot_data import CODES, position_terms, split  # noqa: E402

from common import machine  # noqa: E402
from med3dinsight_ext.models.student import block_mask  # noqa: E402

PATCH = (48, 48, 40)
LEVELS = ("model.1", "model.1.submodule.1", "model.1.submodule.1.submodule.1")
WIDTHS = {"model.1": 32, "model.1.submodule.1": 64, "model.1.submodule.1.submodule.1": 192}
ROOT = Path("/data")
WORK = Path("/tmp")


def unet(out_channels: int) -> UNet:
    net = UNet(3, 1, out_channels, [16, 32, 64, 128], [2, 2, 2], num_res_units=2, norm="INSTANCE")
    return net.to(memory_format=torch.channels_last_3d)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def scaled(hu: Tensor) -> Tensor:
    return ((hu.float() + 200) / 500).clamp(0, 1)


CACHE: dict[str, dict[str, Tensor]] = {}


def case(name: str, tag: str | None = None) -> dict[str, Tensor]:
    """Image (x, y, z), label, and codes of a teacher, padded to PATCH and an even size."""
    key = f"{name}/{tag}"
    if key not in CACHE:
        arrays = np.load(WORK / "volumes" / f"{name}.npz")
        hu = torch.from_numpy(arrays["image"])
        pad = []
        for n, p in zip(reversed(hu.shape), reversed(PATCH), strict=True):
            pad += [0, max(p, n + n % 2) - n]
        found = {"image": F.pad(scaled(hu), pad).half()}
        if "label" in arrays:
            found["label"] = F.pad(torch.from_numpy(arrays["label"]), pad)
        if tag:
            codes = torch.from_numpy(np.load(WORK / tag / f"{name}.npy"))
            full = [n // 2 for n in reversed(found["image"].shape)]
            have = reversed(codes.shape[1:])
            half = [v for n, c in zip(full, have, strict=True) for v in (0, n - c)]
            found["codes"] = F.pad(codes, half)
        CACHE[key] = found
    return CACHE[key]


def corner(
    shape: tuple[int, ...], rng: np.random.Generator, at: np.ndarray | None = None
) -> tuple[int, ...]:
    """An even corner of a random patch, around voxel ``at`` if given."""
    found = []
    for axis, (n, p) in enumerate(zip(shape, PATCH, strict=True)):
        low = (
            rng.integers(0, n - p + 1)
            if at is None
            else at[axis] - rng.integers(p // 4, 3 * p // 4)
        )
        found.append(int(np.clip(low, 0, n - p)) // 2 * 2)
    return tuple(found)


def cut(value: Tensor, start: tuple[int, ...], every: int = 1) -> Tensor:
    x, y, z = (slice(s // every, (s + p) // every) for s, p in zip(start, PATCH, strict=True))
    return value[..., x, y, z]


def hook_levels(net: nn.Module, store: dict[str, Tensor]) -> list[Any]:
    return [
        net.get_submodule(level).register_forward_hook(
            lambda _, __, out, level=level: store.__setitem__(level, out)
        )
        for level in LEVELS
    ]


def record(kind: str, figures: dict[str, Any]) -> None:
    line = {"kind": kind, **figures, **machine()}
    with (WORK / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print({k: v for k, v in line.items() if k not in ("cases", "versions", "per_code")}, flush=True)


# ---------------------------------------------------------------- pre-training


def explained(net: nn.Module, heads: nn.ModuleDict, tag: str, hidden: bool) -> dict[str, Any]:
    """Share of the codes' variance explained on the cases to score, by level."""
    error = {level: torch.zeros(CODES) for level in LEVELS}
    total = {level: torch.zeros(CODES) for level in LEVELS}
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name in split(ROOT)["score"]:
            data = case(name, tag)
            start = corner(tuple(data["image"].shape), rng)
            image = cut(data["image"], start)[None, None].float()
            codes = cut(data["codes"], start, 2)[None].float()
            mask = block_mask(image, 0.3, 8)
            _, _, weights = forward_codes(net, heads, image, codes, mask if hidden else None)
            for level, (guess, goal, weight) in weights.items():
                error[level] += ((guess - goal).square() * weight).sum((0, 2, 3, 4))
                total[level] += (goal.square() * weight).sum((0, 2, 3, 4))
    r2 = {level: (1 - error[level] / total[level]) for level in LEVELS}
    return {
        level: {
            "mean": float(v.mean()), "first8": float(v[:8].mean()), "last32": float(v[32:].mean()),
        }
        for level, v in r2.items()
    }  # fmt: skip


SCALE: dict[str, dict[str, Tensor]] = {}


def level_scale(tag: str) -> dict[str, Tensor]:
    """Standard deviation of the pooled codes of each level, inside the body."""
    if tag not in SCALE:
        sums: dict[str, list[Tensor]] = {level: [] for level in LEVELS}
        for name in split(ROOT)["pretrain"][:20]:
            data = case(name, tag)
            inside = F.avg_pool3d((data["image"][None, None].float() > 0).float(), 2)
            for i, level in enumerate(LEVELS):
                codes = F.avg_pool3d(data["codes"][None].float(), 2**i)
                keep = F.avg_pool3d(inside, 2**i)[0, 0] > 0.5
                sums[level].append(codes[0][:, keep].square().mean(1))
        SCALE[tag] = {k: torch.stack(v).mean(0).sqrt().clamp(min=1e-3) for k, v in sums.items()}
    return SCALE[tag]


def forward_codes(
    net: nn.Module,
    heads: nn.ModuleDict,
    image: Tensor,
    codes: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Network output, dense loss, and by level (guess, goal, weight)."""
    scale = next(iter(SCALE.values()))
    store: dict[str, Tensor] = {}
    hooks = hook_levels(net, store)
    with bf16():
        output = net(image if mask is None else image.masked_fill(mask, 0)).float()
    for hook in hooks:
        hook.remove()
    inside = F.avg_pool3d((image > 0).float(), 2)
    shown = None if mask is None else F.avg_pool3d(mask.float(), 2)
    loss = torch.zeros(())
    parts = {}
    for i, level in enumerate(LEVELS):
        goal = F.avg_pool3d(codes, 2**i) / scale[level].view(1, -1, 1, 1, 1)
        weight = (F.avg_pool3d(inside, 2**i) > 0.5).float()
        if shown is not None:
            hidden = F.avg_pool3d(shown, 2**i)
            weight = weight * hidden
        guess = heads[level.replace(".", "_")](store[level].float())
        each = F.smooth_l1_loss(guess, goal, reduction="none").mean(1, keepdim=True)
        loss = loss + (each * weight).sum() / weight.sum().clamp(min=1) / len(LEVELS)
        parts[level] = (guess, goal, weight)
    return output, loss, parts


def pretrain(
    name: str,
    tag: str | None = "imagenet",
    dense: float = 1.0,
    reconstruction: float = 0.0,
    steps: int = 800,
    lr: float = 2e-3,
    seed: int = 0,
) -> None:
    begin, cpu = time.time(), time.process_time()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = unet(1)
    heads = nn.ModuleDict({k.replace(".", "_"): nn.Conv3d(c, CODES, 1) for k, c in WIDTHS.items()})
    tag = tag if dense else None
    if tag:
        level_scale(tag)
    names = split(ROOT)["pretrain"]
    params = [*net.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, 0.1)
    for step in range(steps):
        images, codes = [], []
        for _ in range(2):
            data = case(names[rng.integers(len(names))], tag)
            start = corner(tuple(data["image"].shape), rng)
            images.append(cut(data["image"], start).float())
            if tag:
                codes.append(cut(data["codes"], start, 2).float())
        image = torch.stack(images)[:, None]
        clean = image * rng.uniform(0.9, 1.1) + rng.uniform(-0.1, 0.1) * (image > 0)
        mask = block_mask(image, 0.3, 8)
        if tag:
            output, loss, _ = forward_codes(net, heads, clean, torch.stack(codes), mask)
            loss = dense * loss
        else:
            with bf16():
                output = net(clean.masked_fill(mask, 0)).float()
            loss = torch.zeros(())
        if reconstruction:
            loss = loss + reconstruction * (output - clean).square()[mask].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(name, step + 1, float(loss), flush=True)
    torch.save({"net": net.state_dict(), "heads": heads.state_dict()}, WORK / f"{name}.bin")
    figures: dict[str, Any] = {
        "name": name, "tag": tag, "dense": dense, "reconstruction": reconstruction,
        "steps": steps, "lr": lr, "seed": seed,
        "wall_s": time.time() - begin, "cpu_s": time.process_time() - cpu,
    }  # fmt: skip
    if tag:
        net.eval()
        figures["r2_hidden"] = explained(net, heads, tag, True)
        figures["r2_shown"] = explained(net, heads, tag, False)
    record("pretrain", figures)


# ---------------------------------------------------------------- scoring


def dice(guess: Tensor, label: Tensor) -> list[float]:
    found = []
    for k in range(1, 5):
        a, b = guess == k, label == k
        found.append(float(2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1)))
    return found


def predict(net: nn.Module, data: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), bf16():
        logits = sliding_window_inference(
            data["image"].float()[None, None], PATCH, 4, net, overlap=0.25, mode="gaussian"
        )
    return logits.float().softmax(1)[0]


def score(run: Callable[[str], Tensor]) -> dict[str, Any]:
    cases = {}
    for name in split(ROOT)["score"]:
        cases[name] = dice(run(name).argmax(0), case(name)["label"])
    table = np.array(list(cases.values()))
    return {"dice": float(table.mean()), "organs": table.mean(0).round(4).tolist(), "cases": cases}


# ---------------------------------------------------------------- read-outs


def features(tag: str, name: str) -> Tensor:
    """Codes and position at every second voxel: (c, x, y, z)."""
    size = tuple(n // 2 for n in case(name)["image"].shape)
    codes = torch.from_numpy(np.load(WORK / tag / f"{name}.npy"))
    found = torch.cat((codes, position_terms(tuple(codes.shape[1:]))[1:].half()))
    missing = zip(reversed(size), reversed(found.shape[1:]), strict=True)
    return F.pad(found, [v for n, m in missing for v in (0, n - m)])


def readout(
    tag: str, draw: int = 0, labelled: int = 5, hidden: int = 128, seed: int = 0, soft: str = ""
) -> None:
    """Dice of a light head a voxel on the codes; ``soft`` is a folder for its soft labels."""
    begin = time.time()
    torch.manual_seed(seed)
    rows, labels = [], []
    for name in split(ROOT, labelled, draw)["labelled"]:
        data = case(name)
        onehot = F.one_hot(data["label"].long(), 5).movedim(-1, 0).float()[None]
        image = data["image"].float()[None, None]
        onehot, image = F.avg_pool3d(onehot, 2), F.avg_pool3d(image, 2)
        keep = image[0, 0] > 0.05
        rows.append(features(tag, name)[:, keep].T.float())
        labels.append(onehot[0][:, keep].T)
    x, y = torch.cat(rows), torch.cat(labels)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-3)
    x = (x - mean) / std
    head = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.GELU(), nn.Linear(hidden, 5))
    optimizer = torch.optim.AdamW(head.parameters(), 2e-3, weight_decay=0.05)
    steps = 600
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, 0.1)
    for _ in range(steps):
        pick = torch.randint(len(x), (4096,))
        logits = head(x[pick])
        goal = y[pick]
        p = logits.softmax(1)
        overlap = 1 - (2 * (p * goal).sum(0) + 1) / ((p + goal).sum(0) + 1)
        loss = F.cross_entropy(logits, goal) + overlap.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def run(name: str) -> Tensor:
        value = features(tag, name)
        logits = head((value.flatten(1).T.float() - mean) / std).T.reshape(1, 5, *value.shape[1:])
        logits = F.interpolate(logits, case(name)["image"].shape, mode="trilinear")
        logits[0, 1:, case(name)["image"] <= 0.05] -= 10
        return logits.softmax(1)[0]

    figures = score(run)
    if soft:
        (WORK / soft).mkdir(exist_ok=True)
        for name in split(ROOT)["pretrain"]:
            np.save(WORK / soft / f"{name}.npy", run(name).half().numpy())
    record(
        "readout",
        {"source": f"codes:{tag}", "draw": draw, "labelled": labelled, "hidden": hidden,
         "seed": seed, "features": x.shape[1], "wall_s": time.time() - begin, **figures},
    )  # fmt: skip


# ---------------------------------------------------------------- fine-tuning


def augment(image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rotation, zoom, intensity, noise; label is one-hot or soft."""
    if rng.random() < 0.7:
        angle = rng.uniform(-0.26, 0.26, 3)
        matrix = np.eye(3) * rng.uniform(0.85, 1.2)
        for axis, t in enumerate(angle):
            i, j = [a for a in range(3) if a != axis]
            turn = np.eye(3)
            turn[i, i] = turn[j, j] = np.cos(t)
            turn[i, j], turn[j, i] = -np.sin(t), np.sin(t)
            matrix = matrix @ turn
        half = np.array(image.shape[:1:-1], dtype=float)
        matrix = matrix * half[None] / half[:, None]  # mm, not fractions
        theta = torch.tensor(np.c_[matrix, np.zeros(3)], dtype=torch.float32)[None]
        points = F.affine_grid(theta, [1, 1, *image.shape[2:]], align_corners=False)
        both = F.grid_sample(torch.cat((image, label), 1), points, align_corners=False)
        image, label = both[:, :1], both[:, 1:]
        label = torch.cat((1 - label[:, 1:].sum(1, keepdim=True), label[:, 1:]), 1)
    if rng.random() < 0.5:
        image = image * rng.uniform(0.8, 1.2) + rng.uniform(-0.1, 0.1)
    if rng.random() < 0.2:
        image = image + 0.05 * torch.randn_like(image)
    return image, label


def soft_loss(logits: Tensor, goal: Tensor) -> Tensor:
    """Cross-entropy and Dice against soft labels, weighted by their confidence."""
    sure = ((goal.amax(1, keepdim=True) - 0.5) * 2).clamp(0, 1)
    ce = -(goal * logits.log_softmax(1)).sum(1, keepdim=True)
    p = logits.softmax(1)
    inter = (p * goal * sure).sum((0, 2, 3, 4))
    union = ((p + goal) * sure).sum((0, 2, 3, 4))
    return (ce * sure).mean() + (1 - (2 * inter + 1) / (union + 1)).mean()


def finetune(
    init: str = "scratch", draw: int = 0, labelled: int = 5, seed: int = 0, steps: int = 300,
    lr: float = 2e-3, soft: str = "", name: str = "",
) -> None:  # fmt: skip
    """Dice of a U-Net fine-tuned on the labelled cases.

    ``init`` is "scratch" or a pre-training's name: all but the last layer is taken. ``soft`` is a
    folder of soft labels: half of each batch are unlabelled cases then.
    """
    begin, cpu = time.time(), time.process_time()
    torch.manual_seed(seed + 100)
    rng = np.random.default_rng(seed + 100)
    net = unet(5)
    if init != "scratch":
        state = torch.load(WORK / f"{init}.bin")["net"]
        own = net.state_dict()
        taken = {k for k, v in state.items() if v.shape == own[k].shape and k[:8] != "model.2."}
        net.load_state_dict(own | {k: state[k] for k in taken})
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, 0.1)
    loss_of = DiceCELoss(softmax=True, batch=True)
    names = split(ROOT, labelled, draw)["labelled"]
    others = [n for n in split(ROOT)["pretrain"] if n not in names]
    foreground = {n: (case(n)["label"] > 0).nonzero().numpy() for n in names}

    def draw_patch(unlabelled: bool) -> tuple[Tensor, Tensor]:
        n = (others if unlabelled else names)[rng.integers(len(others if unlabelled else names))]
        data = case(n)
        if unlabelled:
            goal = torch.from_numpy(np.load(WORK / soft / f"{n}.npy"))
            likely = (goal[1:].sum(0) > 0.5).nonzero().numpy()
        else:
            goal = F.one_hot(data["label"].long(), 5).movedim(-1, 0)
            likely = foreground[n]
        at = likely[rng.integers(len(likely))] if rng.random() < 2 / 3 and len(likely) else None
        start = corner(tuple(data["image"].shape), rng, at)
        image = cut(data["image"], start).float()[None, None]
        return augment(image, cut(goal, start).float()[None], rng)

    for _ in range(steps):
        batch = [draw_patch(bool(soft) and i == 1) for i in range(2)]
        image = torch.cat([b[0] for b in batch])
        with bf16():
            logits = net(image)
        logits = logits.float()
        if soft:
            loss = loss_of(logits[:1], batch[0][1])
            loss = loss + soft_loss(logits[1:], batch[1][1])
        else:
            loss = loss_of(logits, torch.cat([b[1] for b in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    figures = score(lambda n: predict(net, case(n)))
    record(
        "finetune",
        {"name": name or init, "init": init, "draw": draw, "labelled": labelled, "seed": seed,
         "steps": steps, "lr": lr, "soft": soft, "wall_s": time.time() - begin,
         "cpu_s": time.process_time() - cpu, **figures},
    )  # fmt: skip


def run(root: str, work: str, calls: str) -> None:
    """Run a file of calls, one JSON list [function, arguments] a line; skips what is recorded."""
    global ROOT, WORK
    ROOT, WORK = Path(root), Path(work)
    torch.set_num_threads(1)
    done = WORK / f"{Path(calls).name}.done"
    seen = done.read_text().splitlines() if done.exists() else []
    for line in Path(calls).read_text().splitlines():
        if not line.strip() or line in seen or line.startswith("#"):
            continue
        function, arguments = json.loads(line)
        functions: dict[str, Callable[..., None]] = {
            "pretrain": pretrain, "readout": readout, "finetune": finetune
        }  # fmt: skip
        functions[function](**arguments)
        with done.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    import fire

    fire.Fire(run)
