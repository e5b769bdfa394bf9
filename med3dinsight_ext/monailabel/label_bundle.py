"""Makes a trained network a folder that annotation servers, viewers and strangers can use."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser
from torch import Tensor, nn

from med3dinsight_ext.io.configs import with_shared
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.training.weights import read_weights

BUNDLE = Path(__file__).parents[2] / "bundles" / "seg-finetune"
NAMES = {"segmentation": "label_names", "classification": "class_names"}  # keys of configs
MOST_VALUES = 100_000  # of an overlay
COPIED = ("LICENSE", "docs", "configs/multi_gpu_train.json", "configs/logging.conf")


def label_bundle(
    target: str, weights: str, overlays: str | Sequence[str] = (), click: bool = False,
    bundle: str | Path = BUNDLE,
) -> None:  # fmt: skip
    """Write a seg-finetune bundle for MONAI Label, which reads no overlays.

    Args:
        target: new folder; its name is the model's, and with clicks must contain "deepedit", which
            tells the viewers to offer points.
        weights: model.pt of a training with the same overlays.
        overlays: config files that it was trained with, separated by commas: backbone, label names.
        click: it was trained with click.yaml.
        bundle: folder of seg-finetune.

    Raises:
        ValueError: the folder is there already, its name does not suit clicks, or the weights are
            not those of the network that the configs describe.
    """
    folder, configs = Path(target), Path(bundle) / "configs"
    if folder.exists():
        raise ValueError(f"target must be a new folder, got {target}; choose another name")
    check_click("target", folder.name, click)
    merged = merged_configs(configs, overlays, click)
    network = ConfigParser(merged["inference"]).get_parsed_content("network_def")
    state = fill(network, weights)
    metadata = measured(configs / "metadata.json", network, merged["inference"])
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "configs").mkdir(parents=True)
    for name in COPIED:
        source = Path(bundle) / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, draft / name)
    for name, content in {**merged, "metadata": metadata}.items():
        (draft / "configs" / f"{name}.json").write_text(as_json(content), "utf-8")
    write_atomic(draft / "models" / "model.pt", lambda path: path.write_bytes(saved(state)))
    draft.rename(folder)
    print(f"wrote {folder}; python -m med3dinsight_ext label --studies DIR --bundles {folder}")


def check_click(argument: str, name: str, click: bool) -> None:
    """Whether a network's name tells what it takes; ``argument`` is what the name came as."""
    if not isinstance(click, bool):
        raise ValueError(f"click must be True or False, got {click!r}")
    if click and "deepedit" not in name.lower():
        raise ValueError(
            f"{argument} must have a name with deepedit for a network that takes clicks, got "
            f"{name}; call it deepedit_{name}"
        )


def merged_configs(
    configs: Path, overlays: str | Sequence[str], click: bool
) -> dict[str, dict[str, Any]]:
    """A bundle's train and inference configs with the overlays that a network was trained with.

    Args:
        configs: folder of the bundle's.
        overlays: files, separated by commas.
        click: click.yaml and click_inference.yaml come last.
    """
    listed = overlays.split(",") if isinstance(overlays, str) else overlays
    paths = [path for path in (str(path).strip() for path in listed) if path]
    for path in paths:
        _check_overlay(path)
    merged = {}
    for name, last in (("train", "click.yaml"), ("inference", "click_inference.yaml")):
        files = [*with_shared(configs / f"{name}.json"), *paths]
        files += [str(configs / last)] if click else []
        with readable("overlays", ", ".join(paths) or configs, "correct them"):
            merged[name] = dict(ConfigParser.load_config_files(files))
    return merged


def _check_overlay(path: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"overlays must be files, got {path}; correct the path")
    try:
        content = ConfigParser.load_config_file(path)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"overlays must be JSON or YAML, got {path}: {cause}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"overlays must be mappings, got {type(content).__name__} in {path}; write key: value"
        )
    if _values(content, {}) > MOST_VALUES:
        raise ValueError(
            f"overlays must have at most {MOST_VALUES} values, got more in {path}, whose anchors "
            "repeat each other; write them out"
        )


