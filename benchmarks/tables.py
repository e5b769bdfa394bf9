"""Write benchmarks/README.md, templates/*.md filled with results/*.json; and costs in a guide.

python benchmarks/tables.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

from formatting import (
    Result,
    duration,
    ends,
    fill,
    load,
    percents,
    reached,
    segmentation,
    span,
    table,
    where,
)


def pretrain(result: Result) -> str:
    """Section of bench_pretrain.py."""
    over, pairs, store = result["overhead"], result["pairs"], result["store"]
    rows = [
        [
            name,
            span(row["ours_seconds"]),
            span(row["bare_seconds"]),
            span(row["ratio"], 3),
            reached(row["ratio"]["median"] <= 1.15),
        ]
        for name, row in over["networks"].items()
    ]
    share = store["share_of_a_step_of_two"]
    return fill(
        "pretrain",
        where=where(result),
        size=over["size"],
        batch=over["batch"],
        slices=over["slices"],
        rows=table(rows),
        pairs=pairs,
        pairs_ours=span(pairs["ours_per_second"]),
        pairs_plain=span(pairs["plain_per_second"], 3),
        pairs_ratio=span(pairs["ratio"], 1),
        pairs_goal=reached(pairs["ratio"]["median"] >= 20),
        sampling=100 * share,
        sampling_goal=reached(share < 0.02),
        fill_ratio=span(store["fill_ratio"]),
        fill_rate=span(store["fill_slices_per_second"], 1),
        fill_goal=reached(store["fill_ratio"]["median"] >= 0.9),
    )


def ranks(result: Result) -> str:
    """Section of bench_ranks.py."""
    rows = [
        [name, span(row["patches_per_second"], 3)]
        + [span({k: 100 * v for k, v in row["waiting"].items()}, 1)]
        for name, row in result["ranks"].items()
    ]
    return fill(
        "ranks",
        where=where(result),
        rows=table(rows),
        ratio=result["ratio"],
        ratio_goal=reached(result["ratio"] >= 1.6),
        waiting_goal=reached(result["ranks"]["1"]["waiting"]["median"] < 0.05),
    )


def transport(result: Result) -> str:
    """Section of bench_transport.py."""
    speed, grid, peak = result["speed"], result["agreement"], result["peak_mb_at_4096"]
    outliers = [row for row in grid["rows"] if row[4] > 1e-3]
    return fill(
        "transport",
        where=where(result),
        speed=speed,
        ours=span(speed["ours_seconds"], 3),
        pot=span(speed["pot_seconds"]),
        speedup=span(speed["speedup"], 1),
        speed_goal=reached(speed["speedup"]["median"] >= 50),
        peak=peak,
        peak_goal=reached(peak < 1000),
        settings=len(grid["rows"]),
        error=max(row[4] for row in grid["rows"] if row[4] <= 1e-3),
        outliers=len(outliers),
        outlier_residual=max((row[5] for row in outliers), default=0.0),
        residual=grid["worst_residual"],
    )


def sarcoma(result: Result) -> str:
    """Section of bench_sarcoma.py."""
    kinds = {
        "image_all": "slice → image, all",
        "image_within": "slice → image, same modality, plane and depth",
        "text_all": "slice → text, all",
        "text_within": "slice → text, same modality, plane and depth",
    }
    names = {}
    for key in result["summary"]:
        kind, _, k = key.rpartition("_r")
        names[key] = f"{kinds[kind]}, R@{k}"
    summary = [
        [
            names[key],
            *(percents(row[who], "mean", "min", "max") for who in ("student", "volume_zero")),
            f"{100 * row['chance']:.1f}",
        ]
        for key, row in result["summary"].items()
    ]
    runs = result["runs"]
    by_seed = [
        [name, *(percents(run["student"], key, f"{key}_low", f"{key}_high") for run in runs)]
        for key, name in names.items()
    ]
    head = table([["retrieval", *(f"seed {run['seed']}" for run in runs)]])
    seconds = [run["train_seconds"] for run in runs]
    return fill(
        "sarcoma",
        where=where(result),
        test_patients=result["test_patients"],
        seeds=result["seeds"],
        summary=table(summary),
        shortest=min(seconds) / 60,
        longest=max(seconds) / 60,
        commits=", ".join(sorted({run["train_commit"] for run in runs})),
        seed_table="\n".join([head, "|---" * (1 + len(runs)) + "|", table(by_seed)]),
        patient=result["patient"],
    )


def commands(result: Result) -> str:
    """Section of bench_commands.py."""
    rows = result["rows"]
    first = rows["headneck_newcomer"]
    names = ("pretrain", "finetune", "predict")
    return fill(
        "commands",
        where=where(result),
        dice=ends(first["test"]["mean"]["dice"]),
        cases=first["test"]["cases"],
        newcomer=table([name, first[name]["words"], *_minutes(first[name])] for name in names),
        **{key: first[key] for key in ("images", "labelled", "predicted")},
        **_plans(rows),
        **_seconds(rows),
    )


def _minutes(row: Result) -> list[str]:
    return [f"{row[key] / 60:.1f}" for key in ("seconds", "cpu_seconds")]


def _plans(rows: Result) -> dict[str, str | float]:
    """The plan alone against an overlay by hand."""
    arms = {
        "hippocampus, plan alone": "hippocampus_planned",
        "head and neck, plan alone": "headneck_planned",
        "head and neck, by hand (`headneck_by_hand.yaml`)": "headneck_by_hand",
    }
    dice = {name: rows[name]["test"]["mean"]["dice"] for name in arms.values()}
    behind = dice["headneck_by_hand"]["mean"] - dice["headneck_planned"]["mean"]
    return {
        "plans": table(
            [text, rows[name]["steps"], *_minutes(rows[name]["finetune"])]
            + [f"{rows[name]['validation_dice']:.3f}", ends(dice[name])]
            for text, name in arms.items()
        ),
        "hippocampus_goal": reached(dice["hippocampus_planned"]["mean"] >= 0.88),
        "behind": 100 * behind,
        "behind_goal": reached(behind <= 0.01),
        "tried": table(_tried(row) for row in rows.values() if "settings" in row),
    }


def _tried(row: Result) -> list[object]:
    sizes = [" × ".join(map(str, row["settings"][key])) for key in ("spacing", "patch_size")]
    others = [row["settings"][key] for key in ("batch_size", "learning_rate", "ema_decay")]
    return [*sizes, *others, row["steps"], f"{row['validation_dice']:.3f}"]


def _seconds(rows: Result) -> dict[str, str | float]:
    """One file, and quickstart."""
    one, quick = rows["one_file"], rows["quickstart"]["quickstart"]
    return {
        **{key: span(row, 1) for key, row in one.items()},
        "beyond_goal": reached(one["beyond"]["median"] < 3),
        "quickstart": quick["seconds"] / 60,
        "quickstart_threads": quick["threads"],
        "quickstart_goal": reached(quick["seconds"] <= 360),
    }


def hippocampus(result: Result) -> str:
    """Section of bench_finetune.py on hippocampus."""
    test, seconds = result["test"], result["train_seconds"]
    rows = {**test["classes"], "mean": test["mean"]}
    return fill(
        "hippocampus",
        where=where(result),
        cases=test["cases"],
        minutes=seconds / 60,
        goal=reached(test["mean"]["dice"]["mean"] >= 0.88 and seconds < 2400),
        tolerance=test["tolerance_mm"],
        rows=table([name, *segmentation(row)] for name, row in rows.items()),
    )


def headneck(result: Result) -> str:
    """Section of bench_headneck.py."""
    names = {
        "auto": "2.5 mm, swap left and right (default)",
        "auto_4mm": "4 mm, swap left and right (default)",
        "plain_4mm": "4 mm, plain",
    }
    runs, test = result["runs"], result["runs"]["auto"]["test"]
    tests = {names[arm]: run["test"] for arm, run in runs.items()}
    return fill(
        "headneck",
        where=where(result),
        cases=test["cases"],
        minutes=" and ".join(duration(run["train_seconds"]) for run in runs.values()),
        goal_dice=result["goal_dice"],
        goal=reached(test["mean"]["dice"]["mean"] >= result["goal_dice"]),
        tolerance=test["tolerance_mm"],
        rows=table(
            [arm, name, *segmentation(row)]
            for arm, found in tests.items()
            for name, row in {**found["classes"], "mean": found["mean"]}.items()
        ),
    )


def frozen(result: Result) -> str:
    """Section of bench_frozen.py."""
    names = {
        "trained": "frozen 2D features, ImageNet weights",
        "random": "frozen 2D features, random weights",
        "scratch": "3D network from scratch",
        "reconstruction": "3D, after masked reconstruction",
        "default": "3D, after the default pre-training until budget `choice`",
        "default_reconstruction_100": "3D, after the default pre-training",
    }
    counts = ("12", "119", "None")
    rows, differences = [], []
    for arm, name in names.items():
        found = [result["arms"][arm][count] for count in counts]
        cells = []
        for row in found:
            spread = f" ± {stdev(row['auroc']):.3f}" if len(set(row["auroc"])) > 1 else ""
            ends = f"{row['low']:.3f}–{row['high']:.3f}"
            cells.append(f"{row['mean']:.3f}{spread} ({ends})")
        rows.append([name, *cells])
        if arm != "trained":
            gains = [row["trained_above"] for row in found]
            differences.append([name, *(f"{points(gain)}; {gain['pairs']}" for gain in gains)])
    trained, choice = result["arms"]["trained"], result["choice"]
    chosen = choice["auroc"]
    few = trained["12"]["auroc"]
    draws = next(iter(chosen.values()))
    return fill(
        "frozen",
        where=where(result),
        cases=result["test_cases"],
        trained_seconds=result["volume_seconds"]["trained"],
        fit_12=result["fit_seconds"]["12"],
        fit_119=result["fit_seconds"]["119"],
        draws_12=len(few),
        draws_119=len(trained["119"]["auroc"]),
        bad=sum(value < 0.5 for value in few),
        median_12=median(few),
        goal_12=reached(trained["12"]["mean"] >= 0.77),
        goal_119=reached(trained["119"]["mean"] >= 0.86),
        rows=table(rows),
        differences=table(differences),
        choice_cases=choice["cases"],
        choice_12=len(draws["12"]),
        choice_119=len(draws["119"]),
        choice=table(
            [name, *(f"{mean(row[n]):.3f} ± {stdev(row[n]):.3f}" for n in ("12", "119"))]
            for name, row in chosen.items()
        ),
    )


VOLUME = {
    "frozen": "frozen 2D features",
    "untrained": "3D network, random weights",
    "volume": "3D network, taught by the 2D encoder",
    "volume_random": "3D network, taught by the 2D encoder with random weights",
    "joined": "2D features and those of the taught 3D network",
}


def volume(result: Result) -> str:
    """Section of bench_volume.py."""
    rows = []
    for arm, name in VOLUME.items():
        found = [result["arms"][arm][count] for count in ("12", "119")]
        cells = [
            f"{row['mean']:.3f} ± {stdev(row['auroc']):.3f} ({row['low']:.3f}–{row['high']:.3f})"
            for row in found
        ]
        gains = [points(row["above_frozen"]) if "above_frozen" in row else "" for row in found]
        rows.append([name, *cells, *gains])
    chosen, arms = result["choice"]["auroc"], result["arms"]["frozen"]
    return fill(
        "volume",
        where=where(result),
        cases=result["test_cases"],
        epochs=result["epochs"],
        draws_12=len(arms["12"]["auroc"]),
        draws_119=len(arms["119"]["auroc"]),
        rows=table(rows),
        choice_cases=result["choice"]["cases"],
        choice=table(
            [VOLUME[arm], *(f"{mean(row[n]):.3f} ± {stdev(row[n]):.3f}" for n in ("12", "119"))]
            for arm, row in chosen.items()
        ),
    )


def points(gain: dict[str, float]) -> str:
    """Difference in points with its interval."""
    mean, low, high = (100 * gain[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def adrenal(result: Result) -> str:
    """Section of bench_finetune.py on adrenal."""
    test = result["test"]
    scores = {
        key: ends({"mean": test[key], "low": test[f"{key}_low"], "high": test[f"{key}_high"]})
        for key in ("auroc", "balanced_accuracy", "f1", "ece")
    }
    return fill(
        "adrenal",
        where=where(result),
        cases=test["n"],
        minutes=result["train_seconds"] / 60,
        goal=reached(test["auroc"] >= 0.84),
        **scores,
    )


def finetune_speed(result: Result) -> str:
    """Section of bench_finetune_speed.py."""
    loading, inference = result["loading"], result["inference"]
    overhead = inference["overhead"]["median"]
    return fill(
        "finetune_speed",
        where=where(result),
        step=span(loading["step_seconds"], 3),
        step_fixed=span(loading["step_seconds_fixed"], 3),
        throughput=span(loading["throughput_ratio"]),
        throughput_goal=reached(loading["throughput_ratio"]["median"] >= 0.9),
        window=span(inference["window_seconds"], 1),
        before=span(inference["before_seconds"], 1),
        after=span(inference["after_seconds"], 1),
        overhead=100 * overhead,
        overhead_goal=reached(overhead <= 0.1),
    )


def captions(result: Result) -> str:
    """Section of bench_captions.py, with times from the store's rate."""
    local, resume, memory = result["local"], result["resume"], result["memory"]
    growth = memory["growth_of_the_second_half_megabytes"]
    text = fill(
        "captions",
        where=where(result),
        local=local,
        local_ratio=span(local["ratio"]),
        local_goal=reached(local["ratio"]["median"] >= 0.9),
        resume=resume,
        resume_goal=reached(resume["seconds"] < 10),
        slices=memory["slices"],
        growth=growth,
        growth_goal=reached(abs(growth) < 20),
    )
    store = load("pretrain")
    if not store:
        return text
    rate = store["store"]["fill_slices_per_second"]["median"]
    rows = [
        [f"{n:,}", duration(48 * n / rate), *(duration(12 * n / speed) for speed in (1, 10, 100))]
        for n in (100, 1000, 100_000)
    ]
    return f"{text}\n{fill('captions_time', rate=rate, where=where(store), rows=table(rows))}"


