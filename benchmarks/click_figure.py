"""Draw corrections of two organs by a trained network: before, the click, after.

python benchmarks/click_figure.py hippocampus DATA OUT [--tag TAG]

OUT has the arm of ``bench_clicks.py``. Of the first clicks on each organ in the validation cases it
takes the one that corrects most voxels; writes docs/guides/figures/correction.png.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import fire
import nibabel as nib
import numpy as np
from matplotlib import rc_context
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from bench_clicks import METHODS, name_of, segmenter, source  # noqa: E402
from click_scores import next_clicks  # noqa: E402
from med3dinsight_ext.data.splits import partition  # noqa: E402
from med3dinsight_ext.reports.figures import STYLE, class_colors  # noqa: E402
from med3dinsight_ext.training.checkpoints import load_weights  # noqa: E402

PICTURE = HERE.parent / "docs" / "guides" / "figures" / "correction.png"


class Correction(NamedTuple):
    """One click on a case, with all arrays (x, y, z)."""

    case: str
    image: np.ndarray
    label: np.ndarray
    before: np.ndarray
    after: np.ndarray
    place: tuple[int, ...]
    corrected: int


def corrections(answer: Any, items: list[dict], names: list[str]) -> dict[int, Correction]:
    """The best first click on each organ."""
    best: dict[int, Correction] = {}
    for item in items:
        given = {key: item[key] for key in ("image", "modality")}
        file: Any = nib.load(item["label"])
        label = np.asarray(file.dataobj).astype(int)
        before = answer(given | {name: [] for name in names})
        for number in range(1, len(names)):
            seen = np.where(label == number, before, label)  # only voxels of this organ are wrong
            for _, place in next_clicks(seen, label, len(names), False):
                after = answer(given | {names[number]: [list(place)]})
                corrected = int((after == label).sum()) - int((before == label).sum())
                if number not in best or corrected > best[number].corrected:
                    picture: Any = nib.load(item["image"])
                    image = np.asarray(picture.dataobj, dtype=float)
                    best[number] = Correction(
                        Path(item["image"]).name, image, label, before, after, place, corrected
                    )
    return best


def draw(found: dict[int, Correction], names: list[str]) -> Figure:
    """A row for each organ: before, the click, after, in the sagittal slice of the click."""
    colors = class_colors(names[1:])
    filled = ListedColormap(["#00000000", *(colors[name] for name in names[1:])])
    figure = Figure(figsize=(7.5, 2.1 * len(found) + 0.4), layout="constrained")
    panels = figure.subplots(len(found), 3, squeeze=False)
    for row, (number, one) in zip(panels, sorted(found.items()), strict=True):
        x, *inside = one.place
        limits = np.percentile(one.image, (1, 99.5))
        titles = (
            "before",
            f"a click: {names[number]}",
            f"after: {one.corrected} more voxels are right",
        )
        for ax, title, mask in zip(row, titles, (one.before, one.before, one.after), strict=True):
            ax.imshow(one.image[x].T, cmap="gray", vmin=limits[0], vmax=limits[1], origin="lower")
            ax.imshow(
                mask[x].T,
                cmap=filled,
                vmin=0,
                vmax=len(names) - 1,
                alpha=0.45,
                origin="lower",
                interpolation="nearest",
            )
            for value, name in enumerate(names[1:], 1):
                truth = (one.label[x].T == value).astype(float)
                if truth.any():
                    ax.contour(truth, [0.5], colors=colors[name], linewidths=1.2)
            ax.set(xticks=[], yticks=[], title=title)
            ax.grid(False)
        row[1].plot(*inside, "o", ms=9, mfc="none", mec="white", mew=1.8)
        row[1].plot(*inside, ".", ms=4, color="white")
        row[0].set_ylabel(one.case.split(".")[0])
    handles = [Patch(color=color, alpha=0.6, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names))
    return figure


def main(
    dataset: str, data: str, out: str, method: str = "click", tag: str = "", **settings: Any
) -> None:
    """Write the picture.

    Args:
        dataset: hippocampus or headneck.
        data: its folder.
        out: of all arms.
        method: of the arm.
        tag: of its name.
        settings: of inference.
    """
    folder = Path(out) / name_of(dataset, method, None, tag)
    overlays = [HERE / f"{dataset}.yaml", *METHODS[method][1]]
    given = source(data) | {"bundle_root": str(folder), "subset": "development", **settings}
    parser, answer = segmenter(overlays, **given)
    network, weights = (parser.get_parsed_content(key) for key in ("network_def", "checkpoint"))
    load_weights(network, weights)
    names, items = (parser.get_parsed_content(key) for key in ("label_names", "items"))
    with rc_context(STYLE):
        figure = draw(corrections(answer, partition(items, None, None)[1], names), names)
        figure.savefig(PICTURE, dpi=120)
    print(PICTURE)


if __name__ == "__main__":
    fire.Fire(main)
