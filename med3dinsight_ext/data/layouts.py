"""Layouts of datasets on disk: which images there are, which label belongs to which."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from med3dinsight_ext.data.datalists import LABEL_ENDINGS, datalist
from med3dinsight_ext.data.labels import label_values
from med3dinsight_ext.data.modalities import MODALITY_PREFIXES, modality_name
from med3dinsight_ext.data.pairing import (
    NAMING_RULES,
    Key,
    channel_number,
    naming_key,
    numbers_channels,
    without_channel,
)
from med3dinsight_ext.data.patients import patient_name
from med3dinsight_ext.data.splits import split_items
from med3dinsight_ext.data.volumes import check_each
from med3dinsight_ext.io.errors import told
from med3dinsight_ext.io.files import volume_stem
from med3dinsight_ext.io.images import open_volume
from med3dinsight_ext.io.reading import read_json, readable
from med3dinsight_ext.io.remote import is_remote
from med3dinsight_ext.io.volume_files import DICOM_ENDINGS, VOLUME_ENDINGS, find_volumes

IMAGE_FOLDERS = ("imagesTr", "images")
FEW_IMAGES = 10  # in a folder, on average, that is taken to be one patient
MODALITY_FOLDERS = {*MODALITY_PREFIXES, "MRI"}


class Dataset(NamedTuple):
    """Images of a folder or list.

    root: folder of relative paths.
    items: as from ``datalist``, with ``label`` where there is one.
    names: of the classes by label value, background first; None if they are not written anywhere.
    split, captions: split.json and captions.jsonl in the folder, if they are there.
    notes: what was left out, one line each.
    """

    root: Path
    items: list[dict[str, Any]]
    names: list[str] | None
    split: Path | None
    captions: Path | None
    notes: list[str]
    twice: Sequence[str] = ()  # labels that are of one image
    partial: bool = False  # voxels of nnU-Net's ``ignore`` have no class

    def training(self) -> Dataset:
        """The dataset without the cases that a split.json keeps for tests."""
        if not self.split:
            return self
        items = split_items(self.items, self.root, self.split, "development", whole=False)
        return self._replace(items=items)

    def check_split(self) -> None:
        """Stop if split.json names an image that is not there."""
        if self.split:
            split_items(self.items, self.root, self.split, "development")

    def labelled(self) -> list[dict[str, Any]]:
        """The items with a label."""
        return [item for item in self.items if item.get("label") not in (None, "")]

    def check_labels(self) -> None:
        """Stop if an image has several labels."""
        if self.twice:
            raise ValueError(
                f"labels must be one for each image, got {' and '.join(self.twice[:2])}; leave one "
                "of them, or name image and label in a list"
            )

    def segments(self) -> bool:
        """Whether labels are label maps, not classes.

        Raises:
            ValueError: some are, others not.
        """
        labels = [str(item["label"]) for item in self.labelled()]
        maps = [label for label in labels if label.endswith(VOLUME_ENDINGS)]
        if maps and len(maps) < len(labels):
            other = next(label for label in labels if label not in maps)
            raise ValueError(
                f"labels must be all label maps or all classes, got {maps[0]} and {told(other)} in "
                f"the list below {self.root}; correct them, or make two lists"
            )
        return bool(maps) or not labels


def read_dataset(source: str | Path, labels: str | Path | None = None) -> Dataset:
    """Find the images and labels of a dataset in one of the usual layouts.

    A folder with imagesTr and labelsTr (Decathlon, nnU-Net), with images and labels in two folders,
    with labels named ``*_seg``, ``*_label``, ``*_mask`` or ``*_gtv`` beside the images, or with
    images alone; or a list, see ``datalist``. Images for tests are left out, as imagesTs and the
    section "test" of an .npz.

    Args:
        source: folder or list of images.
        labels: folder of labels that are named like the images, or a list with image and label.

    Raises:
        ValueError: nothing to use is there, or the labels belong to other images.
    """
    source = Path(source)
    if source.is_file() and source.name.endswith(VOLUME_ENDINGS):
        raise ValueError(f"data must be a folder or a list, got the file {source}; name its folder")
    if not source.exists():
        raise ValueError(f"data must exist, got {source}; name a folder of volumes or a list")
    if source.is_file() and labels and not Path(labels).is_file():
        raise ValueError(
            f"labels must be a list where data is one, got {labels} for {source}; write each label "
            "beside its image in the list, or name the folder of the images as data"
        )
    listed = next((Path(p) for p in (labels, source) if p and Path(p).is_file()), None)
    root = source if source.is_dir() else source.parent
    described = listed if listed and listed.suffix == ".json" else root / "dataset.json"
    notes: list[str] = []
    names, partial = decathlon_names(described, notes) if described.is_file() else (None, False)
    twice: list[str] = []
    if listed:
        items = datalist(listed, root)
        kept = [item for item in items if "::test_images::" not in item["image"]]
        if 0 < len(kept) < len(items):  # of an .npz
            notes.append(
                f"{len(items) - len(kept)} images of {listed.name} are left out: its section test"
            )
            items = kept
        for item in items:
            image = item["image"]
            path = image if is_remote(image) else os.path.relpath(image, root)
            item["patient"] = patient_name(item, bids_subject(Path(path).parts) or path)
    else:
        kinds = _modalities(described) if described.is_file() else {}
        items = folder_items(source, Path(labels) if labels else None, notes, kinds, twice)
    split, captions = _beside(root, "split.json"), _beside(root, "captions.jsonl")
    return Dataset(root, items, names, split, captions, notes, twice, partial)


def _beside(root: Path, name: str) -> Path | None:
    """A file in the folder of a dataset; in that of its images it would be overlooked."""
    if (root / name).is_file():
        return root / name
    for folder in IMAGE_FOLDERS:
        if (path := root / folder / name).is_file():
            raise ValueError(f"{name} must lie in {root}, got {path}; move it there")
    return None


def decathlon_names(source: Path, notes: list[str]) -> tuple[list[str] | None, bool]:
    """Class names of a ``dataset.json``, in either direction: number to name, name to number.

    Also whether one of them is nnU-Net's ``ignore``.

    Args:
        source: file.
        notes: gets that it names regions of several values, as nnU-Net may.

    Raises:
        ValueError: it is no JSON.
    """
    fix = "correct it or move it away"
    content = read_json(source, "dataset.json", fix) if source.suffix == ".json" else None
    known = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(known, dict):
        return None, False
    partial = "ignore" in known or "ignore" in known.values()
    if regions := [name for name, number in known.items() if isinstance(number, list)]:
        notes.append(
            f"labels of {source.name} are not read, as {regions[0]!r:.100} is a region of several "
            "values: classes are named by number"
        )
        return None, partial
    pairs = known.items() if "0" in known else [(number, name) for name, number in known.items()]
    found = {str(number): str(name) for number, name in pairs}
    names = [found.get(str(i)) for i in range(len(found))]
    return None if None in names else [str(name) for name in names], partial


def folder_items(
    source: Path,
    labels: Path | None,
    notes: list[str],
    kinds: Mapping[int, str] = MappingProxyType({}),
    twice: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Images of a folder with their patients and labels.

    Args:
        source: folder, as for ``read_dataset``.
        labels: folder, as for ``read_dataset``.
        notes: gets what was left out or guessed.
        kinds: modality of each channel, where it is known.
        twice: gets labels that are of one image, which then has none.

    Raises:
        ValueError: no volumes, or labels that no image is named like.
    """
    images = source / "imagesTr" if (source / "imagesTr").is_dir() else source
    if images != source and (source / "imagesTs").is_dir():
        notes.append("imagesTs is left out: images for tests")
    volumes = find_volumes(images)
    if not volumes:
        other = Counter(path.suffix.lower() for path in images.rglob("*") if path.is_file())
        count = ", ".join(f"{n} {kind or 'without extension'}" for kind, n in other.most_common(4))
        raise ValueError(
            f"data must hold {', '.join(VOLUME_ENDINGS)} files or DICOM series, got "
            f"{count or 'no files'} in {images}; pictures (2D) are not volumes"
        )
    folders = {path.parent for path in volumes if path.is_file()}
    names = [file.name for folder in folders for file in folder.iterdir()]
    if beside := sum(name.lower().endswith(DICOM_ENDINGS) for name in names):
        notes.append(f"{beside} DICOM files beside other volumes are left out")
    volumes_too = {name for name in names if name.lower().endswith(VOLUME_ENDINGS)}
    if odd := sorted(name for name in volumes_too if not name.endswith(VOLUME_ENDINGS)):
        notes.append(f"{len(odd)} files like {odd[0]} are left out: write endings in small letters")
    items = datalist(images)
    if labels and Path(os.path.abspath(images)) in (root := Path(os.path.abspath(labels))).parents:
        items = [item for item in items if root not in Path(item["image"]).parents]
    keys = {item["image"]: naming_key(Path(item["image"]), images) for item in items}
    found = _labels(source, labels)
    if labels and not found:
        raise ValueError(f"labels must hold label maps, got no volumes in {labels}")
    known = {key: paths[0] for key, paths in found.items() if len(paths) == 1}
    if more := [path for paths in found.values() if len(paths) > 1 for path in paths]:
        notes.append(f"{len(more)} labels are left out: two or more are of one image")
        if twice is not None:
            twice += more
    rule = max(NAMING_RULES, key=lambda rule: rule.matches(keys.values(), known))
    if known and not rule.matches(keys.values(), known):
        shown = [
            ", ".join(sorted({stem for _, stem in group})[:3]) for group in (known, keys.values())
        ]
        raise ValueError(
            f"labels must belong to the images, got {len(known)} labels ({shown[0]} …) and none "
            f"named like one of {len(items)} images ({shown[1]} …); name them alike"
        )
    if known:
        labels_by = {rule.label(key): path for key, path in known.items()}
        cases = {image: rule.image(key) for image, key in keys.items()}
        if lost := len(known) - len(labels_by.keys() & set(cases.values())):
            notes.append(f"{lost} of {len(known)} labels have no image")
        for item in items:
            if (key := cases[item["image"]]) in labels_by:
                item["label"] = labels_by[key]
    if rule.channels if known else numbers_channels(keys.values(), kinds):
        for item in items if kinds else ():
            item["modality"] = kinds.get(channel_number(item["image"]), "auto")
        keys = {image: without_channel(key) for image, key in keys.items()}
    elif kinds:
        items = [item | {"modality": kinds.get(0, "auto")} for item in items]
    _name_patients(items, keys, notes)
    return items


