"""Files of a published folder, and outcomes of its checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigParser

from med3dinsight_ext.io.errors import first_line, root_cause, summary
from med3dinsight_ext.publishing.zoo import needed

SUFFIXES = ("json", "yaml", "yml")  # of configs and of large_files, as MONAI looks for them
METADATA = "configs/metadata.json"
PACKAGES = ("required_packages_version", "optional_packages_version")
IGNORED = {".git", "__pycache__", "eval"}  # folders
WRITTEN = (  # into a published folder, by predict, ask, evaluate and the app of MONAI Label
    "predictions", "answers", "evaluation-*", "features", "models/round", "models/earlier",
    "models/.*", "configs/monailabel_train.json",
)  # fmt: skip


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


def _is_ignored(path: Path) -> bool:
    """Whether a relative path is none of what ``publish`` wrote."""
    places = [place.as_posix() for place in (path, *path.parents)]
    return bool(IGNORED & set(path.parts)) or any(
        fnmatchcase(place, pattern) for place in places for pattern in WRITTEN
    )


class PublishedFolder:
    """Files of a published folder; errors name them.

    Args:
        root: its path.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self, ending: str = "") -> list[str]:
        """Files with an ending, relative, without what later commands wrote."""
        found = (
            path.relative_to(self.root)
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and path.name.endswith(ending)
        )
        return [path.as_posix() for path in found if not _is_ignored(path)]

    def text(self, name: str) -> str:
        return (self.root / name).read_text("utf-8")

    def read(self, name: str) -> dict[str, Any]:
        """Content of a JSON or YAML file."""
        try:
            return dict(ConfigParser.load_config_file(self.root / name))
        except Exception as error:
            raise ValueError(f"{name} cannot be read: {cause(error)}") from None

    def metadata(self) -> dict[str, Any]:
        """Content of metadata.json."""
        if not (self.root / METADATA).is_file():
            raise ValueError(f"{METADATA} is missing")
        metadata = self.read(METADATA)
        for key in ("changelog", *PACKAGES, "network_data_format"):
            if not isinstance(metadata.get(key, {}), dict):
                raise ValueError(f"{METADATA} has {key} {metadata[key]}, which is no mapping")
        return metadata

    def configs(self) -> dict[str, Any]:
        """Contents of all configs by their names."""
        names = [
            f"configs/{path.name}"
            for path in sorted((self.root / "configs").glob("*"))
            if path.suffix[1:] in SUFFIXES
            and path.name != "metadata.json"
            and not _is_ignored(path.relative_to(self.root))
        ]
        return {name: self.read(name) for name in names}

    def needed(self) -> dict[str, str]:
        """Modules and targets that the configs name, in full, and where."""
        return {
            name: f"{file} {place}"
            for file, config in self.configs().items()
            for place, name in needed(config)
        }

    def find(self, name: str) -> str | None:
        """The first of NAME.json, NAME.yaml, NAME.yml that is there."""
        found = (f"{name}.{suffix}" for suffix in SUFFIXES)
        return next((path for path in found if (self.root / path).is_file()), None)

    def large(self) -> dict[str, dict[str, Any]]:
        """Entries of large_files by their path."""
        if (name := self.find("large_files")) is None:
            return {}
        entries = self.read(name).get("large_files")
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in entries
        ):
            raise ValueError(f"{name} holds no list large_files of entries with a path")
        return {entry["path"]: entry for entry in entries}
