"""One page that shows what the texts in a store say, so that a person can judge the teacher."""

from __future__ import annotations

import base64
import heapq
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from med3dinsight_ext.data.slicing import PLANES, WINDOWS, cut, depth, window
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.reports.caption_counts import (
    NEVER,
    Counts,
    SliceRecord,
    Summary,
    percentile,
    read_entry,
)
from med3dinsight_ext.reports.report import BLUE, GREEN, ORANGE, SKY, STYLE, VERMILION, html, short
from med3dinsight_ext.reports.segmentation import case_names

PIXELS = 192  # of a picture; shown smaller, so that fine screens have something to show
HUES = (BLUE, VERMILION, GREEN, ORANGE, SKY)
FILTERS = ("plane", "modality", "status", "captioner")
LOOK = """<style>
.filters { display: flex; flex-wrap: wrap; gap: .6rem .8rem; align-items: end; margin: 0 0 .9rem; }
.filters label { display: grid; color: var(--soft); font-size: .8rem; }
.filters .search { flex: 1 1 12rem; }
.filters input, .filters select { font: inherit; font-size: .95rem; color: var(--ink);
  background: var(--page); border: 1px solid var(--line); border-radius: .35rem;
  padding: .3rem .45rem; height: 2.2rem; min-width: 0; max-width: 15rem; }
.filters .search input { max-width: none; }
.filters output { color: var(--soft); font-size: .85rem; flex: 1 0 100%; }
.slices { list-style: none; margin: 0; padding: 0; display: grid; gap: .9rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.slices > li { display: grid; grid-template-columns: auto 1fr; gap: .8rem; min-width: 0;
  border-top: 1px solid var(--line); padding-top: .9rem; align-items: start; }
.slices img, .slices .gone { width: 160px; height: 160px; border-radius: .3rem; background: #000; }
.slices .gone { display: grid; place-content: center; text-align: center; padding: .6rem;
  font-size: .8rem; background: none; border: 1px dashed var(--line); color: var(--soft); }
.slices p, .texts p { margin: 0 0 .35rem; overflow-wrap: anywhere; }
.slices div { min-width: 0; }
.slices small { display: block; color: var(--soft); overflow-wrap: anywhere; line-height: 1.4; }
a { color: var(--accent); }
.none { color: #b34e00; font-weight: 600; }
@media (prefers-color-scheme: dark) { .none { color: #E69F00; } }
.raw { color: var(--soft); font-size: .9rem; font-style: italic; white-space: pre-line; }
.texts td { overflow-wrap: anywhere; }
.texts td:first-child { width: 22%; color: var(--soft); }
[hidden] { display: none !important; }
@media (max-width: 40rem) {
  .slices img, .slices .gone { width: 112px; height: 112px; } }
</style>"""
SCRIPT = """<script>
(() => {
  const form = document.querySelector(".filters"), list = document.querySelector(".slices");
  const cards = [...list.children], said = form.querySelector("output");
  const fits = (card) => card.textContent.toLowerCase().includes(form.text.value.toLowerCase())
    && ["plane", "modality", "status", "captioner"].every((name) =>
      !form[name] || !form[name].value || form[name].value === card.dataset[name]);
  const filter = () => {
    let shown = 0;
    for (const card of cards) shown += !(card.hidden = !fits(card));
    said.textContent = `${shown} of ${cards.length} slices`;
  };
  const sort = () => {
    const sign = Number(form.sort.value);
    const key = (card) => card.dataset.similarity ? sign * card.dataset.similarity : 2;
    list.append(...(sign ? [...cards].sort((a, b) => key(a) - key(b)) : cards));
  };
  const update = () => { sort(); filter(); };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
})();
</script>"""


def captions(store: str, out: str | None = None, sample: int = 200, seed: int = 0) -> str:
    """Write one page with counts of a store's captions and some slices beside their captions.

    No model is needed. Reads the store's JSON files, and the volumes of the slices shown.

    Args:
        store: folder that embed.json, or training, filled.
        out: page to write; by default captions.html in the store.
        sample: slices to show, >= 1.
        seed: of the slices' draw.

    Returns:
        The page's path.
    """
    if sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}; ask for some slices")
    found = Summary(sample, seed)
    files = sorted(Path(store).glob("??/*.json"))
    for file in tqdm(files, "Reading entries", unit="volume", disable=None):
        try:
            found.add(read_entry(file))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError):
            found.skipped += 1
    if not found.images:
        ignored = f", and {found.skipped} JSON files that are none" if found.skipped else ""
        raise ValueError(
            f"store must be a folder with entries, got none in {store}{ignored}; fill it with "
            "embed.json, see bundles/pretrain/docs/README.md"
        )
    names = source_names(found.sources)
    facts = headline(found)
    for name, value in facts.items():
        print(f"{name:<22}{value}")
    rows = found.drawn()
    page = Path(out) if out else Path(store) / "captions.html"
    html(page, "What the texts say", facts, list(sections(found, names, rows)))
    return str(page)


