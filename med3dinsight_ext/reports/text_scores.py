"""Figures of text prompts' scores along the planes of a volume."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
from ignite.engine import Engine, Events
from matplotlib import rc_context
from matplotlib.figure import Figure

from med3dinsight_ext.data.slicing import PLANES, cut
from med3dinsight_ext.reports.figures import PLANE_COLORS, STYLE, draw_image, save_png

ENDS = ("left → right", "posterior → anterior", "inferior → superior")  # of the planes' axes


class TextScoreFigures:
    """Handler that draws ``case_text.png`` beside each ``case_text.json``.

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
            volume = case.image.as_tensor().cpu()
            spacing = case.image.pixdim.tolist()
            scores, slices = {}, {}
            for prompt, planes in case.prompts.items():
                scores[prompt] = {
                    k: (s.position.numpy(), s.visible.numpy()) for k, s in planes.items()
                }
                slices[prompt] = {
                    k: cut(volume, spacing, k, s.padded[s.best, None], 160)[0, 0].numpy()
                    for k, s in planes.items()
                }
            save_png(f"{case.stem}_text.png", text_curves(scores, slices))


@rc_context(STYLE)
def text_curves(
    scores: Mapping[str, Mapping[int, tuple[np.ndarray, np.ndarray]]],
    slices: Mapping[str, Mapping[int, np.ndarray]],
) -> Figure:
    """For each prompt its score along the three axes, and the best slice of each plane.

    Args:
        scores: prompt to plane to (position (s,) in [0, 1], score (s,), NaN for empty slices).
        slices: prompt to plane to the image (h, w) in [0, 1] where that score is highest.
    """
    figure = Figure((7.4, 2.0 * len(scores) + 0.3), layout="constrained")
    best_at = []
    parts = figure.subfigures(len(scores), 1, squeeze=False)[:, 0]
    for part, (prompt, by_plane) in zip(parts, scores.items(), strict=True):
        text = textwrap.wrap(prompt, 95, max_lines=2, placeholder=" …")
        part.suptitle("\n".join(text), x=0.01, ha="left", fontsize=9.5, weight="bold")
        axes = part.subplots(1, 1 + len(by_plane), width_ratios=[2.6, *[1] * len(by_plane)])
        for ax, (plane, (position, score)) in zip(axes[1:], by_plane.items(), strict=True):
            best, color = int(np.nanargmax(score)), PLANE_COLORS[plane]
            axes[0].plot(position, score, color=color, label=PLANES[plane])
            axes[0].plot(position[best], score[best], "o", color=color, markersize=5)
            title = f"{PLANES[plane]} {position[best]:.2f}\nscore {score[best]:.2f}"
            draw_image(ax, slices[prompt][plane], title, color, 2)
            best_at.append(f"“{prompt}” {PLANES[plane]} {position[best]:.2f}")
        axes[0].set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1])
        axes[0].set(xlabel="position along the axis", ylabel="similarity")
    lines = [axes[0].get_lines()[2 * i] for i in range(len(by_plane))]
    names = [f"{PLANES[plane]} ({ENDS[plane]})" for plane in by_plane]
    figure.legend(lines, names, loc="outside upper left", ncols=3, fontsize=8)
    figure.set_label("Score of each text along each axis, best at " + "; ".join(best_at))
    return figure
