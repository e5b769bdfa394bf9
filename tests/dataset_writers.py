"""Small datasets on disk."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

GOOD = np.arange(60, dtype=np.float32).reshape(3, 4, 5)


def nifti(path: Path, array: np.ndarray = GOOD, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def decathlon(folder: Path, ids: str = "abc", **more: object) -> Path:
    for id_ in ids:
        nifti(folder / "imagesTr" / f"{id_}.nii.gz")
        nifti(folder / "labelsTr" / f"{id_}.nii.gz")
    rows = [{k: f"./{k}sTr/{id_}.nii.gz" for k in ("image", "label")} for id_ in ids]
    content = {"modality": {"0": "MRI"}, "training": rows, "test": []} | more
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder / "dataset.json"
