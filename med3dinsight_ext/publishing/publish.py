"""Published bundles: folders that run alone, for the Model Zoo and Hugging Face."""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser
from torch import Tensor, nn

from med3dinsight_ext.io.bundles import kind_of
from med3dinsight_ext.io.errors import first_line
from med3dinsight_ext.io.files import move
from med3dinsight_ext.publishing.bundle import (
    PLACES,
    as_json,
    channel_names,
    check_click,
    filled_state,
    find_bundle,
    measured_metadata,
    merged_configs,
    takes_clicks,
    weights_file,
)
from med3dinsight_ext.publishing.card import METADATA, front_matter, read_card, readme
from med3dinsight_ext.publishing.scores import INFERENCE, read_scores
from med3dinsight_ext.publishing.vendoring import pins, reached_modules, requirements, vendored
from med3dinsight_ext.publishing.zoo import LARGE, NAME, PACKAGE, TASKS, VERSION, teacher_pins
from med3dinsight_ext.training.origin import without_images
from med3dinsight_ext.training.record import FILE, read_record, weights_hash

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
COPIED = ("LICENSE", "configs/logging.conf")
OVERLAYS = ("evaluate", "multi_gpu_train", "embed")  # of train.json
BEFORE = r"(?<![\w.>])(?<!\+ ['\"])"  # the path goes on from a name, or joins what a key holds
HOME = re.compile(BEFORE + r"(?:/(?:home|Users|root|mnt|tmp)/|~/|[A-Z]:\\\w)[^\s\"']*")


def publish(
    bundle: str,
    weights: str,
    name: str,
    out: str,
    overlays: str | Sequence[str] = "",
    click: bool = False,
    metrics: str | None = None,
    card: str | None = None,
    version: str = "0.1.0",
    changes: str | Sequence[str] = "first version",
    large_files_url: str = "",
) -> None:
    """Write ``out``/``name``, a bundle that runs without this package, and ``name``.zip.

    The same input gives the same bytes. Configs and card repeat the training that models/run.json
    records; paths of this machine (``bundle.PLACES``) are reset to the bundle's defaults.

    Args:
        bundle: pretrain, seg-finetune or cls-finetune, or a folder made of one.
        weights: models/model.pt of its training; pretrain needs student.pt beside it too.
        name: task and modality in lower case with underscores; with clicks it contains "deepedit".
        out: folder that gets the two.
        overlays: config files that it was trained with, separated by commas, if there is no record.
        click: it was trained with click.yaml; also from the record.
        metrics: JSON that ``evaluate`` wrote: eval/metrics.json, of pretrain eval/retrieval.json.
        card: YAML file about the model; its keys are ``card.KEYS``.
        version: of the model, three numbers.
        changes: entry of the changelog.
        large_files_url: location of files over 25 MB, each at this URL and its path.

    Raises:
        ValueError: something is missing, does not fit together, or names a place on this machine.
    """
    source, folder = find_bundle(bundle), Path(out) / str(name)
    if not (source / "configs" / "inference.json").is_file():
        raise ValueError(f"bundle must hold configs/inference.json, got {bundle}; correct the path")
    record = read_record(weights)
    click = click or takes_clicks(record)
    check_names(source, folder, click, version)
    files = contents(
        source,
        Path(weights),
        folder.name,
        overlays,
        click,
        metrics,
        card,
        version,
        change_text(changes),
        record,
    )
    check_places(files, (bundle, weights, out, ".", *(path for path in (card, metrics) if path)))
    large = [path for path, data in files.items() if len(data) > LARGE]
    if large:
        files["large_files.yml"] = large_files(files, large, large_files_url)
    write(folder, dict(sorted(files.items())), large)
    print(f"wrote {folder} and {folder}.zip; python -m med3dinsight_ext verify {folder}")


def check_names(source: Path, folder: Path, click: bool, version: str) -> None:
    """Check names and numbers before anything is read."""
    if not re.fullmatch(NAME, folder.name):
        raise ValueError(
            f"name must be task_modality in lower case, got {folder.name}; for instance "
            "hippocampus_mr_segmentation"
        )
    if not any(task in folder.name for task in TASKS):
        raise ValueError(f"name must contain the task, got {folder.name}; add one of {TASKS}")
    check_click("name", folder.name, click)
    if click and not (source / "configs" / "click_inference.yaml").is_file():
        raise ValueError(f"click must be False for {source}, got True; seg-finetune takes clicks")
    if not re.fullmatch(VERSION, str(version)):
        raise ValueError(f"version must be three numbers, got {version}; for instance 0.1.0")
    if files := [path for path in folder.parents if path.is_file()]:
        raise ValueError(f"out must be a folder, got the file {files[0]}; choose another")
    for path in (folder, folder.with_name(f"{folder.name}.zip")):
        if path.exists():
            raise ValueError(f"out must not hold {path.name} yet, got {path}; choose another")


