"""MONAI Label's own app and ours, over REST, in the environment that ``label-install`` makes."""

import gzip
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fakes
import nibabel as nib
import numpy as np
import pytest
import torch
from label_running import PYTHON, BrightNet, Server, is_free, small_bundle, start_own, start_stock
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
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY), reason=WHY)]


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


def start(root: Path, app: str) -> tuple[Server, Path, Path]:
    """A server, its first bundle, and its studies."""
    studies = write_studies(root / "studies")
    bundles = [small_bundle(root / PLAIN), small_bundle(root / CLICK, "ClickNet", overlays=True)]
    if app == "own":  # the stock app would take it for the model, as it has the shortest name
        (bundles[0] / "models" / "last.ckpt").write_bytes(b"of a run from the command line")
    starter = {"stock": start_stock, "own": start_own}[app]
    return starter(root, bundles, studies), bundles[0], studies


@pytest.fixture(scope="module", params=["stock", "own"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path, Path]]:
    found = start(tmp_path_factory.mktemp(request.param), request.param)
    server = found[0]
    yield found
    if server.process.poll() is None:
        server.stop()
        assert is_free(server.port)


own_app = pytest.mark.parametrize("served", ["own"], indirect=True)
Served = tuple[Server, Path, Path]


def overlay(server: Server, image: str, model: str = PLAIN, params: str = "{}") -> nib.Nifti1Image:
    """What the server segments in an image."""
    answer = server.ask("POST", f"/infer/{model}?image={image}&output=image", params=params)
    assert answer.status == 200, server.log.read_text()[-3000:]
    return nib.Nifti1Image.from_bytes(gzip.decompress(answer.body))


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return torch.load(bundle / "models" / "model.pt", weights_only=True)


def test_the_server_offers_model_labels_and_kind_of_clicks(served: Served) -> None:
    found = served[0].ask("GET", "/info/").body
    assert found["models"].keys() == {PLAIN, CLICK, f"{CLICK}_seg"}
    assert found["models"][PLAIN]["type"] == "segmentation"
    assert found["models"][PLAIN]["labels"] == {"foreground": 1}
    assert found["models"][CLICK]["type"] == "deepedit"
    assert found["models"][CLICK]["labels"] == {"background": 0, "foreground": 1}
    assert found["trainers"].keys() == {PLAIN, CLICK}


@pytest.mark.parametrize("image", ["v0", *KINDS])
def test_a_segmentation_lies_on_its_image(image: str, served: Served) -> None:
    server, _, studies = served
    found, stored = overlay(server, image), nib.load(studies / f"{image}.nii.gz")
    assert found.shape == stored.shape and np.allclose(found.affine, stored.affine, atol=1e-4)
    ball = np.asarray(nib.load(studies / "labels" / f"{image}.nii.gz").dataobj) > 0
    mask = np.asarray(found.dataobj) > 0
    assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.85


@pytest.mark.parametrize("image", ["v0", *KINDS])
def test_the_segmentation_follows_a_click(image: str, served: Served) -> None:
    for click in ([9, 12, 10], [19, 20, 14]):
        params = json.dumps({"foreground": [click], "background": []})
        mask = np.asarray(overlay(served[0], image, CLICK, params).dataobj)
        assert np.linalg.norm(np.argwhere(mask).mean(0) - click) < 1.5


@own_app
@pytest.mark.parametrize(
    ("clicks", "message"),
    [
        ({"foreground": [[40, 1, 1]]}, "click must be inside the volume, 0 to .27, 31, 25."),
        ({"liver": [[1, 1, 1]]}, "clicks must be on one of the labels background, foreground"),
    ],
)
def test_a_click_that_means_nothing_is_refused(clicks: dict, message: str, served: Served) -> None:
    path = f"/infer/{CLICK}?image=v0&output=image"
    answer = served[0].ask("POST", path, params=json.dumps(clicks))
    assert answer.status == 400 and re.search(message, answer.body["detail"])


def test_without_a_click_the_network_segments_alone(served: Served) -> None:
    found = overlay(served[0], "v0", CLICK, json.dumps({"foreground": [], "background": []}))
    assert found.shape == (28, 32, 26) and not np.asarray(found.dataobj).any()  # as ClickNet does


def test_a_saved_label_trains_the_model(served: Served) -> None:
    server, bundle, studies = served
    before = weights(bundle)
    assert server.save_label("v0", studies / "labels" / "v0.nii.gz").status == 200
    assert server.start_training(PLAIN).status == 200
    assert server.trained()["status"] == "DONE"
    after = weights(bundle)
    assert before.keys() == after.keys() and before["threshold"] != after["threshold"]
    assert overlay(server, "v0").shape == (28, 32, 26)  # by the new weights
    files = {"model.pt", "last.ckpt", "run.json", ".gitkeep", ".training"}
    assert {path.name for path in (bundle / "models").iterdir()} <= files