def served(result: Result) -> str:
    """Section of bench_served.py."""
    rows = [
        [
            row["concurrency"],
            span(row["ours_per_second"], 1),
            span(row["plain_per_second"], 1),
            span(row["ratio"]),
            reached(row["ratio"]["median"] >= 0.9),
        ]
        for row in result["rows"]
    ]
    return fill(
        "served",
        where=where(result),
        delay=result["delay_seconds"],
        jitter=100 * result["jitter"],
        pixels=result["pixels"],
        rows=table(rows),
    )


PROTOCOLS = {
    "one": "one click at a time",
    "each": "one click a class at a time, in the largest error that the class is part of",
}
CLICK_GOALS: dict[str, list[tuple[str, str, str, str, float]]] = {
    "hippocampus": [
        ("click_warm_long", "plain", "validation", "one", 0.03),
        ("click_all", "plain_all", "test", "one", 0.03),
    ],
    "headneck": [
        ("click_6_warm", "plain_6", "validation", "each", 0.15),
        ("click_warm", "plain", "test", "each", 0.06),
        ("click_warm", "plain", "validation", "each", 0.06),
    ],
}


def click_row(name: str, arm: Result, subset: str, protocol: str) -> list[str]:
    """Row of one arm of bench_clicks.py."""
    found, training = arm[subset][protocol], arm["training"]
    means = [step["mean"] for step in found["dice"]]
    noc = found["noc"]
    clicked = len(means) > 1
    effects = found["effects"].get("all")
    return [
        name.replace("_", " "),
        f"{training['cases']}",
        f"{training['budget']:.0f}",
        str(training["iterations"]),
        ends(found["dice"][0]),
        *(f"{means[n]:.3f}" if n < len(means) and clicked else "–" for n in (1, 3, 5, 10)),
        percents(found["gain"], "mean", "low", "high") if clicked else "–",
        f"{noc['mean']:.2f}" if clicked and protocol == "one" else "–",
        ("yes" if means == sorted(means) else "no") if clicked else "–",
        f"{effects['followed']:.0%}" if effects else "–",
        f"{found['seconds']['median']:.2f}" if clicked else "–",
    ]


