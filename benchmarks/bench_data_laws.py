"""Data laws on real data: false alarms, planted faults that are found, time and memory.

python benchmarks/bench_data_laws.py ../shared/data

Faults are planted in temporary copies of the development cases of headneck and hippocampus.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import fire
import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import write  # noqa: E402
from med3dinsight_ext.data.cohort import Cohort, read_cohort  # noqa: E402
from med3dinsight_ext.data.datalists import datalist  # noqa: E402
from med3dinsight_ext.data.laws import MIRRORED, SIDES, Finding, findings  # noqa: E402
from med3dinsight_ext.data.likeness import asymmetry, tells  # noqa: E402

SOURCES = {
    "hippocampus": "dataset.json", "headneck": "dataset.json", "sarcoma": "index.json"
}  # fmt: skip
Edit = Callable[[np.ndarray], np.ndarray]


def alarms(cohort: Cohort, found: Sequence[Finding]) -> dict[str, Any]:
    """Findings by level and law, with the number of files of each."""
    files: Counter[str] = Counter()
    for finding in found:
        files[f"{finding.level}: {finding.law}"] += len(finding.files)
    return {"volumes": len(cohort.records), "findings": len(found), "files": dict(files)}


def mirrors(cohort: Cohort) -> dict[str, Any]:
    """For each modality and axis the share of mirrored cases found, None if it cannot be told.

    A fingerprint that is mirrored has its likeness negated.
    """
    result: dict[str, Any] = {}
    for modality, records in cohort.groups().items():
        result[modality] = {}
        for axis, sides in enumerate(SIDES):
            likeness = asymmetry([record.grid for record in records], axis)
            share = float((-likeness <= MIRRORED).mean()) if tells(likeness) else None
            result[modality][" and ".join(sides)] = share
    return result


def edited(path: Path, edit: Edit, target: Path | None = None) -> None:
    """Write a volume with changed voxels and an unchanged header."""
    image: Any = nib.load(path)
    array = np.ascontiguousarray(edit(np.asanyarray(image.dataobj)))
    nib.save(nib.Nifti1Image(array, image.affine), target or path)


def mirror(folder: Path, case: str) -> None:
    for kind in ("imagesTr", "labelsTr"):
        edited(folder / kind / f"{case}.nii.gz", lambda x: x[::-1])


def duplicate(folder: Path, case: str, other: str, noise: float) -> None:
    """Give a case the image and label of another, with noise as a share of its deviation."""
    random = np.random.default_rng(0)
    edited(
        folder / "imagesTr" / f"{case}.nii.gz",
        lambda x: (x + random.normal(0, noise * x.std(), x.shape)).astype(np.float32),
        folder / "imagesTr" / f"{other}.nii.gz",
    )
    edited(
        folder / "labelsTr" / f"{case}.nii.gz", np.asarray, folder / "labelsTr" / f"{other}.nii.gz"
    )


def extra_value(label: np.ndarray) -> np.ndarray:
    label = label.copy()
    label[0, 0, 0] = 9
    return label


def planted(source: Path) -> list[dict[str, Any]]:
    """Faults in a copy of the development cases, and the laws that find them."""
    items = datalist(source / "dataset.json", split=source / "split.json", subset="development")
    cases = [Path(item["image"]).name.removesuffix(".nii.gz") for item in items]
    is_ct = items[0]["modality"] == "CT"
    a, b, c, d, e, f, g = (cases[i * len(cases) // 8] for i in range(1, 8))
    about = json.loads((source / "dataset.json").read_text())
    about["training"] = [
        {key: f"./{key}sTr/{case}.nii.gz" for key in ("image", "label")} for case in cases
    ]
    with TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("imagesTr", "labelsTr"):
            (folder / kind).mkdir()
            for case in cases:
                shutil.copyfile(source / kind / f"{case}.nii.gz", folder / kind / f"{case}.nii.gz")
        (folder / "dataset.json").write_text(json.dumps(about))
        rest = [case for case in cases if case not in (c, e)]
        split = {"development": rest, "test": [c, e]}
        (folder / "split.json").write_text(json.dumps(split))
        faults = {
            "mirrored volume": [a],
            "near-duplicate in two lists": [b, c],
            "copied patient in two lists": [d, e],
            "label value without a name": [f],
        }
        mirror(folder, a)
        duplicate(folder, b, c, noise=0.1)
        duplicate(folder, d, e, noise=0.0)
        edited(folder / "labelsTr" / f"{f}.nii.gz", extra_value)
        if is_ct:
            edited(folder / "imagesTr" / f"{g}.nii.gz", lambda x: x + 1024)
            faults["CT offset by 1024"] = [g]
        found = findings(read_cohort(folder / "dataset.json", folder / "split.json"))
    rows = []
    for fault, names in faults.items():
        files = {f"imagesTr/{case}.nii.gz" for case in names}
        laws = [f"{x.level}: {x.law}: {x.text}" for x in found if x.files and {*x.files} <= files]
        rows.append({"fault": fault, "cases": names, "findings": laws})
    return rows


def run(data: str) -> None:
    """Measure and write results/data_laws.json.

    Args:
        data: folder of hippocampus, headneck and sarcoma.
    """
    real, faults = {}, {}
    for name, file in SOURCES.items():
        source = Path(data) / name
        begin = perf_counter()
        cohort = read_cohort(source / file, source / "split.json")
        found = findings(cohort)
        seconds = perf_counter() - begin
        real[name] = alarms(cohort, found) | {
            "seconds_per_volume": round(seconds / len(cohort.records), 4),
            "mirrored": mirrors(cohort),
        }
        if name != "sarcoma":
            faults[name] = planted(source)
    memory = getrusage(RUSAGE_SELF).ru_maxrss // 1024
    write("data_laws", {"real": real, "planted": faults, "peak_memory_MiB": memory})


if __name__ == "__main__":
    fire.Fire(run)
