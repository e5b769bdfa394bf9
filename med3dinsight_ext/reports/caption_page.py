"""Page of a store's captions: counts, histograms, and slices beside their captions."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from med3dinsight_ext.data.slicing import PLANES, depth
from med3dinsight_ext.io.console import Bar
from med3dinsight_ext.reports.caption_counts import (
    NOT_REQUESTED,
    Counts,
    SliceRecord,
    Summary,
    percentile,
    read_entry,
)
from med3dinsight_ext.reports.caption_pictures import pictures
from med3dinsight_ext.reports.figures import BLUE, GREEN, ORANGE, SKY, STYLE, VERMILION
from med3dinsight_ext.reports.formatting import case_names, short
from med3dinsight_ext.reports.pages import write_page

HUES = (BLUE, VERMILION, GREEN, ORANGE, SKY)
FILTERS = ("plane", "modality", "status", "captioner")


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
        raise ValueError(f"sample must be at least 1, got {sample}; show one slice or more")
    summary = read_store(Path(store), sample, seed)
    facts = headline(summary)
    for name, value in facts.items():
        print(f"{name:<22}{value}")
    page = Path(out) if out else Path(store) / "captions.html"
    write_page(
        page, "captions.html", title="Captions of a store", facts=facts, **page_values(summary)
    )
    return str(page)


def read_store(store: Path, sample: int, seed: int) -> Summary:
    """Counts over all entries of a store; JSON files that are no entries are skipped."""
    summary = Summary(sample, seed)
    files = sorted(store.glob("??/*.json"))
    for file in Bar(files, "Reading entries", unit="volume"):
        try:
            summary.add(read_entry(file))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError):
            summary.skipped += 1
    if not summary.images:
        skipped = f", and {summary.skipped} other JSON files" if summary.skipped else ""
        raise ValueError(
            f"store must be a folder with entries, got none in {store}{skipped}; fill it: "
            "python -m monai.bundle run --config_file "
            "\"['configs/train.json','configs/embed.json']\" (in bundles/pretrain)"
        )
    return summary


def headline(summary: Summary) -> dict[str, str]:
    """The main counts in words, for the page and the terminal."""
    total, each = summary.total, summary.captions_each
    middle, ends = total.word_range
    rejected = [f"{total.statuses[status]:,} {status}" for status in total.rejected]
    facts = {
        "Volumes": f"{len(summary.images):,}",
        "Slices": f"{total.slices:,}; for {total.statuses[NOT_REQUESTED]:,} of them no caption was "
        "requested",
        "Captions": f"{total.captions:,}; {min(each)} to {max(each)} a volume, "
        f"median {percentile(each, 0.5)}",
        "Rejected answers": ", ".join(rejected) or "none",
        "Words a caption": f"median {middle}, 5–95 %: {ends}" if ends else "–",
        "Texts used repeatedly": f"{summary.repeated():.1%} of the captions",
        "Similarity": similarity_text(summary),
    }
    if len(summary.sources) > 1:
        facts["Captioners, teachers"] = f"{len(summary.sources)}, shown separately below"
    if summary.repeats:
        facts["Earlier entries"] = (
            f"{summary.repeats:,}, with other slices or captions of the same volumes; they are "
            "counted and shown too"
        )
    if summary.skipped:
        facts["Skipped JSON files"] = f"{summary.skipped} that are no entries"
    return facts


def similarity_text(summary: Summary) -> str:
    """The median cosine of images and captions, or why there is none."""
    if summary.total.similarity:
        return f"median {summary.total.median_similarity:.3f}"
    if summary.total.captions and not any(json.loads(s)["joint"] for s in summary.sources):
        return "none: the teacher embeds image and text in two spaces, so no cosine compares them"
    return "none: no caption with a similarity"


def captioner_names(sources: Mapping[str, Counts]) -> dict[str, str]:
    """A name for each captioner with its teacher, the most frequent first."""
    names: dict[str, str] = {}
    for source, _ in sorted(sources.items(), key=lambda pair: -pair[1].slices):
        captioner = json.loads(source)["captioner"]
        name = short(str(captioner.get("model") or captioner["kind"]), 32)
        names[source] = f"{len(names) + 1}: {name}" if len(sources) > 1 else name
    return names


def page_values(summary: Summary) -> dict[str, Any]:
    """Values of the template ``captions.html``."""
    total, names = summary.total, captioner_names(summary.sources)
    groups = {
        "Plane": {name: summary.planes[name] for name in PLANES if name in summary.planes},
        "Modality": dict(sorted(summary.modalities.items())),
        "Captioner": {name: summary.sources[source] for source, name in names.items()},
    }
    cards = slice_cards(summary.drawn(), names)
    options = {name: Counter(card[name] for card in cards) for name in FILTERS}
    return {
        "total": total,
        "groups": {group: rows for group, rows in groups.items() if len(rows) > 1},
        "statuses": [*total.rejected, *[NOT_REQUESTED] * (NOT_REQUESTED in total.statuses)],
        "captioners": {name: source_facts(summary, source) for source, name in names.items()},
        "similarity": similarity_text(summary),
        "histograms": histograms(summary, names) if total.captions else None,
        "repeated": [
            (count, names[source], short(text, 600))
            for count, source, text in summary.most_repeated(5)
        ],
        "rejected": [
            (status, short(raw, 300)) for status in total.rejected for raw in summary.raw(status)
        ],
        "cards": cards,
        "options": {name: sorted(c.items()) for name, c in options.items() if len(c) > 1},
        "seed": summary.seed,
    }


def source_facts(summary: Summary, source: str) -> dict[str, str]:
    """Settings of one captioner and its teacher."""
    about = json.loads(source)
    return {
        **about["captioner"],
        "teacher": about["teacher"],
        "image and text": "one space" if about["joint"] else "two spaces: no similarity",
        "texts used repeatedly": f"{summary.repeated(source):.1%} of its captions",
    }


def slice_cards(records: Sequence[SliceRecord], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Values of the page's card of each slice.

    Args:
        records: those of one image in a row.
        names: of the captioners.
    """
    images = list(dict.fromkeys(record.image for record in records))
    volumes = dict(zip(images, case_names(images), strict=True))
    return [
        record._asdict()
        | {
            "plane": PLANES[record.plane],
            "depth": depth(record.plane, record.position),
            "captioner": names[record.source],
            "similarity": "" if record.similarity is None else f"{record.similarity:.4f}",
            "raw": short(record.raw, 300),
            "volume": volumes[record.image],
            "picture": picture,
        }
        for record, picture in zip(records, pictures(records), strict=True)
    ]


