"""Bundle folders for MONAI Label, with merged configs and trained weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from monai.bundle import ConfigParser

from med3dinsight_ext.io.files import move, write_atomic
from med3dinsight_ext.publishing.bundle import (
    as_json,
    check_click,
    filled_state,
    find_bundle,
    measured_metadata,
    merged_configs,
    takes_clicks,
    weights_file,
)
from med3dinsight_ext.training.record import FILE, read_record

COPIED = ("LICENSE", "docs", "configs/multi_gpu_train.json", "configs/logging.conf")


def label_bundle(
    target: str,
    weights: str,
    overlays: str | Sequence[str] = (),
    click: bool = False,
    bundle: str = "seg-finetune",
) -> None:
    """Write a seg-finetune bundle for MONAI Label, which reads no overlays.

    Args:
        target: new folder; its name is the model's, and with clicks must contain "deepedit", by
            which viewers offer points.
        weights: model.pt of a training with the same overlays.
        overlays: config files that it was trained with, separated by commas: backbone, label names;
            not needed where models/run.json records them.
        click: it was trained with click.yaml; also from the record.
        bundle: seg-finetune, or a folder made of it.

    Raises:
        ValueError: the folder is there already, its name does not suit clicks, or the weights are
            not those of the network that the configs describe.
    """
    folder, source = Path(target), find_bundle(bundle)
    if folder.exists():
        raise ValueError(f"target must be a new folder, got {target}; choose another name")
    record = read_record(weights)
    click = click or takes_clicks(record)
    check_click("target", folder.name, click)
    merged = merged_configs(source, overlays, click, record)
    network = ConfigParser(merged["inference"]).get_parsed_content("network_def")
    state = filled_state(network, weights)
    metadata = measured_metadata(source, network, merged["inference"])
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "configs").mkdir(parents=True)
    for name in COPIED:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        copy(source / name, draft / name)
    for name, content in {**merged, "metadata": metadata}.items():
        (draft / "configs" / f"{name}.json").write_text(as_json(content), "utf-8")
    write_atomic(draft / "models" / "model.pt", lambda path: path.write_bytes(weights_file(state)))
    if record is not None:
        shutil.copy(Path(weights).with_name(FILE), draft / "models")
    move(draft, folder)
    print(f"wrote {folder}; python -m med3dinsight_ext label --studies DIR --bundles {folder}")
