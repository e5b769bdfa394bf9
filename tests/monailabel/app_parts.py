"""Checks of the app's classes, without a server; run by the python of MONAI Label's environment.

python tests/monailabel/app_parts.py RESULTS.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
    with mock.patch.object(BundleTrainTask, "__call__", lambda _, request, __: seen.update(request)):
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