def click_goal(
    arms: Result, name: str, plain: str, subset: str, protocol: str, goal: float
) -> str | None:
    """Line on one arm's goals, None where it has no scores."""
    if subset not in arms.get(name, {}) or subset not in arms.get(plain, {}):
        return None
    found = arms[name][subset][protocol]
    means = [step["mean"] for step in found["dice"]]
    below = means[0] - arms[plain][subset]["one"]["dice"][0]["mean"]
    gain, rising = found["gain"], means[:6] == sorted(means[:6])
    return (
        f"- {name.replace('_', ' ')}, {subset}: {percents(gain, 'mean', 'low', 'high')} points "
        f"from 0 to 5 clicks, goal {100 * goal:.0f}: {reached(gain['mean'] >= goal)}; "
        f"a rise with each: {reached(rising)}; without clicks {100 * below:+.1f} points against "
        f"{plain.replace('_', ' ')}, goal at least -0.3: {reached(below >= -0.003)}"
    )


def clicks(result: Result) -> str:
    """Section of all arms of bench_clicks.py."""
    arms, sections = result["arms"], []
    for subset, text in (("validation", "development"), ("test", "test")):
        for protocol, words in PROTOCOLS.items():
            scored = {k: arm for k, arm in arms.items() if protocol in arm.get(subset, {})}
            if not scored:
                continue
            cases = next(iter(scored.values()))[subset]["cases"]
            rows = [click_row(name, arm, subset, protocol) for name, arm in scored.items()]
            parts = {"cases": cases, "subset": text, "protocol": words}
            sections.append(fill("clicks_arms", rows=table(rows), **parts))
    goals = [click_goal(arms, *goal) for goal in CLICK_GOALS[result["dataset"]]]
    name, _, subset, protocol, _ = CLICK_GOALS[result["dataset"]][-1]
    return fill(
        "clicks",
        where=where(result),
        dataset={"hippocampus": "hippocampus", "headneck": "head and neck"}[result["dataset"]],
        script=f"bench_clicks.py arm {result['dataset']} DATA OUT",
        goals="\n".join(goal for goal in goals if goal),
        sections="\n".join(sections),
        arm=name.replace("_", " "),
        subset=subset,
        effects=table(
            [
                label,
                row["clicks"],
                f"{row['followed']:.0%}",
                f"{row['corrected']:.1f}",
                f"{row['spoilt']:.1f}",
                f"{100 * row['gain']:.2f}",
            ]
            for label, row in arms[name][subset]["one"]["effects"].items()
        ),
    )


