"""Pictures of stored slices as data URIs."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from med3dinsight_ext.data.slicing import WINDOWS, cut, window
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.reports.caption_counts import SliceRecord

PIXELS = 192  # of a picture; the page shows it smaller, sharp on high-resolution screens


def pictures(records: Sequence[SliceRecord]) -> list[str]:
    """The slices as data URIs, or why there is no picture; each volume is read once.

    Args:
        records: those of one image in a row.
    """
    found = []
    volumes = [list(group) for _, group in groupby(records, key=lambda record: record.image)]
    for group in Bar(volumes, "Reading volumes", unit="volume"):
        try:
            volume = read_volume(group[0].image)
            shown = {name: window(volume, name) for name in {row.modality for row in group}}
            spacing = volume.pixdim.tolist()
            found += [picture(shown[row.modality], spacing, row) for row in group]
        except (ValueError, OSError, RuntimeError):
            exists = os.path.exists(group[0].image.partition("::")[0])
            fault = "cannot be read" if exists else "no longer exists"
            found += [f"no picture: the volume {fault}"] * len(group)
    return found


def picture(shown: Tensor, spacing: Sequence[float], record: SliceRecord) -> str:
    """One slice as a data URI; CT in the captioner's window, where that is recorded."""
    place = torch.tensor([record.position])
    pixels = cut(shown, spacing, record.plane, place, PIXELS)[0]
    name = json.loads(record.source)["captioner"].get("ct_window")
    if len(pixels) == 3 and name != "all":
        channel = list(WINDOWS).index(name) if isinstance(name, str) and name in WINDOWS else 0
        pixels = pixels[[channel]]
    array = pixels.mul(255).round().byte().movedim(0, -1).squeeze(-1).contiguous().numpy()
    return jpeg_uri(array, 85)


def jpeg_uri(pixels: np.ndarray, quality: int) -> str:
    """Bytes (h, w) or (h, w, 3) as a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
