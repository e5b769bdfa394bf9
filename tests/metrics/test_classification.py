from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Engine
from matplotlib.image import imread
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.metrics import compute_roc_auc
from monai.transforms import Activationsd
from torch import Tensor

from med3dinsight_ext.metrics.classification import ClassAUROC, class_scores, scores
from med3dinsight_ext.reports.classification import ClassificationReport
from med3dinsight_ext.reports.classification_figures import (
    ActivationMap,
    calibration_figure,
    confusion_figure,
    heat_figure,
    roc_figure,
)

NAMES = ["well", "ill <b>", "gone"]
SHAPE = (5, 7, 4)
FILES = ["calibration.png", "cases.csv", "confusion.png", "metrics.json", "report.html"]


def cases(n: int = 60, k: int = 3, ties: bool = True) -> tuple[Tensor, Tensor]:
    """Probabilities (n, k), many of them equal, and labels (n,) they know something of."""
    generator = torch.Generator().manual_seed(k)
    label = torch.randint(k, (n,), generator=generator)
    logit = torch.randn(n, k, generator=generator) + torch.nn.functional.one_hot(label, k)
    return (logit.round() if ties else logit).double().softmax(1), label


def two(p: list[float]) -> Tensor:
    return torch.tensor([[1 - x, x] for x in p])


@pytest.mark.parametrize("ties", [True, False])
def test_auroc_equals_monai(ties: bool) -> None:
    probability, label = cases(ties=ties)
    assert (len(probability[:, 0].unique()) < 40) == ties
    each = [compute_roc_auc(probability[:, c], (label == c).long()) for c in range(3)]
    result = scores(probability, label, NAMES, bootstraps=0)
    assert result["auroc"] == pytest.approx(np.mean(each), abs=1e-12)
    per_class = [result["per_class"][name]["auroc"] for name in NAMES]
    assert per_class == pytest.approx(each, abs=1e-12)


def test_of_two_classes_the_second_is_scored() -> None:
    probability, label = cases(k=2)
    result = scores(probability, label, NAMES[:2], bootstraps=0)
    assert result["auroc"] == pytest.approx(compute_roc_auc(probability[:, 1], label))
    assert result["f1"] == result["per_class"]["ill <b>"]["f1"]
    assert result["f1"] != result["per_class"]["well"]["f1"]


def test_scores_equal_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    probability, label = cases()
    result, said = scores(probability, label, NAMES, bootstraps=0), probability.argmax(1)
    assert result["auroc"] == pytest.approx(
        metrics.roc_auc_score(label, probability, multi_class="ovr")
    )
    assert result["balanced_accuracy"] == pytest.approx(
        metrics.balanced_accuracy_score(label, said)
    )
    assert result["f1"] == pytest.approx(metrics.f1_score(label, said, average="macro"))
    assert result["accuracy"] == pytest.approx(metrics.accuracy_score(label, said))
    assert result["confusion"] == metrics.confusion_matrix(label, said).tolist()


def test_calibration_error_equals_a_loop_over_bins() -> None:
    probability, label = cases(ties=False)
    confidence, said = probability.max(1)
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            right = (said == label)[inside].double().mean()
            expected += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    assert scores(probability, label, NAMES, bootstraps=0)["ece"] == pytest.approx(expected)
    assert expected > 0.01


def test_the_last_bins_of_calibration_are_counted_by_hand() -> None:
    wrong, right, lower = [0.0, 1.0], [0.02, 0.98], [0.1, 0.9]  # of 15 bins: 15, 15 and 14
    result = scores(torch.tensor([wrong, right, lower]), torch.tensor([0, 1, 1]), ["a", "b"], 0)
    assert result["ece"] == pytest.approx((1.98 - 1 + 1 - 0.9) / 3)