def source_names(sources: Mapping[str, Counts]) -> dict[str, str]:
    """A name for each captioner with its teacher, the commonest first."""
    names: dict[str, str] = {}
    for source, _ in sorted(sources.items(), key=lambda pair: -pair[1].slices):
        captioner = json.loads(source)["captioner"]
        name = short(str(captioner.get("model") or captioner["kind"]), 32)
        names[source] = f"{len(names) + 1}: {name}" if len(sources) > 1 else name
    return names


def _spread(counts: Mapping[int, int]) -> tuple[str, str]:
    """Median, and the 5th to 95th percentile."""
    if not counts:
        return "–", ""
    low, middle, high = (percentile(counts, share) for share in (0.05, 0.5, 0.95))
    return f"{middle}", f"{low} to {high}"


def headline(found: Summary) -> dict[str, str]:
    """The main counts in words, for the page and the terminal."""
    total, each = found.total, found.captions_each
    middle, ends = _spread(total.words)
    bad = [(n, status) for status, n in total.statuses.most_common() if status not in ("ok", NEVER)]
    never = total.statuses[NEVER]
    facts = {
        "Volumes": f"{len(found.images):,}",
        "Slices": f"{total.slices:,}; no caption was asked for {never:,} of them",
        "Captions": f"{total.captions:,}; a volume has {min(each)} to {max(each)}, "
        f"median {percentile(each, 0.5)}",
        "Answers without one": ", ".join(f"{n:,} {status}" for n, status in bad) or "none",
        "Words a caption": f"median {middle}, 5–95 %: {ends}" if ends else "–",
        "Texts used repeatedly": f"{found.repeated():.1%} of the captions",
        "Similarity": _likeness(found),
    }
    if len(found.sources) > 1:
        facts["Captioners, teachers"] = f"{len(found.sources)}, kept apart below"
    if found.skipped:
        facts["Skipped JSON files"] = f"{found.skipped} that are no entries"
    return facts


def _likeness(found: Summary) -> str:
    """The median cosine of images and captions, or why there is none."""
    if found.total.similarity:
        return f"median {percentile(found.total.similarity, 0.5) / 1000:.3f}"
    if found.total.captions and not any(json.loads(s)["joint"] for s in found.sources):
        return "none: the teacher embeds image and text in two spaces, so no cosine compares them"
    return "none: no caption with a similarity"


def sections(
    found: Summary, names: Mapping[str, str], rows: Sequence[SliceRecord]
) -> Iterator[tuple[str, str, Figure | str]]:
    """Heading, text and content of each part of the page."""
    groups = {
        "Plane": {name: found.planes[name] for name in PLANES if name in found.planes},
        "Modality": dict(sorted(found.modalities.items())),
        "Captioner": {name: found.sources[source] for source, name in names.items()},
    }
    jump = '<p><a href="#slices">To the slices</a></p>'
    yield "Counts", "", count_table(found.total, groups) + jump
    if found.total.captions:
        text = "" if found.total.similarity else f"Similarity: {_likeness(found)}."
        yield "Words and similarity", text, histograms(found, names)
    if found.again:
        yield (
            "The commonest texts",
            "A text that comes again and again says nothing of its slice.",
            text_table(common_texts(found, names), len(names) > 1),
        )
    bad = [status for status, _ in found.total.statuses.most_common()]
    raws = [
        (status, raw) for status in bad if status not in ("ok", NEVER) for raw in found.raw(status)
    ]
    if raws:
        yield (
            "Answers that are no caption",
            "As the model gave them; the slices below have more.",
            text_table([(status, "", short(raw, 300)) for status, raw in raws], False),
        )
    yield (
        "Who wrote them",
        "Captioner and teacher, with whatever may change a text.",
        "".join(source_table(found, source, name) for source, name in names.items()),
    )
    yield (
        "Slices",
        f"{len(rows):,} of {found.total.slices:,}, drawn with seed {found.seed} over volumes, "
        "planes and statuses; rare statuses are shown more often than they come. As radiologists "
        "see them: patient's right on the left, anterior or superior up.",
        LOOK + controls(rows, names, bool(found.total.similarity)) + cards(rows, names) + SCRIPT,
    )


