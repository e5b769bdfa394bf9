"""Slice retrieval in reports: rows of its table, and a gallery of retrieved slices."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from monai.data import MetaTensor
from torch import Tensor, nn

from med3dinsight_ext.data.slicing import PLANES, cut
from med3dinsight_ext.metrics.retrieval import depth_group
from med3dinsight_ext.reports.figures import GREEN, INK, STYLE, draw_image
from med3dinsight_ext.reports.formatting import case_names, short

TASKS = {
    "image_within": "slice → image, same modality, plane and depth",
    "text_within": "slice → text, same modality, plane and depth",
    "image_all": "slice → image, among all slices",
    "text_all": "slice → text, among all slices",
}


class Slice(NamedTuple):
    """A slice to show: image (h, w) in [0, 1], plane 0 to 2, position in [0, 1], volume's path."""

    image: np.ndarray
    plane: int
    position: float
    volume: str
    caption: str = ""


class Hit(NamedTuple):
    """A retrieved slice, its cosine similarity to the query, and whether it is the right one."""

    slice: Slice
    similarity: float
    correct: bool


def retrieval_tasks(metrics: Mapping[str, float]) -> dict[str, list[int]]:
    """The tasks in a ``RetrievalTable``'s result, each with the k of its R@k."""
    tasks = {
        task: sorted(
            int(key.removeprefix(f"{task}_r").removesuffix("_chance"))
            for key in metrics
            if key.startswith(f"{task}_r") and key.endswith("_chance")
        )
        for task in TASKS
        if f"{task}_queries" in metrics
    }
    if not tasks:
        raise ValueError(
            f"metrics must come from RetrievalTable, got {sorted(metrics)}; pass its whole result"
        )
    return tasks


def retrieved_slices(
    dataset: Iterable[Mapping[str, Any]],
    student: nn.Module,
    inferer: Callable[..., Any],
    device: torch.device,
    queries: int = 4,
    hits: int = 5,
) -> list[tuple[Slice, list[Hit]]]:
    """Query slices with the slices whose image embeddings are most similar to their tokens.

    Candidates share the query's plane and depth bin, as in the table's "within" rows.

    Args:
        dataset: validation items with image, plane, position, image_target and targets.
        student: predicts the tokens; is set to evaluation mode.
        inferer: runs the student.
        device: of the student.
        queries: at most 4, drawn with a fixed seed.
        hits: slices a query.
    """
    student.eval()
    tokens, targets, groups = [], [], []
    slices: list[Slice] = []
    for item in dataset:
        plane, position = item["plane"], item["position"]
        batch = (x[None].to(device) for x in (item["image"].as_tensor(), plane, position))
        with torch.no_grad():
            volume, *place = batch
            out = inferer(volume, student, *place).tokens
        tokens.append(out.get("image", out.get("joint"))[0].cpu())
        targets.append(item["image_target"])
        groups.append(depth_group(plane, position, 4))
        slices += slices_of(item)
    return retrieved(
        torch.cat(tokens), torch.cat(targets), torch.cat(groups), slices, queries, hits
    )


def retrieved(
    tokens: Tensor,
    targets: Tensor,
    group: Tensor,
    slices: Sequence[Slice],
    queries: int = 4,
    hits: int = 5,
) -> list[tuple[Slice, list[Hit]]]:
    """Query slices with the slices of their group whose targets are most similar to their tokens.

    Args:
        tokens: (n, d) of any length.
        targets: (n, d) of unit length.
        group: (n,) number of each slice's group.
        slices: the n slices.
        queries: at most 4, drawn with a fixed seed from the axial, coronal and sagittal ones.
        hits: slices a query.
    """
    score = F.normalize(tokens, dim=1) @ targets.mT
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in (2, 1, 0, 2)[:queries]:
        same_plane = [i for i, shown in enumerate(slices) if shown.plane == number]
        if not same_plane:  # other planes alone are trained on
            continue
        drawn_from = [i for i in same_plane if slices[i].caption] or same_plane
        query = drawn_from[int(torch.randint(len(drawn_from), (1,), generator=generator))]
        peers = (group == group[query]).nonzero().flatten()
        best = peers[score[query, peers].argsort(descending=True)[:hits]].tolist()
        rows.append(
            (slices[query], [Hit(slices[i], float(score[query, i]), i == query) for i in best])
        )
    return rows


def slices_of(item: Mapping[str, Any]) -> list[Slice]:
    """The slices of a validation item, with the captions of its entry in the store."""
    image: MetaTensor = item["image"]
    entry = json.loads(Path(item["targets"]).with_suffix(".json").read_text())
    name = str(entry["image"])
    captions = [known["caption"] or "" for known in entry["slices"]]
    if len(captions) != len(item["plane"]):
        captions = [""] * len(item["plane"])
    spacing = image.pixdim.tolist()
    found = []
    for plane, position, caption in zip(
        item["plane"].tolist(), item["position"].split(1), captions, strict=True
    ):
        picture = cut(image.as_tensor(), spacing, plane, position, 96)[0, 0]
        found.append(Slice(picture.numpy(), plane, position.item(), name, caption))
    return found


@rc_context(STYLE)
def gallery(rows: Sequence[tuple[Slice, Sequence[Hit]]]) -> Figure:
    """For each query slice the retrieved slices, best first, the right one framed and ticked.

    Args:
        rows: a query and its hits, for instance five.
    """
    columns = max(len(hits) for _, hits in rows)
    shown = {part.volume for query, hits in rows for part in (query, *(hit.slice for hit in hits))}
    names = dict(zip(sorted(shown), case_names(sorted(shown)), strict=True))
    size = (1.25 * (columns + 1.15), 2.05 * len(rows))
    figure = Figure(size, layout=ConstrainedLayoutEngine(h_pad=0.08))
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (query, hits) in zip(parts, rows, strict=True):
        text = textwrap.wrap(query.caption, 24 * columns, max_lines=2, placeholder=" …")
        text = [*(text or ["no caption"]), " "][:2]  # two lines each, so that rows are alike
        part.suptitle("\n".join(text), x=0.01, ha="left", fontsize=8.5)
        axes = part.subplots(1, columns + 2, width_ratios=[1, 0.15, *[1] * columns])
        for ax in axes[1:]:
            ax.set_axis_off()
        place = f"{PLANES[query.plane]} {query.position:.2f}"
        draw_image(
            axes[0], query.image, f"{place}\n{short(names[query.volume], 16)}\nquery", INK, 2
        )
        for ax, (hit, similarity, correct) in zip(axes[2:], hits, strict=False):
            ax.set_axis_on()
            title = f"{PLANES[hit.plane]} {hit.position:.2f}\n{short(names[hit.volume], 16)}\n"
            title += f"{'✓ ' if correct else ''}{similarity:.2f}"
            color, width = (GREEN, 3) if correct else ("#8a94a0", 0.6)
            draw_image(ax, hit.image, title, color, width)
    right = sum(any(hit.correct for hit in hits) for _, hits in rows)
    figure.set_label(
        f"{len(rows)} query slices, each with the {columns} most similar; "
        f"for {right} of them the right slice is among these"
    )
    return figure
