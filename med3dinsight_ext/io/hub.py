"""Published bundles on Hugging Face, by the names of their repositories."""

from __future__ import annotations

import re
from pathlib import Path

from med3dinsight_ext.io.errors import first_line

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?")
FILES = ["configs/*", "models/*.pt", "models/*.json", "README.md", "LICENSE"]  # no Python


def hub_id(model: str | Path) -> tuple[str, str | None] | None:
    """Repository and revision that a name stands for; None for a path, existing or mistyped.

    Examples:
        >>> hub_id("ann/ball"), hub_id("ann/ball@v1"), hub_id("/tmp/ball")
        (('ann/ball', None), ('ann/ball', 'v1'), None)
    """
    found = REPOSITORY.fullmatch(str(model))
    return (found[1], found[2]) if found and not Path(model).parent.is_dir() else None


def local_folder(model: str | Path) -> Path:
    """Folder of a model: a path, or a repository of Hugging Face, which is downloaded once.

    A config is code: a bundle is to be trusted like a program. Its Python files are not downloaded,
    as this package has them.

    Args:
        model: folder, "owner/name", or "owner/name@revision".

    Raises:
        ValueError: there is neither such a folder nor such a repository, or no connection.
    """
    named = hub_id(model)
    if named is None:
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(named[0], revision=named[1], allow_patterns=FILES))
    except Exception as error:  # of the hub and of the connection
        raise ValueError(
            f"model must be a folder or a repository of Hugging Face, got {model}: no such folder, "
            f"and {type(error).__name__}: {first_line(error)[:200]}; correct the path or the name"
        ) from error
