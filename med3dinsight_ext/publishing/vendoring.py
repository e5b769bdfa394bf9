"""The part of this package that a bundle's configs reach, to travel inside the bundle."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from med3dinsight_ext.publishing.zoo import (
    LINE,
    NAMED_OTHERWISE,
    PACKAGE,
    PINS,
    imported,
    needed,
    statements,
    texts,
)

SOURCE = Path(__file__).parents[1]
WITHIN_MONAI = {"monai.metrics": "scipy", "TensorBoard": "tensorboard"}  # MONAI imports it lazily
DATA = "templates"  # folder beside the modules that read from it


def reached_modules(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Modules of this package that configs name, and those that these import, sorted.

    Args:
        configs: targets, imports and expressions in them count.

    Raises:
        ValueError: a config names a module that is not in this package.
    """
    waiting = {PACKAGE}
    for _, text in texts(list(configs)):
        for name in re.findall(rf"\b{PACKAGE}(?:\.\w+)+", text):
            own = _modules(name)
            if len(own) < 2 or module_file(own[-1]).name == "__init__.py":
                raise ValueError(f"configs must name modules of {PACKAGE}, got {name} in {text!r}")
            waiting.update(own)
    found: set[str] = set()
    while waiting:
        found.add(name := waiting.pop())
        code = module_file(name).read_text("utf-8")
        waiting |= {module for node in statements(code) for module in _own(node)} - found
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
    listed = list(configs)
    code = [module_file(name).read_text("utf-8") for name in modules]
    full = {name for text in code for name in imported(text)} | {name for _, name in needed(listed)}
    names = {name.split(".")[0] for name in full} - {*sys.stdlib_module_names, *PINS, PACKAGE}
    code += [text for _, text in texts(listed)]
    lazily = {need for mark, need in WITHIN_MONAI.items() if any(mark in text for text in code)}
    return sorted({NAMED_OTHERWISE.get(name, name) for name in names} | lazily | {"fire"})


def pins(metadata: Mapping[str, Any], needed: Iterable[str]) -> dict[str, str]:
    """The versions of what is needed, from a bundle's metadata."""
    known = metadata["required_packages_version"]
    if missing := [name for name in needed if name not in known]:
        raise ValueError(
            f"required_packages_version must pin what the configs need, got none for {missing}; "
            "name only MONAI's and the bundle's parts in overlays, or add the pin to metadata.json"
        )
    return {name: known[name] for name in needed}


def vendored(modules: Iterable[str]) -> dict[str, str]:
    """Path in a published bundle and text of modules and of the templates that they read."""
    files = {}
    for path in map(module_file, modules):
        files[path] = formatted(path)
        if f'"{DATA}"' in files[path]:
            files |= {file: file.read_text("utf-8") for file in (path.parent / DATA).glob("*.*")}
    return {path.relative_to(SOURCE.parent).as_posix(): text for path, text in files.items()}


@lru_cache
def formatted(path: Path) -> str:
    """Source of a module in the Model Zoo's format.

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
    text = path.read_text("utf-8")
    settings = isort.Config(
        settings_file="",
        profile="black",
        line_length=LINE,
        src_paths=(),
        known_first_party=frozenset({PACKAGE}),
    )
    version = black.mode.TargetVersion.PY310
    mode = black.Mode({version}, LINE, magic_trailing_comma=False)
    return black.format_str(isort.code(text, config=settings), mode=mode)
