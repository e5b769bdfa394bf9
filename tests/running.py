"""The bundles at sizes at which a step takes a second, in this process and in others."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow

from med3dinsight_ext.io.configs import with_shared
from med3dinsight_ext.io.folder_lock import only_training
from med3dinsight_ext.planning.plan import Machine

ROOT = Path(__file__).parents[1]
BUNDLES = ("pretrain", "seg-finetune", "cls-finetune")
BACKBONES = {path.stem: path for path in sorted((ROOT / "bundles" / "backbones").glob("*.yaml"))}
NETWORKS = {  # small, for each bundle; PlainNet is not MONAI's
    "pretrain": {"backbone": {"_target_": "fakes.PlainNet"}},
    "seg-finetune": {"backbone": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1,
                     "out_channels": "@out_channels", "channels": [4, 8], "strides": [2]}},
    "cls-finetune": {"backbone": {"_target_": "fakes.PlainNet"},
                     "class_names": ["even", "odd"], "val_fraction": 0.4},
}  # fmt: skip
SMALL_MACHINE = Machine(16**3, 0, 1, 2, 1, 2, 4)  # its plans take a second to train


def configs(bundle: str) -> Path:
    return ROOT / "bundles" / bundle / "configs"


def suits(bundle: str) -> list[str]:
    """Names of the backbones whose header lists the bundle."""
    return [name for name, path in BACKBONES.items() if bundle in path.read_text().splitlines()[1]]


def paths(bundle: str, files: Sequence[str | Path]) -> list[str]:
    """Paths of config files, with the shared files after train.json."""
    return [path for file in files for path in with_shared(configs(bundle) / file)]


def merged(bundle: str, *files: str | Path) -> dict[str, Any]:
    """One config from these files."""
    return ConfigParser.load_config_files(paths(bundle, files))


class Killed(BaseException):
    """Ends a run or a writer without any handler of errors."""


class KillAt:
    """A handler that ends a run at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED(once=self.step), self)

    def __call__(self, engine: Engine) -> None:
        raise Killed


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def settings(bundle: str, root: Path, volumes: Path, **changes: Any) -> dict[str, Any]:
    """Overrides that make a bundle small enough for a test.

    Args:
        bundle: its folder's name.
        root: bundle_root, where it writes.
        volumes: from ``fakes.write_volumes``.
        changes: more overrides.
    """
    own: dict[str, dict[str, Any]] = {
        "pretrain": {"teacher": {"_target_": "fakes.teacher"}, "per_plane": 4, "slices": 4},
        "seg-finetune": {"datalist": str(volumes / "segmentation.json"), "patches_per_volume": 1},
        "cls-finetune": {"datalist": str(volumes / "classification.json")},
    }
    return {
        "bundle_root": str(root),
        "dataset_dir": str(volumes),
        "spacing": [2.0, 2.0, 2.0],
        "patch_size": [32, 32, 32],
        "batch_size": 2,
        "num_workers": 0,
        "max_epochs": 1,
        "val_interval": 1,
        "val_fraction": 0.5 if bundle == "cls-finetune" else 0.2,  # of each class a case
        "device": "$torch.device('cpu')",
        **own[bundle],
        **changes,
    }


def inference_settings(bundle: str, root: Path, volumes: Path, **changes: Any) -> dict[str, Any]:
    """The same for inference.json."""
    keys = ("bundle_root", "dataset_dir", "teacher", "spacing", "patch_size", "device")
    given = settings(bundle, root, volumes)
    kept = {key: given[key] for key in keys if key in given}
    return kept | {"dataloader::num_workers": 0} | changes


def run(bundle: str, files: Sequence[str | Path], **overrides: Any) -> ConfigWorkflow:
    """A bundle's config files, run in this process."""
    workflow = ConfigWorkflow(
        paths(bundle, files), logging_file=False, workflow_type="train", **overrides
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def command(bundle: str, files: Sequence[str | Path], overrides: dict[str, Any]) -> list[str]:
    """Arguments of python that do the same in another process."""
    words = ["-m", "monai.bundle", "run", "--config_file"]
    words.append(str(paths(bundle, files)))
    for key, value in overrides.items():
        words += [f"--{key}", str(value)]
    return words


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def forked(call: Callable[[], Any]) -> Iterator[int]:
    """The id of a process that makes a call and then waits; it is killed (kill -9) at the end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            call()
            os.write(write, b"done")
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(write)
    try:
        with os.fdopen(read, "rb", 0) as pipe:
            assert pipe.read(4) == b"done"
            yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def trains_in(folder: Path) -> AbstractContextManager[int]:
    """Another process that holds the folder of a training."""
    return forked(only_training(folder).__enter__)
