from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.colors import to_hex
from matplotlib.image import imread
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.networks import one_hot
from monai.transforms import AsDiscreted, Orientation

from med3dinsight_ext.metrics.segmentation import (
    case_scores,
    confusion,
    confusion_counts,
    summary,
    worst_class,
)
from med3dinsight_ext.reports import segmentation, viewer
from med3dinsight_ext.reports.figures import CLASS_COLORS
from med3dinsight_ext.reports.formatting import case_names
from med3dinsight_ext.reports.segmentation import SegmentationReport
from med3dinsight_ext.reports.segmentation_figures import overlays, three_slices

SHAPE = (9, 12, 7)
NAMES = ["background", "liver", "a < b"]


def box(x: int = 2, y: int = 3, z: int = 1, number: int = 1) -> torch.Tensor:
    """A box of 4 x 5 x 3 voxels."""
    volume = torch.zeros(1, *SHAPE)
    volume[:, x : x + 4, y : y + 5, z : z + 3] = number
    return volume


def item(
    path: Path, prediction: torch.Tensor, label: torch.Tensor, axcodes: str = "RAS"
) -> dict[str, MetaTensor]:
    """What an evaluator leaves of one case, whose image it writes, at 1 x 1 x 3 mm."""
    affine = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    image = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0)) + label
    turn = Orientation(axcodes, labels=None)
    kept = {
        key: turn(MetaTensor(value, affine=affine, meta={"filename_or_obj": str(path)}))
        for key, value in {"image": image, "pred": prediction, "label": label}.items()
    }
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(kept["image"][0].numpy(), kept["image"].affine.numpy()), path)
    return kept


def evaluate(report: SegmentationReport, *items: dict[str, MetaTensor]) -> dict[str, float]:
    engine = Engine(lambda _, batch: batch)
    report.attach(engine)
    return engine.run([[one] for one in items]).metrics


def three_cases(folder: Path) -> list[dict[str, MetaTensor]]:
    """Dice of the liver 0.5, 1 and 0.75; no case has the other class."""
    moved = {"half": 2, "all": 0, "most": 1}
    return [item(folder / f"{name}.nii", box(2 + x), box()) for name, x in moved.items()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("run")
    report = SegmentationReport(folder / "out", NAMES, title="Liver & more")
    return folder / "out", evaluate(report, *three_cases(folder))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("low", [(0, 0, 0), (1, 2, 3), (3, 4, 2)], ids=str)
def test_scores_equal_monai_on_whole_volumes(low: tuple[int, ...], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    label, prediction = torch.zeros(2, 1, *SHAPE).long()
    part = (slice(None), *(slice(n, n + 5) for n in low))  # at z = 2 it ends with the volume
    for volume in (label, prediction):
        volume[part] = torch.randint(3, volume[part].shape, generator=g)
    found = case_scores(prediction, label, (0.7, 1.1, 3.0), NAMES, tolerance=1.2)
    pair = [one_hot(x[None], 3) for x in (prediction, label)]
    dice = compute_dice(*pair, include_background=False)[0]
    nsd = compute_surface_dice(*pair, [1.2, 1.2], spacing=(0.7, 1.1, 3.0))[0]
    hd95 = compute_hausdorff_distance(*pair, percentile=95, spacing=(0.7, 1.1, 3.0))[0]
    for i, name in enumerate(NAMES[1:]):
        expected = {"dice": dice[i].item(), "nsd": nsd[i].item(), "hd95": hd95[i].item()}
        assert found[name] == pytest.approx(expected, abs=1e-6)


def test_distances_are_in_mm() -> None:
    near, far = (
        case_scores(box(**moved), box(), (1, 1, 3), NAMES)["liver"]
        for moved in ({"x": 3}, {"z": 2})
    )
    assert (near["hd95"], far["hd95"]) == (1.0, 3.0)
    assert near["nsd"] == 1.0 > far["nsd"]


def test_tolerance_decides_nsd() -> None:
    pair = box(z=2), box()
    assert case_scores(*pair, (1, 1, 3), NAMES, tolerance=3.0)["liver"]["nsd"] == 1.0


def test_a_prediction_that_fills_the_volume_is_scored_in_all_of_it() -> None:
    found = case_scores(torch.ones(1, *SHAPE), box(), (1, 1, 1), NAMES)["liver"]
    assert found["dice"] == pytest.approx(2 * 60 / (60 + math.prod(SHAPE)))
    counts = confusion_counts(torch.ones(1, *SHAPE), box(), NAMES)
    assert counts[:2, 1].tolist() == [math.prod(SHAPE) - 60, 60]


def test_a_class_of_neither_map_does_not_count() -> None:
    found = case_scores(box(), box(), (1, 1, 1), NAMES)
    assert all(math.isnan(x) for x in found["a < b"].values())
    assert found["liver"] == {"dice": 1.0, "nsd": 1.0, "hd95": 0.0}


@pytest.mark.parametrize("missed", [True, False])
def test_a_class_of_one_map_costs_the_diagonal_of_the_whole_volume(missed: bool) -> None:
    pair = [torch.zeros(1, *SHAPE), box(number=2)]
    found = case_scores(*(pair if missed else pair[::-1]), (1, 2, 3), NAMES)
    diagonal = math.sqrt(9**2 + 24**2 + 21**2)
    assert found["a < b"] == {"dice": 0.0, "nsd": 0.0, "hd95": pytest.approx(diagonal)}


def test_empty_maps_count_nothing() -> None:
    found = case_scores(torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE), (1, 1, 1), NAMES)
    assert all(math.isnan(x) for row in found.values() for x in row.values())


@pytest.mark.parametrize("bad", [3.0, -1.0, 0.5, math.nan])
def test_what_is_no_class_number_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match=r"prediction must hold class numbers 0 to 2, got .*name"):
        case_scores(box(number=1) * bad, box(), (1, 1, 1), NAMES)


