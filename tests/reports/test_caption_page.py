from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fakes import write_volumes
from page_reader import Page

from med3dinsight_ext.data.slicing import PLANES
from med3dinsight_ext.reports import caption_pictures
from med3dinsight_ext.reports.caption_page import captions

MODEL = {"kind": "ServedCaptions", "model": "looker-4b", "prompt": "What is <this>?"}
BAD = {"refused": "I am sorry", "empty": "", "repeats": "a a a a", "too long": "and on and on"}


def record(
    plane: int, index: int, caption: str | None, status: str | None = "ok"
) -> dict[str, Any]:
    entry = {"plane": PLANES[plane], "index": index, "position": (index + 0.5) / 20}
    entry |= {"caption": caption, "status": status}
    entry["similarity"] = None if caption is None else 0.2 + 0.01 * index
    return {**entry, "raw": BAD[status]} if status in BAD else entry


def write(store: Path, image: Path | str, slices: list[dict], **more: Any) -> Path:
    """One entry, in the folder and under the kind of name that a store gives it."""
    about = {
        "image": str(image),
        "modality": "MR",
        "teacher": "fake",
        "joint": True,
        "captioner": MODEL,
        "per_plane": 4,
        "seed": 0,
        "slices": slices,
        **more,
    }
    number = len(list(store.glob("??/*.json")))
    path = store / f"{number % 7:02x}" / f"{number:032x}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three volumes: 8 captions, "seen twice" in two of them; one slice of each other status."""
    data = write_volumes(tmp_path / "data", 3)
    same = record(0, 3, "seen twice")
    first = [same, record(1, 4, "a b c"), record(2, 5, "a b c d"), record(2, 6, None, None)]
    write(tmp_path / "store", data / "v0.nii.gz", first)
    bad = [record(2, 7 + i, None, status) for i, status in enumerate(BAD)]
    write(tmp_path / "store", data / "v1.nii.gz", [same, *bad])
    more = [record(i % 3, 10 + i, f"text {i} " + "word " * i) for i in range(4)]
    write(tmp_path / "store", data / "v2.nii.gz", more, modality="CT")
    return tmp_path / "store"


def lines(text: str) -> dict[str, str]:
    """What the terminal shows, name to value."""
    return {line[:22].strip(): line[22:] for line in text.splitlines()}


def test_entries_of_earlier_runs_are_told_apart(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write(store, tmp_path / "data" / "v0.nii.gz", [record(0, 3, "corrected")])
    captions(str(store))
    found = lines(capsys.readouterr().out)
    assert found["Earlier entries"].startswith("1, with other slices or captions of the same vol")
    assert found["Volumes"] == "3"


def test_the_terminal_shows_the_counts(store: Path, capsys: pytest.CaptureFixture) -> None:
    assert captions(str(store)) == str(store / "captions.html")
    assert lines(capsys.readouterr().out) == {
        "Volumes": "3",
        "Slices": "13; for 1 of them no caption was requested",
        "Captions": "8; 1 to 4 a volume, median 3",
        "Rejected answers": "1 refused, 1 empty, 1 repeats, 1 too long",
        "Words a caption": "median 3, 5–95 %: 2 to 5",
        "Texts used repeatedly": "25.0% of the captions",
        "Similarity": "median 0.250",
    }


def test_counts_are_shown_by_plane_and_by_modality(store: Path) -> None:
    table = (
        Page(captions(str(store))).source.partition('<h2 id="counts">')[2].partition("</table>")[0]
    )
    rows = re.findall(r'<th scope="row">(\w+)</th><td>(\d+)</td><td>(\d+)<br>', table)
    assert rows == [
        ("All", "13", "8"),
        ("sagittal", "4", "4"),
        ("coronal", "2", "2"),
        ("axial", "7", "2"),
        ("CT", "4", "4"),
        ("MR", "9", "4"),
    ]


def test_the_most_frequent_captions_come_with_their_number(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(8) for _ in range(i)]
    write(tmp_path, "gone.nii", [record(2, i % 20, text) for i, text in enumerate(texts)])
    page = Page(captions(str(tmp_path)))
    found = re.findall(r'<td>(\d) times</td><td dir="auto">(text \d)</td>', page.source)
    assert found == [(str(i), f"text {i}") for i in (7, 6, 5, 4, 3)]


def test_raw_answers_that_are_no_caption_are_shown(store: Path) -> None:
    cells = Page(captions(str(store))).text["td"]
    for status, raw in BAD.items():
        assert cells[cells.index(status) + 1] == (raw or "(empty)")


def test_each_slice_shows_its_picture_and_where_it_is(store: Path) -> None:
    page = Page(captions(str(store)))
    sources = page.having("img", "src")
    assert len(sources) == 13 and len(set(sources)) > 9
    assert all(source.startswith("data:image/jpeg;base64,") for source in map(str, sources))
    first = page.text["small"].index("MR, coronal, posterior")
    notes = page.text["small"][first : first + 4]
    assert notes[1:] == ["position 0.23, slice 4", "v0", "similarity 0.240"]


def test_a_volume_is_read_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = caption_pictures.read_volume
    monkeypatch.setattr(caption_pictures, "read_volume", lambda p: (read.append(p), real(p))[1])
    captions(str(store))
    assert sorted(Path(path).name for path in read) == [f"v{i}.nii.gz" for i in range(3)]


@pytest.mark.parametrize("field", ["caption", "raw", "image", "model", "status"])
def test_everything_a_model_wrote_is_escaped(field: str, tmp_path: Path) -> None:
    evil = "\"'><script>alert(1)<b>"
    row = record(2, 3, None, "refused") if field in ("raw", "status") else record(2, 3, "fine")
    captioner = {**MODEL, "model": evil} if field == "model" else MODEL
    row |= {field: evil} if field in row else {}
    image = f"/gone/{evil}.nii.gz" if field == "image" else "gone.nii.gz"
    write(tmp_path, image, [row, record(1, 3, "fine")], captioner=captioner)
    write(tmp_path, "other.nii.gz", [record(1, 3, "fine")])
    page = Page(captions(str(tmp_path)))
    tags = [name for name, _ in page.tags]
    assert "alert(1)" in page.source and "<script>alert" not in page.source
    assert tags.count("script") == 1 and "b" not in tags
    assert not any(key.startswith(("on", "<", "'")) for _, attrs in page.tags for key in attrs)


def test_the_page_needs_nothing_from_outside(store: Path) -> None:
    page = Page(captions(str(store)))
    links = page.having("img", "src") + page.having("a", "href") + page.having("use", "xlink:href")
    assert all(str(link).startswith(("data:", "#")) for link in links)
    assert not page.having("script", "src") and not page.having("link", "href")
    assert not re.search(r"""url\(['"]?[^#'"]|@import""", page.source)


def test_slices_carry_what_the_filters_offer(store: Path) -> None:
    write(store, "gone.nii.gz", [record(1, 3, "other")], captioner={"kind": "FileCaptions"})
    page = Page(captions(str(store)))
    offered = page.having("option", "value")
    for name, count in {"plane": 3, "modality": 2, "status": 6, "captioner": 2}.items():
        values = page.having("li", f"data-{name}")
        assert len(values) == 14 and len(set(values)) == count
        assert set(values) <= set(offered)
    assert page.having("select", "name") == ["plane", "modality", "status", "captioner", "sort"]


def test_a_filter_with_one_choice_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "gone.nii", [record(2, 3, "one"), record(2, 4, "two")])
    assert Page(captions(str(tmp_path))).having("select", "name") == ["sort"]


