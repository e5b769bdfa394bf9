"""Checks of a published folder's files, name, README and metadata."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from med3dinsight_ext.publishing.card import run_table
from med3dinsight_ext.publishing.checks.folder import METADATA, PublishedFolder, Skipped, settle
from med3dinsight_ext.publishing.zoo import NAME, TASKS, VERSION
from med3dinsight_ext.training.record import FILE, read_record

FILES = (
    METADATA, "LICENSE", "models/model.pt", "README.md", "docs/README.md",
    "docs/data_license.txt", "configs/logging.conf",
)  # fmt: skip
SECTIONS = (
    "Model Overview", "Data", "Training configuration", "Input", "Output", "Performance",
    "MONAI Bundle Commands", "References", "License",
)  # fmt: skip


def check_files(folder: PublishedFolder) -> str:
    """Mandatory files are there, not empty, and inside of the folder."""
    listed, faults = folder.large(), []
    due = [*FILES, folder.find("configs/inference") or "configs/inference.json"]
    for name in dict.fromkeys([*due, *folder.names()]):
        path = folder.root / name
        if not path.is_file():
            faults += [f"{name} is missing"] if name not in listed else []
        elif not path.resolve().is_relative_to(folder.root):
            faults.append(f"{name} lies outside of the bundle; put the file in the link's place")
        elif name in due and not path.read_bytes()[:80].strip():
            faults.append(f"{name} is empty")
    return settle(faults, f"all {len(due)} are there")


def check_name(folder: PublishedFolder) -> str:
    """The folder's name has the zoo's form and names a task."""
    if not re.fullmatch(NAME, folder.root.name):
        raise ValueError(
            f"{folder.root.name} is not lower-case words joined by underscores; rename it"
        )
    if not any(task in folder.root.name for task in TASKS):
        raise ValueError(f"{folder.root.name} names no task; add one of {', '.join(TASKS)}")
    return folder.root.name


def check_readme(folder: PublishedFolder) -> str:
    """Both READMEs have the zoo's sections in its order."""
    path = folder.root / "docs" / "README.md"
    if not path.is_file():
        raise ValueError("docs/README.md is missing")
    text = path.read_text("utf-8")
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = [title.strip() for title in re.findall(r"^#+ (.*)$", plain, re.MULTILINE)]
    faults = [f"docs/README.md lacks the section {name}" for name in SECTIONS if name not in titles]
    order = [title for title in dict.fromkeys(titles) if title in SECTIONS]
    if not faults and order != list(SECTIONS):
        late = next(got for got, due in zip(order, SECTIONS, strict=True) if got != due)
        faults = [f"docs/README.md has {late} out of the order {', '.join(SECTIONS)}"]
    card = folder.root / "README.md"
    if card.is_file() and not card.read_text("utf-8").rstrip().endswith(text.strip()):
        faults.append("README.md does not end with the text of docs/README.md")
    return settle(faults, f"{len(SECTIONS)} sections in the zoo's order")


def check_record(folder: PublishedFolder) -> str:
    """The record of the training is that of the weights, of train.json and of the README."""
    name = f"models/{FILE}"
    weights = folder.root / "models" / "model.pt"
    if not (folder.root / name).is_file():
        raise Skipped(f"{name} is missing; what these weights were trained with is not recorded")
    if not weights.is_file():
        raise Skipped("models/model.pt is not here, see files and large files")
    record = read_record(weights) or {}
    config, train = record["config"], folder.read("configs/train.json")
    keys = dict.fromkeys([*config, *train])
    faults = [
        f"configs/train.json has {key} {train.get(key)}, {name} {config.get(key)}"
        for key in keys
        if train.get(key) != config.get(key)
    ]
    text = folder.text("docs/README.md")
    faults += [
        f"docs/README.md lacks the line {line}, see {name}"
        for line in run_table(record).splitlines()
        if line not in text
    ]
    return settle(faults, f"{record['epochs']} epochs, {record['data']['training']['cases']} cases")


def check_version(folder: PublishedFolder) -> str:
    """The version has three numbers and an entry in the changelog."""
    metadata = folder.metadata()
    now, log = str(metadata.get("version")), metadata.get("changelog", {})
    faults = []
    if not re.fullmatch(VERSION, now):
        faults.append(f"{METADATA} has version {now}, which is not x.y.z")
    if now not in log:
        faults.append(
            f"{METADATA} has version {now}, its changelog has {', '.join(log) or 'no version'}"
        )
    elif not str(log[now] or "").strip():
        faults.append(f"{METADATA} has a changelog that says nothing of {now}")
    return settle(faults, f"{now}: {log.get(now)}")


def check_schema(folder: PublishedFolder, schema: str | None) -> str:
    """metadata.json fits the zoo's JSON schema, a file."""
    metadata = folder.metadata()
    url = metadata.get("schema")
    if not url or not isinstance(url, str):
        raise ValueError(f"{METADATA} names no schema, which the zoo would download")
    if schema is None:
        raise Skipped(f"offline; download {url} and give it as --schema FILE")
    if importlib.util.find_spec("jsonschema") is None:
        raise Skipped("needs jsonschema; pip install jsonschema")
    if not Path(schema).is_file():
        raise ValueError(f"schema must be a file, got {schema}; download {url}")
    from jsonschema.validators import validator_for

    rules = json.loads(Path(schema).read_text("utf-8"))
    found = validator_for(rules)(rules).iter_errors(metadata)
    faults = [f"{METADATA} {error.json_path}: {error.message}" for error in found]
    return settle(faults, f"metadata.json fits {Path(schema).name}")