def click_guidance(result: Result) -> str:
    """Section of clicks_gpu.py choose."""
    tables = {
        part: table(
            [name.replace("_", ", "), ends(row["dice"]), points(row["difference"])]
            for name, row in result[part].items()
        )
        for part in ("guidance", "radii")
    }
    return fill(
        "click_guidance",
        where=where(result),
        seconds=result["seconds"],
        warm=" from the weights of a plain network ({epochs} epochs)".format(**result["start"])
        if result["start"]
        else "",
        cases=result["cases"],
        **tables,
    )


def click_pretraining(result: Result) -> str:
    """Section of click_pretraining.py."""
    rows = []
    for clicks in result["difference"]:
        scratch, pretrained, gain = (
            result[arm][clicks] for arm in ("scratch", "pretrained", "difference")
        )
        draws = ", ".join(f"{100 * value:+.1f}" for value in gain["draws"])
        rows.append([clicks, ends(scratch), ends(pretrained), points(gain), draws])
    keys = ("dataset", "labelled", "seconds", "draws", "scored")
    return fill(
        "click_pretraining",
        where=where(result),
        volumes=result["pretrain"]["volumes"],
        pretrain_seconds=result["pretrain"]["seconds"],
        rows=table(rows),
        **{key: result[key] for key in keys},
    )


def click_seconds(result: Result) -> str:
    """Section of bench_clicks.py seconds."""
    goals = {"128x128x128": 1.0, "256x256x128": 1.5}
    rows = [
        [size.replace("x", " × "), f"{row['first']:.1f}", span(row["click"]), goals[size]]
        + [reached(row["click"]["median"] < goals[size])]
        for size, row in result["seconds"].items()
    ]
    return fill("click_seconds", where=where(result), rows=table(rows))