def _values(node: Any, known: dict[int, int]) -> int:
    """Number of values below a node where anchors are written out, as MONAI's parser does."""
    if not isinstance(node, (dict, list)):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # of a node that holds itself
        below = node.values() if isinstance(node, dict) else node
        known[id(node)] = 1 + sum(_values(value, known) for value in below)
    return known[id(node)]


def kind_of(configs: Path) -> str:
    """What a bundle is for, whatever overlays hold: a key of ``NAMES``, or "pretraining".

    Args:
        configs: folder of the bundle's.
    """
    own = ConfigParser.load_config_file(configs / "inference.json")
    return next((kind for kind, key in NAMES.items() if key in own), "pretraining")


def channel_names(kind: str, config: Mapping[str, Any]) -> list[str]:
    """Names of what a network returns, one a channel.

    Args:
        kind: from ``kind_of``.
        config: inference config.

    Raises:
        ValueError: they are not different, non-empty texts.
    """
    if kind not in NAMES:
        return ["reconstruction"]
    names = ConfigParser(dict(config)).get_parsed_content(NAMES[kind])
    listed = isinstance(names, (list, tuple))
    texts = listed and all(isinstance(name, str) and name.strip() for name in names)
    if not texts or len(set(names)) < len(names):
        raise ValueError(
            f"{NAMES[kind]} must be a list of different texts, got {names}; quote them, as YAML "
            "reads no, on and 0 otherwise"
        )
    return list(names)


def fill(network: nn.Module, weights: str | Path) -> dict[str, Tensor]:
    """Load weights into a network, all of them; returns its state."""
    state = read_weights(weights)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"weights must be those of the network that the configs describe, got {weights}: "
            f"{str(error).splitlines()[-1].strip()} Name the overlays of its training"
        ) from error
    return network.state_dict()


def saved(state: Mapping[str, Tensor]) -> bytes:
    """A weights file whose bytes depend on nothing but the weights."""
    stream = io.BytesIO()  # a path's name would stand in the archive
    torch.save({name: value.detach().cpu().clone() for name, value in state.items()}, stream)
    return stream.getvalue()


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def measured(path: Path, network: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """A bundle's metadata with the sizes, channels and classes of one network, which is run once.

    Args:
        path: metadata.json of the bundle, in the folder of its configs.
        network: of ``config``.
        config: inference config.

    Raises:
        ValueError: the network returns no tensor, or other channels than there are names; or these
            are no names.
    """
    metadata = json.loads(path.read_text("utf-8"))
    parser = ConfigParser(dict(config))
    size = list(parser.get_parsed_content("patch_size"))
    backbone = config.get("backbone")
    counted = isinstance(backbone, Mapping) and "in_channels" in backbone
    channels = parser.get_parsed_content("backbone::in_channels") if counted else 1
    with torch.no_grad():
        output = network.eval()(torch.zeros(1, channels, *size))
    if not isinstance(output, Tensor):
        raise ValueError(f"network must return a tensor, got {type(output).__name__}")
    kind = kind_of(path.parent)
    names = channel_names(kind, config)
    if output.shape[1] != len(names):
        raise ValueError(
            f"network must return a channel for each of {names}, got {output.shape[1]}; "
            "name the overlay with their names"
        )
    image, pred = (metadata["network_data_format"][side][name]
                   for side, name in (("inputs", "image"), ("outputs", "pred")))  # fmt: skip
    inputs = ["image"] if channels == 1 else ["image", *(f"clicks: {name}" for name in names)]
    image |= _shape(torch.Size((1, channels, *size)), torch.float32, inputs)
    pred |= _shape(output.shape, output.dtype, names)
    if kind == "segmentation":
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        metadata["label_classes"] = f"one channel: {listed}"
    return metadata


def _shape(shape: torch.Size, dtype: torch.dtype, names: Sequence[str]) -> dict[str, Any]:
    return {
        "num_channels": shape[1],
        "spatial_shape": list(shape[2:]),
        "dtype": str(dtype).removeprefix("torch."),
        "channel_def": {str(i): name for i, name in enumerate(names)},
    }