def test_confusion_counts_equal_a_count_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    label, prediction = torch.zeros(2, 1, *SHAPE).long()
    for volume in (label, prediction):
        volume[:, 2:6, 3:8, 1:4] = torch.randint(3, (1, 4, 5, 3), generator=g)
    found = confusion_counts(prediction, label, NAMES)
    pairs = [(i, j) for i in range(3) for j in range(3)]
    expected = [int(((label == i) & (prediction == j)).sum()) for i, j in pairs]
    assert found.ravel().tolist() == expected and found.sum() == label.numel()


def test_confusion_is_the_share_of_the_labels_class() -> None:
    found = confusion(np.array([[90, 10, 0], [2, 6, 2], [0, 0, 0]]), NAMES)
    assert found["share"] == [[0.9, 0.1, 0.0], [0.2, 0.6, 0.2], None]
    assert found["confused"] == {"label": "liver", "prediction": "a < b", "share": 0.2}
    assert found["missed"] == {"label": "liver", "prediction": "background", "share": 0.2}
    assert confusion(np.eye(3, dtype=int), NAMES)["share"] == np.eye(3).tolist()  # one voxel each
    assert json.loads(json.dumps(found)) == found


def test_right_predictions_confuse_nothing() -> None:
    found = confusion(np.diag([5, 3, 1]), NAMES)
    assert found["confused"] is found["missed"] is None


def test_the_worst_class_has_the_lowest_dice() -> None:
    rows = {"a": {"dice": 0.5}, "b": {"dice": math.nan}, "c": {"dice": 0.2}, "d": {"dice": 0.2}}
    assert worst_class(rows) == "c" and worst_class({"b": rows["b"]}) is None