def effort(result: Result) -> str:
    """Section of bench_effort.py."""
    rows = [
        [
            text,
            part["cases"],
            ends(part["first_dice"]),
            ends(part["clicks"], 1),
            f"{part['waited']['mean']:.1f}",
            ends(part["last_dice"]),
            f"{part['reached']} of {part['cases']}",
        ]
        for text, part in (("before", result["before"]), ("after", result["after"]))
    ]
    now = result["scores"]["now"]
    score, start = ((now[key] or {}).values() for key in ("validation", "start"))
    return fill(
        "effort",
        where=where(result),
        goal=result["goal"],
        most=result["at_most"],
        epochs=result["epochs"],
        start=f"{next(iter(start), float('nan')):.3f}",
        score=f"{next(iter(score), float('nan')):.3f}",
        rows=table(rows),
    )


def active_learning(result: Result) -> str:
    """Section of bench_active.py."""
    parts = []
    for task, found in result["tasks"].items():
        rows = [
            [
                strategy,
                *(ends(row["dice"]) for row in counts.values()),
                *(percents(row["above_random"], "mean", "low", "high")
                  if strategy != "random" else "–" for row in counts.values()),
            ]
            for strategy, counts in found["arms"].items()
        ]  # fmt: skip
        names = ("seeds", "steps", "pool", "cases")
        facts = {name: found[name] for name in names}
        parts.append(fill("active_learning_task", task=task, rows=table(rows), **facts))
    return fill("active_learning", where=where(result), tasks="\n\n".join(parts))


def label(result: Result) -> str:
    """Section of bench_label.py."""
    answers, trained = result["answers"], result["round"]
    seconds, dice, starts = answers["seconds"], trained["dice"], answers["starts"]
    loads = [start["load_average"] for start in starts]
    names = [name for name in starts[0]["parts"] if name != "total"]
    steps = {name: median(start["parts"][name] for start in starts) for name in names}
    slow = sorted((step for step in steps.items() if step[1] >= 0.02), key=lambda step: -step[1])
    return fill(
        "label",
        where=where(result),
        monailabel=result["monailabel"],
        size=answers["size"],
        patch=answers.get("patch", answers["size"]),
        threads=answers["threads"],
        starts=len(starts),
        lowest=min(loads),
        highest=max(loads),
        overlay=span(seconds["command_to_overlay"], 1),
        overlay_goal=reached(seconds["command_to_overlay"]["median"] < 30),
        start=span(seconds["start"], 1),
        click=span(seconds["click"]),
        click_goal=reached(seconds["click"]["median"] < 2),
        network=span(seconds["network_alone"]),
        first_click=span(seconds["first_click"]),
        steps=", ".join(f"{name.split()[-1]} {step:.2f} s" for name, step in slow),
        round=trained,
        minutes=trained["train_seconds"] / 60,
        before=ends(dice["before"]),
        after=ends(dice["after"]),
        gain=ends(dice["gain"]),
        gain_goal=reached(dice["gain"]["low"] > 0),
    )


def backbones(result: Result) -> str:
    """Section of the table that test_finetune.py writes."""
    bundles = ("pretrain", "seg-finetune", "cls-finetune")
    rows = table([name, *(row[bundle] for bundle in bundles)] for name, row in result.items())
    return fill("backbones", rows=rows)


def exports(result: Result) -> str:
    """Section of bench_exports.py."""
    rows, files = result["rows"], ("model.ts", "model.onnx")
    errors: dict[str, list[float]] = {file: [0.0] for file in files}
    missing, lines = [], []
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        cells = [name, " × ".join(map(str, row["size"]))]
        for file, made in ((file, row[file]) for file in files):
            error = made.get("max_relative_error")
            if "way" in made:
                errors[file].append(error)
                batch = str(made["shape"][0])
                cells += [made["way"], batch, f"{error:.1e}", f"{made['seconds']:.0f}"]
            else:
                missing.append(f"{name} {file}")
                cells += ["none", "", "", ""]
            for way, why in made.get("failed", {}).items():
                text = why if len(why) <= 140 else why[:140] + " …"
                reasons.setdefault(f"{file}, {way}: `{text}`", []).append(name)
        onnx = row["model.onnx"]
        lines.append([*cells, f"{onnx['bytes'] / 1e6:.1f}" if "way" in onnx else ""])
    return fill(
        "exports",
        where=where(result),
        exporters=result["exporters"],
        count=len(rows),
        torchscript=max(errors["model.ts"]),
        onnx=max(errors["model.onnx"]),
        tolerance=result["tolerance"],
        missing=", ".join(missing) or "none",
        rows=table(lines),
        reasons="\n".join(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()),
    )


def data_laws(result: Result) -> str:
    """Section of bench_data_laws.py."""
    real, planted, mirrored = [], [], []
    for name, row in result["real"].items():
        found = ", ".join(f"{law} ({n})" if n else law for law, n in row["files"].items())
        real.append([name, row["volumes"], found or "none", f"{row['seconds_per_volume']:.3f}"])
        for modality, axes in row["mirrored"].items():
            shares = [f"{100 * x:.0f} %" if x is not None else "–" for x in axes.values()]
            mirrored.append([name, modality, *shares])
    for name, faults in result["planted"].items():
        for fault in faults:
            laws = dict.fromkeys(": ".join(x.split(": ")[:2]) for x in fault["findings"])
            planted.append([name, fault["fault"], ", ".join(laws) or "**nothing**"])
    return fill(
        "data_laws",
        where=where(result),
        memory=result["peak_memory_MiB"],
        real=table(real),
        planted=table(planted),
        mirrored=table(mirrored),
    )


