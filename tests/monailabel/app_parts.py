"""Checks of the app's classes, without a server; run by the python of MONAI Label's environment.

python tests/monailabel/app_parts.py RESULTS.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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

    @property
    def _datastore(self) -> Any:
        return SimpleNamespace(objects=self.patients)

    def get_image_info(self, name: str) -> dict[str, str | None]:
        path = self.items[list(self.patients).index(name)]["image"]
        return {"PatientID": self.patients[name], "path": path}

    def get_label_info(self, name: str, tag: str) -> dict[str, str]:
        return {}


def split(task: Any, cases: Cases) -> tuple[list[str], list[str]]:
    request = {"model": "m", "val_split": 0.3}
    parts = task._partition_datalist(task._fetch_datalist(request, cases), request)
    assert all(item.keys() == {"image", "label"} for part in parts for item in part)
    return tuple([Path(item["image"]).name.split(".")[0] for item in part] for part in parts)


@check
def the_cases_of_a_patient_are_validated_together(folder: Path) -> None:
    from med3dinsight_ext.data.patients import place

    cases = Cases(folder, ["a", "e", "UNK", None, "a", "e"], [True] * 6)
    patients = {"v0": "a", "v1": "e", "v2": "v2", "v3": "v3", "v4": "a", "v5": "e"}
    expected = [name for name, patient in patients.items() if place(patient) < 0.3]
    assert 1 < len(expected) < 6 and split(training(folder), cases)[1] == expected


@check
def a_validation_without_a_class_is_none(folder: Path) -> None:
    task = training(folder)
    assert split(task, Cases(folder, [None, None], [False, False])) == (["v0", "v1"], [])
    cases = Cases(folder, [None, None], [True, False])  # v1 has the lower place
    assert split(task, cases) == (["v1"], ["v0"])


@check
def linked_images_are_patients_of_their_own(folder: Path) -> None:
    from med3dinsight_ext.monailabel.app.datastores import CheckedDatastore
    from med3dinsight_ext.monailabel.app.rounds import patients_of

    (folder / "studies").mkdir()
    for n in range(2):
        path = volume(folder / f"p{n}" / "ct.nii.gz", boxes(1))
        (folder / "studies" / f"v{n}.nii.gz").symlink_to(path)
    store = CheckedDatastore(str(folder / "studies"), NAMES)
    assert sorted(patients_of(store).values()) == ["v0", "v1"]
    assert Path(sorted(patients_of(store))[0]) == (folder / "p0" / "ct.nii.gz").resolve()


def volume(path: Path, array: Any) -> Path:
    import nibabel as nib
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 3, 1])), path)
    return path


def stored(path: str | Path) -> Any:
    import nibabel as nib
    import numpy as np

    return np.asarray(nib.load(path).dataobj)


def refusal(call: Callable[[], Any]) -> str:
    """Reason of an answer with status 400."""
    found = raised(call)
    assert found.status_code == 400, found
    return found.detail


NAMES = ["background", "liver", "Spleen", "tumour"]


def boxes(*values: int) -> Any:
    """A label with a box of each value, and slices without any."""
    import numpy as np

    found = np.zeros((10, 12, 8), np.uint8)
    for value in values:
        found[2 * value : 2 * value + 2, 3:9, 2:5] = value
    return found


def studies(folder: Path, count: int = 2) -> Any:
    """A folder of images as a datastore."""
    import numpy as np

    from med3dinsight_ext.monailabel.app.datastores import CheckedDatastore

    for n in range(count):
        array = np.random.default_rng(n).random((10, 12, 8)).astype(np.float32)
        volume(folder / "studies" / f"v{n}.nii.gz", array)
    return CheckedDatastore(str(folder / "studies"), NAMES)


@check
def a_label_gets_the_values_of_the_classes_that_its_segments_name(folder: Path) -> None:
    store = studies(folder)
    given = [{"name": "spleen", "idx": 2}, {"name": "Liver", "idx": 3}, {"name": "other"}]
    label = volume(folder / "label.nii.gz", boxes(1, 2))
    store.save_label("v0", str(label), "final", {"label_info": given})
    found = stored(store.get_label_uri("v0", "final"))
    assert (found == boxes(1, 2).choose([0, 2, 1])).all()
    info = store.get_label_info("v0", "final")["label_info"]
    assert info == [{"name": "liver"}, {"name": "Spleen"}, {"name": "tumour"}]
    label = volume(folder / "label.nii.gz", boxes(3))
    reason = refusal(lambda: store.save_label("v1", str(label), "final", {"label_info": given}))
    assert "segments must be classes of the model (background, liver" in reason
    assert not store.get_label_uri("v1", "final")


def wait_until(ready: Callable[[], Any]) -> Any:
    begin = time.monotonic()
    while not (found := ready()) and time.monotonic() - begin < 10:
        time.sleep(0.05)
    return found


@check
def labels_of_another_process_are_seen_and_kept(folder: Path) -> None:
    one, other = studies(folder, 4), studies(folder, 4)
    label = str(volume(folder / "label.nii.gz", boxes(1)))
    other.save_label("v1", label, "final", {"client_id": "other"})
    assert wait_until(lambda: "v1" in one.get_labeled_images())
    draft = folder / "studies" / "labels" / "final" / ".v2.nii.gz.draft"  # as rsync writes
    draft.write_bytes(Path(label).read_bytes())
    draft.rename(draft.with_name("v2.nii.gz"))
    assert wait_until(lambda: "v2" in one.get_labeled_images())
    one.save_label("v0", label, "final", {})
    text = json.loads((folder / "studies" / "datastore_v2.json").read_text())
    assert text["objects"]["v1"]["labels"]["final"]["info"]["client_id"] == "other"
    assert sorted(one.get_labeled_images()) == ["v0", "v1", "v2"]


@check
def an_image_of_the_store_goes_before_a_file_of_the_working_folder(folder: Path) -> None:
    from monailabel.interfaces.app import MONAILabelApp

    from med3dinsight_ext.monailabel.app.main import LabelApp

    store, seen = studies(folder), {}
    app = LabelApp.__new__(LabelApp)
    task = mock.Mock(labels=[], versions=mock.Mock(weights={"saved": "now"}))
    app._infers, app._datastore = {"m": task}, store
    app._sessions = mock.Mock(store_path=str(folder / "sessions"))
    answer = volume(folder / "answer.nii.gz", boxes(2))
    found = {"label": str(answer), "file": str(answer), "params": {"a": 1}}
    before = os.getcwd()
    os.chdir(folder)
    try:
        Path("v0").write_text("another scan")
        with mock.patch.object(
            MONAILabelApp, "infer", lambda _, request, __: seen.update(request) or found
        ):
            got = app.infer({"model": "m", "image": "v0", "save_label": True, "label_tag": "mine"})
            missing = raised(lambda: app.infer({"model": "m", "image": ["/etc/passwd"]}))
    finally:
        os.chdir(before)
    assert seen["image"] == store.get_image_uri("v0") and got["label"] == "v0"
    assert (stored(store.get_label_uri("v0", "mine")) == boxes(2)).all()
    assert store.get_label_info("v0", "mine")["params"] == {"a": 1}
    assert missing.status_code == 404


class Memory:
    """A client of a DICOMweb store that lies in memory."""

    base_url = "http://memory"

    def __init__(self) -> None:
        self.instances: list[Any] = []

    def search_for_series(self, search_filters: dict[str, str] | None = None) -> list[Any]:
        from pydicom import Dataset

        rows = {}
        for one in self.instances:
            head = Dataset()
            for name in ("SeriesInstanceUID", "StudyInstanceUID", "Modality", "PatientID"):
                setattr(head, name, one.get(name))
            rows[one.SeriesInstanceUID] = head
        wanted = (search_filters or {}).items()
        return [
            head.to_json_dict()
            for head in rows.values()
            if all(str(head.get(key)) == value for key, value in wanted)
        ]

    def retrieve_series(self, study: str, series: str) -> list[Any]:
        return [one for one in self.instances if one.SeriesInstanceUID == series]

    def retrieve_series_metadata(self, study: str, series: str) -> list[Any]:
        rows = [one.to_json_dict() for one in self.retrieve_series(study, series)]
        return [{tag: row[tag] for tag in row if tag != "7FE00010"} for row in rows]

    def store_instances(self, instances: list[Any]) -> Any:
        from pydicom import Dataset

        self.instances += instances
        found = Dataset()
        found.RetrieveURL = f"http://memory/series/{instances[0].SeriesInstanceUID}/x"
        return found


def remote(folder: Path) -> tuple[Memory, list[str]]:
    """A client of a store with two images, and their series."""
    import nibabel as nib
    import numpy as np

    sys.modules.setdefault("playwright.sync_api", mock.MagicMock())
    sys.modules.setdefault("playwright", mock.MagicMock())
    sys.path.append(str(Path(__file__).parents[2] / "docs" / "guides"))
    from ohif import dicom_slices

    client, series = Memory(), []
    for n in range(2):
        array = np.random.default_rng(n).random((10, 12, 8))
        slices = dicom_slices(nib.Nifti1Image(array, np.diag([2.0, 2, 3, 1])), f"Example {n}")
        client.store_instances(slices)
        series.append(str(slices[0].SeriesInstanceUID))
    return client, series


def dicom_store(client: Memory, cache: Path, names: list[str] = NAMES) -> Any:
    """A server of the store with a cache of its own."""
    from monailabel.config import settings

    from med3dinsight_ext.monailabel.app import datastores

    own = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([own, os.environ["PATH"]])
    kind = getattr(datastores, "DicomStore", None)
    if kind is None:
        from med3dinsight_ext.monailabel.app.dicom_store import DicomStore as kind
    with mock.patch.object(settings, "MONAI_LABEL_DICOMWEB_CACHE_PATH", str(cache)):
        return kind(client, names)


def labels_of(store: Any) -> dict[str, Any]:
    """Labels to train on, by their image."""
    return {
        Path(item["image"]).name.removesuffix(".nii.gz"): stored(item["label"])
        for item in store.datalist()
    }


@check
def a_label_without_all_classes_comes_back_from_dicom_as_it_was(folder: Path) -> None:
    client, series = remote(folder)
    store = dicom_store(client, folder / "one")
    shapes = [stored(store.get_image_uri(name)).shape for name in series]
    assert shapes == [(10, 12, 8)] * 2
    given = {"label_info": [{"name": name} for name in NAMES[1:]]}
    expected = {}
    for name, values, info in ((series[0], (2,), given), (series[1], (1, 3), {})):
        array, affine = boxes(*values), image_affine(store.get_image_uri(name))
        path = folder / "label.nii.gz"
        save(array, affine, path)
        store.save_label(name, str(path), "final", info)
        expected[name] = array
    found = [
        [str(part.SegmentLabel) for part in one.SegmentSequence]
        for one in client.instances
        if one.Modality == "SEG"
    ]
    assert found == [["Spleen"], ["liver", "tumour"]]
    for cache in ("one", "other"):  # that which saved them, and a new one
        labels = labels_of(dicom_store(client, folder / cache))
        assert labels.keys() == expected.keys()
        assert all((labels[name] == expected[name]).all() for name in series), cache


def image_affine(path: str) -> Any:
    import nibabel as nib

    return nib.load(path).affine


def save(array: Any, affine: Any, path: Path) -> None:
    import nibabel as nib

    nib.save(nib.Nifti1Image(array, affine), path)


@check
def a_segmentation_that_was_corrected_elsewhere_reaches_each_round(folder: Path) -> None:
    client, series = remote(folder)
    store = dicom_store(client, folder / "one")
    elsewhere = dicom_store(client, folder / "other")
    foreign = dicom_store(client, folder / "foreign", ["background", "lesion"])
    affine, path = image_affine(store.get_image_uri(series[0])), folder / "label.nii.gz"
    for n, (saving, values) in enumerate(
        ((elsewhere, (1,)), (store, (1, 2)), (elsewhere, (3,)), (elsewhere, (2,)), (foreign, (1,)))
    ):
        save(boxes(*values), affine, path)
        saving.save_label(series[0], str(path), "final", {})
        client.instances[-1].ContentTime = f"{n:06d}"
        client.instances[-1].ContentDate = "20300101"
        if saving is foreign:
            assert store.get_labeled_images() == [series[0]]
            assert (labels_of(store)[series[0]] == boxes(2)).all()
        else:
            assert (labels_of(store)[series[0]] == boxes(*values)).all(), values
    del client.instances[-2].SegmentSequence  # as from a store that keeps no names
    assert (labels_of(dicom_store(client, folder / "new"))[series[0]] == boxes(3)).all()
    client.instances = [one for one in client.instances if one.Modality != "SEG"]
    assert labels_of(store) == {} and store.get_labeled_images() == []


@check
def a_label_of_background_alone_is_refused_for_dicom(folder: Path) -> None:
    client, series = remote(folder)
    store = dicom_store(client, folder / "one")
    path = folder / "label.nii.gz"
    save(boxes(), image_affine(store.get_image_uri(series[0])), path)
    reason = refusal(lambda: store.save_label(series[0], str(path), "final", {}))
    assert "label must hold a class, got only background" in reason
    store.save_label(series[0], str(path), "original", {})


LAST = """
import threading
from med3dinsight_ext.monailabel.app.rounds import end, last_words
def log():
    while True:
        print("a line of the log", flush=True)
