"""Files of a published folder, and outcomes of its checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigParser

from med3dinsight_ext.io.errors import first_line, root_cause, summary
from med3dinsight_ext.publishing.zoo import needed

SUFFIXES = ("json", "yaml", "yml")  # of configs and of large_files, as MONAI looks for them
METADATA = "configs/metadata.json"
PACKAGES = ("required_packages_version", "optional_packages_version")
IGNORED = {".git", "__pycache__", "eval"}  # folders


class Check(NamedTuple):
    """One line of the report; ``state`` is "ok", "FAIL" or "skip"."""

    name: str
    state: str
    text: str


class Skipped(Exception):
    """A check that could not be made, with what it needs."""


def outcome(name: str, check: Callable[..., str], *given: Any) -> Check:
    """Run a check, which returns a text or raises."""
    try:
        state, text = "ok", check(*given)
    except Skipped as reason:
        state, text = "skip", str(reason)
    except (Exception, SystemExit) as error:
        state, text = "FAIL", cause(error)
    return Check(name, state, " ".join(text.split()))


def cause(error: BaseException) -> str:
    """The root cause of an error in a line, with its type unless that is ValueError."""
    root = root_cause(error)
    return first_line(root) if type(root) is ValueError else summary(root)


def settle(faults: Sequence[str], good: str) -> str:
    """``good`` if there are no faults.

    Raises:
        ValueError: names the first three.
    """
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError("; ".join(faults[:3]) + more)
    return good


def file_names(root: Path, ending: str = "") -> list[str]:
    """Files of a bundle with an ending, relative."""
    found = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
    return [path.as_posix() for path in found
            if not IGNORED & set(path.parts) and path.name.endswith(ending)]  # fmt: skip


def read_config(root: Path, name: str) -> dict[str, Any]:
    """Content of a JSON or YAML file of a bundle; errors name it."""
    try:
        return dict(ConfigParser.load_config_file(root / name))
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {cause(error)}") from None


def read_metadata(root: Path) -> dict[str, Any]:
    """Content of metadata.json; errors name it."""
    if not (root / METADATA).is_file():
        raise ValueError(f"{METADATA} is missing")
    metadata = read_config(root, METADATA)
    for key in ("changelog", *PACKAGES, "network_data_format"):
        if not isinstance(metadata.get(key, {}), dict):
            raise ValueError(f"{METADATA} has {key} {metadata[key]}, which is no mapping")
    return metadata


def read_configs(root: Path) -> dict[str, Any]:
    """Contents of all configs of a bundle by their names."""
    names = [f"configs/{path.name}" for path in sorted((root / "configs").glob("*"))
             if path.suffix[1:] in SUFFIXES and path.name != "metadata.json"]  # fmt: skip
    return {name: read_config(root, name) for name in names}


def needed_names(root: Path) -> dict[str, str]:
    """Modules and targets that the configs of a bundle name, in full, and where."""
    return {name: f"{file} {place}" for file, config in read_configs(root).items()
            for place, name in needed(config)}  # fmt: skip


def config_name(root: Path, name: str) -> str | None:
    """The first of NAME.json, NAME.yaml, NAME.yml that is there."""
    found = (f"{name}.{suffix}" for suffix in SUFFIXES)
    return next((path for path in found if (root / path).is_file()), None)


def large_entries(root: Path) -> dict[str, dict[str, Any]]:
    """Entries of large_files by their path."""
    name = config_name(root, "large_files")
    if name is None:
        return {}
    entries = read_config(root, name).get("large_files")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in entries
    ):
        raise ValueError(f"{name} holds no list large_files of entries with a path")
    return {entry["path"]: entry for entry in entries}
