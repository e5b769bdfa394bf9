"""Page of predicted segmentations: each on its image, and the volumes of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from monai.data import MetaTensor

from med3dinsight_ext.data.volumes import load_volume
from med3dinsight_ext.io.files import volume_stem
from med3dinsight_ext.reports.figures import STYLE, class_colors
from med3dinsight_ext.reports.formatting import short
from med3dinsight_ext.reports.pages import write_page
from med3dinsight_ext.reports.segmentation_figures import (
    FILL,
    draw_slices,
    shown_image,
    three_slices,
)
from med3dinsight_ext.reports.viewer import write_viewer

SHOWN = 12  # cases with pictures


def write_predictions(
    page: Path, files: Mapping[str, str | Path], label_names: Sequence[str]
) -> None:
    """Write one page with the predictions of a folder.

    Args:
        page: HTML file.
        files: image to its predicted label map.
        label_names: of the classes by number; the first is the background.
    """
    rows: dict[str, list[str]] = {}
    figures: list[Figure] = []
    viewers: dict[str, str] = {}
    for image, path in files.items():
        label = load_volume(path)
        ml = float(label.pixdim.prod()) / 1000
        counts = torch.bincount(label.long().flatten(), minlength=len(label_names))[1:]
        rows[Path(image).name] = [volume_text(n * ml) for n in counts.tolist()]
        if len(figures) < SHOWN:
            figures.append(picture(image, label, label_names[1:]))
            viewer = f"viewer/{volume_stem(path)}.html"
            maps = {"Prediction": label}
            if write_viewer(page.parent / viewer, image, maps, label_names[1:], f"../{page.name}"):
                viewers[Path(image).name] = viewer
    write_page(
        page,
        "predictions.html",
        title="Predictions",
        rows=rows,
        figures=figures,
        facts={"Cases": len(rows), "Folder": str(page.parent)},
        classes=list(label_names[1:]),
        hidden=max(0, len(rows) - SHOWN),
        viewers=viewers,
    )


def volume_text(ml: float) -> str:
    """A volume; what is there is never 0.

    Examples:
        >>> [volume_text(ml) for ml in (0, 0.0001, 0.04375, 1234.56)]
        ['0', '< 0.001', '0.044', '1234.6']
    """
    return "0" if not ml else "< 0.001" if ml < 0.001 else f"{ml:.{1 if ml >= 1 else 3}f}"


@rc_context(STYLE)
def picture(image: str, label: MetaTensor, classes: Sequence[str]) -> Figure:
    """A prediction on its image, in the plane of each kind where it marks most.

    Args:
        image: path.
        label: (1, x, y, z) predicted class numbers.
        classes: names from number 1 on.
    """
    colors = class_colors(classes)
    figure = Figure((7.4, 3.1), layout="constrained")
    (part,) = figure.subfigures(1, 1, squeeze=False)[0]
    part.suptitle(short(Path(image).name, 60), x=0.01, ha="left", fontsize=9.5, weight="bold")
    nothing = MetaTensor(torch.zeros_like(label.as_tensor()), affine=label.affine)
    slices = three_slices(label, nothing)
    drawn = draw_slices(part, *shown_image(image), slices, list(colors.values()))
    named = [(name, color) for n, (name, color) in enumerate(colors.items(), 1) if n in drawn]
    handles = [Patch(facecolor=(color, FILL), label=short(name, 24)) for name, color in named]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, fontsize=8)
    figure.set_label(
        f"Prediction on {Path(image).name}: {', '.join(n for n, _ in named) or 'none'}"
    )
    return figure
