"""An annotator's round in OHIF: a headless browser, MONAI Label and orthanc over DICOMweb."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import fakes
import nibabel as nib
import numpy as np
import pytest
from label_cases import CLICK, MARKS, PLAIN, overlay
from label_running import Server, small_bundle, start_own, wait_for
from running import ROOT, free_port

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
CHROMIUM = Path("/usr/bin/chromium")


def lacking() -> str:
    """What this test needs and does not find; nothing if all is there."""
    modules = [name for name in ("playwright", "dicomweb_client") if not _has(name)]
    programs = [str(path) for path in (CHROMIUM, PLUGIN) if not path.exists()]
    return ", ".join(modules + programs + ([] if shutil.which("Orthanc") else ["Orthanc"]))


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


WHY = lacking()
pytestmark = [*MARKS, pytest.mark.skipif(bool(WHY), reason=f"OHIF's round needs {WHY}")]


class Round(NamedTuple):
    """A server whose images are in a DICOMweb store; their labels by patient, and their series."""

    server: Server
    labels: dict[str, Path]
    series: dict[str, str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Round]:
    sys.path.append(str(ROOT / "docs" / "guides"))
    import ohif

    root = tmp_path_factory.mktemp("ohif")
    port = free_port()
    settings = {
        "StorageDirectory": str(root / "store"), "IndexDirectory": str(root / "store"),
        "HttpPort": port, "RemoteAccessAllowed": False, "AuthenticationEnabled": False,
        "DicomServerEnabled": False, "Plugins": [str(PLUGIN)],
    }  # fmt: skip
    (root / "orthanc.json").write_text(json.dumps(settings))
    studies = fakes.write_volumes(root / "studies", 3, (40, 44, 36))
    store, labels, series = f"http://127.0.0.1:{port}/dicom-web", {}, {}
    with (root / "orthanc.log").open("w") as log:
        orthanc = subprocess.Popen(["Orthanc", root / "orthanc.json"], stdout=log, stderr=log)
    try:
        wait_for(orthanc, Path(log.name), lambda: is_up(f"http://127.0.0.1:{port}/system"), 60)
        images = [str(studies / f"v{i}.nii.gz") for i in range(3)]
        for number, (image, found) in enumerate(ohif.sent(store, images), 1):
            patient = f"Example, Number {number}"
            labels[patient] = studies / "labels" / Path(image).name
            series[patient] = found
        bundles = [
            small_bundle(root / PLAIN),
            small_bundle(root / CLICK, "ClickNet", overlays=True),
        ]
        server = start_own(root, bundles, store)
        yield Round(server, labels, series)
        server.stop()
    finally:
        orthanc.terminate()
        orthanc.wait(30)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False


def rows(voxels: Any) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(voxels).tolist()))


def test_open_segment_click_undo_save_train_and_the_next_case(served: Round) -> None:
    from ohif import Viewer

    server, labels, series = served
    patient, other = "Example, Number 2", (30, 10, 12)
    organ = np.argwhere(np.asarray(nib.load(labels[patient]).dataobj))
    with closing(Viewer(server.url, patient)) as viewer:
        viewer.run("segmentation")
        assert rows(viewer.drawn("foreground")) == rows(organ)  # voxel by voxel

        inside = tuple(int(x) for x in organ.mean(0) + [3, 0, 0])
        viewer.clear_clicks()
        viewer.click("foreground", inside)
        viewer.run("pointprompts")
        one = rows(viewer.drawn("foreground"))
        assert inside in one and max(np.ptp(sorted(one), axis=0)) < 12  # a ball around the click
        viewer.click("foreground", other)
        viewer.run("pointprompts")
        two = rows(viewer.drawn("foreground"))
        assert one < two and other in two

        viewer.clear_clicks()  # undo
        viewer.click("foreground", inside)
        viewer.run("pointprompts")
        assert rows(viewer.drawn("foreground")) == one

        name = series[patient]
        answer = overlay(server, name, params='{"result_extension": ".nii.gz"}')
        saved = labels[patient].with_name("answer.nii.gz")
        nib.save(answer, saved)
        assert server.save_label(name, saved).status == 200
        before = viewer.page.url
        assert viewer.next_case() not in ("", before)
        viewer.run("segmentation")
        assert len(viewer.drawn("foreground")) > 100

        viewer.train()
        assert server.trained()["status"] == "DONE"  # of all models
