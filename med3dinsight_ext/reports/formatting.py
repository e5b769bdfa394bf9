"""Names and numbers as figures and tables show them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed decimals; NaN and None as a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A fraction in per cent with one decimal, NaN as a dash."""
    return number(100 * value, 1)


def short(text: str, width: int) -> str:
    """A text of at most ``width`` letters, cut in the middle."""
    return text if len(text) <= width else f"{text[: width // 2]}…{text[-(width // 2) + 1 :]}"


def case_names(images: Sequence[str]) -> list[str]:
    """File names without .nii or .nii.gz, with as many parent folders as make them unique."""
    bare = [re.sub(r"\.nii(\.gz)?$", "", image) for image in images]
    count = Counter(bare)
    parts = [Path(b if count[b] == 1 else i).parts for b, i in zip(bare, images, strict=True)]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, depth, strict=True)]
        count = Counter(names)
        more = [count[n] > 1 and d < len(p) for n, d, p in zip(names, depth, parts, strict=True)]
        if not any(more):
            return names
        depth = [d + m for d, m in zip(depth, more, strict=True)]