def test_summary_of_known_scores() -> None:
    def row(liver: float, other: float) -> dict[str, dict[str, float]]:
        scores = {"liver": liver, "a < b": other}
        return {name: {"dice": x, "nsd": x / 2, "hd95": 10 * x} for name, x in scores.items()}

    found = summary([row(0.2, math.nan), row(0.4, 0.8), row(0.9, math.nan)])
    liver = found["classes"]["liver"]["dice"]
    assert liver["mean"] == pytest.approx(0.5) and liver["median"] == 0.4 and liver["n"] == 3
    assert liver["std"] == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))
    assert 0.2 <= liver["low"] < 0.5 < liver["high"] <= 0.9
    other = found["classes"]["a < b"]["hd95"]
    assert other == {"mean": 8.0, "median": 8.0, "n": 1, "std": None, "low": None, "high": None}
    assert found["mean"]["nsd"]["mean"] == pytest.approx((0.1 + 0.3 + 0.45) / 3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_two_cases_are_enough_for_an_interval() -> None:
    rows = [{"liver": {"dice": v, "nsd": v, "hd95": v}} for v in (0.4, 0.6)]
    found = summary(rows)["mean"]["dice"]
    assert found["std"] == pytest.approx(math.sqrt(0.02)) and found["low"] < 0.5 < found["high"]


@pytest.mark.parametrize(("mm", "expected"), [(1.0, 1.0), (1.1, 0.5)])
def test_surfaces_one_mm_apart_are_equal_by_default(mm: float, expected: float) -> None:
    one, other = torch.zeros(1, 9, 1, 1), torch.zeros(1, 9, 1, 1)
    one[0, 2:4], other[0, 3:5] = 1, 1
    assert case_scores(one, other, (mm, 1.0, 1.0), NAMES)["liver"]["nsd"] == expected


def test_a_thousand_draws_of_seed_zero_are_the_default() -> None:
    rows = [{"liver": {"dice": v, "nsd": v, "hd95": v}} for v in (0.1, 0.5, 0.6, 0.9)]
    assert summary(rows) == summary(rows, 1000, 0) != summary(rows, 1000, 1)


def test_the_interval_is_that_of_a_mean() -> None:
    x = np.random.default_rng(0).normal(0.5, 0.1, 400)
    found = summary([{"liver": {"dice": v, "nsd": v, "hd95": v}} for v in x])["mean"]["dice"]
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.1)


def test_a_class_no_case_has_is_none() -> None:
    found = summary([case_scores(box(), box(), (1, 1, 1), NAMES)])["classes"]["a < b"]["dice"]
    assert found.pop("n") == 0 and set(found.values()) == {None}


def test_names_are_files_without_ending_and_unique() -> None:
    images = ["/d/p1/ct.nii.gz", "/d/p2/ct.nii", "/d/p2/mr.nii", "/e/p2/ct.nii", "/f/a.b.nii.gz"]
    assert case_names(images) == ["p1/ct", "d/p2/ct", "mr", "e/p2/ct", "a.b"]
    assert case_names(["/d/ct.nii", "/d/ct.nii.gz"]) == ["ct.nii", "ct.nii.gz"]


def test_csv_has_a_line_for_each_case_and_class(written: tuple[Path, dict]) -> None:
    rows = list(csv.DictReader((written[0] / "cases.csv").open(encoding="utf-8")))
    assert [(row["case"], row["class"]) for row in rows] == [
        (case, name) for case in ("half", "all", "most") for name in NAMES[1:]
    ]
    assert [float(row["dice"]) for row in rows[::2]] == [0.5, 1.0, 0.75]
    assert [float(row["hd95_mm"]) for row in rows[::2]] == [2.0, 0.0, 1.0]
    assert {row["nsd"] for row in rows[1::2]} == {"nan"}
    assert rows[0]["image"].endswith("half.nii")


def test_json_and_engine_hold_the_means(written: tuple[Path, dict]) -> None:
    found = json.loads((written[0] / "metrics.json").read_text())
    assert found["cases"] == 3 and found["tolerance_mm"] == 1.0
    assert found["mean"]["dice"]["mean"] == found["classes"]["liver"]["dice"]["mean"] == 0.75
    metrics = written[1]
    assert metrics["dice"] == metrics["dice_liver"] == 0.75 and metrics["hd95"] == 1.0
    assert metrics["nsd"] == found["mean"]["nsd"]["mean"] and math.isnan(metrics["dice_a < b"])


def test_page_shows_scores_and_examples(written: tuple[Path, dict]) -> None:
    page = (written[0] / "report.html").read_text(encoding="utf-8")
    assert "<h1>Liver &amp; more</h1>" in page and "a &lt; b" in page and "a < b" not in page
    assert "liver</th><td>3</td><td>0.750<br><small>" in page
    assert "a &lt; b</th><td>0</td><td>–<br>" in page
    places = [
        page.index(text)
        for text in ("Best: all, Dice 1.000", "Median: most, Dice 0.750", "Worst: half, Dice 0.500")
    ]
    assert places == sorted(places)


