"""Checks that build a published folder's network, with the folder's own code alone."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_net_in_out
from monai.bundle.scripts import _get_fake_input_shape
from torch import Tensor, nn

from med3dinsight_ext.publishing.checks.folder import (
    METADATA,
    PublishedFolder,
    Skipped,
    cause,
    outcome,
    settle,
)
from med3dinsight_ext.publishing.zoo import NO_TORCHSCRIPT, PACKAGE


def write_report(root: str, report: str) -> None:
    """Run the checks, in a process of their own.

    From here on this process imports the package from the bundle alone.

    Args:
        root: of the bundle.
        report: JSONL file, a line a check.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.meta_path.insert(0, _VendoredOnly(root))
    sys.path.insert(0, root)
    bundle = Bundle(Path(root), Path(report).parent)
    for name, check in CHECKS.items():
        result = outcome(name, check, bundle)
        with open(report, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


class _VendoredOnly:
    """Finds the package in the bundle or nowhere; an editable install would step in otherwise."""

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path or [self.root])
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{name} is not vendored", name=name)
        return spec


class Bundle(PublishedFolder):
    """A bundle whose network is built.

    Args:
        root: its folder.
        scratch: folder for what is written.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        super().__init__(root)
        self.scratch = scratch

    @cached_property
    def meta(self) -> str:
        self.metadata()
        return str(self.root / METADATA)

    @cached_property
    def config(self) -> str:
        name = self.find("configs/inference")
        if name is None:
            raise ValueError("configs/inference.json is missing")
        self.read(name)
        return str(self.root / name)

    @cached_property
    def state(self) -> Any:
        path = self.root / "models" / "model.pt"
        if not path.is_file():
            raise Skipped("models/model.pt is not here, see files and large files")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise Skipped("models/model.pt cannot be read, see checkpoints") from error

    def parser(self) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(self.config)
        parser.read_meta(self.meta)
        parser["bundle_root"] = str(self.root)
        return parser

    def misfits(self, network: nn.Module) -> list[str]:
        """How the weights differ from what a network can take."""
        state, due = self.state, network.state_dict()
        if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
            return ["models/model.pt is not a flat dict of tensors; save network.state_dict()"]
        return [
            *(f"models/model.pt lacks {name}" for name in due if name not in state),
            *(
                f"models/model.pt has {name}, network_def has not"
                for name in state
                if name not in due
            ),
            *(
                f"models/model.pt has {name} {tuple(state[name].shape)}, network_def "
                f"{tuple(value.shape)}"
                for name, value in due.items()
                if name in state and state[name].shape != value.shape
            ),
            *(
                f"models/model.pt has {name} with values that are not finite"
                for name, value in state.items()
                if not value.isfinite().all()
            ),
        ]


def check_weights(bundle: Bundle) -> str:
    """The weights are all that the network takes, and finite."""
    network = bundle.parser().get_parsed_content("network_def")
    faults = bundle.misfits(network)
    size = sum(value.numel() for value in network.state_dict().values())
    return settle(faults, f"models/model.pt fits {type(network).__name__}, {size:,} values")


def check_in_out(bundle: Bundle) -> str:
    """The network takes and returns what metadata.json describes."""
    data, faults = bundle.metadata().get("network_data_format", {}), []
    try:
        for side in ("inputs", "outputs"):
            for name, part in data[side].items():
                names, count = part.get("channel_def", {}), part["num_channels"]
                if set(names) != {str(i) for i in range(count)}:
                    faults.append(
                        f"{METADATA} {side} {name} has {count} num_channels, "
                        f"channel_def names {', '.join(names) or 'none'}"
                    )
        image, pred = data["inputs"]["image"], data["outputs"]["pred"]
        shape = " x ".join(map(str, image["spatial_shape"]))
        good = f"{image['num_channels']} x {shape} to {pred['num_channels']} channels"
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{METADATA} network_data_format: {cause(error)}") from None
    parser = bundle.parser()
    if "patch_size" in parser:
        patch = parser.get_parsed_content("patch_size")
        if list(image["spatial_shape"]) != list(patch):
            faults.append(
                f"{METADATA} inputs image has spatial_shape {shape}, "
                f"{Path(bundle.config).name} has patch_size {patch}"
            )
    try:
        verify_net_in_out("network_def", bundle.meta, bundle.config, bundle_root=str(bundle.root))
    except Exception as error:
        faults.append(f"{METADATA}: {cause(error)}")
    return settle(faults, good)


def check_torchscript(bundle: Bundle) -> str:
    """``ckpt_export`` makes the same network, unless the README excludes it."""
    readme = bundle.root / "docs" / "README.md"
    lines = readme.read_text("utf-8").splitlines() if readme.is_file() else []
    if any(line.startswith(NO_TORCHSCRIPT) for line in lines):
        return "excluded as docs/README.md says"
    parser = bundle.parser()
    network = parser.get_parsed_content("network_def")
    if bundle.misfits(network):
        raise Skipped("models/model.pt does not fit network_def, see weights")
    try:
        shape = _get_fake_input_shape(parser)
    except Exception as error:
        raise Skipped("network_data_format is broken, see network in and out") from error
    path = str(bundle.scratch / "model.ts")
    ckpt_export(
        "network_def",
        path,
        str(bundle.root / "models" / "model.pt"),
        bundle.meta,
        bundle.config,
        bundle_root=str(bundle.root),
    )
    network.load_state_dict(bundle.state)
    image = torch.rand(shape)
    with torch.no_grad():
        due, got = network.eval()(image), torch.jit.load(path, map_location="cpu").eval()(image)
    due, got = (value if isinstance(value, Tensor) else value[0] for value in (due, got))
    apart = (due - got).abs().max().item()
    if not apart <= 1e-4 * max(1.0, due.abs().max().item()):
        raise ValueError(f"model.ts and network_def differ by {apart:.1e} on {tuple(image.shape)}")
    return f"max abs difference {apart:.1e} on {tuple(image.shape)}"


class _Names(ConfigWorkflow):
    """Looks properties up and leaves them unevaluated: data are not in a published folder."""

    def _get_property(self, name: str, property: dict) -> Any:
        try:
            return self._get_prop_id(name, property)
        except KeyError as error:
            raise AttributeError(name) from error


def check_properties(bundle: Bundle) -> str:
    """The configs have the keys that MONAI's workflows require."""
    logs = bundle.root / "configs" / "logging.conf"
    jobs = {"infer": bundle.config}
    if (train := bundle.find("configs/train")) is not None:
        bundle.read(train)
        jobs["train"] = str(bundle.root / train)
    faults = []
    for kind, path in jobs.items():
        names = _Names(
            path,
            bundle.meta,
            str(logs) if logs.is_file() else False,
            workflow_type=kind,
            bundle_root=str(bundle.root),
        )
        faults += [f"configs/{Path(path).name} lacks {name}" for name in names.check_properties()]
    return settle(faults, f"all in {', '.join(Path(path).name for path in jobs.values())}")


def check_targets(bundle: Bundle) -> str:
    """What the configs name of the package imports, and so does every vendored module."""
    ours = {name: where for name, where in bundle.needed().items() if name.split(".")[0] == PACKAGE}
    modules = {}
    for path in sorted((bundle.root / PACKAGE).rglob("*.py")):
        name = path.relative_to(bundle.root).as_posix()
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if path.stem != "__main__":
            modules[module] = name
    faults = []
    for name, where in {**ours, **modules}.items():
        try:
            _resolve(name)
        except Exception as error:
            faults.append(f"{where} needs {name}, which does not import: {cause(error)}")
    return settle(faults, f"{len(ours)} names in the configs, {len(modules)} modules import")


def _resolve(name: str) -> None:
    """Import a dotted name; ``pkgutil.resolve_name`` hides why a module failed."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:depth]))
        found = getattr(found, part)


CHECKS: dict[str, Callable[[Bundle], str]] = {
    "weights": check_weights, "network in and out": check_in_out, "TorchScript": check_torchscript,
    "properties": check_properties, "config targets": check_targets,
}  # fmt: skip
