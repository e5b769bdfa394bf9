"""Write README.md, page.md filled with results, and its figure.

python benchmarks/dense/tables.py
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist, fmean
from string import Template
from typing import Any, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
from dense import runs  # noqa: E402
from med3dinsight_ext.metrics.bootstrap import percentiles, resamples  # noqa: E402
from med3dinsight_ext.reports.figures import BLUE, STYLE, VERMILION  # noqa: E402

DRAWS = ("draw0", "draw1", "draw2")
ONE = ("one0", "one1", "one2")
TWO = ("two0", "two1", "two2")
PATIENTS = {  # names of the lists of labelled cases of each task
    "headneck": {
        "five patients": DRAWS, "two patients": TWO, "one patient": ONE, "84 patients": ("all",)
    },
    "hippocampus": {"three volumes": DRAWS, "one volume": ONE, "112 volumes": ("all",)},
}  # fmt: skip
LENGTHS = (150, 300)
ORGANS = "Brainstem | SpinalCord | RightParotid | LeftParotid"
Rows = list[dict[str, Any]]
FINE_TUNED = {
    "scratch_3e-4": "from scratch, learning rate 0.0003",
    "scratch_1e-3": "from scratch, 0.001",
    "scratch": "from scratch, 0.003",
    "longer": "from scratch, twice the steps",
    "recon": "masked reconstruction",
    "recon_1e-3": "masked reconstruction, 0.001",
    "both": "dense teaching and reconstruction",
    "both_1e-3": "dense teaching and reconstruction, 0.001",
    "random": "the same by a teacher with random weights",
    "dense": "dense teaching alone",
    "dense_1e-3": "dense teaching alone, 0.001",
    "dense_random": "dense teaching alone by a teacher with random weights",
    "dense_adapted": "dense teaching alone by a teacher adapted to these volumes",
    "soft_mean_teacher": "from scratch, with a mean teacher on the other volumes",
    "soft_network": "from scratch, with soft labels of the network from scratch",
    "soft_again": "from scratch, with soft labels of the network of the line above",
    "soft_head": "from scratch, with soft labels of a head on the teacher's codes",
    "soft_both": "from scratch, with soft labels of that network and that head",
}
NETWORKS = {
    "resenc": "residual encoder",
    "resenc16": "residual encoder, 16 to 128 channels",
    "unetr": "UNETR",
}
READ_OUT = {
    "codes": "the teacher's codes",
    "adapted_codes": "codes of a teacher adapted to these volumes",
    "random_codes": "codes of a teacher with random weights",
    "untrained": "network, never trained",
    "recon": "network, after masked reconstruction",
    "both": "network, after dense teaching and reconstruction",
    "dense": "network, after dense teaching alone",
    "dense_random": "network, after dense teaching alone by a teacher with random weights",
    "dense_adapted": "network, after dense teaching alone by a teacher adapted to these volumes",
    "random": "network, after both by a teacher with random weights",
    "shuffled": "network, after both with another volume's codes",
}


def arm_of(row: dict[str, Any]) -> str:
    """Which line of the table of fine-tuning a run belongs to."""
    arm, rate = training_of(row), {0.0003: "_3e-4", 0.001: "_1e-3"}.get(row["lr"], "")
    return arm if arm == "longer" or arm.startswith("soft_") else arm + rate


def training_of(row: dict[str, Any]) -> str:
    """``arm_of`` a run at any learning rate and of any network."""
    if row.get("soft"):
        again = row.get("soft_weights", "").startswith("soft_")
        return "soft_again" if again else f"soft_{row['soft']}"
    if row.get("init"):
        return row["init"].removeprefix(f"{row.get('backbone')}_").split("_p")[0]
    return "longer" if row["steps"] == 2 * usual_steps(row) else "scratch"


def usual_steps(row: dict[str, Any]) -> int:
    """Of fine-tuning on the labelled cases of a run."""
    return round((1200 if row["labelled"] == "all" else 600) * runs.TASKS[row["task"]].scale)


def by_draw(rows: Rows) -> dict[str, Rows]:
    """Runs of each draw of labelled patients."""
    found: dict[str, Rows] = defaultdict(list)
    for row in rows:
        found[row["labelled"]].append(row)
    return found


def cells(draws: dict[str, Rows], names: Sequence[str] = DRAWS) -> list[str]:
    """Mean Dice of each draw."""
    means = [fmean(r["dice"] for r in draws[d]) if d in draws else None for d in names]
    return ["–" if mean is None else f"{mean:.3f}" for mean in means]


def interval(values: Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (draws, cases, pre-trainings), each resampled."""
    streams = zip(*(resamples(n, 2000, seed) for seed, n in enumerate(values.shape)), strict=True)
    means = [
        values[draws[:, :, None, None], cases[:, None, :, None], runs[:, None, None]].mean(
            (1, 2, 3)
        )
        for draws, cases, runs in streams
    ]
    return percentiles(torch.cat(means))