def test_scores_of_six_cases_counted_by_hand() -> None:
    result = scores(
        two([0.1, 0.2, 0.7, 0.4, 0.9, 0.8]), torch.tensor([0, 0, 0, 1, 1, 1]), ["a", "b"], 0
    )
    assert result["confusion"] == [[2, 1], [1, 2]] and result["n"] == 6
    assert result["accuracy"] == result["balanced_accuracy"] == pytest.approx(2 / 3)
    assert result["f1"] == pytest.approx(2 / 3) and result["auroc"] == pytest.approx(8 / 9)
    assert result["per_class"]["b"]["specificity"] == pytest.approx(2 / 3)
    lost = scores(two([0.9, 0.9, 0.9, 0.1]), torch.tensor([0, 1, 1, 1]), ["a", "b"], 0)
    b = {"auroc": 1 / 3, "sensitivity": 2 / 3, "specificity": 0.0, "f1": 2 / 3, "n": 3}
    assert lost["per_class"]["b"] == pytest.approx(b)
    assert lost["balanced_accuracy"] == pytest.approx(1 / 3)


def test_what_one_class_cannot_tell_is_nan() -> None:
    result = scores(two([0.2, 0.3]), torch.tensor([0, 0]), ["a", "b"], 20)
    assert all(math.isnan(result[key]) for key in ("auroc", "auroc_low", "f1", "f1_high"))
    assert result["accuracy"] == result["balanced_accuracy"] == 1
    assert math.isnan(result["per_class"]["b"]["sensitivity"])


def test_an_absent_class_is_left_out_of_the_means() -> None:
    probability, label = cases(k=2)
    wide = torch.cat([probability, torch.zeros(len(label), 1)], 1)
    result = scores(wide, label, NAMES, bootstraps=0)
    two_classes = scores(probability, label, NAMES[:2], bootstraps=0)
    for key in ("auroc", "balanced_accuracy", "accuracy", "ece"):
        assert result[key] == pytest.approx(two_classes[key])
    assert result["f1"] == np.mean([two_classes["per_class"][n]["f1"] for n in NAMES[:2]])


