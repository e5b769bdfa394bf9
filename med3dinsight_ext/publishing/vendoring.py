"""The part of this package that a bundle's configs reach, to travel inside the bundle."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from med3dinsight_ext.publishing.verify import NAMED_OTHERWISE, PACKAGE

SOURCE = Path(__file__).parents[1]
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
    waiting = {PACKAGE}
    for text in strings(list(configs)):
        for name in re.findall(rf"\b{PACKAGE}(?:\.\w+)+", text):
            own = _modules(name)
            if len(own) < 2 or module_file(own[-1]).name == "__init__.py":
                raise ValueError(f"configs must name modules of {PACKAGE}, got {name} in {text!r}")
            waiting.update(own)
    found: set[str] = set()
    while waiting:
        found.add(name := waiting.pop())
        tree = ast.parse(module_file(name).read_text("utf-8"))
        waiting |= {module for node in imports(tree) for module in _own(node)} - found
    return sorted(found)


def module_file(module: str) -> Path:
    """Source file of a dotted module of this package; a folder's is its ``__init__.py``."""
    path = SOURCE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


def _modules(name: str) -> list[str]:
    """The package, folders and module that a dotted name passes through, outermost first."""
    parts = name.split(".")
    dotted = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return [module for module in dotted if module_file(module).is_file()]


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
    """Modules of this package that an import statement names; relative imports are not used."""
    if isinstance(node, ast.Import):
        full = [alias.name for alias in node.names]
    else:
        full = [f"{node.module}.{alias.name}" for alias in node.names]
    return {module for name in full if name.split(".")[0] == PACKAGE for module in _modules(name)}


def requirements(modules: Iterable[str], configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Distributions that modules and configs need beside PyTorch, MONAI and NumPy, sorted.

    Args:
        modules: of this package.
        configs: their imports and dotted targets count.
    """
    texts = list(strings(list(configs)))
    code = [module_file(name).read_text("utf-8") for name in modules]
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


def vendored_path(module: str) -> str:
    """Where a module lies in a published bundle."""
    return module_file(module).relative_to(SOURCE.parent).as_posix()


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
    text = module_file(module).read_text("utf-8")
    settings = isort.Config(settings_file="", profile="black", line_length=LINE, src_paths=())
    version = black.mode.TargetVersion.PY310
    mode = black.Mode({version}, LINE, magic_trailing_comma=False)
    return black.format_str(isort.code(text, config=settings), mode=mode)