def mutation(result: Result) -> str:
    """Section of mutation.py."""
    rows, modules = [], result["modules"].values()
    for name, row in result["modules"].items():
        share = f"{100 * row['killed_share']:.0f} %"
        verdicts = [survivor["verdict"] for survivor in row["survivors"]]
        equal = sum(verdict.startswith("equivalent") for verdict in verdicts)
        counts = (row["mutants"], row["tried"], row["killed"], equal, len(verdicts) - equal)
        rows.append([f"`{name}`", *map(str, counts), share, row["commit"]])
    mutants, tried, killed = (
        sum(m[key] for m in modules) for key in ("mutants", "tried", "killed")
    )
    equal, others = (sum(int(row[column]) for row in rows) for column in (4, 5))
    return fill(
        "mutation",
        where=where(result),
        rows=table(rows),
        mutants=mutants,
        tried=tried,
        killed=killed,
        equal=equal,
        others=others,
        share=100 * killed / max(1, tried - equal),
    )


def fuzz(result: Result) -> str:
    """Section of tests/hostile/fuzz.py."""
    limits, lines = result["limits"], []
    kinds: dict[str, list[tuple[int, int, float]]] = {}
    for name, row in sorted(result["readers"].items()):
        found = row["outcomes"]
        bad = sum(found.values()) - found.get("value", 0) - found.get("refused", 0)
        counts = [row["inputs"], found.get("value", 0), found.get("refused", 0), bad]
        lines.append([f"`{name}`", *(f"{n:,}" for n in counts), f"{row['seconds']:,.0f}"])
        kinds.setdefault(row["kind"], []).append((row["inputs"], bad, row["seconds"] / 60))
    sums = {kind: tuple(map(sum, zip(*rows, strict=True))) for kind, rows in kinds.items()}
    goal = limits["issue_minutes"]
    short = sorted(sums.items(), key=lambda item: item[1][2])
    return fill(
        "fuzz",
        where=where(result),
        memory=limits["memory_bytes"] / 2**30,
        seconds=limits["seconds"],
        minutes=goal,
        forbidden=sum(bad for _, bad, _ in sums.values()),
        total=sum(inputs for inputs, _, _ in sums.values()),
        kinds=table(
            [kind, f"{inputs:,}", bad, f"{minutes:.1f}", f"{100 * minutes / goal:.0f} %"]
            for kind, (inputs, bad, minutes) in short
        ),
        rows=table(lines),
    )


def two(result: Result) -> str:
    """Section of tests/hostile/two.py."""
    scenarios = result["scenarios"]
    lines = [
        [name, str(row["tried"]), outcome, str(count)]
        for name, row in scenarios.items()
        for outcome, count in row["outcomes"].items()
    ]
    return fill(
        "two",
        where=where(result),
        open=sum(len(row["open"]) for row in scenarios.values()),
        total=sum(row["tried"] for row in scenarios.values()),
        rows=table(lines),
    )


def faults(result: Result) -> str:
    """Section of tests/hostile/faults.py."""
    commands: dict[str, dict[str, Result]] = {}
    for name, row in result["scenarios"].items():
        command, fault = name.split(": ")
        commands.setdefault(command, {})[fault] = row
    kinds = dict.fromkeys(fault for rows in commands.values() for fault in rows)
    lines = []
    for command, rows in commands.items():
        outcomes = Counter[str]()
        for row in rows.values():
            outcomes.update(row["outcomes"])
        told = outcomes["the second run says what to do"]
        equal = sum(count for outcome, count in outcomes.items() if outcome.endswith("equal"))
        calls = max(row["calls"] for row in rows.values())
        tried = [_tried_calls(rows.get(fault)) for fault in kinds]
        lines.append([command, f"{calls:,}", *tried, f"{equal:,}", f"{told:,}"])
    scenarios = result["scenarios"].values()
    return fill(
        "faults",
        where=where(result),
        open=sum(len(row["open"]) for row in scenarios),
        total=sum(row["tried"] for row in scenarios),
        kinds=" | ".join(kinds),
        rows=table(lines),
    )


def _tried_calls(row: Result | None) -> str:
    """Of a fault's calls: "all", their number, or none."""
    if row is None:
        return "–"
    return "all" if row["tried"] == row["calls"] else f"{row['tried']:,}"


def gpu(result: Result) -> str:
    """Section of bench_gpu.py; parts that failed are left out."""
    parts = {name: part for name, part in result["parts"].items() if "error" not in part}
    filling = parts.pop("filling", {"size": (), "bare_images_per_second": None, "rows": []})
    steps = [
        [
            name,
            variant,
            span(row["milliseconds"], 1),
            span(row["ratio"], 3),
            f"{part['synchronisations']:g}" if variant == "trainer" else "",
            reached(row["ratio"]["median"] <= 1.05) if variant in ("student", "trainer") else "",
        ]
        for name, part in parts.items()
        for variant, row in part.items()
        if isinstance(row, dict)
    ]
    bare = filling["bare_images_per_second"]
    shares = [(row, row["images_per_second"] / bare["median"]) for row in filling["rows"]]
    return fill(
        "gpu",
        where=where(result),
        steps=table(steps),
        size=" × ".join(map(str, filling["size"])),
        bare=span(bare, 0) if bare else "not measured",
        filling=table(
            [
                row["readers"],
                f"{row['images_per_second']:.0f}",
                f"{share:.2f}",
                reached(share >= 0.9),
            ]
            for row, share in shares
        ),
    )


