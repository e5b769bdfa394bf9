from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_figures import retrieval_metrics, retrieved
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from monai.data import MetaTensor

from med3dinsight_ext.models.student import StudentOutput
from med3dinsight_ext.reports.figures import GREEN
from med3dinsight_ext.reports.pages import environment
from med3dinsight_ext.reports.retrieval import TASKS, gallery, retrieval_tasks, retrieved_slices


def table_html(metrics: dict[str, float], control: dict[str, float] | None = None) -> str:
    template = environment.get_template("retrieval.html")
    return template.module.retrieval_table(metrics, control, retrieval_tasks(metrics), TASKS)


def frame(ax: Axes) -> str:
    return to_hex(ax.spines["left"].get_edgecolor())


def test_table_shows_student_control_and_chance() -> None:
    metrics = retrieval_metrics()
    control = {key: value / 2 for key, value in metrics.items()}
    text = table_html(metrics, control)
    for value in ("r5", "r5_low", "r5_high", "r5_chance"):
        assert f"{100 * metrics[f'image_within_{value}']:.1f}" in text
    assert f"{100 * control['image_within_r5']:.1f}" in text
    assert text.count('scope="row"') == 6 and text.count("<tbody>") == 2


def test_table_without_control_has_no_column_for_it() -> None:
    assert "zero" not in table_html(retrieval_metrics())


def test_table_of_one_volume_shows_no_interval() -> None:
    nan = {
        k: float("nan") if "low" in k or "high" in k else v for k, v in retrieval_metrics().items()
    }
    text = table_html(nan)
    assert "nan" not in text and "– to –" in text


def test_table_of_other_metrics_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"come from RetrievalTable, got \['dice'\]"):
        retrieval_tasks({"dice": 0.5})


def test_the_right_slice_is_framed_and_ticked() -> None:
    panels = gallery(retrieved(rows=1)).get_axes()
    query, _, first, second, third = panels
    assert frame(second) == GREEN.lower() != frame(first) == frame(third)
    assert second.get_title() == "coronal 0.25\nvolume_1\n✓ 0.80"
    assert query.get_title() == "sagittal 0.25\nvolume_0\nquery"


def test_long_volume_names_are_shortened() -> None:
    rows = [(query._replace(volume="a" * 30 + "_end"), hits) for query, hits in retrieved(rows=1)]
    assert gallery(rows).get_axes()[0].get_title().split("\n")[1] == "aaaaaaaa…aaa_end"


def test_a_query_may_find_fewer_slices() -> None:
    rows = retrieved(rows=2)
    rows[1] = (rows[1][0], rows[1][1][:1])
    assert [len(ax.images) for ax in gallery(rows).get_axes()] == [1, 0, 1, 1, 1, 1, 0, 1, 0, 0]


def test_queries_are_ranked_by_the_similarity_of_their_tokens(tmp_path: Path) -> None:
    plane = torch.arange(3).repeat_interleave(4)
    position = torch.full((12,), 0.1)
    targets = torch.eye(24).split(12)
    dataset = []
    for i, target in enumerate(targets):
        slices = [{"caption": "seen" if k == 9 else None} for k in range(12)]
        entry = {"image": f"/d/v{i}.nii.gz", "slices": slices}
        (tmp_path / f"{i}.json").write_text(json.dumps(entry))
        image = MetaTensor(torch.rand(1, 6, 7, 8), affine=torch.eye(4))
        item = {"image": image, "plane": plane, "position": position, "image_target": target}
        dataset.append(item | {"targets": tmp_path / f"{i}.safetensors"})
    tokens = iter(targets)

    def inferer(*_: object) -> StudentOutput:
        return StudentOutput({"image": 3 * next(tokens)[None]}, None, None)

    rows = retrieved_slices(dataset, torch.nn.Identity(), inferer, torch.device("cpu"))
    assert [query.plane for query, _ in rows] == [2, 1, 0, 2]
    assert rows[0][0].caption == rows[3][0].caption == "seen"  # preferred, where there are any
    for query, (first, *others) in rows:
        assert first.correct and first.slice is query and first.similarity == pytest.approx(1)
        assert all(hit.slice.plane == query.plane and not hit.correct for hit in others)
        assert len(others) == 4


def test_the_gallery_tells_volumes_of_one_name_apart() -> None:
    [(query, hits)] = retrieved(rows=1)
    paths = ["site/1.2.840.11", "site/1.2.840.22", "a/scan.nii.gz", "b/scan.nii.gz"]
    hits = [
        hit._replace(slice=hit.slice._replace(volume=path))
        for hit, path in zip(hits, paths, strict=False)
    ]
    figure = gallery([(query._replace(volume=paths[3]), hits)])
    names = [ax.get_title().splitlines()[1] for ax in figure.axes if ax.get_title()]
    assert names == ["b/scan", "1.2.840.11", "1.2.840.22", "a/scan"], names
