"""Checks of the app's classes, without a server; run by the python of MONAI Label's environment.

python tests/monailabel/app_parts.py RESULTS.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

Check = Callable[[Path], Any]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def raised(call: Callable[[], Any]) -> Exception:
    """What a call raises."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def training(folder: Path) -> Any:
    from label_running import small_bundle

    from med3dinsight_ext.monailabel.app.rounds import Training

    return Training(str(small_bundle(folder / "bundle")), {})


@check
def a_request_chooses_neither_expression_nor_file_nor_address(folder: Path) -> None:
    from monailabel.tasks.train.bundle import BundleTrainTask

    task, seen = training(folder), {}
    given = {"run_id": "evil", "model_filename": "../x.pt", "tracking_uri": "http://evil"}
    with mock.patch.object(
        BundleTrainTask, "__call__", lambda _, request, __: seen.update(request)
    ):
        task(given | {"memory_gb": 1000, "tracking": "mlflow"}, None)
    assert seen["run_id"] == "run" and seen["model_filename"] == "model.pt"
    assert seen["tracking_uri"] == "" and seen["tracking"] == "mlflow"
    assert not {"run_id", "tracking_uri"} & task.config().keys()


@check
def a_config_as_tracking_is_refused(folder: Path) -> None:
    task = training(folder)
    with mock.patch("monai.bundle.run") as run:
        found = raised(lambda: task({"model": "m", "tracking": "/tmp/evil.json"}, None))
    assert isinstance(found, ValueError) and "tracking must be one of" in str(found)
    assert not run.called


@check
def ranks_that_fail_end_the_training(folder: Path) -> None:
    task = training(folder)
    task._run_command([sys.executable, "-c", ""], dict(os.environ))
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    found = raised(lambda: task._run_command(failing, dict(os.environ)))
    assert "must end without an error, got return code 3" in str(found)


ENDS = """
import subprocess, sys
from med3dinsight_ext.monailabel.app.rounds import {name}
outer = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '99']).pid, flush=True)"
first = subprocess.Popen([sys.executable, "-c", outer + "; time.sleep(99)"], stdout=subprocess.PIPE)
print(first.pid, int(first.stdout.readline()), flush=True)
{name}(0)  # no memory is enough, and no process has this id
"""


def started_and_left(name: str) -> set[int]:
    """Processes that a training has started, and that are there after the end of its own."""
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(name=name)],
        stdout=subprocess.PIPE,
        timeout=60,
        text=True,
    )
    assert done.returncode == 1
    pids = set(map(int, done.stdout.splitlines()[0].split()))
    assert len(pids) == 2
    begin = time.monotonic()
    while (left := {pid for pid in pids if is_running(pid)}) and time.monotonic() - begin < 5:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, 9)
    return left


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@check
def a_training_without_memory_leaves_no_process(folder: Path) -> None:
    assert not started_and_left("end_above")


@check
def a_training_without_its_server_leaves_no_process(folder: Path) -> None:
    assert not started_and_left("end_with")


@check
def the_weights_are_hashed_once(folder: Path) -> None:
    from med3dinsight_ext.monailabel.app import versions

    task = training(folder)
    with mock.patch.object(versions, "weights_of", wraps=versions.weights_of) as read:
        for _ in range(3):
            task.stats()
    assert read.call_count == 1


@check
def the_server_itself_does_not_train(folder: Path) -> None:
    from med3dinsight_ext.monailabel.app.main import SERVER, LabelApp

    app = mock.Mock(spec=LabelApp)
    with mock.patch.dict(os.environ, {SERVER: str(os.getpid())}):
        found = raised(lambda: LabelApp.train(app, {"model": "m"}))
    assert found.status_code == 400 and "run_sync must be false" in found.detail


class Cases:
    """A datastore of labelled cases.

    Args:
        folder: to write into.
        patients: PatientID of each case, or None.
        organ: whether the label of each case has a class.
    """

    def __init__(self, folder: Path, patients: list[str | None], organ: list[bool]) -> None:
        import nibabel as nib
        import numpy as np

        self.patients = dict(zip([f"v{n}" for n in range(len(patients))], patients, strict=True))
        self.items = []
        for (name, _), has in zip(self.patients.items(), organ, strict=True):
            array = np.random.default_rng(0).random((4, 5, 6)).astype("float32")
            item = {"image": array, "label": (array > (0.5 if has else 1)).astype("uint8")}
            for key, value in item.items():
                path = folder / key / f"{name}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(value, np.eye(4)), path)
                item[key] = str(path)
            self.items.append(item)

    def datalist(self) -> list[dict[str, str]]:
        return self.items

    def _to_id(self, file: str) -> tuple[str, str]:
        return file.removesuffix(".nii.gz"), ".nii.gz"

    def get_image_info(self, name: str) -> dict[str, str | None]:
        return {"PatientID": self.patients[name]}


def split(task: Any, cases: Cases) -> tuple[list[str], list[str]]:
    request = {"model": "m", "val_split": 0.3}
    parts = task._partition_datalist(task._fetch_datalist(request, cases), request)
    assert all(item.keys() == {"image", "label"} for part in parts for item in part)
    return tuple([Path(item["image"]).name.split(".")[0] for item in part] for part in parts)


@check
def the_cases_of_a_patient_are_validated_together(folder: Path) -> None:
    cases = Cases(folder, ["a", "b", "a", "b", "UNK", None], [True] * 6)
    train, held = split(training(folder), cases)
    assert held and sorted(train + held) == list(cases.patients)
    assert all(not {one, other} & set(held) or {one, other} <= set(held)
               for one, other in (("v0", "v2"), ("v1", "v3")))  # fmt: skip


@check
def a_validation_without_a_class_is_none(folder: Path) -> None:
    cases = Cases(folder, [None, None], [True, False])  # v1 has the lower place
    assert split(training(folder), cases) == (["v0"], [])


def main(out: str) -> None:
    found = {}
    for name, function in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                function(Path(folder))
            except Exception:
                found[name] = traceback.format_exc()
            else:
                found[name] = ""
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
