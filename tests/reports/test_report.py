from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from med3dinsight_ext.metrics.retrieval import retrieval
from med3dinsight_ext.reports import report
from med3dinsight_ext.reports.report import Found, Slice

EVENTS = [
    {"epoch": 1, "loss": 3.0, "image": 2.0, "reconstruction": 1.0},
    {"epoch": 2, "loss": 2.0, "image": 1.5, "reconstruction": 0.5},
    {"epoch": 2, "image_within_r1": 0.4, "image_within_r1_chance": 0.1, "text_all_r1": 0.2},
]


def table() -> dict[str, float]:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(60, 6, generator=g)
    noisy = y + torch.randn(60, 6, generator=g)
    place = (
        torch.arange(60) % 3,
        torch.rand(60, generator=g),
        torch.zeros(60).long(),
        torch.arange(60) // 6,
    )
    rows: dict[str, float] = {}
    for scope in ("all", "within"):
        row = retrieval(noisy, y, *place, within=scope == "within")
        rows |= {f"image_{scope}_{key}": value for key, value in row.items()}
    return rows


def found(rows: int = 2, columns: int = 3, size: int = 8) -> list[tuple[Slice, list[Found]]]:
    image = np.random.default_rng(0).random((size, size))
    slices = [Slice(image, i % 3, 0.25, f"volume_{i}") for i in range(columns)]
    hits = [Found(s, 0.9 - 0.1 * i, i == 1) for i, s in enumerate(slices)]
    return [(slices[0]._replace(caption="A caption of $5 & <b>"), hits)] * rows


def prompts() -> tuple[dict, dict]:
    position = np.linspace(0.05, 0.95, 10)
    score = -((position - 0.65) ** 2)
    image = np.zeros((5, 7))
    return (
        {text: {plane: (position, score) for plane in range(3)} for text in ("heart", "liver")},
        {text: {plane: image for plane in range(3)} for text in ("heart", "liver")},
    )


def axes(figure: Figure) -> list[Axes]:
    return figure.get_axes()


def frame(ax: Axes) -> str:
    return to_hex(ax.spines["left"].get_edgecolor())