def _name_patients(
    items: Sequence[dict[str, Any]], keys: Mapping[str, Key], notes: list[str]
) -> None:
    """Give each item without a patient one, by its folder or its name.

    Args:
        items: images; a DICOM series has its patient.
        keys: of each image.
        notes: gets that folders were taken for patients.
    """
    by_modality = all(f[-1].upper() in MODALITY_FOLDERS for f, _ in keys.values() if f)
    if by_modality:  # the patients of one are those of the others
        keys = {image: (folders[:-1], stem) for image, (folders, stem) in keys.items()}
    groups = {folders for folders, _ in keys.values() if folders}
    by_folder = 1 < len(groups) >= len(items) / FEW_IMAGES
    taken = set()
    for item in items:
        folders, stem = keys[item["image"]]
        if subject := bids_subject(folders):
            name = subject
        elif by_folder and folders:
            name = "/".join(folders)
            taken.add(name)
        else:
            name = "/".join((*folders, stem))
        item["patient"] = patient_name(item, name)
    if taken:
        notes.append(f"{len(taken)} folders are taken for patients; write a list if they are not")


def bids_subject(folders: Sequence[str]) -> str | None:
    """The subject's folder in BIDS."""
    return next((part for part in folders if part.startswith("sub-")), None)


def _modalities(path: Path) -> dict[int, str]:
    """Modality of each channel in a dataset.json; "auto" for an unknown one."""
    content = read_json(path, "dataset.json", "correct it or move it away")
    with readable("dataset.json", path, "correct it or move it away"):
        kinds = dict(content.get("modality") or content.get("channel_names") or {})
        found = {int(channel): "auto" for channel in kinds}
    for channel, kind in kinds.items():
        with suppress(ValueError):
            found[int(channel)] = modality_name(kind)
    return found


