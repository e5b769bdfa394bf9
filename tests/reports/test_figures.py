from __future__ import annotations

import pytest
from fake_figures import EVENTS, retrieved

from med3dinsight_ext.reports.figures import INK, svg
from med3dinsight_ext.reports.retrieval import gallery
from med3dinsight_ext.reports.segmentation_figures import dice_comparison
from med3dinsight_ext.reports.training_curves import curves


@pytest.mark.parametrize(
    "figure",
    [lambda: curves(EVENTS), lambda: gallery(retrieved())],
    ids=["lines", "images"],
)
def test_svg_has_alt_text_and_the_pages_colour(figure: object) -> None:
    drawn = figure()  # type: ignore[operator]
    text = svg(drawn)
    assert text.startswith('<svg role="img" aria-label="') and drawn.get_label() in text
    assert "currentColor" in text and INK not in text


def test_svg_is_the_same_every_time() -> None:
    assert svg(curves(EVENTS)) == svg(curves(EVENTS))


def test_captions_of_any_script_stay_text() -> None:
    ((query, hits),) = retrieved(rows=1)
    assert "轴位 $x^2</text>" in svg(gallery([(query._replace(caption="轴位 $x^2"), hits)]))


def test_dice_of_every_class_of_every_training_is_shown_and_skip_what_is_not_defined() -> None:
    def stats(mean: float | None) -> dict:
        low, high = (None, None) if mean is None else (mean - 0.1, mean + 0.1)
        return {"dice": {"mean": mean, "low": low, "high": high}}

    trainings = {
        arm: {"mean": stats(mean), "classes": {"left": stats(mean), "right": stats(None)}}
        for arm, mean in (("from scratch", 0.5), ("pre-trained", 0.625))
    }
    label = str(dice_comparison(trainings).get_label())
    assert label == (
        "Dice: mean from scratch 0.500; left from scratch 0.500; "
        "mean pre-trained 0.625; left pre-trained 0.625"
    )
