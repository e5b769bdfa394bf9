"""A trained bundle: merged configs, weights that fit them, and metadata of its network."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from torch import Tensor, nn

from med3dinsight_ext.io.bundles import NAMES, bundles_dir, config_files, kind_of
from med3dinsight_ext.io.reading import readable
from med3dinsight_ext.training.weights import read_weights

MOST_VALUES = 100_000  # of an overlay

OF_OVERLAYS = ("unlabelled", "soft_weights")  # None without
PLACES = ("bundle_root", "dataset_dir", "datalist", "split", "captions", "pretrained", "ckpt_dir",
          "output_dir", "store_dir", "prepared", *OF_OVERLAYS)  # fmt: skip
SAME = ("spacing", "patch_size", "ct_range", "modality", "label_names", "class_names")
MACHINE = ("device", "subset")
RUN = ("imports", "initialize", "run", "finalize", "evaluator")  # differ between the configs
DATA = ("train::dataset::data", "validate::dataset::data")  # lists of files by MONAI Label
LOADING = "load_transforms"  # which inference repeats
ATTACHED = ("CheckpointLoader", "MLFlowHandler", "med3dinsight_ext.training.tracking.Tracking")


def find_bundle(bundle: str | Path) -> Path:
    """A bundle's folder by its path, or by the name of one that comes with the package."""
    return Path(bundle) if Path(bundle).is_dir() else bundles_dir() / bundle


def check_click(argument: str, name: str, click: bool) -> None:
    """Check that a network with click channels has a name that viewers recognize.

    Args:
        argument: that the name came as.
        name: of the network.
        click: whether it has click channels.
    """
    if not isinstance(click, bool):
        raise ValueError(f"click must be True or False, got {click!r}")
    if click and "deepedit" not in name.lower():
        raise ValueError(
            f"{argument} must have a name with deepedit for a network that takes clicks, got "
            f"{name}; call it deepedit_{name}"
        )


