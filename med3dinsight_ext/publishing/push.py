"""Upload of a published bundle to Hugging Face."""

from __future__ import annotations

import json
import re
from pathlib import Path

from med3dinsight_ext.publishing.checks.folder import METADATA, PublishedFolder


def push(folder: str, repo: str, dry_run: bool = True) -> None:
    """Upload a published folder as a model repository of Hugging Face, or list its files.

    Args:
        folder: from ``publish``.
        repo: "owner/name".
        dry_run: check and list only; no network is used.

    Raises:
        ValueError: it is no published folder, its card is broken, or there is no token.
    """
    from huggingface_hub import HfApi, ModelCard, get_token

    if not isinstance(dry_run, bool):
        raise ValueError(f"dry_run must be True or False, got {dry_run!r}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(repo)):
        raise ValueError(f"repo must be owner/name, got {repo}")
    root = Path(folder)
    for name in ("README.md", METADATA):
        if not (root / name).is_file():
            raise ValueError(f"folder must come from publish, got {folder} without {name}")
    try:
        card = ModelCard.load(root / "README.md").data
    except Exception as error:  # YAML errors, ValueErrors and others
        raise ValueError(f"README.md must begin with a model card, got {error}") from error
    for key, value in (("library_name", card.library_name), ("license", card.license)):
        if not value:
            raise ValueError(f"README.md must have a {key} between dashes, got none in {folder}")
    paths = PublishedFolder(root).names()
    for path in paths:
        print(f"{(root / path).stat().st_size:>12,}  {path}")
    scores = {score.metric_type: score.metric_value for score in card.eval_results or ()}
    print(f"card: {card.library_name}, {card.license}, tags {card.tags}, scores {scores}")
    if dry_run:
        print(f"nothing was sent; --dry_run False uploads {len(paths)} files to {repo}")
        return
    if not get_token():
        raise ValueError("push must have a token, got none; hf auth login, or set HF_TOKEN")
    metadata = json.loads((root / METADATA).read_text("utf-8"))
    version = metadata["version"]
    api = HfApi()
    api.create_repo(repo, repo_type="model", exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        folder_path=root,
        commit_message=f"{version}: {metadata['changelog'][version]}",
        allow_patterns=paths,
    )
    print(f"uploaded {len(paths)} files to {repo}")