def test_captioners_are_kept_apart(store: Path) -> None:
    other = {**MODEL, "prompt": "Another?"}
    write(store, "gone.nii.gz", [record(0, 3, "seen twice")] * 2, captioner=other)
    page = Page(captions(str(store)))
    assert {"What is <this>?", "Another?", "1: looker-4b", "2: looker-4b"} <= set(page.text["td"])
    assert {"25.0% of its captions", "100.0% of its captions"} <= set(page.text["td"])
    assert page.having("li", "data-captioner").count("2: looker-4b") == 2


def many(store: Path, volumes: int = 30) -> Path:
    """Mostly captions; one refusal in all, and as many slices that have no requested caption."""
    for number in range(volumes):
        rows = [record(i % 3, i, f"{number} {i}") for i in range(9)]
        rows += [record(i % 3, 10 + i, None, None) for i in range(9)]
        rows += [record(0, 19, None, "refused")] * (number == 7)
        write(store, f"v{number:02}.nii.gz", rows)
    return store


def test_the_sample_is_spread_over_volumes_planes_and_statuses(tmp_path: Path) -> None:
    page = Page(captions(str(many(tmp_path)), sample=24))
    status, plane = page.having("li", "data-status"), page.having("li", "data-plane")
    assert len(status) == 24 and status.count("refused") == 1 and status.count("not requested") == 3
    assert min(plane.count(name) for name in PLANES) >= 7
    names = [text for text in page.text["small"] if text.startswith("v")]
    assert 7 <= len(set(names)) <= 10  # few volumes have to be read


def test_the_seed_draws_the_sample(tmp_path: Path) -> None:
    store = str(many(tmp_path))
    shown = [
        Page(captions(store, str(tmp_path / f"{i}.html"), sample=9, seed=seed)).text
        for i, seed in enumerate((0, 0, 1))
    ]
    assert shown[0]["p"] == shown[1]["p"] != shown[2]["p"]
    volumes = [{note for note in text["small"] if note.startswith("v")} for text in shown]
    assert volumes[0] == volumes[1] != volumes[2]


def test_a_small_store_is_shown_whole(store: Path) -> None:
    assert len(Page(captions(str(store), sample=13)).having("li", "data-plane")) == 13


@pytest.mark.parametrize(
    ("harm", "said"),
    [("remove", "no longer exists"), ("cut", "cannot be read")],
)
def test_a_placeholder_explains_a_missing_picture(harm: str, said: str, store: Path) -> None:
    file = store.parent / "data" / "v2.nii.gz"
    file.unlink() if harm == "remove" else file.write_bytes(file.read_bytes()[:900])
    page = Page(captions(str(store)))
    placeholders = [text for text in page.text["div"] if text.startswith("no picture: ")]
    assert placeholders == [f"no picture: the volume {said}"] * 4
    assert len(page.having("img", "src")) == 9


