"""Style of all figures, and figures as PNG files or inline SVG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from med3dinsight_ext.io.files import write_atomic

DPI = 120
INK = "#1d2530"  # text and axes; becomes the page's own text colour in the HTML
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"  # colours of Okabe and Ito
SKY, ORANGE = "#56B4E9", "#E69F00"
PLANE_COLORS = (BLUE, VERMILION, GREEN)
# Okabe and Ito's, then the ones farthest from all before under each kind of colour blindness.
CLASS_COLORS = (
    BLUE, ORANGE, GREEN, "#CC79A7", SKY, VERMILION, "#F0E442", "#8800FF", "#663311", "#BBEE99",
    "#4422AA", "#553366", "#00FFDD", "#BB55FF", "#EE0055", "#CCAA55", "#771133", "#99FF77",
)  # fmt: skip
DASHED: dict[str, Any] = {"linestyle": (0, (3, 2)), "linewidth": 1}
STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("font.size", "axes.titlesize"), 9),
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.alpha": 0.12,
    "lines.linewidth": 1.8,
    "text.parse_math": False,  # a caption may hold dollar signs
}


def class_colors(names: Sequence[str]) -> dict[str, str]:
    """The colour of each class in figures and tables; it repeats after ``len(CLASS_COLORS)``.

    Args:
        names: of the classes without the background, in the order of their numbers.
    """
    return dict(zip(names, cycle(CLASS_COLORS)))


def draw_image(ax: Axes, image: np.ndarray, title: str, color: str, width: float) -> None:
    """Draw an image (h, w) in [0, 1] with a title and a frame."""
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.set_title(title, fontsize=7.5, pad=5)
    ax.spines[:].set(visible=True, color=color, linewidth=width)


def save_png(path: str | Path, figure: Figure) -> None:
    """Write a figure as a PNG; the file is complete or absent."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    write_atomic(Path(path), lambda draft: draft.write_bytes(data.getvalue()))


def svg(figure: Figure) -> str:
    """A figure as inline SVG: text stays text in the page's colour, the label is the alt text."""
    buffer = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "med3dinsight"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph")  # the browser has the fonts
        figure.savefig(buffer, format="svg", dpi=DPI, transparent=True, metadata=none)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    label = escape(str(figure.get_label()))
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