@rc_context(STYLE)
def histograms(summary: Summary, names: Mapping[str, str]) -> Figure:
    """Words a caption, and similarity if there is any; a line a captioner."""
    parts: list[tuple[str, float, Callable[[Counts], Counter[int]]]] = [
        ("words a caption", 1, lambda counts: counts.words)
    ]
    if summary.total.similarity:
        parts.append(("cosine of image and caption", 1000, lambda counts: counts.similarity))
    figure = Figure((7.4, 2.6 + 0.2 * (len(names) > 1)), layout="constrained")
    axes: Any = figure.subplots(1, len(parts), squeeze=False)[0]
    medians = []
    for ax, (label, unit, select) in zip(axes, parts, strict=True):
        every = select(summary.total)
        medians.append(f"{label} (median {percentile(every, 0.5) / unit:g})")
        step = max(1, math.ceil((max(every) - min(every) + 1) / 40))
        edges = np.arange(min(every), max(every) + step + 1, step)
        for number, (source, name) in enumerate(names.items()):
            values = select(summary.sources[source])
            height, _ = np.histogram(list(values), edges, weights=list(values.values()))
            color = HUES[number % len(HUES)]
            ax.stairs(height, edges / unit, color=color, label=name, linewidth=1.4)
            ax.stairs(height, edges / unit, color=color, fill=True, alpha=0.2)
        ax.set(xlabel=label, ylim=(0, None))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("slices")
    if len(names) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    figure.set_label(f"Histograms of {' and '.join(medians)}")
    return figure
