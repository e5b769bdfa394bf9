"""Datalists from what people have, checked volumes, and a cohort to try everything with."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor, NibabelReader
from monai.transforms import (
    Compose,
    LoadImage,
    MapTransform,
    Orientation,
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandRicianNoised,
    RandSmoothDeformd,
    ScaleIntensityRange,
)
from monai.utils import convert_to_dst_type
from nibabel.openers import Opener
from torch import Tensor
from tqdm import tqdm

from med3dinsight_ext.slicing import MODALITIES, PLANES, choose, window

log = logging.getLogger(__name__)
LABEL_ENDINGS = ("_gtv", "_seg", "_label", "_labels", "_mask")
MODALITY_PREFIXES = {"CT": "CT", "PT": "PET", "PET": "PET", "AUTO": "auto"} | dict.fromkeys(
    ("MR", "T1", "T2", "FLAIR", "PD", "ADC", "DWI"), "MR"
)


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Rows of a JSONL or CSV file, each with the place it stands at: ("a.jsonl line 3", row)."""
    path = Path(path)
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictReader(file)
            yield from ((f"{path} line {table.line_num}", row) for row in table)
            return
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} must be JSON, got {error}; correct it") from error
            if row is not None and not isinstance(row, dict):
                raise ValueError(f"{where} must be a JSON object, got {row!r}; correct it")
            if row:
                yield where, row


def modality_name(name: object) -> str:
    """CT, MR, PET or auto for what datasets write: "MRI", "MR_T1", "FLAIR", "PT" or nothing."""
    text = str(name or "auto").upper()
    for prefix, modality in MODALITY_PREFIXES.items():
        if text.startswith(prefix):
            return modality
    raise ValueError(
        f"modality must be {', '.join(MODALITIES)} or auto, got {name!r}; "
        "set modality to what comes closest"
    )


def guess_modality(volume: Tensor) -> str:
    """CT if anything is below -150 (air is, in HU), else MR; PET cannot be told from MR."""
    return "CT" if volume.min() < -150 else "MR"


def datalist(
    source: str | Path,
    root: str | Path | None = None,
    split: str | Path | None = None,
    subset: str | None = None,
    modality: str = "auto",
) -> list[dict]:
    """List the images of a dataset, with their modality and whatever else is known of them.

    Args:
        source: a Decathlon ``dataset.json``; a JSON list, JSONL or CSV of items with ``image``; a
            folder, searched for .nii and .nii.gz that are not labels (in a folder ``labels*``, or
            named ``*_gtv``, ``*_seg``, ``*_label`` or ``*_mask``); a MedMNIST-style .npz.
        root: what relative paths start from; by default the source's folder.
        split: JSON file ``{"development": [ids], "test": [ids]}``. An id is an item's ``patient``,
            its file name without extension, or a folder on its path below ``root``.
        subset: a list of ``split``; without a split, a section of a Decathlon file ("training" by
            default) or of an .npz ("train", "val" or "test"; all three by default).
        modality: "CT", "MR" or "PET" for all. With "auto" an item's own field counts, and "auto"
            stays where it has none: ``guess_modality`` then tells from the volume.

    Returns:
        Items with an absolute ``image``, a ``modality``, and ``label`` and other fields if given.
        An image in an .npz is named ``file.npz::train_images::12``.
    """
    source = Path(source)
    root = Path(root or (source if source.is_dir() else source.parent))
    sections = _sections(source)
    section = next(iter(sections)) if split or not subset else subset
    if section not in sections:
        raise ValueError(
            f"subset must be one of {list(sections)} in {source}, got {subset!r}; "
            "correct it, or give the split file that defines it"
        )
    items = [_item(row, source, root, modality_name(modality)) for row in sections[section]]
    count = Counter(os.path.realpath(item["image"]) for item in items)
    for rule, bad in (
        ("exist", [path for path in count if not os.path.exists(path.split("::")[0])]),
        ("be listed once", [path for path, times in count.items() if times > 1]),
    ):
        if bad:
            raise ValueError(
                f"images must {rule}, got {len(bad)} of {len(count)} that do not in {source}: "
                f"{', '.join(bad[:3])}; correct the list or root={str(root)!r}"
            )
    if not items:
        raise ValueError(f"source must list images, got none in {source}; name another source")
    return _subset(items, root, Path(split), subset) if split else items