def test_pictures_are_written(written: tuple[Path, dict]) -> None:
    for name in ("boxes.png", "overlays.png"):
        assert imread(written[0] / name).std() > 0.05
    files = {path.name for path in written[0].iterdir()} - {"viewer"}  # needs nilearn
    assert files == {"boxes.png", "overlays.png", "cases.csv", "metrics.json", "report.html"}


def test_swapped_organs_are_seen_at_a_glance(tmp_path: Path) -> None:
    names = ["background", "kidney_left", "kidney_right"]
    label = box(x=0) + box(x=5, number=2)
    swapped = box(x=0, number=2) + box(x=5)
    report = SegmentationReport(tmp_path / "out", names)
    evaluate(report, item(tmp_path / "a.nii", swapped, label))
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["confusion"]["share"] == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert found["worst_class"] == {"a": "kidney_left"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    sentence = "100.0 % of the voxels of kidney_left are predicted as kidney_right"
    assert sentence in page and "Dice 0.000; worst class kidney_left 0.000" in page
    figure = overlays(report.cases, ["a"])
    (legend,) = figure.legends
    drawn = [text.get_text() for text in legend.get_texts()]
    assert drawn == ["prediction (fill)", "label (outline)", "kidney_left", "kidney_right"]
    axial = figure.subfigs[0].axes[2]
    fills = [to_hex(im.get_array().max((0, 1))[:3]).upper() for im in axial.images[1:]]
    outlines = [to_hex(c.get_edgecolor()[0]).upper() for c in axial.collections]
    assert fills == outlines == list(CLASS_COLORS[:2])
    left, right = (im.get_array()[..., 3].argmax(1).max() for im in axial.images[1:])
    truth = [c.get_paths()[0].vertices[:, 0].min() for c in axial.collections]
    assert left < right and truth[0] > truth[1]  # each fill lies in the other's outline
    for name, color in zip(names[1:], CLASS_COLORS, strict=False):
        assert f'style="color:{color}">■</span>&nbsp;{name}' in page


@pytest.mark.skipif(viewer.niivue() is None, reason="nilearn is not installed")
def test_the_cases_with_the_lowest_dice_have_viewers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "LOWEST", 2)
    evaluate(SegmentationReport(tmp_path / "out", NAMES), *three_cases(tmp_path))
    pages = [path.read_text("utf-8") for path in sorted((tmp_path / "out/viewer").glob("*.html"))]
    titles = [re.findall("<title>(.*?)</title>", page)[0] for page in pages]
    assert [title.partition(".")[0] for title in titles] == ["half", "most"]
    report = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert re.findall(r'href="viewer/(\S+)">(\w+)<', report) == [
        ("case-01.html", "half"),
        ("case-02.html", "most"),
    ]


def test_slices_are_cut_through_the_worst_class(tmp_path: Path) -> None:
    label = box()
    label[0, 7, 10, 5] = 2
    case = item(tmp_path / "a.nii", box(), label)
    report = SegmentationReport(tmp_path / "out", NAMES)
    evaluate(report, case)
    kept = np.load(io.BytesIO(report.cases[0].slices))
    assert kept["position"] == pytest.approx([7.5 / 9, 10.5 / 12, 5.5 / 7])


def test_slices_are_cut_where_the_label_marks_most(tmp_path: Path) -> None:
    label = box()
    label[0, 4, 0], label[0, 0, 6] = 2, 2
    kept = np.load(
        io.BytesIO(three_slices(box(3), item(tmp_path / "a.nii", box(), label)["label"]))
    )
    assert kept["position"] == pytest.approx([4.5 / 9, 6.5 / 12, 1.5 / 7])
    assert np.array_equal(kept["sagittal"][0], label[0, 4:5])
    assert np.array_equal(kept["axial"][1], box(3)[0, :, :, 1:2])
    assert list(kept["spacing"]) == [1, 1, 3]