def _labels(source: Path, labels: Path | None) -> dict[Key, list[str]]:
    """Label files by what they belong to."""
    if labels and not labels.is_dir():
        raise ValueError(f"labels must be a folder or a list, got {labels}; correct the path")
    root = labels or (source / "labelsTr" if (source / "labelsTr").is_dir() else source)
    found: dict[Key, list[str]] = {}
    for path in (path for path in find_volumes(root) if path.is_file()):
        folders = path.relative_to(source).parts[:-1] if path.is_relative_to(source) else ()
        in_folder = labels or any(folder.startswith("labels") for folder in folders)
        if in_folder or volume_stem(path).endswith(LABEL_ENDINGS):
            found.setdefault(naming_key(path, root), []).append(str(path.absolute()))
    return found


def check_trainable(dataset: Dataset) -> None:
    """Stop if segmentation cannot be trained as the labels are meant.

    Raises:
        ValueError: several images share a label, but networks here take one channel; or a class is
            nnU-Net's ``ignore``, which would be learned.
    """
    items = dataset.labelled()
    count = Counter(item["label"] for item in items if str(item["label"]).endswith(VOLUME_ENDINGS))
    if shared := [label for label, n in count.items() if n > 1]:
        names = sorted(Path(i["image"]).name for i in items if i["label"] == shared[0])
        raise ValueError(
            f"cases must have one image a label, got {', '.join(names)} for {shared[0]} and "
            f"{len(shared) - 1} more such; keep one channel in the folder, or name the images in a "
            "list with image and label"
        )
    if dataset.partial:
        raise ValueError(
            f"labels must not be partial, got a label ignore in the dataset.json of {dataset.root};"
            " train on cases that are annotated completely"
        )


def class_numbers(items: Sequence[dict[str, Any]]) -> set[int]:
    """Values in all label maps of items.

    Raises:
        ValueError: a label is unreadable or has values that are no class numbers.
    """

    def values(item: dict[str, Any]) -> set[float]:
        with readable("label", item["label"]):
            return set(label_values(open_volume(item["label"]).dataobj))

    found = check_each(values, list(items), "labels", skip_bad=None).values()
    union = sorted(set[float]().union(*found))
    if union != list(range(len(union))) or len(union) < 2:
        shown = ", ".join(f"{value:g}" for value in union[:12])
        raise ValueError(
            f"labels must hold 0, 1, 2, … without a gap, got {shown} in {len(items)} label maps; "
            "map the values so that they count up"
        )
    return {int(value) for value in union}
