"""MONAI Label's own app and ours, over REST, in the environment that ``label-install`` makes."""

import json
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from label_cases import CLICK, KINDS, MARKS, PLAIN, overlay, weights, write_studies
from label_running import BrightNet, Server, is_free, small_bundle, start_own, start_stock
from running import free_port

pytestmark = MARKS


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


@own_app
@pytest.mark.parametrize(
    ("image", "clicks", "message"),
    [
        ("lps", [[9, 31, 20]], "click must be inside the volume, 0 to .27, 29, 23."),  # one of v0
        ("v0", [[9, 9, n / 25] for n in range(500)], "clicks must be at most 100 .* got 500"),
    ],
)
def test_clicks_of_another_series_and_too_many_are_refused(
    image: str, clicks: list, message: str, served: Served
) -> None:
    params = json.dumps({"foreground": clicks})
    answer = served[0].ask("POST", f"/infer/{CLICK}?image={image}&output=image", params=params)
    assert answer.status == 400 and re.search(message, answer.body["detail"])


@own_app
def test_one_case_opened_by_three_annotators_gives_each_their_own_answer(served: Served) -> None:
    places = [[9, 12, 10], [19, 20, 14], [14, 5, 20]]

    def work(place: list[int]) -> None:
        clicks: list[list[int]] = []
        for n in range(4):
            clicks.append([place[0], place[1], place[2] + n % 2])
            mask = np.asarray(
                overlay(served[0], "v2", CLICK, f'{{"foreground": {clicks}}}').dataobj
            )
            assert np.linalg.norm(np.argwhere(mask).mean(0) - place) < 2.5

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, places))


@own_app
def test_a_click_that_is_taken_back_leads_to_the_answer_before_it(served: Served) -> None:
    one, two = ({"foreground": [[9, 12, 10], [19, 20, 14]][:n]} for n in (1, 2))
    first, _, again = (
        np.asarray(overlay(served[0], "v3", CLICK, json.dumps(clicks)).dataobj)
        for clicks in (one, two, one)
    )
    assert first.any() and np.array_equal(first, again)


@own_app
def test_the_weights_that_answer_are_named(served: Served) -> None:
    server, bundle, _ = served
    found = server.ask("GET", "/info/").body["models"][CLICK]
    assert found["weights"]["validation"] is None and "not recorded" in found["description"]
    params = json.dumps({"foreground": [[9, 12, 10]]})
    answer = server.ask("POST", f"/infer/{CLICK}?image=v0&output=json", params=params)
    assert answer.body["weights"] == found["weights"]


def test_without_a_click_the_network_segments_alone(served: Served) -> None:
    found = overlay(served[0], "v0", CLICK, json.dumps({"foreground": [], "background": []}))
    assert found.shape == (28, 32, 26) and not np.asarray(found.dataobj).any()  # as ClickNet does


@own_app
def test_a_label_is_replaced_as_a_whole(served: Served) -> None:
    server, _, studies = served
    saved = studies / "labels" / "final" / "v2.nii.gz"
    noise = np.random.default_rng(0).integers(0, 2, (28, 32, 26)).astype(np.uint8)
    other = studies.parent / "other.nii.gz"
    nib.save(nib.Nifti1Image(noise, nib.load(studies / "v2.nii.gz").affine), other)
    files = [studies / "labels" / "v2.nii.gz", other]
    whole = {file.read_bytes() for file in files}
    assert server.save_label("v2", files[0]).status == 200
    stop = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(saved.read_bytes())

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            assert all(server.save_label("v2", files[n % 2]).status == 200 for n in range(20))
        finally:
            stop.set()
        reading.result()
    assert seen == whole
    server.ask("DELETE", "/datastore/label?id=v2&tag=final")


def test_a_saved_label_trains_the_model(served: Served) -> None:
    server, bundle, studies = served
    before = weights(bundle)
    assert server.save_label("v0", studies / "labels" / "v0.nii.gz").status == 200
    assert server.start_training(PLAIN).status == 200
    assert server.trained()["status"] == "DONE"
    after = weights(bundle)
    assert before.keys() == after.keys() and before["threshold"] != after["threshold"]
    assert overlay(server, "v0").shape == (28, 32, 26)  # by the new weights
    files = {"model.pt", "last.ckpt", "run.json", ".gitkeep", ".training", ".weights", "earlier"}
    assert {path.name for path in (bundle / "models").iterdir()} <= files


def test_two_labels_train_and_a_second_training_is_refused(served: Served) -> None:
    server, bundle, studies = served
    before = weights(bundle)
    before["threshold"] = torch.tensor(0.9)  # misses half of a ball, so that a round is better
    torch.save(before, bundle / "models" / "model.pt")
    assert server.save_label("v1", studies / "labels" / "v1.nii.gz").status == 200
    assert server.start_training(PLAIN, max_epochs=3, val_split=0.2).status == 200
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
        ("v2", "v2.nrrd", 400, "label must end in one of ('.nii', '.nii.gz'), got "),
        ("none", "labels/v0.nii.gz", 404, "image must be one of the datastore's, got 'none'"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(
    image: str, label: str, status: int, message: str, served: Served
) -> None:
    server, _, studies = served
    if label.endswith(".nrrd"):  # which a folder of images would not list
        shutil.copy(studies / "labels" / "v2.nii.gz", studies / label)
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
            "strategy must be one of random, first, kcenter_greedy, got 'other'",
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


FULL_DISK = """
import errno, os, runpy, shutil
copy = shutil.copyfile
def full(source, target, **kwargs):
    if os.path.exists("full"):
        open(target, "wb").write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    return copy(source, target, **kwargs)
shutil.copyfile = full
runpy.run_module("med3dinsight_ext", run_name="__main__")
"""


def test_a_full_disk_keeps_the_label_before_and_says_so(tmp_path: Path) -> None:
    studies = write_studies(tmp_path / "studies")
    bundle, port = small_bundle(tmp_path / PLAIN), free_port()
    words = ["-c", FULL_DISK, "label", "--studies", str(studies), "--port", str(port)]
    server = Server([*words, "--bundles", str(bundle)], tmp_path, port)
    try:
        assert server.save_label("v0", studies / "labels" / "v0.nii.gz").status == 200
        saved = studies / "labels" / "final" / "v0.nii.gz"
        before = saved.read_bytes()
        (tmp_path / "full").touch()
        answer = server.save_label("v0", studies / "labels" / "v1.nii.gz")
        assert answer.status == 507 and "No space left" in answer.body["detail"]
        assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1
        (tmp_path / "full").unlink()
        assert server.save_label("v0", studies / "labels" / "v1.nii.gz").status == 200
        assert saved.read_bytes() != before
    finally:
        server.stop()
