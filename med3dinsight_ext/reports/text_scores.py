"""Figures and a page of text prompts' scores along the planes of a volume."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

from ignite.engine import Engine, Events
from matplotlib import rc_context
from matplotlib.figure import Figure
from monai.data import MetaTensor

from med3dinsight_ext.data.slicing import PLANES, cut
from med3dinsight_ext.reports.figures import PLANE_COLORS, STYLE, draw_image, save_png
from med3dinsight_ext.reports.viewer import Curve, write_viewer
from med3dinsight_ext.training.inferers import PlaneScores

ENDS = ("left → right", "posterior → anterior", "inferior → superior")  # of the planes' axes


class TextScoreFigures:
    """Handler that makes ``case_text.png`` and ``case_text.html`` beside each ``case_text.json``.

    It stands after ``TokenWriter`` in the list of handlers and draws the scores that this leaves
    in ``engine.state.output["text_scores"]``; without prompts there are none.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if "text_scores" not in engine.state.output:
            raise ValueError(
                "the engine's output must hold text_scores, got "
                f"{sorted(map(str, engine.state.output))}; attach TokenWriter before "
                "TextScoreFigures"
            )
        for case in engine.state.output["text_scores"]:
            page = case.stem.with_name(f"{case.stem.name}_text.html")
            curves = {text: curves_of(planes) for text, planes in case.prompts.items()}
            stills = [text_curves(case.prompts, case.image)]
            write_viewer(page, case.source, {}, [], curves=curves, stills=stills)
            save_png(page.with_suffix(".png"), stills[0])


@rc_context(STYLE)
def text_curves(prompts: Mapping[str, Mapping[int, PlaneScores]], image: MetaTensor) -> Figure:
    """For each prompt its score along the three axes, and the best slice of each plane.

    Args:
        prompts: prompt to plane to scores.
        image: (1, x, y, z) that they belong to.
    """
    figure = Figure((7.4, 2.0 * len(prompts) + 0.3), layout="constrained")
    volume, spacing = image.as_tensor().cpu(), image.pixdim.tolist()
    best_at = []
    parts = figure.subfigures(len(prompts), 1, squeeze=False)[:, 0]
    for part, (prompt, planes) in zip(parts, prompts.items(), strict=True):
        text = textwrap.wrap(prompt, 95, max_lines=2, placeholder=" …")
        part.suptitle("\n".join(text), x=0.01, ha="left", fontsize=9.5, weight="bold")
        curves, *axes = part.subplots(1, 1 + len(planes), width_ratios=[2.6, *[1] * len(planes)])
        for ax, (plane, scores) in zip(axes, planes.items(), strict=True):
            color, best = PLANE_COLORS[plane], scores.best
            place, score = f"{PLANES[plane]} {scores.position[best]:.2f}", scores.visible[best]
            curves.plot(scores.position, scores.visible, color=color, label=PLANES[plane])
            curves.plot(scores.position[best], score, "o", color=color, markersize=5)
            picture = cut(volume, spacing, plane, scores.padded[best, None], 160)[0, 0].numpy()
            draw_image(ax, picture, f"{place}\nscore {score:.2f}", color, 2)
            best_at.append(f"“{prompt}” {place}")
        curves.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1])
        curves.set(xlabel="position along the axis", ylabel="similarity")
    lines = curves.get_lines()[::2]
    names = [f"{PLANES[plane]} ({ENDS[plane]})" for plane in planes]
    figure.legend(lines, names, loc="outside upper left", ncols=3, fontsize=8)
    figure.set_label("Score of each text along each axis, best at " + "; ".join(best_at))
    return figure


def curves_of(planes: Mapping[int, PlaneScores]) -> list[Curve]:
    """One prompt's scores along the axes, each on its own scale; empty slices are gaps."""
    found = []
    for plane, scores in planes.items():
        values = [value for value in scores.visible.tolist() if not math.isnan(value)]
        low, extent = min(values), max(max(values) - min(values), 1e-6)
        pieces: list[list[str]] = [[]]
        for position, value in zip(scores.position.tolist(), scores.visible.tolist(), strict=True):
            if math.isnan(value):
                pieces.append([])
            else:
                pieces[-1].append(f"{300 * position:.1f},{86 - 82 * (value - low) / extent:.1f}")
        lines = [" ".join(piece) for piece in pieces if piece]
        best = scores.best
        name, color = f"{PLANES[plane]}, {ENDS[plane]}", PLANE_COLORS[plane]
        found.append(
            Curve(plane, name, color, lines, float(scores.position[best]), low, max(values))
        )
    return found
