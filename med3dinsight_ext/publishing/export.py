"""A bundle's network as TorchScript and ONNX, each compared with PyTorch before it is kept.

Weights for nnU-Net are written by ``publishing.nnunet``.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser, ckpt_export, onnx_export
from torch import Tensor, nn

from med3dinsight_ext.io.errors import summary
from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.publishing.nnunet import export_nnunet
from med3dinsight_ext.training.checkpoints import load_weights
from med3dinsight_ext.training.record import read_record, state_hash

TOLERANCE = 1e-3  # of the largest output
NEEDED = ("onnx", "onnxruntime", "onnxscript")
Call = Callable[[Tensor], list[Tensor]]


class Differs(Exception):
    """An exported network that runs and differs from PyTorch."""


def export(folder: str, to: str | None = None) -> None:
    """Write a network as TorchScript and ONNX, or as weights for nnU-Net.

    They are models/model.ts, models/model.onnx and models/exports.json of a bundle folder; with
    ``--to nnunet`` models/nnunet.pth alone, also in the folder of a training.

    MONAI's ``ckpt_export`` and ``onnx_export`` make the files. Each is read back, run under
    TorchScript or onnxruntime on the CPU on one seeded random input of the config's ``patch_size``,
    and kept only if it matches PyTorch. A format that the network does not allow is
    printed and written down with the reasons, and an older file of that format is removed.

    Args:
        folder: a bundle with configs/inference.json and models/model.pt.
        to: None, or nnunet.

    Raises:
        ModuleNotFoundError: onnx, onnxruntime or onnxscript is missing.
        ValueError: there is no such bundle, its weights are those of another network, or a file
            differs from PyTorch.
    """
    if to is not None:
        if to != "nnunet":
            raise ValueError(f"to must be nnunet, got {to}; leave it out for TorchScript and ONNX")
        export_nnunet(folder)
    else:
        _export_graphs(folder)


def _export_graphs(folder: str) -> None:
    """Write TorchScript and ONNX."""
    versions = _versions()
    root = Path(folder).resolve()
    config = root / "configs" / "inference.json"
    if not config.exists():
        raise ValueError(
            f"folder must hold configs/inference.json, got {folder}; give a bundle, or what "
            "publish made of one"
        )
    parser = ConfigParser(ConfigParser.load_config_file(str(config)))
    parser["bundle_root"] = str(root)
    network = parser.get_parsed_content("network_def").eval()
    load_weights(network, root / "models" / "model.pt")
    read_record(root / "models" / "model.pt")
    size = parser.get_parsed_content("patch_size")
    volumes = torch.rand(2, _channels(network), *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = [_tensors(network(volumes[:b])) for b in (1, 2)]
    report: dict[str, Any] = {
        "network": _name(network),
        "weights_sha256": state_hash(network.state_dict()),
        "versions": versions,
        "tolerance": TOLERANCE,
    }
    given = {
        "bundle_root": str(root),
        "config_file": str(config),
        "ckpt_file": str(root / "models" / "model.pt"),
        "net_id": "network_def",
        "input_shape": (1, *volumes.shape[1:]),
    }
    wrong = []
    for name, methods in (("model.ts", _torchscript(given)), ("model.onnx", _onnx(given))):
        row, differs = _first_right(root / "models" / name, methods, volumes, truth)
        report[name] = row
        print(f"{name}: {_line(row)}", flush=True)
        wrong += [name] if differs else []
    text = json.dumps(report, indent=1) + "\n"
    write_atomic(root / "models" / "exports.json", lambda draft: draft.write_text(text))
    if wrong:
        raise ValueError(
            f"{wrong[0]} must match PyTorch, got more than {TOLERANCE:g} of difference; "
            "it is not kept, see models/exports.json"
        )


class ExportMethod(NamedTuple):
    """One attempt at a format.

    name: its name in the report.
    batch: largest batch that it is compared on; 2 stands for any.
    write: makes the file at a path.
    read: makes a function of volumes from it.
    """

    name: str
    batch: int
    write: Callable[[Path], None]
    read: Callable[[Path], Call]


def _torchscript(given: dict[str, Any]) -> Iterator[ExportMethod]:
    """Script where the network allows it, as that keeps what depends on the input; else a trace."""

    def write(path: Path, trace: bool) -> None:
        kwargs = {"check_trace": False} if trace else {}  # it is compared here
        ckpt_export(filepath=str(path), use_trace=trace, converter_kwargs=kwargs, **given)

    for name, batch in (("script", 2), ("trace", 2), ("trace for a batch of one", 1)):
        yield ExportMethod(name, batch, partial(write, trace=name != "script"), _read_torchscript)


def _onnx(given: dict[str, Any]) -> Iterator[ExportMethod]:
    """From a trace, or by torch.export, which takes minutes but infers the shapes of Swin UNETR.

    The sizes along x, y and z are fixed, as the inferer's window is.
    """
    batches = {"image": {0: "batch"}, "pred": {0: "batch"}}
    whole: dict[str, Any] = {"external_data": False, "verbose": False}

    def write(path: Path, **how: Any) -> None:
        kwargs = {"input_names": ["image"], "output_names": ["pred"], **how}
        onnx_export(filepath=str(path), use_trace=True, converter_kwargs=kwargs, **given)

    yield ExportMethod("trace", 2, partial(write, dynamo=False, dynamic_axes=batches), _read_onnx)
    yield ExportMethod("torch.export", 1, partial(write, dynamo=True, **whole), _read_onnx)


def _first_right(
    path: Path, methods: Iterator[ExportMethod], volumes: Tensor, truth: list[list[Tensor]]
) -> tuple[dict[str, Any], bool]:
    """Row of the report for one file, and whether a method gave other outputs than PyTorch."""
    failed: dict[str, str] = {}
    differs = False
    for method in methods:
        begin = perf_counter()
        with tempfile.TemporaryDirectory() as folder, _quiet():
            made = Path(folder) / path.name  # TorchScript keeps the name in its file
            try:
                method.write(made)
                _without_paths(made)
                seconds = perf_counter() - begin
                call = method.read(made)
                errors = [
                    _apart(call(volumes[:b]), truth[b - 1]) for b in range(1, method.batch + 1)
                ]
            except Exception as error:  # of a converter or runtime
                failed[method.name] = summary(error)
                differs |= isinstance(error, Differs)
                continue
            write_atomic(path, partial(shutil.copyfile, made))
            row = {
                "way": method.name,
                "shape": ["any" if method.batch == 2 else 1, *volumes.shape[1:]],
                "max_relative_error": max(errors),
                "seconds": round(seconds, 1),
                "bytes": made.stat().st_size,
            }
            opset = _opset(made) if path.suffix == ".onnx" else {}
            return row | opset | ({"failed": failed} if failed else {}), False
    path.unlink(missing_ok=True)  # of other weights
    return {"failed": failed}, differs


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer: its warnings are about differences that are measured here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _without_paths(path: Path) -> None:
    """Remove source locations, which name folders of this machine."""
    if path.suffix == ".onnx":
        import onnx

        model = onnx.load(str(path))
        for node in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
        onnx.save(model, str(path))
        return
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            if not name.endswith(".debug_pkl"):
                file.writestr(zipfile.ZipInfo(name), content)


def _read_torchscript(path: Path) -> Call:
    network = torch.jit.load(str(path), map_location="cpu").eval()

    def call(volume: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return _tensors(network(volume))

    return call


def _read_onnx(path: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda volume: [torch.as_tensor(x) for x in session.run(None, {"image": volume.numpy()})]


def _opset(path: Path) -> dict[str, int]:
    import onnx

    (standard,) = (o.version for o in onnx.load(str(path)).opset_import if o.domain == "")
    return {"opset": standard}


def _apart(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest difference as a share of the largest output.

    Raises:
        Differs: it is above ``TOLERANCE``, or a NaN, or the outputs are not as many or as large.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (found, truth)]
    if shapes[0] != shapes[1]:
        raise Differs(f"gives {shapes[0]} for a batch of {len(truth[0])}, PyTorch {shapes[1]}")
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
        for a, b in zip(found, truth, strict=True)
    ]
    error = float(torch.tensor(errors).max())  # Python's max may pass over a NaN
    if not error <= TOLERANCE:
        raise Differs(f"differs from PyTorch by {error:.1e} for a batch of {len(truth[0])}")
    return error


def _tensors(output: Any) -> list[Tensor]:
    """All tensors of an output: MONAI's ViT returns its layers too."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in _tensors(part)]


def _channels(network: nn.Module) -> int:
    """Input channels of the first convolution: a network with clicks takes more than the image."""
    return next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv3d)), 1)


def _name(network: nn.Module) -> str:
    inner = getattr(network, "network", None)
    name = type(network).__name__
    return f"{name} of {type(inner).__name__}" if isinstance(inner, nn.Module) else name


def _line(row: dict[str, Any]) -> str:
    failed = "; ".join(f"{way}: {why}" for way, why in row.get("failed", {}).items())
    if "way" not in row:
        return f"not exported. {failed}"
    return (
        f"{row['way']}, {' x '.join(map(str, row['shape']))}, "
        f"{row['max_relative_error']:.1e} from PyTorch, {row['bytes'] / 1e6:.1f} MB, "
        f"{row['seconds']} s{f' (failed: {failed})' if failed else ''}"
    )


def _versions() -> dict[str, str]:
    try:
        return {name: version(name) for name in ("torch", "monai", *NEEDED)}
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} must be installed, got no such package; pip install -e ".[publish]"'
        ) from error
