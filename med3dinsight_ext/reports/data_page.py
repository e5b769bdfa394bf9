"""Page of a dataset: findings of the data laws with thumbnails, and a sample of the volumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_rgb
from torch import Tensor

from med3dinsight_ext.data.cohort import Cohort, Record
from med3dinsight_ext.data.laws import LEVELS, Finding
from med3dinsight_ext.data.slicing import cut, window
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.reports.caption_pictures import jpeg_uri
from med3dinsight_ext.reports.figures import CLASS_COLORS, class_colors
from med3dinsight_ext.reports.pages import write_page

PIXELS = 128  # side of a plane in a thumbnail
SHOWN = 6  # thumbnails of a finding
LISTED = 24  # file names of a finding
SAMPLE = 12  # volumes


def write_data_page(
    path: str | Path, cohort: Cohort, found: Sequence[Finding], title: str = "Data laws"
) -> None:
    """Write the page; the volumes that it shows are read again, one at a time.

    Args:
        path: file to write.
        cohort: from ``read_cohort``.
        found: from ``findings``.
        title: of the page.
    """
    records = {record.name: record for record in cohort.records}
    names = sorted(records)
    index = np.unique(np.linspace(0, len(names) - 1, SAMPLE).round().astype(int))
    sample = [names[i] for i in index] if names else []
    shown = [[name for name in finding.files if name in records][:SHOWN] for finding in found]
    wanted = sorted({*sample, *sum(shown, [])})
    modality = {r.name: group for group, members in cohort.groups().items() for r in members}
    pictures = {
        name: thumbnail(records[name], modality[name])
        for name in Bar(wanted, "Drawing", unit="volume")
    }
    count = {level: sum(finding.level == level for finding in found) for level in LEVELS}
    facts = {
        "Volumes": len(records),
        "Modality": ", ".join(f"{len(x)} {name}" for name, x in cohort.groups().items()),
        "Lists": ", ".join(sorted({name for r in cohort.records for name in r.lists})) or "none",
        "Findings": ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in count.items()),
    }
    write_page(
        path,
        "data.html",
        title=title,
        facts=facts,
        findings=list(zip(found, shown, strict=True)),
        sample=sample,
        pictures=pictures,
        records=records,
        listed=LISTED,
        colors=class_colors(list(cohort.names or ())[1:]),
    )


def thumbnail(record: Record, modality: str) -> str:
    """The three planes side by side as a JPEG data URI, with the label's classes in colour.

    They are cut through the middle, or where the label marks most.

    Args:
        record: of the volume.
        modality: CT, MR or PET.
    """
    volume = read_volume(record.item["image"])
    shown = window(volume, modality)[:1]
    if shown.min() == shown.max():  # a CT in other units
        shown = window(volume, "MR")
    classes = sorted(record.labels.voxels) if record.labels else []
    label = _label(record) if classes else None
    planes = []
    for plane in range(3):
        position = torch.tensor([0.5 if label is None else _fullest(label, plane)])
        grey = cut(shown, record.spacing, plane, position, PIXELS)[0, 0]
        image = grey.numpy()[..., None].repeat(3, 2)
        for number in classes if label is not None else []:
            mask = torch.as_tensor(label == number).float()
            area = cut(mask, record.spacing, plane, position, PIXELS)[0, 0].numpy() >= 0.5
            color = np.array(to_rgb(CLASS_COLORS[(number - 1) % len(CLASS_COLORS)]))
            image[area] = 0.45 * image[area] + 0.55 * color
        planes.append(image)
    return jpeg_uri((np.concatenate(planes, 1) * 255).round().astype(np.uint8), 80)


def _label(record: Record) -> Tensor | None:
    """The label map; None if it has one value everywhere."""
    try:
        return read_volume(record.item["label"])
    except ValueError:
        return None


def _fullest(label: Tensor, plane: int) -> float:
    """Position of the slice with the most marked voxels."""
    count = (label[0] != 0).sum([axis for axis in range(3) if axis != plane])
    return (int(count.argmax()) + 0.5) / len(count)
