"""The app's classes without a server, in MONAI Label's environment: see app_parts.py."""

import json
import subprocess
from pathlib import Path

import pytest
from app_parts import CHECKS
from label_cases import MARKS
from label_running import PYTHON
from running import environment

pytestmark = MARKS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The traceback of each check that failed, from one process for all of them."""
    out = tmp_path_factory.mktemp("parts") / "found.json"
    words = [PYTHON, str(Path(__file__).with_name("app_parts.py")), str(out)]
    done = subprocess.run(words, env=environment(), cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CHECKS)
def test_a_part_of_the_app(name: str, found: dict[str, str]) -> None:
    assert not found[name], found[name]