def count_table(total: Counts, groups: Mapping[str, Mapping[str, Counts]]) -> str:
    """Counts of all slices and of each group as an HTML table; groups of one are left out."""
    bad = [name for name, _ in total.statuses.most_common() if name not in ("ok", NEVER)]
    statuses = [*bad, *[NEVER] * (NEVER in total.statuses)]
    head = ["", "Slices", "Captions", "Words", *["Similarity"] * bool(total.similarity), *statuses]
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)

    def line(name: str, tally: Counts) -> str:
        def cell(value: str, small: str = "") -> str:
            return f"<td>{value}{f'<br><small>{small}</small>' if small else ''}</td>"

        cells = cell(f"{tally.slices:,}")
        cells += cell(f"{tally.captions:,}", f"{tally.captions / tally.slices:.1%}")
        cells += cell(*_spread(tally.words))
        if total.similarity:
            likeness = tally.similarity
            cells += cell(f"{percentile(likeness, 0.5) / 1000:.3f}" if likeness else "–")
        cells += "".join(cell(f"{tally.statuses[status]:,}") for status in statuses)
        return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'

    body = f"<tbody>{line('All', total)}</tbody>"
    for group, tallies in groups.items():
        if len(tallies) > 1:
            body += f'<tbody><tr><th scope="rowgroup" colspan="{len(head)}">{group}</th></tr>'
            body += "".join(line(name, tally) for name, tally in tallies.items()) + "</tbody>"
    return (
        f'<table class="scores"><thead><tr>{names}</tr></thead>{body}</table>'
        "<p><small>Words, similarity: median; 5th to 95th percentile below.</small></p>"
    )