def case_means(rows: Rows) -> Tensor:
    """Dice of each case and run: (cases, runs)."""
    names = sorted(rows[0]["cases"])
    ordered = sorted(rows, key=lambda row: row["name"])
    means = [[fmean(row["cases"][name]) for row in ordered] for name in names]
    return torch.tensor(means, dtype=torch.float64)


def difference(
    rows: dict[str, Rows], others: dict[str, Rows], names: Sequence[str] = DRAWS
) -> tuple[float, float, float] | None:
    """Mean difference in points over the draws that both have, and the ends of its interval.

    Runs of one draw are of several pre-trainings; those of both arms with as many are paired.
    """
    values = []
    for draw in names:
        if draw in rows and draw in others:
            one, other = case_means(rows[draw]), case_means(others[draw])
            if one.shape != other.shape and min(one.shape[1], other.shape[1]) > 1:
                other = other.mean(1, keepdim=True)
            values.append(100 * (one - other))
    if not values:
        return None
    runs = {value.shape[1] for value in values}
    if len(runs) > 1:  # not each draw has all pre-trainings
        values = [value.mean(1, keepdim=True) for value in values]
    found = torch.stack(values)
    return float(found.mean()), *interval(found)


def smallest_seen(rows: Rows, arm: str, other: str) -> str:
    """Points that ``arm`` must be above ``other`` for 80 % power, by the width of the interval."""
    arms = fine_tuned(rows)
    found = difference(by_draw(arms[arm]), by_draw(arms[other]))
    normal = NormalDist()
    widths = 1 + normal.inv_cdf(0.8) / normal.inv_cdf(0.975)
    return "–" if found is None else f"{widths * (found[2] - found[1]) / 2:.1f}"


def above(rows: dict[str, Rows], others: dict[str, Rows], names: Sequence[str] = DRAWS) -> str:
    """``difference`` as a cell."""
    found = difference(rows, others, names)
    return "–" if found is None else f"{found[0]:+.1f} ({found[1]:+.1f} to {found[2]:+.1f})"


def table(head: str, lines: list[list[str]]) -> str:
    """Markdown."""
    columns = head.count("|") + 1
    rule = "|".join(["---", *["---:"] * (columns - 1)])
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def unet(row: dict[str, Any]) -> bool:
    """Whether it is a run of fine-tuning the U-Net."""
    return row["kind"] == "finetune" and row.get("backbone", "unet") == "unet"


def usual(row: dict[str, Any]) -> bool:
    """Whether the U-Net is fine-tuned for the usual length, or from scratch for twice that."""
    return unet(row) and (row["steps"] == usual_steps(row) or arm_of(row) == "longer")


def from_scratch(row: dict[str, Any]) -> bool:
    """Whether the U-Net is trained from scratch at the usual rate."""
    return unet(row) and arm_of(row) in ("scratch", "longer")


def other_network(row: dict[str, Any]) -> bool:
    """Whether another network than the U-Net is fine-tuned."""
    return row["kind"] == "finetune" and not unet(row)


def short(row: dict[str, Any]) -> bool:
    """Whether it tells what an arm of three gives on five patients after a number of steps."""
    few_steps = unet(row) and row["steps"] in LENGTHS and row["labelled"] in DRAWS
    return few_steps and arm_of(row) in ("scratch", "recon", "dense")


def fine_tuned(rows: Rows) -> dict[str, Rows]:
    """Runs of ``usual`` length, by arm."""
    arms: dict[str, Rows] = defaultdict(list)
    for row in rows:
        if usual(row):
            arms[arm_of(row)].append(row)
    return arms


class Panel(NamedTuple):
    """A part of the figure: a task and a number of labelled cases."""

    title: str
    draws: Sequence[str]
    arms: dict[str, dict[str, Rows]]  # of all arms, by draw
    shown: list[str]