def test_two_labels_train_and_a_second_training_is_refused(served: Served) -> None:
    server, bundle, studies = served
    before = weights(bundle)
    assert server.save_label("v1", studies / "labels" / "v1.nii.gz").status == 200
    assert server.start_training(PLAIN, val_split=0.2).status == 200
    server.wait(lambda: server.ask("GET", "/train/").body["status"] == "RUNNING")
    refused = server.start_training(PLAIN)
    assert refused.status == 429 and "Already Running" in refused.body["detail"]
    assert server.trained()["status"] == "DONE"
    assert before["threshold"] != weights(bundle)["threshold"]


def test_the_next_case_is_one_without_a_label(served: Served) -> None:
    server, _, studies = served
    server.save_label("v0", studies / "labels" / "v0.nii.gz")
    strategies = server.ask("GET", "/info/").body["strategies"]
    assert {"first", "random"} <= strategies.keys()
    for name in strategies:
        answer = server.ask("POST", f"/activelearning/{name}", {})
        assert answer.status == 200 and answer.body["id"] in {"v1", "v2", "v3", *KINDS}


@pytest.mark.parametrize("served", ["stock"], indirect=True)
def test_the_stock_app_does_not_train_on_a_label_of_another_shape(served: Served) -> None:
    server, bundle, studies = served
    before = weights(bundle)
    assert server.save_label("oblique", studies / "labels" / "v0.nii.gz").status == 200
    server.start_training(PLAIN)
    task = server.trained()
    assert task["status"] == "ERROR"
    assert "label must have its image's shape (28, 30, 24), got (28, 32, 26)" in str(task)
    assert all(torch.equal(value, before[name]) for name, value in weights(bundle).items())
    server.ask("DELETE", "/datastore/label?id=oblique&tag=final")


@own_app
@pytest.mark.parametrize(
    ("image", "label", "status", "message"),
    [
        ("oblique", "labels/v0.nii.gz", 400, "refused, nothing was saved: label must have its"),
        ("v2", "v2.nii.gz", 400, "label must hold 0 to 1 (background, foreground), got the value"),
        ("v2", "segmentation.json", 400, "label must end in one of"),
        ("none", "labels/v0.nii.gz", 404, "image must be one of the datastore's, got 'none'"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(
    image: str, label: str, status: int, message: str, served: Served
) -> None:
    server, _, studies = served
    answer = server.save_label(image, studies / label)
    assert answer.status == status and message in answer.body["detail"]
    assert not (studies / "labels" / "final" / f"{image}.nii.gz").exists()


@own_app
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/infer/other?image=v0", "model must be one of seg-finetune, deepedit_ball_seg"),
        ("/infer/seg-finetune?image=v9", "image must be one of the datastore's, got 'v9'"),
        ("/train/other", "model must be one of seg-finetune, deepedit_ball, got 'other'"),
        (
            "/activelearning/other",
            "strategy must be one of first, random, kcenter_greedy, got 'other'",
        ),
    ],
)
def test_what_is_not_there_is_named(path: str, message: str, served: Served) -> None:
    answer = served[0].ask("POST", path, {} if "infer" not in path else None)
    assert answer.status == 404 and message in answer.body["detail"]


@own_app
def test_a_server_killed_in_training_comes_back_with_its_model(
    served: Served, tmp_path: Path
) -> None:
    server, bundle, studies = served
    server.save_label("v0", studies / "labels" / "v0.nii.gz")
    history = bundle / "eval" / "history.jsonl"
    history.unlink(missing_ok=True)
    server.start_training(PLAIN, max_epochs=100_000)
    server.wait(lambda: history.exists() and len(history.read_text().splitlines()) > 2)
    server.stop(signal.SIGKILL)
    assert weights(bundle).keys() == BrightNet().state_dict().keys()
    again = start_own(tmp_path, [bundle], studies)
    try:
        assert overlay(again, "v0").shape == (28, 32, 26)
        assert again.start_training(PLAIN, max_epochs=100_000).status == 200
        again.wait(lambda: again.ask("GET", "/train/").body["status"] == "RUNNING")
    finally:
        again.stop()
    assert not again.left and is_free(again.port)
    assert not list((tmp_path / "tmp").glob("med3dinsight-label-*"))