def source_table(found: Summary, source: str, name: str) -> str:
    """What is known of one captioner and its teacher, as an HTML table."""
    about = json.loads(source)
    rows = {"captioner": name, **about["captioner"], "teacher": about["teacher"]}
    rows["image and text"] = "one space" if about["joint"] else "two spaces: no similarity"
    rows["texts used repeatedly"] = f"{found.repeated(source):.1%} of its captions"
    lines = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
        for key, value in rows.items()
    )
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def common_texts(found: Summary, names: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """How often, whose and which: the five texts that come most often."""
    keys = heapq.nlargest(5, found.again, key=lambda key: found.texts[key])
    return [
        (f"{found.texts[key]:,} times", names[found.again[key][0]], short(found.again[key][1], 600))
        for key in keys
    ]


def text_table(rows: Iterable[tuple[str, str, str]], whose: bool) -> str:
    """A label, perhaps a captioner, and a text a row, as an HTML table."""
    body = "".join(
        f"<tr><td>{escape(label)}{f'<br><small>{escape(name)}</small>' if whose else ''}</td>"
        f'<td dir="auto">{escape(text) or "(nothing)"}</td></tr>'
        for label, name, text in rows
    )
    return f'<table class="texts"><tbody>{body}</tbody></table>'


@rc_context(STYLE)
def histograms(found: Summary, names: Mapping[str, str]) -> Figure:
    """Words a caption, and similarity if there is any; a line a captioner."""
    parts: list[tuple[str, float, Callable[[Counts], Counter[int]]]] = [
        ("words a caption", 1, lambda tally: tally.words)
    ]
    if found.total.similarity:
        what = "cosine of image and caption"
        parts.append((what, 1000, lambda tally: tally.similarity))
    figure = Figure((7.4, 2.6 + 0.2 * (len(names) > 1)), layout="constrained")
    axes: Any = figure.subplots(1, len(parts), squeeze=False)[0]
    for ax, (label, unit, counts) in zip(axes, parts, strict=True):
        every = counts(found.total)
        step = max(1, math.ceil((max(every) - min(every) + 1) / 40))
        edges = np.arange(min(every), max(every) + step + 1, step)
        for number, (source, name) in enumerate(names.items()):
            mine = counts(found.sources[source])
            height, _ = np.histogram(list(mine), edges, weights=list(mine.values()))
            color = HUES[number % len(HUES)]
            ax.stairs(height, edges / unit, color=color, label=name, linewidth=1.4)
            ax.stairs(height, edges / unit, color=color, fill=True, alpha=0.2)
        ax.set(xlabel=label, ylim=(0, None))
    axes[0].set_ylabel("slices")
    if len(names) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    said = [f"{label} (median {percentile(counts(found.total), 0.5) / unit:g})"
            for label, unit, counts in parts]  # fmt: skip
    figure.set_label(f"Histograms of {' and '.join(said)}")
    return figure


def controls(rows: Sequence[SliceRecord], names: Mapping[str, str], likeness: bool) -> str:
    """Search box and filters over what the slices shown have; the script brings them to life."""
    fields = ['<label class="search">search<input type="search" name="text"></label>']
    for name in FILTERS:
        values = Counter(_data(row, names)[name] for row in rows)
        if len(values) > 1:
            options = "".join(
                f'<option value="{escape(value)}">{escape(value)} ({count})</option>'
                for value, count in sorted(values.items())
            )
            choice = f'<select name="{name}"><option value="">all</option>{options}</select>'
            fields.append(f"<label>{name}{choice}</label>")
    order = '<option value="0">volume and place</option>'
    if likeness:
        order += '<option value="1">similarity, lowest first</option>'
        order += '<option value="-1">similarity, highest first</option>'
    fields.append(f'<label>order<select name="sort">{order}</select></label>')
    return f'<form class="filters" hidden>{"".join(fields)}<output></output></form>'


def _data(row: SliceRecord, names: Mapping[str, str]) -> dict[str, str]:
    likeness = "" if row.similarity is None else f"{row.similarity:.4f}"
    return {
        "plane": PLANES[row.plane], "modality": row.modality, "status": row.status,
        "captioner": names[row.source], "similarity": likeness,
    }  # fmt: skip


def cards(rows: Sequence[SliceRecord], names: Mapping[str, str]) -> str:
    """Each slice as a picture beside what was said of it, as an HTML list."""
    images = list(dict.fromkeys(row.image for row in rows))
    volumes = dict(zip(images, case_names(images), strict=True))
    items = []
    for row, picture in zip(rows, pictures(rows), strict=True):
        data = _data(row, names)
        fields = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
        said = f'<p dir="auto">{escape(row.caption)}</p>' if row.caption is not None else ""
        if row.status != "ok":
            said += f'<p class="none">{escape(row.status)}</p>'
        if row.raw:
            said += f'<p class="raw" dir="auto">{escape(short(row.raw, 300))}</p>'
        place = f"{data['plane']}, {depth(row.plane, row.position)}"
        notes = [
            f"{row.modality}, {place}",
            f"position {row.position:.2f}, slice {row.number}",
            volumes[row.image],
        ]
        if data["similarity"]:
            notes.append(f"similarity {row.similarity:.3f}")
        if len(names) > 1:
            notes.append(data["captioner"])
        small = "".join(f"<small>{escape(note)}</small>" for note in notes)
        alt = escape(f"{place}, of {volumes[row.image]}")
        if picture.startswith("data:"):
            shown = f'<img src="{picture}" alt="{alt}" decoding="async">'
        else:
            shown = f'<div class="gone">{escape(picture)}</div>'
        items.append(f"<li {fields}>{shown}<div>{said}{small}</div></li>")
    return f'<ul class="slices" id="slices">{"".join(items)}</ul>'


def pictures(rows: Sequence[SliceRecord]) -> list[str]:
    """The slices as data URIs, or why there is no picture; each volume is read once.

    Args:
        rows: those of one image in a row.
    """
    found = []
    volumes = [list(group) for _, group in groupby(rows, key=lambda row: row.image)]
    for group in tqdm(volumes, "Reading volumes", unit="volume", disable=None):
        try:
            volume = read_volume(group[0].image)
            shown = {name: window(volume, name) for name in {row.modality for row in group}}
            spacing = volume.pixdim.tolist()
            found += [_jpeg(shown[row.modality], spacing, row) for row in group]
        except (ValueError, OSError, RuntimeError):
            there = os.path.exists(group[0].image.partition("::")[0])
            fault = "cannot be read" if there else "is not there any more"
            found += [f"no picture: the volume {fault}"] * len(group)
    return found


def _jpeg(shown: Tensor, spacing: Sequence[float], row: SliceRecord) -> str:
    """One slice as a data URI, CT in the window that the captioner saw, if it tells."""
    pixels = cut(shown, spacing, row.plane, torch.tensor([row.position]), PIXELS)[0]
    name = json.loads(row.source)["captioner"].get("ct_window")
    if len(pixels) == 3 and name != "all":
        pixels = pixels[
            [list(WINDOWS).index(name) if isinstance(name, str) and name in WINDOWS else 0]
        ]
    array = pixels.mul(255).round().byte().movedim(0, -1).squeeze(-1).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