def _sections(source: Path) -> dict[str, list]:
    """Rows of a source as written, in named sections; the first one is the default."""
    if source.is_dir():
        paths = [path.relative_to(source) for path in sorted(source.rglob("*.nii*"))]
        return {"all": [str(path) for path in paths if _is_image(path)]}
    if not source.is_file():
        raise ValueError(f"source must exist, got {source}; name a folder or a file")
    if source.suffix in (".jsonl", ".csv"):
        return {"all": [row for _, row in read_rows(source)]}
    if source.suffix == ".json":
        content = _read_json(source)
        if isinstance(content, list):
            return {"all": content}
        if "training" not in content:
            raise ValueError(f"source must have a list 'training', got {list(content)} in {source}")
        names = [name for name in ("training", "validation", "test") if name in content]
        kinds = list(dict(content.get("modality") or {}).values())  # one name a channel
        known = {"modality": kinds[0]} if kinds else {}
        return {name: [known | _as_dict(row) for row in content[name]] for name in names}
    if source.suffix == ".npz":
        with np.load(source) as arrays:
            labels = {k[:-7]: arrays[k] for k in arrays.files if k.endswith("_labels")}
        rows = {
            name: [
                {
                    "image": f"{source.resolve()}::{name}_images::{i}",
                    "label": row.squeeze().tolist(),
                }
                for i, row in enumerate(array)
            ]
            for name, array in labels.items()
        }
        return {"all": sum(rows.values(), [])} | rows
    raise ValueError(f"source must be a folder, .json, .jsonl, .csv or .npz, got {source}")


def _read_json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}; correct it") from error


def _is_image(path: Path) -> bool:
    folders, stem = path.parts[:-1], _stem(path)
    is_label = stem.endswith(LABEL_ENDINGS) or any(f.startswith("labels") for f in folders)
    return not is_label and path.name.endswith((".nii", ".nii.gz")) and path.name[0] != "."


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _as_dict(row: dict | str) -> dict:
    return {"image": row} if isinstance(row, str) else row


def _item(row: dict | str, source: Path, root: Path, modality: str) -> dict:
    """One row with absolute paths and a modality."""
    item = dict(_as_dict(row))
    if not isinstance(item.get("image"), str) or not item["image"]:
        raise ValueError(
            f"image must be a path in every item of {source}, got {item.get('image')!r}; "
            "name it in a field or column 'image'"
        )
    for key in item.keys() & {"image", "label"}:
        if key == "image" or str(item[key]).endswith((".nii", ".nii.gz")):
            item[key] = os.path.abspath(root / item[key])
    item["modality"] = modality_name(item.get("modality")) if modality == "auto" else modality
    return item


def _subset(items: list[dict], root: Path, split: Path, subset: str | None) -> list[dict]:
    """The items of one list of a split file, once the whole file is known to be sound."""
    lists = {name: ids for name, ids in dict(_read_json(split)).items() if isinstance(ids, list)}
    if subset not in lists:
        raise ValueError(f"subset must be one of {list(lists)} in {split}, got {subset!r}")
    count = Counter(id_ for ids in lists.values() for id_ in ids)
    if twice := [id_ for id_, times in count.items() if times > 1]:
        raise ValueError(f"split must name each id once, got {twice} again in {split}")
    chosen, found = [], set()
    for item in items:
        path = Path(os.path.relpath(item["image"], os.path.abspath(root)))
        ids = count.keys() & {str(item.get("patient")), _stem(path), *path.parts[:-1]}
        found |= ids
        if len(homes := {name for name, members in lists.items() if ids & set(members)}) > 1:
            raise ValueError(f"split must keep an image in one list, got {path} in {sorted(homes)}")
        if subset in homes:
            chosen.append(item)
    if lost := sorted(count.keys() - found):
        raise ValueError(
            f"split must name ids of the source, got {lost} of {split} that match no patient, "
            "file name or folder; correct the split"
        )
    return chosen