def test_orientation_changes_neither_scores_nor_pictures(tmp_path: Path) -> None:
    drawn = []
    for codes in ("RAS", "LPS", "SPR"):
        report = SegmentationReport(tmp_path, NAMES)
        report.write_files = lambda *_: None  # type: ignore[method-assign]
        metrics = evaluate(report, item(tmp_path / f"{codes}.nii", box(3, z=2), box(), codes))
        figure = overlays(report.cases, ["a"])
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=60)
        buffer.seek(0)
        drawn.append((metrics, imread(buffer)))
    for metrics, picture in drawn[1:]:
        assert metrics == pytest.approx(drawn[0][0], nan_ok=True)
        assert np.abs(picture - drawn[0][1]).max() < 0.02


def test_oblique_images_are_drawn(tmp_path: Path) -> None:
    case = item(tmp_path / "a.nii", box(z=2), box())
    turn = torch.eye(4, dtype=torch.float64)
    turn[1:3, 1:3] = torch.tensor([[0.96, -0.28], [0.28, 0.96]])
    for value in case.values():
        value.affine = turn @ value.affine
    nib.save(
        nib.Nifti1Image(case["image"][0].numpy(), case["image"].affine.numpy()), tmp_path / "a.nii"
    )
    assert evaluate(SegmentationReport(tmp_path / "out", NAMES), case)["hd95"] == pytest.approx(3)
    assert "Only: a, Dice" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


class Threshold(torch.nn.Module):
    """Finds what ``item`` marks, one voxel too far along x."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([1 - image, image - 1], 1).roll(1, 2)


def test_scores_a_batch_of_monais_evaluator(tmp_path: Path) -> None:
    cases = [item(tmp_path / f"{name}.nii", box(), box()) for name in "ab"]
    data = [{key: case[key] for key in ("image", "label")} for case in cases]
    report = SegmentationReport(tmp_path / "out", NAMES)
    evaluator = SupervisedEvaluator(
        "cpu",
        DataLoader(data, batch_size=2),
        Threshold(),
        postprocessing=AsDiscreted("pred", argmax=True),
        val_handlers=[report],
    )
    evaluator.run()
    assert evaluator.state.metrics["dice"] == 0.75 and evaluator.state.metrics["hd95"] == 1
    assert [Path(case.image).name for case in report.cases] == ["a.nii", "b.nii"]
    assert "Best: a, Dice" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_second_run_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = SegmentationReport(tmp_path / "out", NAMES)
    monkeypatch.setattr(report, "write_files", lambda *_: None)
    half, _, most = three_cases(tmp_path)
    engine = Engine(lambda _, batch: batch)
    report.attach(engine)
    engine.run([[half]])
    assert engine.run([[most]]).metrics["dice"] == 0.75


def test_ranks_join_and_repeated_files_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, full, most = three_cases(tmp_path)
    other = SegmentationReport(tmp_path / "other", NAMES)
    monkeypatch.setattr(other, "write_files", lambda *_: None)
    evaluate(other, full, half)
    monkeypatch.setattr(idist, "all_gather", lambda cases: [other.cases, cases])
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    assert evaluate(SegmentationReport(tmp_path / "out", NAMES), half, most)["dice"] == 0.75
    assert not (tmp_path / "out").exists()  # the first rank writes


def test_shape_error_names_the_file(tmp_path: Path) -> None:
    case = item(tmp_path / "scan.nii", box(), box())
    case["pred"] = case["pred"][:, :-1]
    with pytest.raises(ValueError, match=r"got \(1, 8, 12, 7\) and \(1, 9, 12, 7\).*scan\.nii"):
        evaluate(SegmentationReport(tmp_path / "out", NAMES), case)


@pytest.mark.parametrize("names", [["background"], ["a", "a"]])
def test_names_must_tell_classes_apart(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_names must be the background and one or more"):
        SegmentationReport(tmp_path, names)


def test_a_run_without_cases_is_an_error(tmp_path: Path) -> None:
    report = SegmentationReport(tmp_path, NAMES)
    with pytest.raises(ValueError, match="cases must be at least one, got none"):
        report.write(Engine(lambda *_: None))


@pytest.mark.parametrize("mm", [1.0, 1.0000001])
def test_a_spacing_rounded_up_in_the_header_changes_no_score(mm: float) -> None:
    label = torch.zeros(1, 12, 12, 12)
    label[:, 3:8, 3:8, 3:8] = 1
    scores = case_scores(label.roll(1, 1), label, (mm, mm, mm), ["background", "liver"])
    assert scores["liver"]["nsd"] == 1
