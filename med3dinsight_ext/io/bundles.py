"""The bundles that come with the package, and their config files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from med3dinsight_ext.io.configs import with_shared
from med3dinsight_ext.io.errors import advice

NAMES = {"segmentation": "label_names", "classification": "class_names"}  # keys of configs
BUNDLES = ("pretrain", "seg-finetune", "cls-finetune")
SHARED = ("shared", "backbones")  # folders beside the bundles
WRITTEN = ("models", "eval", "store", "features", "mlruns", "__pycache__")  # by runs


def bundles_dir() -> Path:
    """Folder of the bundles: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "bundles"
    return inside if inside.is_dir() else package.with_name("bundles")


def kind_of(bundle: Path) -> str:
    """A bundle's task, which overlays do not change: a key of ``NAMES``, or "pretraining"."""
    own = json.loads((bundle / "configs" / "inference.json").read_text("utf-8"))
    return next((kind for kind, key in NAMES.items() if key in own), "pretraining")


def config_files(bundle: Path, name: str) -> list[Path]:
    """The config files that make up a config of a bundle, its own first.

    MONAI reads metadata.json and logging.conf from the folder of the first one.

    Args:
        bundle: folder of the bundle.
        name: "train", "inference", ...
    """
    return [Path(path) for path in with_shared(bundle / "configs" / f"{name}.json")]


def backbone_files(bundle: Path) -> list[Path]:
    """The overlays that choose a bundle's network; each names its bundles in line 2."""
    shared = sorted((bundle.absolute().parent / "backbones").glob("*.yaml"))
    return [path for path in shared if bundle.name in path.read_text("utf-8").splitlines()[1]]


def train_option(bundle: Path) -> str:
    """Option of ``python -m monai.bundle run`` that trains a bundle."""
    files = [str(path) for path in config_files(bundle, "train")]
    return f"--config_file {files[0]}" if len(files) == 1 else f'--config_file "{files}"'


def bundles() -> None:
    """Print the train config and the backbone overlays of each bundle."""
    for name in BUNDLES:
        bundle = bundles_dir() / name
        print(f"{name}\n  {train_option(bundle)}")
        names = " ".join(path.name for path in backbone_files(bundle))
        print(f"  backbones in {bundles_dir() / 'backbones'}: {names}")


def init(target: str, bundle: str | None = None) -> None:
    """Copy the bundles for editing.

    Args:
        target: new or empty folder.
        bundle: name of the only one to copy; by default all of them.

    Raises:
        ValueError: the folder is not empty, or there is no such bundle.
    """
    folder = Path(target)
    if bundle is not None and bundle not in BUNDLES:
        hint = advice(bundle, BUNDLES, f"one of {', '.join(BUNDLES)}")
        raise ValueError(f"bundle must be the name of a bundle, got {bundle}; {hint}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"target must be a new or empty folder, got {target}; choose another")
    ignored = shutil.ignore_patterns(*WRITTEN)
    names = [bundle] if bundle else BUNDLES
    for name in (*names, *SHARED):
        if (source := bundles_dir() / name).is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
    print(f"wrote {folder}; train with")
    for name in names:
        print(f"  python -m monai.bundle run {train_option(folder / name)}")