@pytest.mark.parametrize("chunk", [2**22, 7 * 60])
def test_intervals_equal_drawing_one_by_one(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("med3dinsight_ext.metrics.bootstrap.CHUNK", chunk)
    probability, label = cases()
    state = torch.get_rng_state()
    result = scores(probability, label, NAMES, bootstraps=30, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    drawn = torch.randint(60, (30, 60), generator=torch.Generator().manual_seed(5))
    each = [scores(probability[rows], label[rows], NAMES, bootstraps=0) for rows in drawn]
    for key in ("auroc", "balanced_accuracy", "f1", "ece"):
        ends = np.quantile([one[key] for one in each], (0.025, 0.975))
        assert [result[f"{key}_low"], result[f"{key}_high"]] == pytest.approx(ends)
        assert result[f"{key}_low"] < result[f"{key}_high"]


def test_scores_are_plain() -> None:
    result = scores(*cases(), NAMES, bootstraps=5)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("probability", "label", "names", "match"),
    [
        (two([0.5]), [0], ["a", "a"], r"names must be two or more different ones, got \['a', 'a'"),
        (two([0.5]), [0], NAMES, r"probability must be \(1, 3\) .* got \(1, 2\); give"),
        (torch.zeros(0, 2), [], ["a", "b"], r"probability must be \(>= 1, 2\) for 0 labels"),
        (torch.tensor([[2.0, -1.0]]), [0], ["a", "b"], r"sum to 1 .* -1 to 2; apply Activationsd"),
        (two([math.nan]), [0], ["a", "b"], "sum to 1 in each row, got nan"),
        (two([0.5, 0.5]), [1, -1], ["a", "b"], r"label must be in \[0, 2\), got -1 to 1"),
        (two([0.5]), [2], ["a", "b"], r"label must be in \[0, 2\), got 2 to 2; correct the labels"),
    ],
)
def test_wrong_input_is_an_error(probability: Tensor, label: list, names: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        scores(probability, torch.tensor(label), names)


def test_confusion_figure_has_the_counts_in_their_cells() -> None:
    result = scores(*cases(), NAMES, bootstraps=0)
    (ax,) = confusion_figure(result).get_axes()
    shown = {text.get_position(): text.get_text().split("\n")[0] for text in ax.texts}
    assert shown == {
        (j, i): str(n) for i, row in enumerate(result["confusion"]) for j, n in enumerate(row)
    }
    assert ax.get_ylabel() == "truth" and ax.get_xlabel() == "prediction"


def test_calibration_figure_shows_bins_and_the_error() -> None:
    ax, below = calibration_figure(
        two([0.9, 0.9, 0.9, 0.1, 0.3]), torch.tensor([1, 1, 0, 1, 0])
    ).get_axes()
    x, y = ax.lines[1].get_data()
    assert np.allclose(x, [0.7, 0.9]) and np.allclose(y, [1, 0.5])
    assert [p.get_height() for p in below.patches if p.get_height()] == [1, 4]
    assert ax.get_title("left") == "expected calibration error 38.0 %"


def test_the_area_under_a_drawn_curve_is_the_auroc() -> None:
    probability, label = cases()
    lines = roc_figure(probability, label, NAMES).get_axes()[0].lines[1:]
    result = scores(probability, label, NAMES, bootstraps=0)
    areas = [np.trapezoid(line.get_ydata(), line.get_xdata()) for line in lines]
    assert areas == pytest.approx([result["per_class"][name]["auroc"] for name in NAMES])
    assert len(roc_figure(*cases(k=2), NAMES[:2]).get_axes()[0].lines) == 2


class Flat(torch.nn.Module):
    """The first voxels are the logits."""

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1)[:, :3]


def dataset(labels: list[int | None]) -> list[dict[str, Any]]:
    """Volumes whose first voxels are certain of class i % 3, the surer the higher i."""
    items = []
    for i, label in enumerate(labels):
        volume = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(i))
        volume.view(-1)[:3] = torch.eye(3)[i % 3] * (1 + i)
        image = MetaTensor(volume, meta={"filename_or_obj": f"d.npz::test_images::{i:02d}"})
        items.append({"image": image} | ({} if label is None else {"label": label}))
    return items