def scale(result: Result) -> str:
    """Section of bench_scale.py; its later parts may not have been measured."""
    chunks, prepare = result["chunks"], result["prepare"]
    slow, *_, ours = chunks.values()
    ratio = ours["patches_per_second"]["median"] / slow["patches_per_second"]["median"]
    rate = prepare["volumes_per_minute"]
    return fill(
        "scale",
        where=where(result),
        ratio=ratio,
        ratio_goal=reached(ratio >= 20),
        read_goal=reached(ours["megabytes_read"] <= 4),
        chunks=table(
            [name, span(row["patches_per_second"], 1), *(f"{row[key]:.1f}" for key in SIZES)]
            for name, row in chunks.items()
        ),
        size=" × ".join(map(str, prepare["size"])),
        one=span(rate["1"], 0),
        two=span(rate["2"], 0),
        prepare_ratio=span(prepare["ratio"]),
        prepare_goal=reached(prepare["ratio"]["median"] >= 1.7),
        load=prepare["load_average"],
        costs=volume_costs(result, load("pretrain") or {}),
        more="".join(_scale_part(name, result[name]) for name in SCALE_PARTS if name in result),
    )


def volume_costs(scale: Result, pretrain: Result) -> str:
    """Costs of 1,000, 10,000 and 100,000 volumes; docs/guides/scale.md has this table too."""
    prepare, store, steps = scale["prepare"], pretrain["store"], pretrain["overhead"]
    hours = [
        1 / 60 / prepare["volumes_per_minute"]["1"]["median"],
        SLICES / store["fill_slices_per_second"]["median"] / 3600,
        steps["networks"]["SegResNet"]["ours_seconds"]["median"] / steps["batch"] / 3600,
    ]
    sizes = [prepare["megabytes_nii_gz"], prepare["megabytes_per_volume"]]
    rows = [
        [f"{n:,}", *(f"{n * mb / 1000:,.0f}" for mb in sizes), *(f"{n * h:,.1f}" for h in hours)]
        for n in (1000, 10_000, 100_000)
    ]
    return (
        "| volumes | .nii.gz, GB | prepared copy, GB | preparing, hours | filling the store, hours "
        f"| an epoch of training, hours |\n|---|---|---|---|---|---|\n{table(rows)}"
    )


def pairs(result: Result) -> str:
    """Section of bench_pairs.py."""
    sizes = dict.fromkeys(row["pairs"] for row in result["rows"])
    return fill(
        "pairs",
        where=where(result),
        length=result["length"],
        matrices=" and ".join(f"{4 * n**2 / 1e6:,.0f} MB at {n:,}" for n in sizes),
        rows=table(
            [kind, f"{n:,}", f"{seconds:.1f}", f"{peak:,.0f}"]
            for kind, n, seconds, peak in (row.values() for row in result["rows"])
        ),
    )


def filling(result: Result) -> str:
    """Section of bench_filling.py; some of its parts may not have been measured."""
    return fill(
        "filling",
        where=where(result),
        more=_processes(result) + _ray_rate(result) + _kills(result),
    )


def _processes(result: Result) -> str:
    """Two processes against one, and costs by their seconds of the processor."""
    if "processes" not in result:
        return ""
    part = result["processes"]
    kinds = part["kinds"]
    lines = []
    for name, row in kinds.items():
        rate, ratio, cpu = row["volumes_per_minute"], row["ratio"], row["cpu_seconds_per_volume"]
        share = row["share_of_a_core"]["2"]["median"]
        goal = reached(ratio["median"] >= 1.7) if name in ("preparing", "filling the store") else ""
        each = ", ".join(f"{cpu[n]['median']:.2f}" for n in "12")
        lines.append(
            [name, span(rate["1"], 0), span(rate["2"], 0), span(ratio), f"{share:.2f}", each, goal]
        )
    control = kinds["pure computation"]["ratio"]["median"]
    own, store = kinds["preparing"], kinds["filling the store"]
    hours = [row["cpu_seconds_per_volume"]["1"]["median"] / 3600 for row in (own, store)]
    sizes = [part["megabytes_nii_gz"], *(row["megabytes_per_volume"] for row in (own, store))]
    costs = [
        [f"{n:,}", *(f"{n * mb / 1000:,.1f}" for mb in sizes)]
        + [f"{n * one:,.1f}" for one in hours]
        for n in (1000, 10_000, 100_000)
    ]
    shares = [f"{row['ratio']['median'] / control:.0%}" for row in (own, store)]
    one_share = store["share_of_a_core"]["1"]["median"]
    return fill(
        "filling_processes",
        one_share=one_share,
        most=2 / one_share,
        load_first=part["load_average"],
        load_last=part["load_average_at_the_end"],
        processes=table(lines),
        control=control,
        shares=" and ".join(shares),
        costs=table(costs),
    )