def merged_configs(
    bundle: Path,
    overlays: str | Sequence[str] = "",
    click: bool = False,
    record: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """A bundle's train and inference configs as a network was trained, without this machine.

    Args:
        bundle: folder of the bundle.
        overlays: files, separated by commas.
        click: click.yaml and click_inference.yaml come last.
        record: of the training, from ``read_record``; its config is taken, and overlays and click
            must agree with it.
    """
    listed = overlays.split(",") if isinstance(overlays, str) else overlays
    paths = [path for path in (str(path).strip() for path in listed) if path]
    for path in paths:
        _check_overlay(path)
    recorded = (record or {}).get("config")
    train = _elsewhere(recorded, bundle) if recorded else {}
    if train:
        _check_agreement(bundle, paths, click, train)
    merged = {}
    for name, last in (("train", "click.yaml"), ("inference", "click_inference.yaml")):
        files = config_files(bundle, name)
        plain = _load(files)
        more = [bundle / "configs" / last] if click else []
        with readable("overlays", ", ".join(paths) or bundle, "correct them"):
            merged[name] = _load([*files, *(() if train else paths), *more])
        merged[name] |= {key: plain[key] for key in PLACES if key in plain}
    config = train or merged["train"]
    if (weights := ConfigParser(config).get("teacher::weights")) is not None:
        raise ValueError(
            f"teacher::weights must be none in a published bundle, got {weights}; it does not "
            "carry an adapted encoder: train with the encoder's own weights"
        )
    if not train:
        return merged
    inference = _as_trained(merged, train, bundle)
    if mirror := (record or {}).get("evaluated", {}).get("mirror"):  # inference has no labels
        inference |= {"mirror_axes": mirror[0], "mirror_pairs": mirror[1]}
    return {"train": train, "inference": inference}


def _check_agreement(
    bundle: Path, overlays: Sequence[str], click: bool, train: Mapping[str, Any]
) -> None:
    """Check that overlays and click are those of a recorded train config."""
    if click and "max_clicks" not in train:
        raise ValueError("click must agree with run.json, got True; it was trained without clicks")
    files = config_files(bundle, "train")
    more = [bundle / "configs" / "click.yaml"] if click else []
    plain, given = _load(files), _load([*files, *overlays, *more]) if overlays else {}
    for key in [key for key in given if key not in (*PLACES, *MACHINE)]:
        if given[key] not in (plain.get(key), train.get(key)):
            raise ValueError(
                f"overlays must agree with run.json, got {key} {given[key]}, trained with "
                f"{train.get(key)}; leave overlays out, the record holds the config"
            )


def _as_trained(
    merged: Mapping[str, dict[str, Any]], train: Mapping[str, Any], bundle: Path
) -> dict[str, Any]:
    """Inference config with what a recorded training changed of the bundle's train config."""
    plain, inference = _load(config_files(bundle, "train")), merged["inference"]
    changed = {key: value for key, value in train.items() if value != plain.get(key)}
    overlays = map(ConfigParser.load_config_file, bundle.glob("configs/*.yaml"))
    own = (overlay.get(LOADING) for overlay in overlays)
    if LOADING in changed and train[LOADING] not in own:
        raise ValueError(
            f"{LOADING} must be the bundle's own, got others in run.json: inference would read "
            "volumes in another way; train with ct_range, modality and spacing in their place"
        )
    for key, value in changed.items():
        if key not in RUN and (key in inference or key not in merged["train"]):
            inference[key] = value
    for key in SAME:  # of a bundle whose train.json was edited and its inference.json was not
        if key in inference and key in train:
            inference[key] = train[key]
    new = [line for line in train["imports"] if line not in plain["imports"]]
    return inference | {"imports": [*inference["imports"], *new]}


def takes_clicks(record: Mapping[str, Any] | None) -> bool:
    """Whether a recorded training was one with click.yaml."""
    return "max_clicks" in ((record or {}).get("config") or {})


def _load(files: Sequence[Path | str]) -> dict[str, Any]:
    return dict(ConfigParser.load_config_files([str(file) for file in files]))


def _elsewhere(config: Mapping[str, Any], bundle: Path) -> dict[str, Any]:
    """A recorded train config without what bound it to its machine, data and launcher."""
    parser = ConfigParser(copy.deepcopy(dict(config)))
    own = ConfigParser(_load(config_files(bundle, "train")))
    launcher = ConfigParser.load_config_file(bundle / "configs" / "multi_gpu_train.json")
    reset = [key for key, value in launcher.items() if key in own and parser.get(key) == value]
    reset += [key for key in DATA if isinstance(parser.get(key), list)]
    reset += [key for key in (*PLACES, *MACHINE) if key in own]
    reset += [key for key in OF_OVERLAYS if key in parser]
    for key in reset:
        parser[key] = own.get(key)
    handlers = parser["train"]["handlers"]
    parser["train"]["handlers"] = [
        handler
        for handler in handlers
        if not isinstance(handler, Mapping) or handler.get("_target_") not in ATTACHED
    ]
    tracking = DEFAULT_MLFLOW_SETTINGS["configs"]
    return {k: v for k, v in parser.get().items() if k in own or k not in tracking}


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


def channel_names(kind: str, config: Mapping[str, Any]) -> list[str]:
    """Names of a network's output channels.

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


def filled_state(network: nn.Module, weights: str | Path) -> dict[str, Tensor]:
    """State of a network after all weights of a file are loaded into it."""
    state = read_weights(weights)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"weights must be those of the network that the configs describe, got {weights}: "
            f"{str(error).splitlines()[-1].strip()} Name the overlays of its training"
        ) from error
    return network.state_dict()


def weights_file(state: Mapping[str, Tensor]) -> bytes:
    """A weights file whose bytes depend on nothing but the weights."""
    stream = io.BytesIO()  # a path's name would stand in the archive
    torch.save({name: value.detach().cpu().clone() for name, value in state.items()}, stream)
    return stream.getvalue()


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def measured_metadata(
    bundle: Path, network: nn.Module, config: Mapping[str, Any]
) -> dict[str, Any]:
    """A bundle's metadata with the sizes, channels and classes of one network, which is run once.

    Args:
        bundle: folder of the bundle.
        network: of ``config``.
        config: inference config.

    Raises:
        ValueError: the network returns no tensor, or other channels than there are names; or these
            are no names.
    """
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text("utf-8"))
    parser = ConfigParser(dict(config))
    size = list(parser.get_parsed_content("patch_size"))
    backbone = config.get("backbone")
    counted = isinstance(backbone, Mapping) and "in_channels" in backbone
    channels = parser.get_parsed_content("backbone::in_channels") if counted else 1
    with torch.no_grad():
        output = network.eval()(torch.zeros(1, channels, *size))
    if not isinstance(output, Tensor):
        raise ValueError(f"network must return a tensor, got {type(output).__name__}")
    kind = kind_of(bundle)
    names = channel_names(kind, config)
    if output.shape[1] != len(names):
        raise ValueError(
            f"network must return a channel for each of {names}, got {output.shape[1]}; "
            "name the overlay with their names"
        )
    groups = ("clicks", "earlier answer")[: (channels - 1) // len(names)]
    inputs = ["image", *(f"{group}: {name}" for group in groups for name in names)]
    data = metadata["network_data_format"]
    data["inputs"]["image"] |= _shape(torch.Size((1, channels, *size)), torch.float32, inputs)
    data["outputs"]["pred"] |= _shape(output.shape, output.dtype, names)
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