class Page(HTMLParser):
    """Tags with attributes, the text of each, and whatever points outside."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.links: list[str] = []
        self.roles: list[dict[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], "every tag must be closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "circle", "line"):
            self.open.append(tag)
        if tag == "svg":
            self.roles.append(dict(attrs))
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.text.setdefault(self.open[-1], []).append(data)


def test_each_loss_has_a_panel_with_its_values() -> None:
    panels = axes(report.curves(EVENTS))
    assert [ax.get_title("left").rsplit(" ", 1)[0] for ax in panels[:3]] == [
        "loss (sum)",
        "image",
        "reconstruction",
    ]
    x, y = panels[1].lines[0].get_data()
    assert list(x) == [1, 2] and list(y) == [2.0, 1.5]


def test_chance_is_dashed_in_the_colour_of_its_curve() -> None:
    curve, chance, other, *_ = axes(report.curves(EVENTS))[-1].lines
    assert chance.get_linestyle() == "--" and list(chance.get_ydata()) == [0.1]
    assert chance.get_color() == curve.get_color() != other.get_color()


def test_a_resumed_run_overwrites_its_epochs() -> None:
    rows = [{"epoch": 2, "loss": 9.0}, {"epoch": 3, "loss": 1.0}, *EVENTS]
    x, y = axes(report.curves(rows))[0].lines[0].get_data()
    assert list(x) == [1, 2, 3] and list(y) == [3.0, 2.0, 1.0]


def test_losses_alone_are_enough() -> None:
    assert len(axes(report.curves(EVENTS[:2]))) == 3


def test_events_without_known_names_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"events must hold a loss or R@1, got \['epoch', 'los'\]"):
        report.curves([{"epoch": 1, "los": 2.0}])


def test_table_shows_student_control_and_chance() -> None:
    metrics = table()
    control = {key: value / 2 for key, value in metrics.items()}
    text = report.retrieval_table(metrics, control)
    for value in ("r5", "r5_low", "r5_high", "r5_chance"):
        assert f"{100 * metrics[f'image_within_{value}']:.1f}" in text
    assert f"{100 * control['image_within_r5']:.1f}" in text
    assert text.count('scope="row"') == 6 and text.count("<tbody>") == 2


def test_table_without_control_has_no_column_for_it() -> None:
    assert "zero" not in report.retrieval_table(table())


def test_table_of_one_volume_shows_no_interval() -> None:
    nan = {k: float("nan") if "low" in k or "high" in k else v for k, v in table().items()}
    text = report.retrieval_table(nan)
    assert "nan" not in text and "– to –" in text


def test_table_of_other_metrics_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"come from RetrievalTable, got \['dice'\]"):
        report.retrieval_table({"dice": 0.5})


def test_the_right_slice_is_framed_and_ticked() -> None:
    panels = axes(report.gallery(found(rows=1)))
    query, _, first, second, third = panels
    assert frame(second) == report.GREEN.lower() != frame(first) == frame(third)
    assert second.get_title() == "coronal 0.25\nvolume_1\n✓ 0.80"
    assert query.get_title() == "sagittal 0.25\nvolume_0\nquery"


def test_long_volume_names_are_shortened() -> None:
    rows = [(query._replace(volume="a" * 30 + "_end"), hits) for query, hits in found(rows=1)]
    assert axes(report.gallery(rows))[0].get_title().split("\n")[1] == "aaaaaaaa…aaa_end"


def test_a_query_may_find_fewer_slices() -> None:
    rows = found(rows=2)
    rows[1] = (rows[1][0], rows[1][1][:1])
    assert [len(ax.images) for ax in axes(report.gallery(rows))] == [1, 0, 1, 1, 1, 1, 0, 1, 0, 0]


def test_text_curves_mark_the_best_slice_of_each_plane() -> None:
    panels = axes(report.text_curves(*prompts()))
    assert len(panels) == 2 * 4
    _, best, *_ = panels[0].lines
    assert best.get_xdata()[0] == pytest.approx(0.65)
    assert [ax.get_title().split("\n")[0] for ax in panels[1:4]] == [
        "sagittal 0.65",
        "coronal 0.65",
        "axial 0.65",
    ]
    assert [frame(ax) for ax in panels[1:4]] == [color.lower() for color in report.COLORS]


def test_text_scores_are_written_as_png(tmp_path: Path) -> None:
    report.save_text_scores(tmp_path / "new" / "scores.png", *prompts())
    assert imread(tmp_path / "new" / "scores.png").std() > 0.05
    assert os.listdir(tmp_path / "new") == ["scores.png"]


@pytest.mark.parametrize(
    "figure",
    [lambda: report.curves(EVENTS), lambda: report.gallery(found())],
    ids=["lines", "images"],
)
def test_svg_has_alt_text_and_the_pages_colour(figure: object) -> None:
    drawn = figure()  # type: ignore[operator]
    text = report.svg(drawn)
    assert text.startswith('<svg role="img" aria-label="') and drawn.get_label() in text
    assert "currentColor" in text and report.INK not in text


def test_svg_is_the_same_every_time() -> None:
    assert report.svg(report.curves(EVENTS)) == report.svg(report.curves(EVENTS))


def test_captions_of_any_script_stay_text() -> None:
    ((query, hits),) = found(rows=1)
    assert "轴位 $x^2</text>" in report.svg(
        report.gallery([(query._replace(caption="轴位 $x^2"), hits)])
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out") / "report.html"
    facts = {"Data & <more>": "a < b", "Volumes": 12}
    sections = [
        ("Curves <1>", "First & foremost.\n\nSecond.", report.curves(EVENTS)),
        ("Table", "", report.retrieval_table(table(), table())),
        ("Gallery", "", report.gallery(found())),
        ("Texts", "", report.text_curves(*prompts())),
    ]
    report.html(path, "Report <script>", facts, sections)
    return path


def test_page_escapes_what_users_wrote(page: Path) -> None:
    tree = Page(page)
    assert tree.text["h1"] == tree.text["title"] == ["Report <script>"]
    assert tree.text["h2"] == ["Curves <1>", "Table", "Gallery", "Texts"]
    assert "First & foremost." in tree.text["p"] and "Second." in tree.text["p"]
    assert "Data & <more>" in tree.text["th"] and "a < b" in tree.text["td"]
    assert "script" not in tree.tags and "b" not in tree.tags


def test_page_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = Page(page).links
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in text and all(
        u.startswith("#") for u in re.findall(r"url\(['\"]?(.)", text)
    )


def test_page_is_semantic_and_described(page: Path) -> None:
    tree = Page(page)
    assert [tree.tags.count(tag) for tag in ("main", "header", "h1")] == [1, 1, 1]
    assert tree.tags.count("section") == 4 and tree.tags.count("figure") == 3
    assert all(r.get("aria-label") or r.get("aria-hidden") == "true" for r in tree.roles)


def test_page_follows_the_readers_screen(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_page_with_full_size_pictures_is_small(tmp_path: Path) -> None:
    gallery = report.gallery(found(rows=5, columns=5, size=224))  # noise: the worst case for PNG
    report.html(tmp_path / "report.html", "Big", {}, [("Gallery", "", gallery)])
    assert os.path.getsize(tmp_path / "report.html") < 3e6


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    path = tmp_path / "report.html"
    report.html(path, "Old", {}, [])
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        report.html(path, "New", {}, [])
    assert Page(path).text["h1"] == ["Old"]
    assert os.listdir(tmp_path) == ["report.html"]


def test_arms_show_every_class_of_every_arm_and_skip_what_is_not_defined() -> None:
    def stats(mean: float | None) -> dict:
        low, high = (None, None) if mean is None else (mean - 0.1, mean + 0.1)
        return {"dice": {"mean": mean, "low": low, "high": high}}

    found = {
        arm: {"mean": stats(mean), "classes": {"left": stats(mean), "right": stats(None)}}
        for arm, mean in (("from scratch", 0.5), ("pre-trained", 0.625))
    }
    label = str(report.arms(found).get_label())
    assert label == (
        "Dice: mean from scratch 0.500; left from scratch 0.500; "
        "mean pre-trained 0.625; left pre-trained 0.625"
    )
