"""The built wheel, in another environment and folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from fakes import write_volumes
from packaging.version import Version
from running import ROOT, settings

import med3dinsight_ext

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(version("setuptools")) < Version("77"), reason="pip install 'setuptools>=77'"
    ),
]
SOURCES = ("med3dinsight_ext", "bundles", "setup.py", "setup.cfg", "pyproject.toml", "README.md",
           "LICENSE")  # fmt: skip


def installed(folder: Path) -> tuple[Path, list[str]]:
    """Python of a new environment with the wheel and this environment's packages; its files."""
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    for name in SOURCES:  # a copy, as a build writes into its folder
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / "source").mkdir(exist_ok=True)
        copy(ROOT / name, folder / "source" / name)
    models = folder / "source" / "bundles" / "pretrain" / "models"
    models.mkdir(exist_ok=True)
    (models / "model.pt").touch()
    subprocess.run([*words, "-w", str(folder), str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", script], capture_output=True, check=True, text=True)
    site = Path(done.stdout.strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        return python, archive.namelist()


def test_the_wheel_brings_the_bundles_and_they_run_anywhere(tmp_path: Path) -> None:
    python, names = installed(tmp_path)
    bundled = [name for name in names if name.startswith("med3dinsight_ext/bundles/")]
    assert len(bundled) > 40 and f"med3dinsight_ext-{med3dinsight_ext.__version__}" in names[-1]
    written = {"models", "eval", "store"}
    assert not [name for name in bundled if written & set(Path(name).parts)]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*words: str, path: str = "") -> str:
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        clean |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        done = subprocess.run(
            [python, "-m", *words], cwd=elsewhere, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "--max_epochs" in run("med3dinsight_ext", "quickstart", "--help")
    run("med3dinsight_ext", "init", "mine", "--bundle", "seg-finetune")
    assert (elsewhere / "mine" / "seg-finetune" / "configs" / "train.json").is_file()
    lines = run("med3dinsight_ext", "bundles").splitlines()
    option = lines[lines.index("pretrain") + 1].split("--config_file ")[1].strip('"')
    assert str(tmp_path / "venv") in option
    volumes = write_volumes(tmp_path / "volumes", 3)
    given = settings("pretrain", elsewhere / "run", volumes)
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    run("monai.bundle", "run", "--config_file", option, *words, path=str(ROOT / "tests"))
    assert (elsewhere / "run" / "models" / "model.pt").is_file()
