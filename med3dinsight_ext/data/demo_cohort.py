"""Demo cohort: brain volumes made from the template in the nilearn package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandRicianNoised,
    RandSmoothDeformd,
)
from torch import Tensor

from med3dinsight_ext.data.slicing import PLANES, choose
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.io.files import move

SOURCE = """Brain volumes made from one template by random transforms; nobody's patient data.

Origin: ICBM 152 nonlinear symmetric template, version 2009a (T1, grey and white matter), as it
ships in the nilearn package ({names}).
Licence of the template: Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre,
Montreal Neurological Institute, McGill University. Permission to use, copy, modify, and distribute
this software and its documentation for any purpose and without fee is hereby granted, provided that
the above copyright notice appear in all copies. It is provided "as is" without express or implied
warranty. Cite: Fonov et al. 2011, NeuroImage 54:313-327; 2009, NeuroImage 47:S102.
Made by: med3dinsight_ext.data.demo_cohort.make_cohort(n={n}, seed={seed}): halved to 2 mm; a
random affine and smooth deformation, contrast, bias field and Rician noise for each case (MONAI);
in every second case a synthetic ellipsoid lesion in white matter. It teaches nothing about disease.
Labels: 0 background, 1 grey matter, 2 white matter, 3 lesion.
captions.jsonl: written by a rule from plane, depth and these labels; index and position in RAS.
"""
LABELS = ("background", "grey matter", "white matter", "lesion")
REGIONS = (  # of each plane, along the brain's own extent: upper bound and name
    ((0.2, "lateral left hemisphere"), (0.45, "medial left hemisphere"), (0.55, "midline"),
     (0.8, "medial right hemisphere"), (1.0, "lateral right hemisphere")),
    ((0.2, "occipital lobes"), (0.42, "parietal lobes and cerebellum"),
     (0.65, "central region and temporal lobes"), (0.88, "frontal lobes"),
     (1.0, "frontal poles")),
    ((0.2, "cerebellum and brainstem"), (0.4, "temporal lobes"),
     (0.6, "deep grey matter and ventricles"), (0.8, "white matter above the ventricles"),
     (1.0, "convexity near the vertex")),
)  # fmt: skip
PHRASES = {
    "opening": (
        "{plane} T1-weighted brain slice through the {region}",
        "Brain MRI, {plane} plane, at the level of the {region}",
        "T1 MR image of the brain in the {plane} plane, cutting the {region}",
    ),
    "lesion": (
        "a {tone} lesion about {mm} mm across lies {side}",
        "{side} there is a {tone} focus of roughly {mm} mm",
        "note a {tone} round lesion {side}, {mm} mm in size",
    ),
    "healthy": ("no lesion is visible", "without a focal lesion", "no focal change"),
}


def make_cohort(folder: str | Path, n: int = 24, seed: int = 0) -> Path:
    """Write a small brain MR cohort with tissue labels and captions, from nilearn's template.

    The folder appears when it is complete; one that is complete is left as it is.

    Args:
        folder: gets imagesTr, labelsTr, dataset.json, split.json, captions.jsonl, SOURCE.txt.
        n: cases, >= 2; three quarters are for development, the rest is the test list.
        seed: the same seed gives the same cohort.

    Returns:
        The folder.
    """
    folder, made = Path(folder), {"n": n, "seed": seed}
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}; a split needs two cases")
    if _is_cohort(folder, made):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"folder must be new, or hold the cohort {made}, got {folder}; name another"
        )
    draft = folder.parent / f".{folder.name}.{uuid4().hex}"
    try:
        _write(draft, n, seed)
        move(draft, folder)
    except OSError:
        if not _is_cohort(folder, made):  # else another process was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write(folder: Path, n: int, seed: int) -> None:
    template, affine, files = load_template()
    random = np.random.RandomState(seed)
    with_lesion = random.permutation(np.arange(n) % 2 == 0)
    test = sorted(random.permutation(n)[: max(1, round(n / 4))])
    ids, captions = [f"case_{i:03d}" for i in range(n)], ""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i, id_ in enumerate(Bar(ids, "Making the cohort")):
        state = np.random.RandomState([seed, i])
        image, label = random_case(template, with_lesion[i], state)
        for name, array in (("imagesTr", (image * 1000).short()), ("labelsTr", label.byte())):
            nib.save(nib.Nifti1Image(array[0].numpy(), affine), folder / name / f"{id_}.nii.gz")
        for row in caption_rows(image, label, state):
            captions += json.dumps({"image": f"imagesTr/{id_}.nii.gz"} | row) + "\n"
    split = {
        "development": [id_ for i, id_ in enumerate(ids) if i not in test],
        "test": [ids[i] for i in test],
    }
    about = {
        "name": "template cohort",
        "made": {"n": n, "seed": seed},
        "modality": {"0": "MRI"},
        "labels": dict(zip("0123", LABELS, strict=True)),
        "numTraining": n,
        "training": [{k: f"./{k}sTr/{id_}.nii.gz" for k in ("image", "label")} for id_ in ids],
    }
    for name, text in (
        ("captions.jsonl", captions),
        ("split.json", json.dumps(split, indent=1)),
        ("dataset.json", json.dumps(about, indent=1)),
        ("SOURCE.txt", SOURCE.format(names=", ".join(files), n=n, seed=seed)),
    ):
        (folder / name).write_text(text, encoding="utf-8")


def _is_cohort(folder: Path, made: dict) -> bool:
    file = folder / "dataset.json"
    return file.is_file() and json.loads(file.read_text()).get("made") == made


def load_template() -> tuple[dict[str, Tensor], np.ndarray, list[str]]:
    """The template at 2 mm: T1 in [0, 1] and tissue labels; affine; file names."""
    spec = find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("nilearn must be installed; pip install -e '.[demo]'")
    data = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    names = [f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")]
    images: list[Any] = [nib.load(data / name) for name in names]
    stack = np.stack([np.asarray(image.dataobj, np.float32) for image in images])
    crop = torch.from_numpy(stack[:, 10:186, 12:220, :176])  # the head and a centimetre of air
    t1, *tissue = F.avg_pool3d(crop / 255, 2)  # (x, y, z) each
    share, kind = torch.stack(tissue).max(0)
    affine = images[0].affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    # the centre of the first block of eight voxels
    affine[:3, 3] += images[0].affine[:3, :3] @ (np.array([10, 12, 0]) + 0.5)
    return {"image": t1[None], "label": ((kind + 1) * (share > 0.5))[None].float()}, affine, names


def random_case(
    template: dict[str, Tensor], with_lesion: bool, state: np.random.RandomState
) -> tuple[Tensor, Tensor]:
    """One random variant: image (1, x, y, z) near [0, 1], label (1, x, y, z)."""
    both, modes = ("image", "label"), ("bilinear", "nearest")
    shape = template["image"].shape[1:]
    warp = Compose(
        [
            RandAffined(
                both,
                prob=1.0,
                rotate_range=(0.12,) * 3,
                shear_range=(0.04,) * 6,
                translate_range=(3,) * 3,
                scale_range=(0.1,) * 3,
                mode=modes,
                padding_mode="zeros",
            ),
            RandSmoothDeformd(
                both,
                spatial_size=shape,
                rand_size=(6, 7, 6),
                pad=1,
                field_mode="trilinear",
                prob=1.0,
                def_range=0.06,
                grid_mode=modes,
            ),
        ]
    )
    look = Compose(
        [
            RandAdjustContrastd("image", prob=1.0, gamma=(0.7, 1.5)),
            RandBiasFieldd("image", coeff_range=(0.0, 0.15), prob=1.0),
            RandRicianNoised("image", prob=1.0, std=0.03),
        ]
    )
    case = warp.set_random_state(state=state)(template)
    image, label = (torch.as_tensor(case[key]).as_subclass(Tensor) for key in both)
    if with_lesion:
        white = label[0].eq(2).nonzero()
        centre, radius = white[state.randint(len(white))], state.uniform(2, 7, 3)  # 2 mm voxels
        x, y, z = ((torch.arange(n) - c) / r for n, c, r in zip(shape, centre, radius, strict=True))
        distance = (x[:, None, None] ** 2 + y[:, None] ** 2 + z**2).sqrt().float()
        weight = torch.sigmoid(8 * (1 - distance)) * (label[0] > 0)
        level = image[label == 2].mean() * state.choice([state.uniform(0.4, 0.65), 1.35])
        image = image + weight * (level - image)
        label = torch.where(weight > 0.5, 3.0, label)
    image = look.set_random_state(state=state)({"image": image})["image"]
    return torch.as_tensor(image).as_subclass(Tensor), label


def caption_rows(image: Tensor, label: Tensor, state: np.random.RandomState) -> Iterator[dict]:
    """Captions of some slices of each plane, among them the one with the most lesion."""
    numbers, positions = choose(label, 4, state.randint(2**31))
    label = label[0]
    brain, lesion = label.nonzero(), (label == 3).nonzero()  # (voxels, 3) indices
    extent = brain.amin(0), brain.amax(0) + 1
    middle = brain[:, 0].float().mean()  # of the head, which need not be centred
    tone = "bright" if image[0][label == 3].mean() > image[0][label == 2].mean() else "dark"
    index = (positions * torch.tensor(label.shape)[numbers]).long()
    slices = set(zip(numbers.tolist(), index.tolist(), strict=True))
    slices |= {(plane, int(lesion[:, plane].mode().values)) for plane in range(3) if len(lesion)}
    for plane, k in sorted(slices):
        section, shown = label.select(plane, k), lesion[lesion[:, plane] == k]
        depth = (k + 0.5 - extent[0][plane]) / (extent[1] - extent[0])[plane]
        words = {
            "plane": PLANES[plane],
            "region": next(region for bound, region in REGIONS[plane] if depth <= bound),
        }
        finding = "lesion" if len(shown) >= 3 else "healthy"
        if finding == "lesion":
            offset = shown[:, 0].float().mean() - middle  # of voxels of 2 mm
            side = "in the right hemisphere" if offset > 0 else "in the left hemisphere"
            words["side"] = side if abs(offset) > 2 else "near the midline"
            words |= {"tone": tone, "mm": str(round(4 * (len(shown) / np.pi) ** 0.5))}
        ratio = (section == 1).sum() / (section == 2).sum()
        tissue = "grey matter prevails" if ratio > 1.5 else "grey and white matter are balanced"
        start, end = (str(state.choice(PHRASES[key])) for key in ("opening", finding))
        text = f"{start}; {tissue if ratio > 0.8 else 'white matter prevails'}; {end}."
        text = text.format(**words)
        yield {
            "plane": PLANES[plane],
            "index": k,
            "size": label.shape[plane],
            "position": round((k + 0.5) / label.shape[plane], 4),
            "orientation": "RAS",
            "caption": text[0].upper() + text[1:],
        }