def change_text(changes: object) -> str:
    """Entry of the changelog; the command line parses "a, b" as a tuple and "2" as a number."""
    text = ", ".join(map(str, changes)) if isinstance(changes, (list, tuple)) else changes
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"changes must be text, got {changes!r}; say what is new in this version")
    return text


def contents(
    source: Path,
    weights: Path,
    name: str,
    overlays: str | Sequence[str],
    click: bool,
    metrics: str | None,
    card: str | None,
    version: str,
    changes: str,
    record: Mapping[str, Any] | None,
) -> dict[str, bytes]:
    """Every file of the folder by its path in it; arguments as in ``publish``."""
    facts = read_card(card)
    kind = kind_of(source)
    configs = release_configs(source, overlays, click, record)
    train, inference = configs["train"], configs["inference"]
    names = channel_names(kind, inference)
    classes = {"segmentation": names[1:], "classification": names}
    measured = weights_hash(weights) if metrics else None
    parser = ConfigParser(dict(inference))
    used = {key: parser.get_parsed_content(key) for key in INFERENCE if key in inference}
    scores = read_scores(metrics, kind, classes.get(kind, ()), measured, used)
    network = parser.get_parsed_content("network_def")
    state = filled_state(network, weights)
    files = {"models/model.pt": weights_file(state)}
    if kind == "pretraining":
        files["models/student.pt"] = weights_file(student_state(inference, weights, state))
    modules = reached_modules(configs.values())
    metadata = measured_metadata(source, network, inference)
    metadata |= {key: facts[key] for key in METADATA if key in facts}
    metadata |= {
        "name": facts.get("title", metadata["name"]),
        "version": version,
        "changelog": {version: changes},
        "required_packages_version": {
            **pins(metadata, requirements(modules, configs.values())),
            **teacher_pins(inference),
        },
        "eval_metrics": scores.flat,
    }
    fault = torchscript_fault(network)
    traced = bool(fault) and traces(network, metadata["network_data_format"]["inputs"]["image"])
    text = readme(name, kind, metadata, train, facts, scores, fault, traced, record)
    weights_licence = facts.get("license", "other")
    licence = (source / "docs" / "data_license.txt").read_text("utf-8")
    licence = facts.get("data_license", licence.replace("no data and no weights", "no data"))
    texts = {
        "README.md": front_matter(name, kind, metadata, weights_licence, scores.validated) + text,
        "docs/README.md": text,
        "docs/data_license.txt": licence.rstrip() + "\n",
        "configs/metadata.json": as_json({"schema": SCHEMA, **metadata}),
        **{f"configs/{stem}.json": as_json(config) for stem, config in configs.items()},
        **{path: (source / path).read_text("utf-8") for path in COPIED},
        **vendored(modules),
    }
    if record is not None:
        hidden = {k: v for k, v in without_images(record).items() if k != "command"}
        evaluated = {k: v for k, v in record["evaluated"].items() if k not in PLACES}
        texts[f"models/{FILE}"] = as_json({**hidden, "config": train, "evaluated": evaluated})
    return files | {path: text.encode() for path, text in texts.items()}


