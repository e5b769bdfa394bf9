"""Makes a trained segmentation network a folder that annotation servers and viewers can use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from .files import write_atomic
from .weights import read_weights

BUNDLE = Path(__file__).parents[1] / "bundles" / "seg-finetune"
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
    if not isinstance(click, bool):
        raise ValueError(f"click must be True or False, got {click!r}")
    folder, configs = Path(target), Path(bundle) / "configs"
    if folder.exists():
        raise ValueError(f"target must be a new folder, got {target}; choose another name")
    if click and "deepedit" not in folder.name.lower():
        raise ValueError(
            f"target must have a name with deepedit for a network that takes clicks, got "
            f"{folder.name}; call it deepedit_{folder.name}"
        )
    paths = overlays.split(",") if isinstance(overlays, str) else list(overlays)
    for path in [path for path in map(str, paths) if path and not Path(path).is_file()]:
        raise ValueError(f"overlays must be files, got {path}; correct the path")
    merged = {}
    for name, last in (("train", "click.yaml"), ("inference", "click_inference.yaml")):
        files = [configs / f"{name}.json", *(path for path in paths if path)]
        files += [configs / last] if click else []
        merged[name] = dict(ConfigParser.load_config_files([str(file) for file in files]))
    network = ConfigParser(merged["inference"]).get_parsed_content("network_def")
    state = read_weights(weights)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"weights must be those of the network that the configs describe, got {weights}: "
            f"{str(error).splitlines()[-1].strip()} Name the overlays of its training"
        ) from error
    metadata = _metadata(
        json.loads((configs / "metadata.json").read_text("utf-8")), merged["train"]
    )
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "configs").mkdir(parents=True)
    for name in COPIED:
        source = Path(bundle) / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, draft / name)
    for name, content in {**merged, "metadata": metadata}.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (draft / "configs" / f"{name}.json").write_text(text, "utf-8")
    write_atomic(draft / "models" / "model.pt", lambda path: torch.save(state, path))
    draft.rename(folder)
    print(f"wrote {folder}; python -m med3dinsight_ext label --studies DIR --bundles {folder}")


def _metadata(metadata: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """The bundle's, with the classes and sizes of the merged config."""
    pred, image = (metadata["network_data_format"][side][name]
                   for side, name in (("outputs", "pred"), ("inputs", "image")))  # fmt: skip
    names = train["label_names"]
    pred |= {"num_channels": len(names), "channel_def": {str(i): n for i, n in enumerate(names)}}
    for part in (pred, image):
        part["spatial_shape"] = train["patch_size"]
    return metadata
