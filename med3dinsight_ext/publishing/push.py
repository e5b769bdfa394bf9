"""Upload of a published bundle to Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from med3dinsight_ext.io.errors import first_line
from med3dinsight_ext.publishing.checks.contents import check_paths
from med3dinsight_ext.publishing.checks.documents import check_version
from med3dinsight_ext.publishing.checks.folder import METADATA, PublishedFolder
from med3dinsight_ext.publishing.zoo import PACKAGE
from med3dinsight_ext.reports.formatting import short

RECORD, WEIGHTS = "models/run.json", "models/model.pt"
WRITTEN = (  # by publish and export; whatever else lies in a folder stays there
    "README.md", "LICENSE", "large_files.yml", "docs/README.md", "docs/data_license.txt",
    "configs/logging.conf", METADATA, "configs/train.json", "configs/inference.json",
    "configs/evaluate.json", "configs/multi_gpu_train.json", "configs/embed.json",
    WEIGHTS, "models/student.pt", RECORD, "models/exports.json", "models/model.ts",
    "models/model.onnx", "models/nnunet.pth", f"{PACKAGE}/*.py", f"{PACKAGE}/*/templates/*",
)  # fmt: skip


def push(folder: str, repo: str, dry_run: bool = True, update: bool = False) -> None:
    """Upload a published folder as a model repository of Hugging Face, or list its files.

    Files that neither ``publish`` nor ``export`` wrote stay here.

    Args:
        folder: from ``publish``.
        repo: "owner/name".
        dry_run: check and list only; no network is used.
        update: the repository may exist and gets a new commit, in which files of an earlier
            release that this one lacks are deleted.

    Raises:
        ValueError: it is no published folder with weights, its card or version is broken, a file
            names a place on a person's machine, a training has run in it, there is no token, the
            repository exists, or the hub does not answer or refuses.
    """
    from huggingface_hub import ModelCard, get_token

    for name, value in (("dry_run", dry_run), ("update", update)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(repo)):
        raise ValueError(f"repo must be owner/name, got {repo}")
    root = Path(folder)
    for name in ("README.md", METADATA, WEIGHTS):
        if not (root / name).is_file():
            raise ValueError(f"folder must come from publish, got {folder} without {name}")
    published = PublishedFolder(root)
    check_version(published)
    metadata = published.metadata()
    try:
        card = ModelCard.load(root / "README.md").data
    except Exception as error:  # YAML errors, ValueErrors and others
        raise ValueError(f"README.md must begin with a model card, got {error}") from error
    for key, value in (("library_name", card.library_name), ("license", card.license)):
        if not value:
            raise ValueError(f"README.md must have a {key} between dashes, got none in {folder}")
    try:
        check_paths(published)
    except ValueError as error:
        raise ValueError(
            f"folder must name no place on a person's machine, got {error} in {folder}; take it out"
        ) from error
    if (root / RECORD).is_file() and "command" in published.read(RECORD):
        raise ValueError(
            f"{RECORD} must be as publish wrote it, got the command of a training in {folder}; "
            "publish that training's weights to a new folder"
        )
    found = published.names()
    paths = [path for path in found if any(fnmatchcase(path, known) for known in WRITTEN)]
    for path in paths:
        print(f"{(root / path).stat().st_size:>12,}  {path}")
    if others := sorted({path.split("/")[0] for path in found if path not in paths}):
        kept = len(found) - len(paths)
        print(f"{kept} other files stay here, in or under {short(', '.join(others), 200)}")
    scores = {score.metric_type: score.metric_value for score in card.eval_results or ()}
    print(f"card: {card.library_name}, {card.license}, tags {card.tags}, scores {scores}")
    if dry_run:
        print(f"nothing was sent; --dry_run False uploads {len(paths)} files to {repo}")
        return
    if not get_token():
        raise ValueError("push must have a token, got none; hf auth login, or set HF_TOKEN")
    version = metadata["version"]
    _upload(root, paths, repo, f"{version}: {metadata['changelog'][version]}", update)
    print(f"uploaded {len(paths)} files to {repo}")


def _upload(root: Path, paths: Sequence[str], repo: str, message: str, update: bool) -> None:
    """Make the repository and add one commit with these files of a folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", exist_ok=update)
        api.upload_folder(
            repo_id=repo, folder_path=root, commit_message=message, allow_patterns=list(paths),
            delete_patterns=list(WRITTEN),
        )  # fmt: skip
    except Exception as error:  # of the hub and of the connection
        code = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if code == 409 and not update:
            raise ValueError(
                f"repo must be new, got {repo}, which exists; --update True adds a commit to it"
            ) from error
        remedy = (
            "check the token's rights" if code in (401, 403) else "repeat it with --update True"
        )
        raise ValueError(
            f"push must reach a hub that accepts {repo}, got {type(error).__name__}: "
            f"{first_line(error)[:200]}; {remedy}"
        ) from error