def release_configs(
    source: Path, overlays: str | Sequence[str], click: bool, record: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Configs by their stems: those of the training, without drawings."""
    merged = merged_configs(source, overlays, click, record)
    own = ConfigParser.load_config_file(source / "configs" / "inference.json")
    given, teacher = own.get("teacher"), merged["inference"].get("teacher")
    if isinstance(given, dict) and isinstance(teacher, dict) and "_disabled_" in given:
        merged["inference"]["teacher"] = {"_disabled_": given["_disabled_"], **teacher}
    if kind_of(source) == "pretraining" and "handlers" in merged["inference"]:
        merged["inference"]["handlers"] = without_reports(merged["inference"]["handlers"])
    if kind_of(source) == "pretraining":
        merged["train"]["train_handlers"] = without_reports(merged["train"]["train_handlers"])
    paths = {stem: source / "configs" / f"{stem}.json" for stem in OVERLAYS}
    return merged | {
        stem: dict(ConfigParser.load_config_file(path))
        for stem, path in paths.items()
        if path.is_file()
    }


def without_reports(handlers: Any) -> Any:
    """Handlers, a list or a mapping by names, without those that draw figures."""

    def draws(handler: Any) -> bool:
        target = handler.get("_target_") if isinstance(handler, Mapping) else None
        return str(target).startswith(f"{PACKAGE}.reports.")

    if isinstance(handlers, Mapping):
        return {name: handler for name, handler in handlers.items() if not draws(handler)}
    return [handler for handler in handlers if not draws(handler)]


def student_state(
    config: Mapping[str, Any], weights: Path, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """State of the student in the file beside a pre-trained network's weights.

    Args:
        config: inference config of pretrain.
        weights: model.pt.
        state: what it holds, and what the student's network must be.
    """
    path = weights.parent / "student.pt"
    if not path.is_file():
        raise ValueError(
            f"weights must have student.pt beside them, which inference reads, got none in "
            f"{weights.parent}; the training wrote it there"
        )
    student = ConfigParser({**config, "checkpoint": str(path)}).get_parsed_content("student")
    found = filled_state(student, path)
    if any(not torch.equal(found[f"network.{key}"], value) for key, value in state.items()):
        raise ValueError(
            f"student.pt must hold the network of {weights.name}, got another in {weights.parent}; "
            "take both from one training"
        )
    return found


def torchscript_fault(network: nn.Module) -> str:
    """Why TorchScript cannot take a network, in a line; "" if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; the Model Zoo uses it
            torch.jit.script(network.eval())
    except Exception as error:  # of its compiler
        return re.sub(r"0x[0-9a-f]+", "0x…", first_line(error)).rstrip(":")
    return ""


def traces(network: nn.Module, image: Mapping[str, Any]) -> bool:
    """Whether a trace of a network returns what the network does, of another input too.

    Args:
        network: that scripting cannot take.
        image: metadata of its input.
    """
    shape = 1, image["num_channels"], *image["spatial_shape"]
    generator = torch.Generator().manual_seed(0)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            trace = torch.jit.trace(network.eval(), torch.zeros(shape), check_trace=False)
            other = torch.rand(shape, generator=generator)
            return torch.allclose(trace(other), network(other), rtol=1e-4, atol=1e-4)
    except Exception:  # of its tracer
        return False


def check_places(files: Mapping[str, bytes], given: Iterable[str]) -> None:
    """Check that no text names a place on this machine.

    Args:
        files: by path; weights hold no paths.
        given: paths that the command came with.
    """
    paths = [path.resolve() for path in (Path.home(), *map(Path, given))]
    places = {path.parent if path.is_file() else path for path in paths}
    known = sorted(str(place) for place in places if place != place.parent)
    for path, data in sorted(files.items(), key=lambda file: not file[0].startswith("configs/")):
        text = "" if path.endswith(".pt") else data.decode()
        found = [match.group() for match in HOME.finditer(text)]
        found += [place for place in known if re.search(f"{BEFORE}{re.escape(place)}/", text)]
        for place in found:
            raise ValueError(
                f"{path} must not name a place on this machine, got {place}; take it out of the "
                "overlays, the config that was trained, or the card"
            )


def large_files(files: Mapping[str, bytes], large: Iterable[str], url: str) -> bytes:
    """large_files.yml, from which MONAI loads what is not in a release."""
    if not url:
        raise ValueError(
            f"large_files_url must be given for {', '.join(large)} over {LARGE // 10**6} MB, got "
            "none; name the address that they will be uploaded to, like https://example.org/release"
        )
    rows = [
        {
            "path": path,
            "url": f"{url.rstrip('/')}/{path}",
            "hash_val": hashlib.sha256(files[path]).hexdigest(),
            "hash_type": "sha256",
        }
        for path in large
    ]
    return yaml.safe_dump({"large_files": rows}, sort_keys=False).encode()


def write(folder: Path, files: Mapping[str, bytes], large: Iterable[str]) -> None:
    """A folder and its zip, which is without the large files; both appear whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".publish-") as place:
        draft = Path(place) / folder.name
        for path, data in files.items():
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            (draft / path).write_bytes(data)
        with zipfile.ZipFile(draft.with_name(f"{folder.name}.zip"), "w") as archive:
            for path in [path for path in files if path not in large]:
                entry = zipfile.ZipInfo(f"{folder.name}/{path}")  # of 1980
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, files[path])
        move(draft, folder)
        move(draft.with_name(f"{folder.name}.zip"), folder.with_name(f"{folder.name}.zip"))
