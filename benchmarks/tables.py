"""Writes benchmarks/README.md from results/*.json: no figure is typed by hand.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent


def load(name: str) -> dict[str, Any] | None:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def where(result: dict[str, Any]) -> str:
    return f"{result['device']}; torch {result['versions']['torch']}; commit {result['commit']}"


def span(figures: dict[str, float], digits: int = 2) -> str:
    """Median with the least and greatest in brackets."""
    low, high = figures["min"], figures["max"]
    return f"{figures['median']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def reached(ok: bool) -> str:
    return "reached" if ok else "**not reached**"


def pretrain(result: dict[str, Any]) -> list[str]:
    over, pairs, store = result["overhead"], result["pairs"], result["store"]
    lines = [
        "## A step against the bare network",
        "",
        f"`bench_pretrain.py` · {where(result)}",
        "",
        f"Forward, backward and optimiser step at {over['size']}³, batch {over['batch']}, with "
        f"{over['slices']} slices a volume from a filled store, over the same for the bare network. "
        "Median (least–greatest) of runs in turn. Goal: at most 1.15.",
        "",
        "| network | ours, s | bare, s | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    for name, row in over["networks"].items():
        goal = reached(row["ratio"]["median"] <= 1.15)
        lines.append(
            f"| {name} | {span(row['ours_seconds'])} | {span(row['bare_seconds'])} "
            f"| {span(row['ratio'], 3)} | {goal} |"
        )
    lines += [
        "",
        f"**Aligned pairs a second** (SegResNet at {pairs['size']}³, batch {pairs['batch']}): ours "
        f"{span(pairs['ours_per_second'])}, the papers' step written plainly "
        f"{span(pairs['plain_per_second'], 3)}; ratio {span(pairs['ratio'], 1)}. Goal 20: "
        f"{reached(pairs['ratio']['median'] >= 20)}. The plain step runs a teacher of BiomedCLIP's "
        "shape with random weights, 300 queries in six layers, and POT's solver, one slice a volume; "
        "16 of the ratio are the slices that share one pass.",
        "",
        f"**Store**: sampling the targets takes {100 * store['share_of_a_step_of_two']:.2f} % of the "
        f"fastest step above (goal 2 %: {reached(store['share_of_a_step_of_two'] < 0.02)}). Filling "
        f"runs at {span(store['fill_ratio'])} × the bare encoder on the same slices (EfficientNet-Lite0 "
        f"at 224 px, {span(store['fill_slices_per_second'], 1)} slices a second; goal 0.9: "
        f"{reached(store['fill_ratio']['median'] >= 0.9)}).",
        "",
    ]
    return lines


def transport(result: dict[str, Any]) -> list[str]:
    speed, grid = result["speed"], result["agreement"]
    apart = [row for row in grid["rows"] if row[4] > 1e-3]
    rest = max(row[4] for row in grid["rows"] if row[4] <= 1e-3)
    certain = max((row[5] for row in apart), default=0.0)
    return [
        "## Partial optimal transport against POT",
        "",
        f"`bench_transport.py` · {where(result)}",
        "",
        f"Forward and backward of the v2 loss, n = {speed['n']}, d = {speed['d']}: ours "
        f"{span(speed['ours_seconds'], 3)} s, POT's `entropic_partial_wasserstein` on torch "
        f"{span(speed['pot_seconds'])} s; {span(speed['speedup'], 1)} × faster (goal 50: "
        f"{reached(speed['speedup']['median'] >= 50)}). At n = 4096 the peak rises by "
        f"{result['peak_mb_at_4096']:.0f} MB (goal under 1,000: "
        f"{reached(result['peak_mb_at_4096'] < 1000)}).",
        "",
        f"Against POT in float64 over {len(grid['rows'])} settings (two costs, n 2–128, mass 0.3–1, ε 0.01–1) the "
        f"largest error of an entry is {rest:.1e} / n, but for {len(apart)} settings at ε = 0.01. In "
        f"those our own residual is at most {certain:.0e} of a marginal, so it is POT that is off: its "
        "kernel underflows or it still moves (its last move stands in the JSON). Our largest residual "
        f"anywhere is {grid['worst_residual']:.1e}.",
        "",
    ]


NAMES = {
    "image_all": "slice → image, all",
    "image_within": "slice → image, same modality, plane and depth",
    "text_all": "slice → text, all",
    "text_within": "slice → text, same modality, plane and depth",
}


def sarcoma(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Does a token know its slice? Soft-tissue sarcoma, unseen patients",
        "",
        f"`bench_sarcoma.py`, `sarcoma.yaml` · {where(result)}",
        "",
        f"A small U-Net, pre-trained on CT, MR and PET of the development patients with the captions "
        f"beside the data, asked about {result['test_patients']} test patients. Mean over "
        f"{result['seeds']} seeds (least–greatest), in per cent. Volume zero: the same students "
        "with every voxel set to zero, which leaves them plane and position.",
        "",
        "| retrieval | student | volume zero | chance |",
        "|---|---|---|---|",
    ]
    for key, row in result["summary"].items():
        scope, _, k = key.rpartition("_r")
        ours, zero = (
            f"{100 * row[who]['mean']:.1f} ({100 * row[who]['min']:.1f}–{100 * row[who]['max']:.1f})"
            for who in ("student", "volume_zero")
        )
        lines.append(f"| {NAMES[scope]}, R@{k} | {ours} | {zero} | {100 * row['chance']:.1f} |")
    seconds = [run["train_seconds"] for run in result["runs"]]
    lines += [
        "",
        f"Training took {min(seconds) / 60:.0f} to {max(seconds) / 60:.0f} minutes a seed, the "
        "machine not always idle, at commits "
        f"{', '.join(sorted({run['train_commit'] for run in result['runs']}))}. "
        "95 % intervals over volumes, seed by seed:",
        "",
        "| retrieval | " + " | ".join(f"seed {run['seed']}" for run in result["runs"]) + " |",
        "|---" * (1 + len(result["runs"])) + "|",
        *(
            f"| {NAMES[key.rpartition('_r')[0]]}, R@{key.rpartition('_r')[2]} | "
            + " | ".join(percents(run["student"], key) for run in result["runs"])
            + " |"
            for key in result["summary"]
        ),
        "",
        f"Text prompts on the first test patient, {result['patient']} (chosen by no other rule), seed 0: the score along each axis "
        "and the best slice of each plane. CT, then T1 MR:",
        "",
        "![scores of three prompts along the axes of a CT volume](figures/sarcoma_CT_text.png)",
        "![the same for T1 MR](figures/sarcoma_MR_T1_text.png)",
        "",
    ]
    return lines


def percents(metrics: dict[str, float], key: str) -> str:
    mean, low, high = (100 * metrics[name] for name in (key, f"{key}_low", f"{key}_high"))
    return f"{mean:.1f} ({low:.1f}–{high:.1f})"


def ends(stat: dict[str, Any], digits: int = 3) -> str:
    """Mean with its interval."""
    return f"{stat['mean']:.{digits}f} ({stat['low']:.{digits}f}–{stat['high']:.{digits}f})"


def hippocampus(result: dict[str, Any]) -> list[str]:
    test = result["test"]
    lines = [
        "## Hippocampus from scratch",
        "",
        f"`bench_finetune.py hippocampus`, `hippocampus.yaml` · {where(result)}",
        "",
        f"`seg-finetune` on all 140 development cases, scored on {test['cases']} test cases on the labels' own grid; "
        f"95 % intervals over cases. Training took {result['train_seconds'] / 60:.0f} minutes, the machine not always "
        f"idle. Goal: mean Dice at least 0.88 in under 40 minutes: "
        f"{reached(test['mean']['dice']['mean'] >= 0.88 and result['train_seconds'] < 2400)}.",
        "",
        f"| class | Dice | NSD at {test['tolerance_mm']:g} mm | HD95, mm |",
        "|---|---|---|---|",
    ]
    for name, row in {**test["classes"], "mean": test["mean"]}.items():
        lines.append(
            f"| {name} | {ends(row['dice'])} | {ends(row['nsd'])} | {ends(row['hd95'], 2)} |"
        )
    return [*lines, ""]


def adrenal(result: dict[str, Any]) -> list[str]:
    test = result["test"]

    def value(key: str) -> str:
        return f"{test[key]:.3f} ({test[key + '_low']:.3f}–{test[key + '_high']:.3f})"

    return [
        "## Adrenal glands from scratch",
        "",
        f"`bench_finetune.py adrenal`, `adrenal.yaml` · {where(result)}",
        "",
        f"`cls-finetune` on AdrenalMNIST3D at 64³, its own sections, {test['n']} test cases, 95 % intervals over cases: AUROC "
        f"{value('auroc')}, balanced accuracy {value('balanced_accuracy')}, F1 {value('f1')}, calibration error {value('ece')}. "
        f"Training took {result['train_seconds'] / 60:.0f} minutes. Goal: AUROC at least 0.84: {reached(test['auroc'] >= 0.84)}.",
        "",
    ]


def finetune_speed(result: dict[str, Any]) -> list[str]:
    loading, infer = result["loading"], result["inference"]
    return [
        "## Fine-tuning against its floor",
        "",
        f"`bench_finetune_speed.py` · {where(result)}",
        "",
        f"**Loading**: with the hippocampus config a step takes {span(loading['step_seconds'], 3)} s from the warm cache with all "
        f"augmentation, {span(loading['step_seconds_fixed'], 3)} s on fixed tensors: {span(loading['throughput_ratio'])} × the "
        f"throughput (goal 0.9: {reached(loading['throughput_ratio']['median'] >= 0.9)}).",
        "",
        f"**Inference** of 256 × 256 × 128 voxels with SegResNet, load and save apart: the sliding window takes "
        f"{span(infer['window_seconds'], 1)} s, what comes before {span(infer['before_seconds'], 1)} s and after "
        f"{span(infer['after_seconds'], 1)} s, together {100 * infer['overhead']['median']:.1f} % on top (goal 10 %: "
        f"{reached(infer['overhead']['median'] <= 0.1)}).",
        "",
    ]


def captions(result: dict[str, Any]) -> list[str]:
    local, resume, memory = result["local"], result["resume"], result["memory"]
    store = load("pretrain")
    growth = memory["growth_of_the_second_half_megabytes"]
    lines = [
        "## Captions",
        "",
        f"`bench_captions.py` · {where(result)}",
        "",
        f"**A local model**: {span(local['ratio'])} × the throughput of its bare `generate()` on ready inputs (batch "
        f"{local['batch']}, {local['new_tokens']} new tokens, LLaVA's architecture with random weights; goal 0.9: "
        f"{reached(local['ratio']['median'] >= 0.9)}).",
        "",
        f"**Resuming**: that nothing is left to do for {resume['volumes']:,} volumes is found in {resume['seconds']:.1f} s "
        f"(goal 10 s: {reached(resume['seconds'] < 10)}).",
        "",
        f"**Memory** over {memory['slices']:,} slices: {growth:+.1f} MB in the second half "
        f"({reached(abs(growth) < 20)}: flat).",
        "",
    ]
    if store:
        rate = store["store"]["fill_slices_per_second"]["median"]
        lines += [
            f"**Time for many volumes**: at the {rate:.1f} slices a second that the bundled teacher does here "
            f"({where(store)}), 48 slices a volume; a captioner's share is 12 calls a volume (4 a plane) at the rate of your model, "
            "for instance:",
            "",
            "| volumes | bundled teacher, this machine | captioner at 1 slice/s | at 10 | at 100 |",
            "|---|---|---|---|---|",
        ]
        for volumes in (100, 1000, 100_000):
            teacher = hours(48 * volumes / rate)
            asked = " | ".join(hours(12 * volumes / speed) for speed in (1, 10, 100))
            lines.append(f"| {volumes:,} | {teacher} | {asked} |")
        lines.append("")
    return lines


def hours(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def served(result: dict[str, Any]) -> list[str]:
    lines = [
        "## A served captioner against a plain load generator",
        "",
        f"`bench_served.py` · {where(result)}",
        "",
        f"A server that answers after {result['delay_seconds']:g} s (± {100 * result['jitter']:.0f} %), slices of {result['pixels']} px; "
        "the plain one sends bodies made beforehand. Goal 0.9.",
        "",
        "| requests at once | ours, per second | plain, per second | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['concurrency']} | {span(row['ours_per_second'], 1)} | {span(row['plain_per_second'], 1)} "
            f"| {span(row['ratio'])} | {reached(row['ratio']['median'] >= 0.9)} |"
        )
    return [*lines, ""]


def clicks(result: dict[str, Any]) -> list[str]:
    steps = result["clicks"]
    means = [step["dice"]["mean"] for step in steps.values()]
    gain, rises = means[-1] - means[0], means == sorted(means)
    labelled = result.get("labelled")
    name = f"clicks_{labelled}" if labelled else "clicks"
    return [
        f"## Clicks, trained on {labelled or 'all 140'} labelled cases",
        "",
        f"`bench_clicks.py score{f' --labelled {labelled} --epochs ' + str(result['epochs']) if labelled else ''}`, `hippocampus.yaml` with "
        f"`click.yaml` · {where(result)}",
        "",
        f"Simulated on {result['cases']} test cases: each click in the largest error, at its most interior voxel, in the stored file's voxels. "
        f"Training took {result['train_seconds'] / 60:.0f} minutes of one thread on a busy machine. From 0 to {len(means) - 1} clicks mean "
        f"Dice rises by {gain:.3f} (goal: by 0.03, each step upwards: {reached(gain >= 0.03 and rises)}).",
        "",
        "| clicks | Dice | NSD | HD95, mm |",
        "|---|---|---|---|",
        *(
            f"| {n} | {ends(step['dice'])} | {ends(step['nsd'])} | {ends(step['hd95'], 2)} |"
            for n, step in steps.items()
        ),
        "",
        f"![mean Dice after each click](figures/{name}.png)",
        "",
    ]


def label(result: dict[str, Any]) -> list[str]:
    asked, taught = result["answers"], result["round"]
    seconds, dice, size = asked["seconds"], taught["dice"], asked["size"]
    loads = [start["load_average"] for start in asked["starts"]]
    steps = {
        name: median(start["parts"][name] for start in asked["starts"])
        for name in asked["starts"][0]["parts"]
        if name != "total"
    }
    slow = sorted((step for step in steps.items() if step[1] >= 0.02), key=lambda step: -step[1])
    return [
        "## MONAI Label",
        "",
        f"`bench_label.py` · {where(result)}; MONAI Label {result['monailabel']}",
        "",
        f"Our app over REST on {size}³ voxels with the U-Net of `quickstart.yaml` in one window, {asked['threads']} threads, "
        f"{len(asked['starts'])} starts at a load average of {min(loads):.1f} to {max(loads):.1f}; median (least–greatest).",
        "",
        f"**From the command to the first overlay**: {span(seconds['command_to_overlay'], 1)} s (goal under 30 s: "
        f"{reached(seconds['command_to_overlay']['median'] < 30)}), of which {span(seconds['start'], 1)} s until the server answers.",
        "",
        f"**A click's answer**: {span(seconds['click'])} s (goal under 2 s: {reached(seconds['click']['median'] < 2)}); the bare network "
        f"takes {span(seconds['network_alone'])} s, a model's first click {span(seconds['first_click'])} s. Where the server's time goes: "
        + ", ".join(f"{name.split()[-1]} {step:.2f} s" for name, step in slow)
        + ".",
        "",
        f"**A round of correcting and training**: {taught['cases']} hippocampus development cases by a network from "
        f"{taught['start_from']}, before and after {taught['epochs']} epochs ({taught['train_seconds'] / 60:.0f} minutes) on "
        f"{taught['corrected']} others that were corrected: mean Dice {ends(dice['before'])} and {ends(dice['after'])}, "
        f"gain {ends(dice['gain'])}, 95 % intervals over cases (goal a rise: {reached(dice['gain']['low'] > 0)}).",
        "",
    ]


def backbones(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Backbones",
        "",
        "`MED3D_WRITE=1 python -m pytest tests/test_finetune.py`: each network at a small width, pre-trained for two steps, transferred, "
        "trained for two steps, and run. What arrived from pre-training:",
        "",
        "| backbone | pretrain | seg-finetune | cls-finetune |",
        "|---|---|---|---|",
    ]
    for name, row in result.items():
        lines.append(
            f"| {name} | {row['pretrain']} | {row['seg-finetune']} | {row['cls-finetune']} |"
        )
    return [*lines, ""]


def exports(result: dict[str, Any]) -> list[str]:
    rows, files = result["rows"], ("model.ts", "model.onnx")
    missing = [
        f"{name} {file}" for name, row in rows.items() for file in files if "way" not in row[file]
    ]
    worst = {file: max((row[file]["max_relative_error"] for row in rows.values() if "way" in row[file]), default=0.0)
             for file in files}  # fmt: skip
    lines = [
        "## TorchScript and ONNX of every backbone",
        "",
        f"`bench_exports.py` · {where(result)}; onnx {result['exporters']['onnx']}, onnxruntime {result['exporters']['onnxruntime']}",
        "",
        f"`export` on {len(rows)} backbones of the fine-tuning bundles at their own width, with random weights, in eval mode (without the "
        "outputs of deep supervision). Largest difference from PyTorch as a share of the largest output, on the CPU: TorchScript "
        f"{worst['model.ts']:.1e}, ONNX {worst['model.onnx']:.1e}; a file above {result['tolerance']:g} would not be kept. Batch: what "
        "the file was seen to take; spatial sizes of a trace and of ONNX are those of the input. Seconds: of exporting, on a busy machine. Not exported: "
        f"{', '.join(missing) or 'none'}.",
        "",
        "| backbone | input | TorchScript | batch | difference | s | ONNX | batch | difference | s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [name, " × ".join(map(str, row["size"]))]
        for file in files:
            made = row[file]
            if "way" in made:
                cells += [
                    made["way"],
                    str(made["shape"][0]),
                    f"{made['max_relative_error']:.1e}",
                    f"{made['seconds']:.0f}",
                ]
            else:
                cells += ["none", "", "", ""]
        onnx = row["model.onnx"]
        lines.append(
            f"| {' | '.join(cells)} | {onnx['bytes'] / 1e6:.1f} |"
            if "way" in onnx
            else f"| {' | '.join(cells)} | |"
        )
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        for file in files:
            for way, why in row[file].get("failed", {}).items():
                text = why if len(why) <= 140 else why[:140] + " …"
                reasons.setdefault(f"{file}, {way}: `{text}`", []).append(name)
    lines += ["", "What did not work, and the first line of why:", ""]
    lines += [f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return [*lines, ""]


SECTIONS = {
    "pretrain": pretrain, "captions": captions, "served": served,
    "transport": transport, "sarcoma": sarcoma, "hippocampus": hippocampus,
    "clicks": clicks, "clicks_14": clicks, "label": label, "adrenal": adrenal, "finetune_speed": finetune_speed, "backbones": backbones,
    "exports": exports,
}  # fmt: skip


def readme() -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `tables.py` from `results/*.json`; each JSON by the script named beside it.",
        "",
    ]
    for name, section in SECTIONS.items():
        result = load(name)
        if result is not None:
            lines += section(result)
    return "\n".join(lines)


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme())
