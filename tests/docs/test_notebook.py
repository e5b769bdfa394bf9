"""The notebook of the tutorials runs from its first cell to its last, with a few steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="the notebook needs nbclient and ipykernel")
ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "tutorials" / "demo.ipynb"
STEPS = "STEPS = 100"


def test_its_outputs_are_small_and_those_of_its_cells() -> None:
    cells = [cell for cell in nbformat.read(PATH, 4).cells if cell.cell_type == "code"]
    assert PATH.stat().st_size < 600_000 and cells[0].source.count(STEPS) == 1
    assert all(out.output_type != "error" for cell in cells for out in cell.outputs)
    assert sum("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs) == 2


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nilearn", reason='the demo cohort needs pip install -e ".[demo]"')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))
    notebook = nbformat.read(PATH, 4)
    notebook.cells[1].source = notebook.cells[1].source.replace(STEPS, "STEPS = 2")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    text = "".join(
        out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ())
    )
    assert "of the encoder's weights arrived" in text and "on 6 test cases" in text
    assert (tmp_path / "finetune" / "evaluation-demo" / "report.html").is_file()
