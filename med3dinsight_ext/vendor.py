"""The part of this package that a bundle's configs reach, to travel inside the bundle."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from .verify import NAMED_OTHERWISE, PACKAGE

SOURCE = Path(__file__).parent
LINE = 120  # columns in the Model Zoo
WITHIN_MONAI = {"monai.metrics": "scipy", "TensorBoard": "tensorboard"}  # MONAI imports it lazily
OWN_KEYS = ("torch", "monai", "numpy")  # pinned by keys of their own in metadata.json


def strings(node: Any) -> Iterator[str]:
    """Every text in a config."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from strings(value)


def reached_modules(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Modules of this package that configs name, and those that these import, sorted.

    Args:
        configs: targets, imports and expressions in them count.

    Raises:
        ValueError: a config names a module that is not in this package.
    """
    waiting = {"__init__"}
    for text in strings(list(configs)):
        for name in re.findall(rf"\b{PACKAGE}\.(\w+)", text):
            if not _path(name).is_file():
                raise ValueError(f"configs must name modules of {PACKAGE}, got {name} in {text!r}")
            waiting.add(name)
    found: set[str] = set()
    while waiting:
        found.add(name := waiting.pop())
        tree = ast.parse(_path(name).read_text("utf-8"))
        waiting |= {module for node in imports(tree) for module in _own(node)} - found
    return sorted(found)


def _path(module: str) -> Path:
    return SOURCE / f"{module}.py"


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that can happen when a module runs, those inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []))
        else:
            yield from imports(node)


def _own(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Modules of this flat package that an import statement names."""
    if isinstance(node, ast.Import):
        full = [alias.name for alias in node.names]
    else:
        start = ".".join(filter(None, [PACKAGE if node.level else "", node.module]))
        full = [start, *(f"{start}.{alias.name}" for alias in node.names)]
    parts = (name.split(".") for name in full)
    return {own[1] for own in parts if own[0] == PACKAGE and own[1:] and _path(own[1]).is_file()}


def requirements(modules: Iterable[str], configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Distributions that modules and configs need beside PyTorch, MONAI and NumPy, sorted.

    Args:
        modules: of this package.
        configs: their imports and dotted targets count.
    """
    texts = list(strings(list(configs)))
    code = [_path(name).read_text("utf-8") for name in modules]
    trees = [ast.parse(text) for text in code]
    trees += [ast.parse(text[1:]) for text in texts if text.startswith("$import ")]
    names = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for tree in trees for node in imports(tree) for alias in node.names
        if isinstance(node, ast.Import) or not node.level
    }  # fmt: skip
    for target in targets(list(configs)):
        names |= {target.split(".")[0]} if "." in target else set()
    names -= {*sys.stdlib_module_names, *OWN_KEYS, PACKAGE, ""}
    lazily = {need for mark, need in WITHIN_MONAI.items() if any(mark in t for t in code + texts)}
    return sorted({NAMED_OTHERWISE.get(name, name) for name in names} | lazily | {"fire"})


def targets(node: Any) -> Iterator[str]:
    """Every ``_target_`` that is named outright."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if isinstance(target, str) and re.fullmatch(r"[\w.]+", target):
            yield target
    for value in node.values() if isinstance(node, Mapping) else node:
        if isinstance(value, (Mapping, list)):
            yield from targets(value)


@lru_cache
def vendored(module: str) -> str:
    """Source of a module, in the Model Zoo's format.

    Raises:
        ValueError: black or isort is missing.
    """
    try:
        import black
        import isort
    except ImportError as error:
        raise ValueError(
            f'publish must format code, got no {error.name}; pip install -e ".[publish]"'
        ) from error
    text = re.sub(rf"^from {PACKAGE}\.", "from .", _path(module).read_text("utf-8"), flags=re.M)
    settings = isort.Config(settings_file="", profile="black", line_length=LINE, src_paths=())
    version = black.mode.TargetVersion.PY310
    mode = black.Mode({version}, LINE, magic_trailing_comma=False)
    return black.format_str(isort.code(text, config=settings), mode=mode)
