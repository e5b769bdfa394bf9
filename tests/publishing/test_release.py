"""The example bundles can be made by the documented command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from real_data import real_data
from running import ROOT, environment


@pytest.mark.slow
def test_an_example_is_trained_scored_published_and_verified(tmp_path: Path) -> None:
    source = real_data("hippocampus")
    split = json.loads((source / "split.json").read_text())
    few = {"development": split["development"][:6], "test": split["test"][:2]}
    listed = json.loads((source / "dataset.json").read_text())
    chosen = few["development"] + few["test"]
    rows = [row for row in listed["training"] if any(f"{name}." in row["image"] for name in chosen)]
    assert len(rows) == 8
    folder = tmp_path / "data" / "hippocampus"
    for row in rows:
        for key in ("image", "label"):
            (folder / row[key]).parent.mkdir(parents=True, exist_ok=True)
            (folder / row[key]).symlink_to((source / row[key]).resolve())
    (folder / "split.json").write_text(json.dumps(few))
    (folder / "dataset.json").write_text(json.dumps(listed | {"training": rows}))
    words = [
        str(ROOT / "docs" / "release" / "make.py"),
        "data",
        "--only",
        "hippocampus",
        "--small",
        "True",
    ]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "16 ok, 1 skipped, 0 failed" in done.stdout
    readme = (
        tmp_path / "releases" / "med3dinsight_hippocampus_segmentation" / "README.md"
    ).read_text()
    assert "license: cc-by-sa-4.0" in readme and "| anterior | 2 |" in readme
    assert "| epochs | 1; the weights are of epoch 1 |" in readme
    assert "| cases | 6 for training" in readme
