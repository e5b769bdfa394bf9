"""Two runs with one seed and one thread, in fresh processes, have bit-equal results."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import pytest
from running import command, environment
from scenarios import files, settings

BUNDLES = ("pretrain", "seg-finetune")


def train(bundle: str, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Digests of the weights and the history of a run of two steps."""
    fakes.write_volumes(folder / "in", 3)
    given = settings(bundle, folder) | {"seed": seed, "val_fraction": 0}
    words = command(bundle, ["train.json"], given)
    done = subprocess.run(
        [sys.executable, *words], env=environment(), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return files("out/models")(folder) | files("out/eval")(folder)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_seed_gives_the_same_bits_in_another_process(bundle: str, tmp_path: Path) -> None:
    first, second, other = (
        train(bundle, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == second and len(first["out/eval/history.jsonl"]) == 2
    assert first["out/models/model.pt"] != other["out/models/model.pt"]