def hold_out(items: list[dict], share: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Items for training and for validation; a patient's images stay together.

    Args:
        items: those with the same ``patient`` are one patient's; without it each is its own.
        share: of the patients to hold out, in [0, 1); rounded, at least one unless it is 0.
        seed: the same seed gives the same parts.
    """
    if not 0 <= share < 1:
        raise ValueError(f"val_share must be in [0, 1), got {share}; 0 holds nothing out")
    names = sorted({str(item.get("patient", item["image"])) for item in items})
    if len(names) < 2 or share == 0:
        return list(items), []
    count = min(max(1, round(share * len(names))), len(names) - 1)
    held = {names[i] for i in np.random.RandomState(seed).permutation(len(names))[:count]}
    parts: tuple[list[dict], list[dict]] = ([], [])
    for item in items:
        parts[str(item.get("patient", item["image"])) in held].append(item)
    return parts


class ScaleByModalityd(MapTransform):
    """Intensities to [0, 1] by the item's ``modality``: a HU range for CT, else percentiles.

    Args:
        keys: images, (1, x, y, z).
        ct_range: HU that become 0 and 1.
    """

    def __init__(self, keys: str | list[str], ct_range: Sequence[float] = (-200.0, 300.0)) -> None:
        super().__init__(keys)
        self.ct = ScaleIntensityRange(ct_range[0], ct_range[1], 0.0, 1.0, clip=True)

    def __call__(self, data: dict) -> dict:
        data = dict(data)
        for key in self.keys:
            image = data[key]
            modality = data.get("modality", "auto")
            if modality == "auto":
                modality = guess_modality(image)
            if modality == "CT":
                data[key] = self.ct(image)
            else:
                data[key] = convert_to_dst_type(window(image, modality), image)[0]
        return data


def read_volume(path: str) -> MetaTensor:
    """Read a volume that is safe to use, or say what is wrong with it.

    Args:
        path: NIfTI file, or ``file.npz::array::index`` (1 mm, taken to be in RAS).

    Returns:
        (1, x, y, z) float32 in RAS, with affine and ``filename_or_obj`` in its meta.

    Raises:
        ValueError: it is unreadable, not 3D, one voxel thick, without a valid spacing or affine,
            not finite, or the same value everywhere.
    """
    if "::" in path:
        file, name, index = path.split("::")
        array = _npz_array(file, name)[int(index)]
        _require(array.ndim == 3, path, "be 3D", array.shape)
        volume = MetaTensor(array[None].astype(np.float32), meta={"filename_or_obj": path})
    else:
        _check_header(path)
        try:
            # Given at the call, the reader has no fallback that would take a broken file.
            loaded = LoadImage(image_only=True, ensure_channel_first=True)(path, NibabelReader())
        except Exception as error:  # gzip, zlib, nibabel and numpy each have their own
            raise _fault(path, "be readable", f"{type(error).__name__}: {error}") from error
        volume = Orientation("RAS", labels=None)(loaded)
    _require(min(volume.shape[1:]) > 1, path, "be thicker than one voxel", tuple(volume.shape[1:]))
    finite = volume.isfinite().all()
    _require(finite, path, "be finite", f"{int((~volume.isfinite()).sum())} NaN or infinite voxels")
    _require(volume.min() < volume.max(), path, "vary", f"{volume.min().item():g} everywhere")
    return volume


def _fault(path: str, rule: str, value: object) -> ValueError:
    return ValueError(
        f"volume must {rule}, got {value} in {path}; repair the file or set skip_bad=True"
    )


def _require(ok: object, path: str, rule: str, value: object) -> None:
    if not ok:
        raise _fault(path, rule, value)


@lru_cache(maxsize=1)  # an archive is unpacked as a whole, so once for all its volumes
def _npz_array(file: str, name: str) -> np.ndarray:
    with np.load(file) as arrays:
        return arrays[name]


def _check_header(path: str) -> None:
    """Check shape, spacing and affine as they stand in the file: nibabel repairs some silently."""
    try:
        image: Any = nib.load(path)
        with Opener(path) as file:
            raw = type(image.header).from_fileobj(file, check=False)
        spacing = np.array(raw["pixdim"][1:4])
    except Exception as error:
        raise _fault(path, "be readable NIfTI", f"{type(error).__name__}: {error}") from error
    shape = image.shape
    _require(len(shape) == 3 or shape[3:] == (1,), path, "be 3D", f"shape {shape}")
    ok = np.isfinite(spacing).all() and (spacing > 0).all()
    _require(ok, path, "have a spacing above 0 mm", spacing.tolist())
    affine = image.affine[:3, :3]
    ok = np.isfinite(image.affine).all() and abs(np.linalg.det(affine)) > 1e-6 * spacing.prod()
    _require(ok, path, "have an invertible affine", image.affine.tolist())


def check_volumes(items: list[dict], skip_bad: bool = False, workers: int = 4) -> list[dict]:
    """Read every image once, before a long job stumbles over one.

    Args:
        items: from ``datalist``.
        skip_bad: leave bad volumes out and log them, instead of raising.
        workers: threads that read.

    Returns:
        The items whose volumes are good, in their order.

    Raises:
        ValueError: with every bad volume and what is wrong with it, or if none is good.
    """

    def fault(item: dict) -> str | None:
        try:
            read_volume(item["image"])
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(workers) as pool:
        faults = list(tqdm(pool.map(fault, items), "Checking volumes", len(items), disable=None))
    good = [item for item, text in zip(items, faults, strict=True) if text is None]
    bad = [text for text in faults if text is not None]
    if bad and not (skip_bad and good):
        listing = "\n  ".join(bad)
        raise ValueError(f"volumes must be sound, got {len(bad)} bad of {len(items)}:\n  {listing}")
    for text in bad:
        log.warning("left out: %s", text)
    return good


SOURCE = """Brain volumes made from one template by random transforms; nobody's patient data.

Origin: ICBM 152 nonlinear symmetric template, version 2009a (T1, grey and white matter), as it
ships in the nilearn package ({names}).
Licence of the template: Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre,
Montreal Neurological Institute, McGill University. Permission to use, copy, modify, and distribute
this software and its documentation for any purpose and without fee is hereby granted, provided that
the above copyright notice appear in all copies. It is provided "as is" without express or implied
warranty. Cite: Fonov et al. 2011, NeuroImage 54:313-327; 2009, NeuroImage 47:S102.
Made by: med3dinsight_ext.data.make_cohort(n={n}, seed={seed}): halved to 2 mm; a random affine and
smooth deformation, contrast, bias field and Rician noise for each case (MONAI); in every second
case a synthetic ellipsoid lesion in white matter. It teaches nothing about disease.
Labels: 0 background, 1 grey matter, 2 white matter, 3 lesion.
captions.jsonl: written by a rule from plane, depth and these labels; index and position in RAS.
"""
REGIONS = (  # where a slice lies along the brain's own extent: upper bound, words
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
    template, affine, names = _template()
    draft = folder.parent / f".{folder.name}.{uuid4().hex}"
    random = np.random.RandomState(seed)
    with_lesion = random.permutation(np.arange(n) % 2 == 0)
    test = set(random.permutation(n)[: max(1, round(n / 4))].tolist())
    ids, captions = [f"case_{i:03d}" for i in range(n)], []
    try:
        for name in ("imagesTr", "labelsTr"):
            (draft / name).mkdir(parents=True)
        for i, id_ in enumerate(tqdm(ids, "Making the cohort", disable=None)):
            state = np.random.RandomState([seed, i])
            image, label = _case(template, with_lesion[i], state)
            for name, array in (("imagesTr", (image * 1000).short()), ("labelsTr", label.byte())):
                nib.save(nib.Nifti1Image(array[0].numpy(), affine), draft / name / f"{id_}.nii.gz")
            for row in _captions(image, label, state):
                captions.append({"image": f"imagesTr/{id_}.nii.gz"} | row)
        training = [{k: f"./{k}sTr/{id_}.nii.gz" for k in ("image", "label")} for id_ in ids]
        labels = {"0": "background", "1": "grey matter", "2": "white matter", "3": "lesion"}
        split = {
            "development": [id_ for i, id_ in enumerate(ids) if i not in test],
            "test": [ids[i] for i in sorted(test)],
        }
        about = {
            "name": "template cohort",
            "made": made,
            "modality": {"0": "MRI"},
            "labels": labels,
        }
        for name, text in (
            ("captions.jsonl", "".join(json.dumps(row) + "\n" for row in captions)),
            ("split.json", json.dumps(split, indent=1)),
            (
                "dataset.json",
                json.dumps(about | {"numTraining": n, "training": training}, indent=1),
            ),
            ("SOURCE.txt", SOURCE.format(names=", ".join(names), **made)),
        ):
            (draft / name).write_text(text, encoding="utf-8")
        try:
            os.replace(draft, folder)
        except OSError:  # another process was faster
            if not _is_cohort(folder, made):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _is_cohort(folder: Path, made: dict) -> bool:
    file = folder / "dataset.json"
    return file.is_file() and dict(_read_json(file)).get("made") == made


def _template() -> tuple[dict[str, Tensor], np.ndarray, list[str]]:
    """The template at 2 mm: T1 in [0, 1] and tissue labels; affine; file names."""
    spec = find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "nilearn must be installed for the cohort; pip install -e '.[demo]'"
        )
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


def _case(
    template: dict[str, Tensor], with_lesion: bool, state: np.random.RandomState
) -> tuple[Tensor, Tensor]:
    """One random variant: image (1, x, y, z) near [0, 1], label (1, x, y, z)."""
    both, modes = ("image", "label"), ("bilinear", "nearest")
    shape = template["image"].shape[1:]
    warp = Compose(
        [
            RandAffined(
                both, prob=1.0, rotate_range=(0.12,) * 3, shear_range=(0.04,) * 6,
                translate_range=(3,) * 3, scale_range=(0.1,) * 3, mode=modes, padding_mode="zeros",
            ),
            RandSmoothDeformd(
                both, spatial_size=shape, rand_size=(6, 7, 6), pad=1, field_mode="trilinear",
                prob=1.0, def_range=0.06, grid_mode=modes,
            ),
        ]
    )  # fmt: skip
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


def _captions(image: Tensor, label: Tensor, state: np.random.RandomState) -> Iterator[dict]:
    """Describe some slices of each plane, among them the one that shows most of the lesion."""
    numbers, positions = choose(label, 4, state.randint(2**31))
    label = label[0]
    brain, lesion = label.nonzero(), (label == 3).nonzero()  # (voxels, 3) indices
    extent = brain.amin(0), brain.amax(0) + 1
    middle = brain[:, 0].float().mean()  # of the head, which need not lie centred
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
