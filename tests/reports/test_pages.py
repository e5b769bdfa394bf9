from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from fake_figures import EVENTS, prompts, retrieval_metrics, retrieved
from jinja2 import UndefinedError
from page_reader import Page

from med3dinsight_ext.reports.figures import save_png
from med3dinsight_ext.reports.pages import write_page
from med3dinsight_ext.reports.retrieval import TASKS, gallery, retrieval_tasks
from med3dinsight_ext.reports.text_scores import text_curves
from med3dinsight_ext.reports.training_curves import curves


def quickstart_page(path: Path, **changes: Any) -> Path:
    metrics = retrieval_metrics()
    values = {
        "title": "Report <script>",
        "facts": {"Data & <more>": "a < b", "Volumes": 12},
        "curves": curves(EVENTS),
        "student": metrics,
        "volume_zero": metrics,
        "tasks": retrieval_tasks(metrics),
        "task_names": TASKS,
        "gallery": gallery(retrieved()),
        "text_scores": None,
        "dice": None,
    }
    write_page(path, "quickstart.html", **values | changes)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    save_png(folder / "scores.png", text_curves(*prompts()))
    return quickstart_page(folder / "report.html", text_scores=folder / "scores.png")


def test_page_escapes_what_users_wrote(page: Path) -> None:
    tree = Page(page)
    assert tree.text["h1"] == tree.text["title"] == ["Report <script>"]
    assert tree.text["h2"] == ["Training", "Slice retrieval", "Retrieved slices", "Text to slice"]
    assert "Data & <more>" in tree.text["th"] and "a < b" in tree.text["td"]
    assert not {"script", "b"} & set(tree.names)


def test_page_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = Page(page).links
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in text and all(
        u.startswith("#") for u in re.findall(r"url\(['\"]?(.)", text)
    )


def test_page_is_semantic_and_described(page: Path) -> None:
    tree = Page(page)
    assert [tree.names.count(tag) for tag in ("main", "header", "h1")] == [1, 1, 1]
    assert tree.names.count("section") == 4 and tree.names.count("figure") == 3
    assert all(
        r.get("aria-label") or r.get("aria-hidden") == "true"
        for name, r in tree.tags
        if name == "svg"
    )


def test_page_follows_the_readers_screen(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_page_with_full_size_pictures_is_small(tmp_path: Path) -> None:
    large = gallery(retrieved(rows=5, columns=5, size=224))  # noise: the worst case for PNG
    page = quickstart_page(tmp_path / "report.html", gallery=large)
    assert os.path.getsize(page) < 3e6


def test_page_allows_no_script_and_no_foreign_source(page: Path) -> None:
    (policy,) = Page(page).having("meta", "content", "http-equiv")
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'"
    )


def test_a_missing_value_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UndefinedError, match="'found' is undefined"):
        write_page(tmp_path / "report.html", "segmentation.html", title="", facts={}, scores={})
    assert not os.listdir(tmp_path)


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    path = tmp_path / "report.html"
    write_page(path, "base.html", title="Old", facts={})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_page(path, "base.html", title="New", facts={})
    assert Page(path).text["h1"] == ["Old"]
    assert os.listdir(tmp_path) == ["report.html"]
