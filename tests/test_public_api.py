"""The public names of the package: imported when used, typed, and absent from published copies."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import med3dinsight_ext

SOURCE = Path(med3dinsight_ext.__file__)


@pytest.mark.parametrize("name", med3dinsight_ext.__all__)
def test_a_public_name_is_an_object_of_its_package(name: str) -> None:
    assert getattr(med3dinsight_ext, name).__module__.startswith("med3dinsight_ext.")


def test_public_names_are_those_for_type_checkers() -> None:
    imports = [
        node
        for node in ast.walk(ast.parse(SOURCE.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("med3d")
    ]
    typed = {
        alias.name: getattr(importlib.import_module(node.module), alias.name)
        for node in imports
        for alias in node.names
    }
    assert typed == {name: getattr(med3dinsight_ext, name) for name in med3dinsight_ext.__all__}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'psat_of'"):
        med3dinsight_ext.psat_of  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import med3dinsight_ext", "from med3dinsight_ext import io"]
)
def test_an_import_of_the_package_alone_loads_no_torch(statement: str) -> None:
    code = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SOURCE.parents[1]).returncode == 0


def test_a_published_copy_without_the_modules_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "med3dinsight_ext").mkdir()
    shutil.copy(SOURCE, tmp_path / "med3dinsight_ext")
    code = (
        "import sys; sys.path[:0] = ['.']; "
        "import med3dinsight_ext as m; print(m.__version__); m.PSAT"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == med3dinsight_ext.__version__
    assert run.stderr.endswith("No module named 'med3dinsight_ext.models'\n")
