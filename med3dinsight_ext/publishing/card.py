"""README and model card of a published bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from monai.bundle import ConfigParser

from med3dinsight_ext.io.errors import advice
from med3dinsight_ext.publishing.scores import Scores, escaped
from med3dinsight_ext.publishing.zoo import NO_TORCHSCRIPT, PACKAGE, PINS, TEACHER_PINS
from med3dinsight_ext.reports.run_facts import run_facts

METADATA = ("task", "description", "authors", "copyright", "data_source", "references",
            "intended_use")  # fmt: skip
KEYS = ("title", "data", "data_license", "license", "training", "limits", *METADATA)
TASKS = {
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "pretraining": "image-feature-extraction",
}
USED = {"spacing": 3, "ct_range": 2}  # keys of train, and their numbers
ONNX = "onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.23.2"  # also of Python 3.10


def read_card(path: str | Path | None) -> dict[str, Any]:
    """Facts about a model that only its publisher has, from a YAML file.

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
            hint = advice(key, KEYS, f"known are {', '.join(KEYS)}")
            raise ValueError(f"card must have known keys, got {key} in {path}; {hint}")
        kind = list if key == "references" else str
        if not isinstance(value, kind):
            raise ValueError(f"card {key} must be a {kind.__name__}, got {value!r} in {path}")
        for text in value if kind is list else ():
            if not isinstance(text, str):
                raise ValueError(
                    f"card references must be texts, got {text!r} in {path}; put quotation marks "
                    "around one with a colon"
                )
    licence = card.get("license", "other")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ValueError(
            f"card license must be SPDX in lower case, got {licence!r} in {path}; cc-by-sa-4.0"
        )
    return card


def front_matter(
    name: str, kind: str, metadata: Mapping[str, Any], licence: str, validated: bool = False
) -> str:
    """Hugging Face's metadata at the head of README.md: YAML between dashes.

    Args:
        name: of the folder.
        kind: of ``TASKS``.
        metadata: as published.
        licence: of the weights, in SPDX.
        validated: the scores are of cases of the training's validation.
    """
    head: dict[str, Any] = {"library_name": "monai", "license": licence}
    head["tags"] = ["monai", "medical", kind, "3d"]
    split = {"split": "validation"} if validated else {}
    if scores := metadata["eval_metrics"]:
        result = {
            "task": {"type": TASKS[kind]},
            "dataset": {"name": metadata["data_source"], "type": "medical-volumes", **split},
            "metrics": [{"type": key, "value": value} for key, value in scores.items()],
        }
        head["model-index"] = [{"name": name, "results": [result]}]
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n\n"


def used_settings(train: Mapping[str, Any]) -> dict[str, Any]:
    """Spacing and ct_range of a train config.

    Raises:
        ValueError: they do not have the numbers that they need.
    """
    parser = ConfigParser(dict(train))
    used = {key: parser.get_parsed_content(key) for key in USED}
    for key, count in USED.items():
        if not isinstance(used[key], (list, tuple)) or len(used[key]) != count:
            raise ValueError(f"{key} must be {count} numbers, got {used[key]}; correct the overlay")
    return used


def readme(
    name: str, kind: str, metadata: Mapping[str, Any], train: Mapping[str, Any],
    card: Mapping[str, Any], scores: Scores, fault: str, traced: bool,
    record: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The text in the section order of MONAI's Model Zoo, from templates/README.md.j2.

    Args:
        name: of the folder.
        kind: of ``TASKS``.
        metadata: as published.
        train: train config as published.
        card: from ``read_card``.
        scores: from ``read_scores``.
        fault: why TorchScript cannot take the network; "" if it can.
        traced: whether a trace can.
        record: of the training, from ``read_record``.

    Raises:
        ValueError: as ``used_settings``.
    """
    data = metadata["network_data_format"]
    image, pred = data["inputs"]["image"], data["outputs"]["pred"]
    used = used_settings(train)
    backbone = train["backbone"] or train["network_def"]  # of frozen 2D features
    pins = {key: metadata[value] for key, value in PINS.items()}
    pins |= metadata["required_packages_version"]
    example = {"image": "a.nii.gz", list(pred["channel_def"].values())[-1]: [[31, 40, 22]]}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["escaped"] = escaped
    return environment.get_template("README.md.j2").render(
        name=name, kind=kind, metadata=metadata, image=image, pred=pred, used=used, train=train,
        card=dict.fromkeys(KEYS, "") | dict(card), ran=run_table(record), scores=scores,
        fault=fault, traced=traced,
        size=" × ".join(map(str, image["spatial_shape"])),
        spacing=" × ".join(map(str, used["spacing"])),
        network=backbone.get("_target_") if isinstance(backbone, Mapping) else backbone,
        pins=[f"{key}=={value}" for key, value in pins.items()],
        teacher=[f"{key}=={value}" for key, value in TEACHER_PINS.items()],
        click_example=json.dumps(example) if image["num_channels"] > 1 else "",
        package=PACKAGE, no_torchscript=NO_TORCHSCRIPT, onnx=ONNX,
    )  # fmt: skip


def run_table(record: Mapping[str, Any] | None) -> str:
    """Markdown table of what a training ran with.

    Args:
        record: from ``read_record``; None gives "not recorded" in every row.
    """
    rows = run_facts(record)
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in rows.items())])