def panels_of(task: str) -> list[Panel]:
    """Panels of a task that have more than training from scratch."""
    parts = fine_tuned(read(task))
    parts["reconstruction"] = [*parts["recon"], *parts["recon_1e-3"]]
    arms = {arm: by_draw(part) for arm, part in parts.items()}
    found = []
    for title, draws in PATIENTS[task].items():
        made = [arm for arm in FINE_TUNED if any(draw in arms.get(arm, ()) for draw in draws)]
        # with few patients a lower rate was used after all pre-trainings
        shown = [a for a in made if a != "scratch" and (draws != DRAWS or "e-" not in a)]
        if shown:
            found.append(Panel(f"{task}, {title}", draws, arms, shown))
    return found


def gains() -> Figure:
    """Points above scratch and above reconstruction, with intervals, by task and labelled cases."""
    panels = [panel for task in PATIENTS for panel in panels_of(task)]
    counts = [len(panel.shown) for panel in panels]
    figure = Figure((8.4, 0.34 * sum(counts) + 0.6 * len(counts) + 0.6), layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, height_ratios=counts)
    for axes, (title, names, arms, shown) in zip(all_axes, panels, strict=True):
        for others, name, color, shift in (
            (arms["scratch"], "above training from scratch", BLUE, -0.12),
            (arms["reconstruction"], "above masked reconstruction", VERMILION, 0.12),
        ):
            for n, arm in enumerate(shown):
                if color == VERMILION and not arm.startswith(("both", "dense")):
                    continue
                if gain := difference(arms[arm], others, names):
                    axes.plot(gain[1:], [n + shift] * 2, color=color)
                    axes.plot(gain[0], n + shift, "o", color=color, label=name)
                    name = ""
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_yticks(range(len(shown)), [FINE_TUNED[arm].split(", 0.")[0] for arm in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        draws = sum(draw in arms["scratch"] for draw in names)
        axes.set_title(
            f"{title}, {f'up to {draws} draws' if draws > 1 else 'one draw'}", loc="left"
        )
    all_axes[-1].set_xlabel("points of Dice, 95 % intervals")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    return figure


def finetuning(rows: Rows) -> str:
    """One line an arm: Dice of each draw, and the gains over scratch and over reconstruction."""
    arms = fine_tuned(rows)
    scratch = by_draw(arms["scratch"])
    reconstruction = by_draw([*arms["recon"], *arms["recon_1e-3"]])
    longer = by_draw(arms["longer"])
    start, columns = "points above scratch, 0.003", ("reconstruction", "twice the steps")
    ends = f"{start} | {' | '.join(f'above {column}' for column in columns)}"
    parts = []
    for title, names in PATIENTS[rows[0]["task"]].items() if rows else ():
        head = " | ".join((*(f"draw {n}" for n in range(len(names))), ends))
        lines = []
        for arm, name in FINE_TUNED.items():
            draws = by_draw(arms[arm])
            if any(draw in draws for draw in names):
                gain = "" if arm == "scratch" else above(draws, scratch, names)
                taught = arm.startswith(("both", "dense", "soft"))
                more = above(draws, reconstruction, names) if taught else ""
                control = above(draws, longer, names) if arm.startswith("soft") else ""
                lines.append([name, *cells(draws, names), gain, more, control])
        if len(lines) > 1:
            parts.append(table(f"{title} | {head}", lines))
    return "\n\n".join(parts)


def gain_of(rows: Rows, arm: str, names: Sequence[str] = ONE, other: str = "scratch") -> str:
    """``above`` of two arms; default: training from scratch with one labelled case."""
    arms = fine_tuned(rows)
    return above(by_draw(arms[arm]), by_draw(arms[other]), names)


def resenc_gain(rows: Rows, arm: str, other: str) -> str:
    """``above`` of two arms of the residual encoder at its rate, or of the U-Net from scratch."""
    arms: dict[str, Rows] = defaultdict(list)
    for row in rows:
        if other_network(row) and row["backbone"] == "resenc16" and row["lr"] == 0.003:
            arms[training_of(row)].append(row)
    arms["unet"] = fine_tuned(rows)["scratch"]
    return above(by_draw(arms[arm]), by_draw(arms[other]))


def scratch_mean(rows: Rows, names: Sequence[str], steps: int) -> tuple[float, int] | None:
    """Mean Dice from scratch over draws of labelled cases, and their number."""
    chosen = [r for r in rows if from_scratch(r) and r["steps"] == steps and r["labelled"] in names]
    means = [fmean(r["dice"] for r in draw) for draw in by_draw(chosen).values()]
    return (fmean(means), len(means)) if means else None


def room(rows: Rows) -> str:
    """What more labels and more steps give from scratch: the room that teaching could use."""
    lines = []
    for count, names in (("1", ONE), ("2", TWO), ("5", DRAWS), ("84", ("all",))):
        found = [scratch_mean(rows, names, steps) for steps in (600, 1200)]
        lines.append([count, *(f"{x[0]:.3f} ({x[1]})" if x else "–" for x in found)])
    return table("labelled patients | 600 steps (draws) | 1,200 steps (draws)", lines)


def room_gain(rows: Rows) -> str:
    """Points of all labels above five, at each number of steps."""
    gains = []
    for steps in (600, 1200):
        every, five = (scratch_mean(rows, names, steps) for names in (("all",), DRAWS))
        if every and five:
            gains.append(f"{100 * (every[0] - five[0]):.1f}")
    return " and ".join(gains)


def steps(rows: Rows) -> str:
    """One line an arm: mean Dice over draws after so many steps, and the gain over scratch."""
    arms: dict[str, dict[int, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in filter(short, rows):
        arms[arm_of(row)][row["steps"]].append(row)
    lines = []
    for arm in ("scratch", "recon", "dense"):
        line = [FINE_TUNED[arm]]
        for count in LENGTHS:
            found, scratch = by_draw(arms[arm][count]), by_draw(arms["scratch"][count])
            means = [fmean(row["dice"] for row in draw) for draw in found.values()]
            cell = f"{fmean(means):.3f} ({len(means)})" if means else "–"
            line.append(cell if arm == "scratch" else f"{cell}, {above(found, scratch)}")
        lines.append(line)
    return table(" | ".join(["five patients", *(f"{count} steps" for count in LENGTHS)]), lines)


def network_lines(rows: Rows, start: str, names: Sequence[str]) -> list[list[str]]:
    """Lines of ``networks`` for the runs of one network on draws of as many labelled cases."""
    arms: dict[str, dict[float, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        arms[training_of(row)][row["lr"]].append(row)
    by_rate = arms["scratch"]
    counts = {r: (len(part), fmean(row["dice"] for row in part)) for r, part in by_rate.items()}
    best = max(counts, key=lambda r: counts[r], default=0.0)  # draws are run at the best rate
    lines = []
    for arm, words in FINE_TUNED.items():
        for rate, part in sorted(arms.get(arm, {}).items()):
            draws = by_draw(part)
            chosen = arm == "scratch" and rate == best
            gain = "" if chosen else above(draws, by_draw(by_rate[best]), names)
            reconstruction = by_draw(arms["recon"][rate]) if arm == "dense" else {}
            more = above(draws, reconstruction, names) if reconstruction else ""
            name = f"{start}, {words.split(', 0.')[0]}, {rate:g}"
            lines.append([name, *cells(draws, names), gain, more])
    return lines


def networks(rows: Rows) -> str:
    """One line an arm and learning rate of each other network: gains over the best from scratch."""
    parts = []
    for title, names in PATIENTS[rows[0]["task"]].items() if rows else ():
        lines = []
        for net, start in NETWORKS.items():
            of_net = [r for r in rows if other_network(r) and r["backbone"] == net]
            if part := [r for r in of_net if r["labelled"] in names]:
                lines += network_lines(part, start, names)
        if lines:
            head = [title, *(f"draw {n}" for n in range(len(names))), "points above scratch"]
            parts.append(table(" | ".join([*head, "above reconstruction"]), lines))
    return "\n\n".join(parts)


def readouts(rows: Rows) -> str:
    """One line a source of frozen features."""
    found: dict[str, Rows] = defaultdict(list)
    for row in rows:
        if row["kind"] == "readout":
            found[row["init"].split("_p")[0]].append(row)
    lines = []
    for key, name in READ_OUT.items():
        if part := found[key]:
            organs = [f"{fmean(r['organs'][k] for r in part):.2f}" for k in range(4)]
            gain = "" if key == "untrained" else above(by_draw(part), by_draw(found["untrained"]))
            runs = str(len({r["init"] for r in part})) if "_p" in part[0]["init"] else "–"
            start = [name, runs, str(part[0]["features"])]
            lines.append([*start, *cells(by_draw(part)), *organs, gain])
    head = f"features | pre-trainings | numbers a voxel | draw 0 | draw 1 | draw 2 | {ORGANS}"
    return table(f"{head} | points above never trained", lines)


def pretraining(rows: Rows) -> str:
    """Seconds and last losses of each pre-training."""
    lines = []
    for row in rows:
        if row["kind"] == "pretrain":
            last = row["last"]
            lines.append(
                [
                    f"`{row['name']}`",
                    str(row["steps"]),
                    f"{row['wall_s']:.0f} s",
                    f"{last['dense']:.3f}",
                    f"{last['reconstruction']:.4f}",
                    row["device"],
                ]
            )
    return table("run | steps | time | smooth L1 of the codes | reconstruction | device", lines)


def speed(result: dict[str, Any]) -> str:
    """One line a network: seconds of a step without and with dense codes."""
    lines = []
    for name in ("unet", "segresnet"):
        row = result[name]
        figures = (f"{row[key]:.2f}" for key in ("bare_s", "dense_s", "ratio"))
        lines.append([name, *figures])
    where = f"{result['points']} points a volume and teacher layer; {result['device']}"
    return (
        table("network | bare | dense | ratio", lines) + f"\n\n{where}, commit {result['commit']}."
    )


class Table(NamedTuple):
    """A table of the page: which results it uses, and how it is written."""

    uses: Callable[[dict[str, Any]], bool]
    write: Callable[[Rows], str]


TABLES = {
    "readouts": Table(lambda row: row["kind"] == "readout", readouts),
    "finetuning": Table(usual, finetuning),
    "room": Table(lambda row: from_scratch(row) and row["steps"] >= 600, room),
    "steps": Table(short, steps),
    "networks": Table(other_network, networks),
    "pretraining": Table(lambda row: row["kind"] == "pretrain", pretraining),
}


def read(task: str = "headneck") -> Rows:
    """All results of a task."""
    text = (HERE / "results" / f"{task}.jsonl").read_text("utf-8")
    return [{"task": task} | json.loads(line) for line in text.splitlines()]


def readme() -> str:
    """The page with its tables."""
    rows, others = read(), read("hippocampus")
    cost = json.loads((HERE / "results" / "speed.json").read_text("utf-8"))
    devices = sorted({f"{row['device']} (commit {row['commit']})" for row in rows + others})
    return Template((HERE / "page.md").read_text("utf-8")).substitute(
        {name: table.write(rows) for name, table in TABLES.items()},
        room_gain=room_gain(rows),
        seen_scratch=smallest_seen(rows, "dense", "scratch"),
        seen_reconstruction=smallest_seen(rows, "dense", "recon"),
        one_self=gain_of(rows, "soft_network"),
        one_control=gain_of(rows, "soft_network", other="longer"),
        one_longer=gain_of(rows, "longer"),
        one_dense=gain_of(rows, "dense_1e-3"),
        hippocampus=finetuning(others),
        hippocampus_networks=networks(others),
        hippocampus_resenc=resenc_gain(others, "scratch", "unet"),
        hippocampus_resenc_dense=resenc_gain(others, "dense", "scratch"),
        hippocampus_resenc_recon=resenc_gain(others, "dense", "recon"),
        hippocampus_pretraining=pretraining(others),
        hippocampus_self=gain_of(others, "soft_network"),
        hippocampus_self_three=gain_of(others, "soft_network", DRAWS),
        hippocampus_control=gain_of(others, "soft_network", other="longer"),
        hippocampus_dense=gain_of(others, "dense", DRAWS),
        hippocampus_dense_recon=gain_of(others, "dense", DRAWS, "recon"),
        hippocampus_random=gain_of(others, "dense_random", DRAWS),
        hippocampus_adapted=gain_of(others, "dense_adapted", DRAWS),
        hippocampus_all=gain_of(others, "dense", ("all",)),
        speed=speed(cost),
        devices="; ".join(devices),
    )


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme(), "utf-8")
    (HERE / "figures").mkdir(exist_ok=True)
    with rc_context(STYLE):
        gains().savefig(HERE / "figures" / "gains.png", dpi=120)
