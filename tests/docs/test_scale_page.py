"""The lines of docs/guides/scale.md run as they stand, in their order, at the size of a test."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import fakes
import pytest
from running import ROOT, settings

from tables import with_costs

TEXT = (ROOT / "docs" / "guides" / "scale.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
LINES = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
SMALL = ("spacing", "patch_size", "batch_size", "num_workers", "val_fraction", "device", "teacher",
         "per_plane", "slices")  # fmt: skip


def lines(start: str) -> list[str]:
    return [line for line in LINES if line.startswith(start)]


def words(line: str, folder: Path, **more: object) -> list[str]:
    """A line of the page as bash splits it, after python, with its folders below ``folder``."""
    line = line.replace("--bundle_root bundles/pretrain", f"--bundle_root {folder}/run")
    line = re.sub(r"\b(DIR|COPY|LISTS)\b", rf"{folder}/\1", line)
    given = settings("pretrain", folder, folder / "DIR")
    small = {key: given[key] for key in SMALL} | more if "monai.bundle" in line else {}
    end = "".join(f" --{key} {shlex.quote(str(value))}" for key, value in small.items())
    script = f"{lines('C=')[0]}\nprintf '%s\\0' {line}{end}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return found.stdout.split("\0")[:-1]


def run(monkeypatch: pytest.MonkeyPatch, line: str, folder: Path, **more: object) -> None:
    """A line that starts with python -m, in this process."""
    _, _, module, *rest = words(line, folder, **more)
    monkeypatch.setattr(sys, "argv", [module, *rest])
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def history(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "run" / "eval" / "history.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_the_page_prepares_splits_embeds_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.write_volumes(tmp_path / "DIR", 6)
    monkeypatch.chdir(ROOT)
    prepare, train = lines("python -m monai.bundle")[:2]
    run(monkeypatch, f"{prepare} --dry_run True", tmp_path)
    assert "6 of them not in" in capsys.readouterr().out and not (tmp_path / "COPY").exists()
    run(monkeypatch, prepare, tmp_path)
    assert "6 of 6 volumes are in" in capsys.readouterr().out
    (split,) = lines("python -m med3dinsight_ext split")
    run(monkeypatch, f"{split} --seed 1 --test_share 0.5", tmp_path)
    assert "6 volumes: development" in capsys.readouterr().out
    (embed,) = [line for line in LINES if "--shard" in line]
    for shard in ("1/2", "2/2"):
        run(monkeypatch, embed.replace('"$SLURM_ARRAY_TASK_ID/16"', shard), tmp_path)
        assert "3 volumes are in" in capsys.readouterr().out
    run(monkeypatch, train, tmp_path, steps_per_epoch=2, max_epochs=1)
    assert [row["steps"] for row in history(tmp_path)] == [2]


def test_the_page_has_the_measured_costs() -> None:
    assert with_costs(TEXT) == TEXT and "| 100,000 |" in TEXT


def test_the_page_has_the_lines_that_run() -> None:
    assert len(lines("python -m monai.bundle")) == 4 and len(lines("srun torchrun")) == 1
    assert len([line for line in LINES if "--shard" in line]) == 1
    assert len(lines("python -m med3dinsight_ext split")) == 1
