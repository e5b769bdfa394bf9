from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fake_figures import prompts
from ignite.engine import Engine
from matplotlib.colors import to_hex
from matplotlib.image import imread

from med3dinsight_ext.reports import viewer
from med3dinsight_ext.reports.figures import PLANE_COLORS
from med3dinsight_ext.reports.text_scores import TextScoreFigures, text_curves
from med3dinsight_ext.training.inferers import TextScores


def test_text_curves_mark_the_best_slice_of_each_plane() -> None:
    panels = text_curves(*prompts()).get_axes()
    assert len(panels) == 2 * 4
    _, best, *_ = panels[0].lines
    assert best.get_xdata()[0] == pytest.approx(0.65)
    assert [ax.get_title().split("\n")[0] for ax in panels[1:4]] == [
        "sagittal 0.65",
        "coronal 0.65",
        "axial 0.65",
    ]
    assert [to_hex(ax.spines["left"].get_edgecolor()) for ax in panels[1:4]] == [
        color.lower() for color in PLANE_COLORS
    ]


def test_a_png_is_drawn_from_the_token_writers_scores(tmp_path: Path) -> None:
    scored, image = prompts()
    source = tmp_path / "case.nii.gz"
    nib.save(nib.Nifti1Image(image[0].numpy(), np.eye(4)), source)
    engine = Engine(lambda *_: {"text_scores": scores})
    TextScoreFigures().attach(engine)
    scores = [TextScores(tmp_path / "new" / "case", image, scored, str(source))]
    engine.run([0])
    made = {"case_text.png"} | ({"case_text.html"} if viewer.niivue() else set())
    assert set(os.listdir(tmp_path / "new")) == made
    assert imread(tmp_path / "new" / "case_text.png").std() > 0.05


def test_the_handler_must_come_after_the_token_writer() -> None:
    engine = Engine(lambda *_: {"pred": 0})
    TextScoreFigures().attach(engine)
    with pytest.raises(ValueError, match=r"text_scores, got \['pred'\]; attach TokenWriter before"):
        engine.run([0])
