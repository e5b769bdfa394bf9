"""Volumes, teacher grids and splits of the dense pilot (head and neck, development cases only)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import Spacing
from torch import Tensor, nn
from tqdm import tqdm

from med3dinsight_ext.data.slicing import window
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.teachers.efficientnet import EfficientNetLite0

SPACING = 4.0  # mm
ZOOM = 3  # teacher pixels a voxel side
STEP = 2  # voxels between the teacher's slices
TAPS = {4: 2, 8: 4, 16: 10}  # stride -> last block of EfficientNet-Lite0 with that stride
CODES = 64


def split(root: Path, labelled: int = 5, draw: int = 0) -> dict[str, list[str]]:
    """Case names: 20 development cases to score, ``labelled`` of the others, all pre-training."""
    development = sorted(json.loads((root / "split.json").read_text())["development"])
    order = np.random.default_rng(20261125).permutation(development).tolist()
    score, rest = order[:20], order[20:]
    start = draw * labelled
    extra = sorted(p.name.split(".")[0] for p in (root / "imagesTs").glob("*.nii.gz"))
    return {"score": score, "labelled": rest[start : start + labelled], "pretrain": rest + extra}


def prepare(root: Path, work: Path) -> None:
    """Write every development volume at 4 mm: HU and label."""
    names = [Path(str(n)).name.split(".")[0] for n in split(root)["score"]]
    names += split(root)["pretrain"]
    (work / "volumes").mkdir(parents=True, exist_ok=True)
    resample = Spacing((SPACING,) * 3, mode="bilinear")
    resample_label = Spacing((SPACING,) * 3, mode="nearest")
    for name in tqdm(names, "volumes"):
        path = work / "volumes" / f"{name}.npz"
        if path.exists():
            continue
        folder = "imagesTr" if (root / "imagesTr" / f"{name}.nii.gz").exists() else "imagesTs"
        image = resample(read_volume(str(root / folder / f"{name}.nii.gz")))
        arrays = {"image": image[0].numpy().astype(np.int16)}
        if folder == "imagesTr":
            from monai.transforms import LoadImage, Orientation

            label = LoadImage(image_only=True, ensure_channel_first=True)(
                str(root / "labelsTr" / f"{name}.nii.gz")
            )
            label = resample_label(Orientation("RAS", labels=None)(label))
            arrays["label"] = label[0].numpy().astype(np.uint8)
            assert arrays["label"].shape == arrays["image"].shape
        np.savez(path, **arrays)


class Taps(nn.Module):
    """The tower's maps of strides 4, 8 and 16, with the pixel that each cell is centred on."""

    def __init__(self, random: bool = False) -> None:
        super().__init__()
        tower = EfficientNetLite0()
        if random:
            tower.randomize(0)
        self.net = tower.model
        self.mean = torch.tensor(tower.mean).view(3, 1, 1)
        self.std = torch.tensor(tower.std).view(3, 1, 1)
        self.centre = self.centres()

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        net = self.net
        x = net._swish(net._bn0(net._conv_stem((pixels - self.mean) / self.std)))
        found = {}
        for index, block in enumerate(net._blocks[: max(TAPS.values()) + 1]):
            x = block(x)
            for stride, last in TAPS.items():
                if index == last:
                    found[stride] = x
        return found

    def centres(self) -> dict[int, float]:
        """Pixel under the middle of cell 0, by the centroid of the input gradient."""
        torch.manual_seed(0)
        pixels = torch.rand(4, 3, 256, 256).requires_grad_(True)
        found = {}
        for stride, features in self(pixels).items():
            cell = 128 // stride
            (grad,) = torch.autograd.grad(
                features[:, :, cell, cell].pow(2).sum(), pixels, retain_graph=True
            )
            weight = grad.pow(2).sum((0, 1, 3))
            centroid = (weight * torch.arange(256.0)).sum() / weight.sum()
            found[stride] = float(centroid) - stride * cell
        return found


@torch.no_grad()
def grids(taps: Taps, hu: Tensor) -> dict[str, Tensor]:
    """Feature grids of every ``STEP``-th slice of three planes: "plane/stride" (s, c, u, v)."""
    shown = window(hu[None].float(), "CT")
    found = {}
    for plane in range(3):
        slices = shown.movedim(plane + 1, 0)[::STEP]  # (s, 3, a, b), axes ascending
        turned = slices.mT.flip(-2, -1)  # as slicing.cut shows them
        shape = [n * ZOOM for n in turned.shape[2:]]
        maps: dict[int, list[Tensor]] = {}
        for part in turned.split(8):
            big = F.interpolate(part, shape, mode="bilinear", align_corners=False)
            pad = [(-n) % 16 for n in shape]
            for stride, value in taps(F.pad(big, (0, pad[1], 0, pad[0]))).items():
                maps.setdefault(stride, []).append(value.half())
        for stride, values in maps.items():
            found[f"{plane}/{stride}"] = torch.cat(values)
    return found