threading.Thread(target=log, daemon=True).start()
last_words("the cause")
threading.Event().wait(0.2)
end()
"""


@check
def the_cause_of_an_end_is_the_last_line(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LAST], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "the cause" and done.returncode == 1, done.stderr


def folder_store(folder: Path) -> Any:
    from med3dinsight_ext.monailabel.app.datastores import CheckedDatastore

    return CheckedDatastore(str(folder), ["background", "a", "b", "c"])


@check
def a_name_that_is_taken_is_another_images_alone(folder: Path) -> None:
    import fakes
    from fastapi import HTTPException

    for name in ("first", "second"):
        (folder / name).mkdir()
        fakes.volume(folder / name / "T1.nii.gz", len(name))
    store = folder_store(folder / "studies")
    store.add_image("T1", str(folder / "first/T1.nii.gz"), {})
    store.add_image("T1", str(folder / "first/T1.nii.gz"), {})  # once more
    before = Path(store.get_image_uri("T1")).read_bytes()
    for name in ("T1", ""):
        found = raised(lambda name=name: store.add_image(name, f"{folder}/second/T1.nii.gz", {}))
        assert isinstance(found, HTTPException) and found.status_code == 400, found
        assert "image must have a new name, got 'T1'" in str(found.detail)
    assert Path(store.get_image_uri("T1")).read_bytes() == before
    store.add_image("T2", f"{folder}/second/T1.nii.gz", {})


@check
def a_label_with_another_ending_replaces_the_file(folder: Path) -> None:
    import fakes
    import nibabel as nib
    import numpy as np

    fakes.volume(folder / "T1.nii.gz", 0)
    affine, shape = image_affine(f"{folder}/T1.nii.gz"), nib.load(folder / "T1.nii.gz").shape
    store = folder_store(folder / "studies")
    store.add_image("T1", str(folder / "T1.nii.gz"), {})
    for value, ending in enumerate((".nii.gz", ".nii", ".nii.gz"), 1):
        save(np.full(shape, value, np.uint8), affine, folder / f"label{ending}")
        store.save_label("T1", str(folder / f"label{ending}"), "final", {})
        kept = list((folder / "studies/labels/final").iterdir())
        assert [path.name for path in kept] == [f"T1{ending}"]
    store.remove_label("T1", "final")
    store.refresh()
    assert store.get_labeled_images() == []


@check
def a_label_of_classes_with_other_numbers_is_not_trained_on(folder: Path) -> None:
    from med3dinsight_ext.monailabel.app import rounds
    from med3dinsight_ext.monailabel.app.datastores import CheckedDatastore

    label = str(volume(folder / "label.nii.gz", boxes(1)))
    studies(folder).save_label("v0", label, "final", {})
    (folder / "studies/labels/final/v1.nii.gz").write_bytes(Path(label).read_bytes())
    for order, kept in (((0, 1, 2, 3), ["v0", "v1"]), ((0, 2, 1, 3), ["v1"])):  # v1 says none
        names = [NAMES[n] for n in order]
        store = CheckedDatastore(str(folder / "studies"), names)
        task = training(folder / "-".join(names))
        with mock.patch.object(rounds, "class_names", return_value=names):
            items = task._fetch_datalist({"model": "m"}, store)
        assert sorted(Path(item["image"]).name[:2] for item in items) == kept


@check
def the_encoder_is_frozen_in_the_first_training_alone(folder: Path) -> None:
    task = training(folder)
    for given, expected in ((20, 0), (-1, None), (0, None)):
        task.bundle_config["freeze_epochs"] = given
        assert task._update_overrides({}).get("freeze_epochs") == expected


@check
def names_with_an_ending_inside_are_images(folder: Path) -> None:
    names = ("scan.nii_old.nii", "x.nii.gz.nii", "P3.nii.gz.nii.gz", "P1.nii", "P1.nii.gz")
    for name in names:
        volume(folder / "studies" / name, boxes(1))
    with mock.patch("logging.Logger.warning") as warning:
        store = folder_store(folder / "studies")
    assert sorted(store.list_images()) == ["P1", "P3.nii.gz", "scan.nii_old", "x.nii.gz"]
    for name in ("P3.nii.gz", "scan.nii_old", "x.nii.gz"):
        assert Path(store.get_image_uri(name)).is_file()
    assert "P1.nii, P1.nii.gz" in str(warning.call_args_list)


@check
def a_request_for_the_next_image_says_that_none_can_be_read(folder: Path) -> None:
    import torch
    from fastapi import HTTPException

    from med3dinsight_ext.monailabel.app.main import KCenterGreedy

    store, strategy = studies(folder), KCenterGreedy(folder)
    strategy.features = mock.Mock(side_effect=RuntimeError("out of memory"))
    found = raised(lambda: strategy({}, store))
    assert found.status_code == 503 and "of 2 images could not be computed: out" in found.detail
    broken = HTTPException(502, "series must come whole")
    strategy.features = mock.Mock(side_effect=[torch.zeros(3), broken])
    assert strategy({}, store) == {"id": "v0"}
    strategy.features = mock.Mock(side_effect=broken)
    for name in ("v0", "v1"):
        label = volume(folder / "label.nii.gz", boxes(1))
        store.save_label(name, str(label), "final", {})
    assert strategy({}, store) is None


@check
def a_series_is_fetched_whole_or_not_at_all(folder: Path) -> None:
    client, series = remote(folder)
    store, whole = dicom_store(client, folder / "one"), client.retrieve_series
    listed = client.retrieve_series_metadata("", series[0])
    client.retrieve_series_metadata = lambda *_: listed
    client.retrieve_series = lambda *words: whole(*words)[:3]
    found = raised(lambda: store.get_image_uri(series[0]))
    assert found.status_code == 502 and "got 3 of its 8 images" in found.detail
    client.retrieve_series = whole
    left = Path(store._datastore.image_path()) / series[0]
    left.mkdir()
    whole("", series[0])[0].save_as(left / "1.dcm")  # of a process that was killed
    assert stored(store.get_image_uri(series[0])).shape == (10, 12, 8)


@check
def a_dicom_segmentation_of_an_answer_names_each_value(folder: Path) -> None:
    from med3dinsight_ext.monailabel.app.dicom_store import with_names

    seen: list[Any] = []
    write = with_names(lambda *words, **_: seen.append(words[2]) or "out", NAMES)
    given = [{"name": name, "color": [n, n, n]} for n, name in enumerate(NAMES[1:])]
    assert write("", str(volume(folder / "a.nii.gz", boxes(2))), given, use_itk=True) == "out"
    assert seen == [[{"name": "Spleen", "color": [1, 1, 1]}]]


def main(out: str) -> None:
    found: dict[str, str] = {}
    for name, function in CHECKS.items():
        folder = Path(out).absolute().parent / name  # stays: threads may be watching it
        folder.mkdir()
        try:
            function(folder)
        except Exception:
            found[name] = traceback.format_exc()
        else:
            found[name] = ""
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