def evaluator(items: list[dict[str, Any]]) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=2),
        network=Flat(),
        postprocessing=Activationsd("pred", softmax=True),
    )


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second, which only two tests need."""
    monkeypatch.setattr(ClassificationReport, "write_report", lambda *_: None)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "cases.csv", newline="") as file:
        return list(csv.DictReader(file))


def hot(seen: list[tuple[int, ...]]) -> Callable[[Tensor, int], Tensor]:
    """A class activation map that is hot in voxel (4, 2, 1)."""

    def cam(image: Tensor, number: int) -> Tensor:
        assert type(image) is Tensor and torch.is_grad_enabled()
        seen.append((*image.shape, number))
        heat = torch.zeros_like(image)
        heat[..., 4, 2, 1] = 1
        return heat

    return cam


def test_an_evaluator_writes_the_report(tmp_path: Path) -> None:
    engine, seen = evaluator(dataset([0, 1, 2, 1, 1, 0, 0])), []
    ClassificationReport(tmp_path, NAMES, "T & t", hot(seen), cam_cases=4).attach(engine)
    engine.run()
    assert sorted(os.listdir(tmp_path)) == FILES
    rows = table(tmp_path)
    assert rows[3] | {"p_well": ""} == {
        "image": "d.npz::test_images::03",
        "label": "ill <b>",
        "prediction": "well",
        "p_well": "",
        "p_ill <b>": rows[3]["p_gone"],
        "p_gone": f"{1 / (2 + math.e**4):.6g}",
    }
    result = json.loads((tmp_path / "metrics.json").read_text())
    probability = torch.tensor([[float(row[f"p_{name}"]) for name in NAMES] for row in rows])
    expected = scores(probability, torch.tensor([0, 1, 2, 1, 1, 0, 0]), NAMES)
    assert result["auroc_low"] == pytest.approx(expected["auroc_low"], abs=1e-5)
    assert result["confusion"] == [[2, 0, 1], [1, 2, 0], [0, 0, 1]]
    for key in ("auroc", "balanced_accuracy", "f1", "accuracy", "ece"):
        assert engine.state.metrics[key] == result[key]
    # the surest right are 6 and 4, the surest wrong 5 and 3, each with the class predicted
    assert seen == [(1, 1, *SHAPE, number) for number in (0, 1, 2, 0)]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "T &amp; t" in page and "ill &lt;b&gt;" in page and "ill <b>" not in page
    assert page.count("<figure") == 4 and "images::06" in page and "images::02" not in page
    for name in ("confusion.png", "calibration.png"):
        assert imread(tmp_path / name).std() > 0.05


@pytest.mark.usefixtures("no_figures")
def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    engine = evaluator(dataset([0, 1, 2]))
    ClassificationReport(tmp_path, NAMES).attach(engine)
    engine.run()
    engine.data_loader = engine.state.dataloader = DataLoader(Dataset(dataset([0, 1])))
    engine.state.epoch_length = None
    engine.run()
    assert len(table(tmp_path)) == 2


def test_without_labels_only_the_cases_are_written(tmp_path: Path) -> None:
    items = [item | {"label": -1} for item in dataset([None] * 3)]
    engine = evaluator(items)
    ClassificationReport(tmp_path, NAMES, cam=hot([])).attach(engine)
    engine.run()
    assert os.listdir(tmp_path) == ["cases.csv"] and engine.state.metrics == {}
    assert [row["label"] for row in table(tmp_path)] == ["", "", ""]
    assert [row["prediction"] for row in table(tmp_path)] == NAMES


def output(i: int, label: Any, p: list[float] | None = None) -> dict[str, Any]:
    return dataset([None] * i + [None])[i] | {
        "pred": torch.tensor(p or [0.7, 0.2, 0.1]),
        "label": label,
    }


def run(report: ClassificationReport, outputs: list[Any]) -> Engine:
    engine = Engine(lambda _, batch: batch)
    report.attach(engine)
    engine.run(outputs)
    return engine


@pytest.mark.usefixtures("no_figures")
def test_a_case_without_label_is_in_the_table_alone(tmp_path: Path) -> None:
    outputs = [[output(0, None), output(1, torch.tensor([0])), output(2, torch.tensor(1))]]
    run(ClassificationReport(tmp_path, NAMES), outputs)
    assert [row["label"] for row in table(tmp_path)] == ["", "well", "ill <b>"]
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["n"] == 2 and result["per_class"]["gone"]["auroc"] is None


@pytest.mark.usefixtures("no_figures")
def test_an_image_that_comes_twice_counts_once(tmp_path: Path) -> None:
    run(ClassificationReport(tmp_path, NAMES), [[output(0, 0)], [output(1, 1), output(0, 0)]])
    assert len(table(tmp_path)) == 2


@pytest.mark.usefixtures("no_figures")
def test_only_candidates_are_kept_in_memory(tmp_path: Path) -> None:
    report = ClassificationReport(tmp_path, NAMES, cam=hot([]), cam_cases=3)
    outputs = [[output(i, i % 2, [0.5 + i / 50, 0.5 - i / 50, 0])] for i in range(9)]
    held: list[int] = []
    engine = Engine(lambda _, batch: held.append(len(report.images)) or batch)
    report.attach(engine)
    engine.run(outputs)
    assert max(held) == 3 and [name[-2:] for name in report.images] == ["08", "06", "07"]


@pytest.mark.usefixtures("no_figures")
def test_rows_of_all_ranks_are_joined_and_the_first_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ClassificationReport(tmp_path, NAMES, cam=hot([]))
    other.start()
    engine = Engine(lambda *_: None)
    engine.state.output = [output(1, 1), output(0, 0)]
    other.collect(engine)
    gathered = (other.rows, other.images)
    monkeypatch.setattr(idist, "all_gather", lambda mine: [mine, gathered])
    for rank in (1, 0):
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        seen: list[tuple[int, ...]] = []
        report = ClassificationReport(tmp_path, NAMES, cam=hot(seen))
        engine = run(report, [[output(2, 2, [0.1, 0.1, 0.8]), output(0, 0)]])
        assert engine.state.metrics["accuracy"] == pytest.approx(2 / 3)
        assert sorted(os.listdir(tmp_path)) == ([] if rank else ["cases.csv", "metrics.json"])
    assert [row["image"][-2:] for row in table(tmp_path)] == ["00", "01", "02"] and len(seen) == 3


@pytest.mark.usefixtures("no_figures")
def test_heat_is_shown_in_the_planes_through_its_maximum(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    report = ClassificationReport(tmp_path, NAMES, cam=hot(seen))
    run(report, [[output(0, 1)]])
    (name,) = report.rows
    shown = report.show(name, report.rows[name], report.images[name], "cpu")
    axes = heat_figure([shown]).get_axes()
    assert [ax.get_title() for ax in axes] == ["sagittal 0.90", "coronal 0.36", "axial 0.38"]
    assert all(ax.images[1].get_array().max() > 0.5 for ax in axes)
    assert shown.title.endswith("images::00\ntruth ill <b>, prediction well (70.0 %)")


def test_a_constant_image_without_heat_can_be_drawn() -> None:
    image = MetaTensor(torch.ones(1, *SHAPE))
    axes = heat_figure([ActivationMap(image, torch.zeros(1, *SHAPE), "")]).get_axes()
    assert len(axes) == 3
    assert all(not picture.get_array().any() for ax in axes for picture in ax.images)


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        ({"pred": torch.zeros(2, 3)}, TypeError, "a list of cases, got dict; set decollate: true"),
        ([output(0, 0) | {"image": torch.zeros(1, 2, 3, 4)}], ValueError, "image must be a Meta"),
        ([output(0, 3)], ValueError, "label must be the index .* got 3 of d.npz::test_images::00"),
        ([output(0, 0, [0.5, 0.5])], ValueError, "class_names must name the network's 2 outputs"),
    ],
)
def test_output_that_cannot_be_read_is_an_error(
    tmp_path: Path, batch: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        run(ClassificationReport(tmp_path, NAMES), [batch])


def test_a_map_of_another_shape_is_an_error(tmp_path: Path) -> None:
    report = ClassificationReport(tmp_path, NAMES, cam=lambda image, _: image[..., :2])
    with pytest.raises(ValueError, match=r"shape \(1, 1, 5, 7, 4\), got \(1, 1, 5, 7, 2\); res"):
        run(report, [[output(0, 0)]])
    assert "cases.csv" in os.listdir(tmp_path)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    idist.sync()
    probability, label = cases(40, 2, ties=False)
    own = slice(0, 25) if rank == 0 else slice(25, 40)
    metric = ClassAUROC()
    metric.update((probability[own], label[own]))
    Path(folder, f"{rank}.json").write_text(json.dumps(metric.compute()))
    dist.destroy_process_group()


def test_ranks_with_different_numbers_of_cases_get_the_score_of_all(tmp_path: Path) -> None:
    probability, label = cases(40, 2, ties=False)
    expected = class_scores(probability, label)["auroc"]
    assert expected != class_scores(probability[:25], label[:25])["auroc"]
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == pytest.approx([expected, expected], abs=1e-6)


def test_a_probability_of_nan_stops_before_a_class_is_written(tmp_path: Path) -> None:
    report = ClassificationReport(tmp_path, NAMES)
    image = MetaTensor(torch.rand(1, *SHAPE), meta={"filename_or_obj": "a.nii.gz"})
    engine = Engine(lambda *_: None)
    engine.state.output = [{"image": image, "pred": torch.tensor([torch.nan] * 3)}]
    with pytest.raises(ValueError, match=r"must be finite, got NaN of a.nii.gz; run with --amp"):
        report.collect(engine)