def _ray_rate(result: Result) -> str:
    if "ray" not in result:
        return ""
    part = result["ray"]
    rate, ratio = part["volumes_per_minute"], part["ratio"]
    return (
        "\n**Ray** with two actors against the plain run with two readers and two threads, on two "
        f"cores, {part['volumes']} volumes, from the third entry to the last: "
        f"{span(rate['ray'], 0)} and {span(rate['plain'], 0)} volumes per minute; ratio "
        f"{span(ratio)} at load averages of {part['load_average']:.0f} to "
        f"{part['load_average_at_the_end']:.0f} (goal 0.9: {reached(ratio['median'] >= 0.9)}).\n"
    )


def _kills(result: Result) -> str:
    """Kills at seeded moments: what was there, and whether the files are equal in the end."""
    parts = {name: result[key] for key, name in KILLS.items() if key in result}
    if not parts:
        return ""
    lines = []
    for name, part in parts.items():
        key = "files_at_the_kill" if "files_at_the_kill" in part["kills"][0] else None
        there = [row[key or "entries_at_the_kill"] for row in part["kills"]]
        equal = sum(row["equal"] for row in part["kills"])
        shown = ", ".join(map(str, there))
        total = part["files"] if key else part["volumes"]
        goal = reached(equal == len(there) == 10)
        lines.append([name, len(there), shown, total, equal, goal])
    head = (
        "| job | kills | there at the kill | of | equal to the undisturbed run | goal |\n"
        "|---|---|---|---|---|---|\n"
    )
    first = "\n**Kills** (SIGKILL) at seeded moments, then the same job again:\n\n"
    return f"{first}{head}{table(lines)}\n"


def _scale_part(name: str, part: Result) -> str:
    """Memory of an epoch, or a start and a resumed run."""
    if name == "memory":
        rows = [
            f"{kind} {part[kind]['megabytes']['max']:.0f} MB at most, {part[kind]['growth']:+.1%}"
            for kind in ("direct", "prepared")
        ]
        flat = all(part[kind]["range"] <= 0.05 for kind in ("direct", "prepared"))
        few = all(
            part[kind]["most_megabytes"] <= part[kind]["limit_megabytes"]
            for kind in ("direct", "prepared")
        )
        return (
            f"\n**Memory** in an epoch of {part['volumes']:,} volumes of 64 × 64 × 40, 2 workers: "
            f"{'; '.join(rows)} from the first tenth to the end (goals: flat within 5 %: "
            f"{reached(flat)}; under `cache_gb`, here {part['cache_gb']} and 0, + 1.5 GB: "
            f"{reached(few)}).\n"
        )
    good = all(
        part[k]["cpu_seconds"] < 60 and part[k]["gigabytes"] < 2 for k in ("start", "resume")
    )
    text = "; ".join(
        "{0} {cpu_seconds:.0f} CPU seconds ({seconds:.0f} s at a load average of "
        "{load_average:.0f}), {gigabytes:.2f} GB".format(kind, **part[kind])
        for kind in ("start", "resume")
    )
    head = f"`{SCALE_PARTS[name]}` with {part['volumes']:,} volumes, to the end of its first step"
    return f"\n**Start** of {head}: {text} (goals 60 s and 2 GB: {reached(good)}).\n"


SLICES = 48  # of a volume, by default
KILLS = {
    "kills": "filling the store",
    "prepare_kills": "preparing",
    "ray_kills": "filling by Ray, one of two actors",
}
SIZES = ("megabytes_read", "megabytes")
SCALE_PARTS = {"memory": "", "start_seg": "seg-finetune", "start_pretrain": "pretrain"}
SECTIONS: dict[str, Callable[[Result], str]] = {
    "pretrain": pretrain,
    "captions": captions,
    "served": served,
    "gpu": gpu,
    "scale": scale,
    "filling": filling,
    "ranks": ranks,
    "pairs": pairs,
    "transport": transport,
    "sarcoma": sarcoma,
    "commands": commands,
    "hippocampus": hippocampus,
    "headneck": headneck,
    "clicks_hippocampus": clicks,
    "clicks_headneck": clicks,
    "click_guidance": click_guidance,
    "click_pretraining": click_pretraining,
    "click_seconds": click_seconds,
    "effort": effort,
    "active_learning": active_learning,
    "label": label,
    "adrenal": adrenal,
    "frozen": frozen,
    "volume": volume,
    "finetune_speed": finetune_speed,
    "backbones": backbones,
    "exports": exports,
    "data_laws": data_laws,
    "mutation": mutation,
    "fuzz": fuzz,
    "faults": faults,
    "two": two,
}


def readme() -> str:
    """The page: a section for each result that there is."""
    intro = "Written by `tables.py` from `results/*.json`; each section names its script."
    results = ((section, load(name)) for name, section in SECTIONS.items())
    sections = [section(result) for section, result in results if result is not None]
    return "\n".join(["# Benchmarks\n", f"{intro}\n", *sections])


def with_costs(page: str) -> str:
    """docs/guides/scale.md with the table of ``volume_costs``."""
    before, start, rest = page.partition("<!-- costs -->\n")
    _, end, after = rest.partition("<!-- end of costs -->")
    costs = volume_costs(load("scale") or {}, load("pretrain") or {})
    return f"{before}{start}\n{costs}\n\n{end}{after}"


if __name__ == "__main__":
    Path(__file__).with_name("README.md").write_text(readme())
    guide = Path(__file__).parents[1] / "docs" / "guides" / "scale.md"
    guide.write_text(with_costs(guide.read_text()))
