"""Volumes, requests and marks that the tests of a MONAI Label server share."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import fakes
import nibabel as nib
import numpy as np
import pytest
import torch
from label_running import PYTHON, Server
from test_finetune import ORIENTATIONS, oblique

PLAIN, CLICK = "seg-finetune", "deepedit_ball"
KINDS = ["permuted", "lps", "oblique"]


def fault() -> str:
    """Why MONAI Label cannot be tested here; nothing if it can."""
    if not PYTHON:
        return "set MED3D_LABEL_PYTHON to the python of an environment made by label-install"
    script = "import importlib.util as u, sys; sys.exit(u.find_spec('monailabel') is None)"
    found = subprocess.run([PYTHON, "-c", script]).returncode == 0
    return "" if found else f"MED3D_LABEL_PYTHON={PYTHON} has no monailabel"


WHY = fault()
MARKS = [pytest.mark.slow, pytest.mark.skipif(bool(WHY), reason=WHY)]


def write_studies(folder: Path) -> Path:
    """Four volumes with a ball, and one more for each kind of grid; the balls are the labels."""
    fakes.write_volumes(folder, 4)
    for kind in KINDS:
        affine = ORIENTATIONS.get(kind, oblique()) @ np.diag([2.0, 2, 2, 1])
        for name in ("v0.nii.gz", "labels/v0.nii.gz"):
            array = np.asarray(nib.load(folder / name).dataobj)[:, :30, :24]
            path = folder / name.replace("v0", kind)
            nib.save(nib.Nifti1Image(array, affine), path)
    return folder


def overlay(server: Server, image: str, model: str = PLAIN, params: str = "{}") -> nib.Nifti1Image:
    """What the server segments in an image."""
    answer = server.ask("POST", f"/infer/{model}?image={image}&output=image", params=params)
    assert answer.status == 200, server.log.read_text()[-3000:]
    return nib.Nifti1Image.from_bytes(gzip.decompress(answer.body))


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return torch.load(bundle / "models" / "model.pt", weights_only=True)