def test_ct_is_shown_in_the_window_that_the_captioner_saw(store: Path, tmp_path: Path) -> None:
    def picture(name: str) -> str | None:
        folder = tmp_path / name
        image = store.parent / "data" / "v0.nii.gz"
        captioner = {**MODEL, "ct_window": name}
        write(folder, image, [record(2, 9, "x")], modality="CT", captioner=captioner)
        return Page(captions(str(folder))).having("img", "src")[0]

    assert len({picture(name) for name in ("soft tissue", "bone", "lung", "all")}) == 4


def test_the_page_explains_why_two_spaces_have_no_similarity(tmp_path: Path) -> None:
    row = {**record(2, 3, "one"), "similarity": None}
    write(tmp_path, "gone.nii", [row], joint=False)
    page = Page(captions(str(tmp_path)))
    assert any("in two spaces, so no cosine compares them" in text for text in page.text["p"])
    assert page.having("option", "value") == ["0"]
    assert "cosine of image and caption" not in page.source


def test_a_store_without_captions_has_a_page(tmp_path: Path) -> None:
    write(tmp_path, "gone.nii", [record(2, 3, None, None)])
    page = Page(captions(str(tmp_path)))
    assert page.text["h2"] == ["Counts", "Captioners and teachers", "Slices"]


@pytest.mark.parametrize(
    "content",
    ["", '{"image": "a.n', "[]", "null", '{"fingerprint": "f"}', '{"slices": [1]}', "\xff\xfe"],
)
def test_a_foreign_file_is_skipped_and_counted(
    content: str, store: Path, capsys: pytest.CaptureFixture
) -> None:
    (store / "00" / "foreign.json").write_bytes(content.encode("latin-1"))
    captions(str(store))
    said = lines(capsys.readouterr().out)
    assert said["Skipped JSON files"] == "1 that are no entries" and said["Slices"][:2] == "13"


@pytest.mark.parametrize(
    "change",
    [{"plane": "oblique"}, {"position": 1.5}, {"similarity": float("nan")}, {"caption": 3}],
    ids=str,
)
def test_an_entry_with_an_impossible_value_is_skipped(
    change: dict, store: Path, capsys: pytest.CaptureFixture
) -> None:
    write(store, "odd.nii", [record(2, 3, "fine"), {**record(2, 4, "odd"), **change}])
    captions(str(store))
    assert lines(capsys.readouterr().out)["Volumes"] == "3"


@pytest.mark.parametrize("exists", [True, False])
def test_the_error_of_an_empty_store_has_the_command_that_fills_it(
    exists: bool, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    if exists:
        store.mkdir()
    with pytest.raises(ValueError, match="store must be a folder with entries, got none.*embed"):
        captions(str(store))
    assert not (store / "captions.html").exists()


def test_a_sample_of_nothing_is_an_error(store: Path) -> None:
    with pytest.raises(ValueError, match="sample must be at least 1, got 0"):
        captions(str(store), sample=0)


def browse(page: Path, profile: Path) -> str:
    """The page's HTML, once a browser has run its scripts."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("the page's script needs chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    dump = subprocess.run(
        [browser, *flags, f"--user-data-dir={profile}", "--dump-dom", page.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return dump.stdout


def test_the_policy_allows_the_pages_own_script_and_no_other(store: Path, tmp_path: Path) -> None:
    page = Path(captions(str(store)))
    page.write_text(page.read_text("utf-8") + "<script>document.title = 'evil';</script>", "utf-8")
    found = browse(page, tmp_path / "profile")
    assert "13 of 13 slices</output>" in found and "<title>Captions of a store</title>" in found


def test_search_filter_and_order_work_in_a_browser(store: Path, tmp_path: Path) -> None:
    script = """
      const form = document.querySelector(".filters"), seen = [form.hidden];
      const set = (name, value) => { form[name].value = value;
        form[name].dispatchEvent(new Event("input", {bubbles: true}));
        seen.push(form.querySelector("output").textContent); };
      set("plane", "axial"); set("status", "ok"); set("plane", ""); set("text", "Seen TWICE");
      set("text", ""); set("sort", "-1");
      seen.push([...document.querySelectorAll(".slices > li:not([hidden])")].map(
        (card) => Number(card.dataset.similarity)).join(" "));
      document.title = seen.join("; ");
    """
    page = Path(captions(str(store)))
    text = re.sub("script-src '[^']*'", "script-src 'unsafe-inline'", page.read_text("utf-8"))
    page.write_text(text + f"<script>{script}</script>", "utf-8")
    found = browse(page, tmp_path / "profile")
    assert found.partition("<title>")[2].partition("</title>")[0] == (
        "false; 7 of 13 slices; 2 of 13 slices; 8 of 13 slices; 2 of 13 slices; 8 of 13 slices; "
        "8 of 13 slices; 0.33 0.32 0.31 0.3 0.25 0.24 0.23 0.23"
    )