@torch.no_grad()
def sample(
    grid: dict[str, Tensor], centre: dict[int, float], shape: tuple[int, ...], every: int = 1
) -> Tensor:
    """The grids at voxel centres (or at centres of blocks of ``every``): (c, x, y, z), half."""
    parts = []
    for plane in range(3):
        axes = [a for a in range(3) if a != plane]  # (across, up)
        where = [
            torch.arange(n // every, dtype=torch.float32) * every + (every - 1) / 2 for n in shape
        ]
        for stride, origin in centre.items():
            value = grid[f"{plane}/{stride}"].float().movedim(0, 2)  # (c, h=up, s, w=across)
            value = value.permute(0, 2, 1, 3)  # (c, s, h, w)
            s, h, w = value.shape[1:]
            rows = {}
            for axis, cells in ((axes[1], h), (axes[0], w)):
                pixel = (shape[axis] - 1 - where[axis]) * ZOOM + (ZOOM - 1) / 2  # flipped
                rows[axis] = ((pixel - origin) / stride * 2 + 1) / cells - 1
            depth = (where[plane] / STEP * 2 + 1) / s - 1
            # separable: depth, up, across
            mesh = torch.meshgrid(depth, rows[axes[1]], rows[axes[0]], indexing="ij")
            points = torch.stack((mesh[2], mesh[1], mesh[0]), -1)[None]
            out = F.grid_sample(value[None], points, align_corners=False, padding_mode="border")[
                0
            ]  # (c, plane, up, across)
            order = [0, 0, 0]
            order[plane], order[axes[1]], order[axes[0]] = 1, 2, 3
            parts.append(out.permute(0, *order).half())
    return torch.cat(parts)


def position_terms(shape: tuple[int, ...]) -> Tensor:
    """Quadratic polynomial of the position in the volume: (10, x, y, z)."""
    axes = [torch.linspace(-1, 1, n) for n in shape]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    one = torch.ones_like(x)
    return torch.stack((one, x, y, z, x * x, y * y, z * z, x * y, x * z, y * z))


def teach(root: Path, work: Path, random: bool = False) -> None:
    """Grids of every volume, and their whitened codes (64, x/2, y/2, z/2) less the position."""
    torch.set_num_threads(1)
    taps = Taps(random).eval()
    tag = "random" if random else "imagenet"
    out = work / tag
    out.mkdir(exist_ok=True)
    (out / "centre.json").write_text(json.dumps(taps.centre))
    print(taps.centre)
    names = split(root)["score"] + split(root)["pretrain"]
    for name in tqdm(names, f"grids {tag}"):
        path = out / f"{name}.pt"
        if not path.exists():
            hu = torch.from_numpy(np.load(work / "volumes" / f"{name}.npz")["image"])
            torch.save(grids(taps, hu), path)
    encode(root, work, tag)


def encode(root: Path, work: Path, tag: str) -> None:
    out = work / tag
    centre = {int(k): v for k, v in json.loads((out / "centre.json").read_text()).items()}
    names = split(root)["pretrain"]
    generator = torch.Generator().manual_seed(0)
    rows, terms = [], []
    for name in tqdm(names[::2], "sample"):
        hu = torch.from_numpy(np.load(work / "volumes" / f"{name}.npz")["image"]).float()
        value = sample(torch.load(out / f"{name}.pt"), centre, tuple(hu.shape), 2)
        half = F.avg_pool3d(hu[None, None], 2)[0, 0]
        inside = (half > -300).flatten().nonzero().flatten()
        pick = inside[torch.randperm(len(inside), generator=generator)[:600]]
        rows.append(value.flatten(1)[:, pick].T.float())
        terms.append(position_terms(tuple(half.shape)).flatten(1)[:, pick].T)
    x, p = torch.cat(rows), torch.cat(terms)
    beta = torch.linalg.lstsq(p, x).solution  # (10, c)
    explained = 1 - (x - p @ beta).var(0).sum() / x.var(0).sum()
    residual = x - p @ beta
    scale = residual.std(0).clamp(min=1e-4)
    residual = residual / scale
    _, s, v = torch.linalg.svd(residual, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    basis = v[:CODES].T / (s[:CODES] / len(x) ** 0.5)
    print(f"{tag}: position explains {explained:.3f}; {CODES} codes hold {share[CODES - 1]:.3f}")
    torch.save({"beta": beta, "scale": scale, "basis": basis, "share": share}, out / "pca.bin")
    for name in tqdm(split(root)["score"] + names, "codes"):
        shape = np.load(work / "volumes" / f"{name}.npz")["image"].shape
        value = sample(torch.load(out / f"{name}.pt"), centre, shape, 2)
        flat = value.flatten(1).T.float()
        flat = flat - position_terms(tuple(value.shape[1:])).flatten(1).T @ beta
        codes = ((flat / scale) @ basis).T.reshape(CODES, *value.shape[1:]).clamp(-6, 6)
        np.save(out / f"{name}.npy", codes.half().numpy())


if __name__ == "__main__":
    import fire

    fire.Fire({"prepare": lambda r, w: prepare(Path(r), Path(w)),
               "teach": lambda r, w, random=False: teach(Path(r), Path(w), random),
               "encode": lambda r, w, tag: encode(Path(r), Path(w), tag)})  # fmt: skip
