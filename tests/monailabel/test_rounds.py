"""Rounds of training and the effort of annotators, over REST, as viewers ask for them."""

import gzip
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from label_cases import CLICK, MARKS, PLAIN, overlay, weights, write_studies
from label_running import Server, small_bundle, start_own

pytestmark = MARKS
FOREVER = 100_000  # epochs


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path, Path]]:
    root = tmp_path_factory.mktemp("rounds")
    studies = write_studies(root / "studies")
    bundles = [small_bundle(root / PLAIN), small_bundle(root / CLICK, "ClickNet", overlays=True)]
    server = start_own(root, bundles, studies)
    for name in ("v0", "v1", "v2"):
        assert server.save_label(name, studies / "labels" / f"{name}.nii.gz").status == 200
    yield server, bundles[0], studies
    if server.process.poll() is None:
        server.stop()


Served = tuple[Server, Path, Path]


@pytest.fixture(autouse=True)
def idle(served: Served) -> Iterator[None]:
    """No training goes on after a test."""
    yield
    served[0].ask("DELETE", "/train/")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def train_forever(server: Server, bundle: Path) -> None:
    """Start a training, and wait until it has trained for some epochs."""
    history = bundle / "eval" / "history.jsonl"
    history.unlink(missing_ok=True)
    assert server.start_training(PLAIN, max_epochs=FOREVER).status == 200
    server.wait(lambda: history.exists() and len(history.read_text().splitlines()) > 2)


def resident(server: Server) -> int:
    """MiB of the server's process."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) // 1024


def test_a_round_is_offered_beside_the_weights_before_it_and_one_request_goes_back(
    served: Served,
) -> None:
    server, bundle, _ = served
    assert server.ask("POST", f"/rounds/{PLAIN}/back").status == 400
    assert f"{PLAIN}_earlier" not in server.ask("GET", "/info/").body["models"]
    before = weights(bundle)
    before["threshold"] = torch.tensor(0.9)  # misses half of a ball, so that a round is better
    torch.save(before, bundle / "models" / "model.pt")
    server.start_training(PLAIN, max_epochs=3, val_split=0.34)
    assert server.trained()["status"] == "DONE"
    after = weights(bundle)
    assert not same(before, after)
    found = server.ask("GET", "/rounds/models").body[PLAIN]
    score, start = (found["now"][key]["val_mean_dice"] for key in ("validation", "start"))
    assert score > start and found["earlier"]["saved"]
    stats = server.ask("GET", "/info/").body["train_stats"][PLAIN]
    assert stats == {"best_metric": score}
    assert "before training; kept epoch" in server.ask("GET", "/rounds/").body.decode()
    new, old = (
        np.asarray(overlay(server, "v3", name).dataobj).sum()
        for name in (PLAIN, f"{PLAIN}_earlier")
    )
    assert new != old
    assert server.ask("POST", f"/rounds/{PLAIN}/back").status == 200
    assert same(before, weights(bundle))
    assert np.asarray(overlay(server, "v3").dataobj).sum() == old
    assert server.ask("POST", f"/rounds/{PLAIN}/back").body["now"] == found["now"]
    assert same(after, weights(bundle))
    answer = server.ask("POST", "/rounds/other/back")
    assert answer.status == 404 and PLAIN in answer.body["detail"]


def test_a_training_shows_its_progress_and_a_stopped_one_changes_nothing(served: Served) -> None:
    server, bundle, _ = served
    before = weights(bundle)
    train_forever(server, bundle)
    stats = server.ask("GET", "/info/").body["train_stats"][PLAIN]
    assert 1 < stats["epoch"] < stats["total_epochs"] == FOREVER
    assert "Stop" in server.ask("GET", "/rounds/").body.decode()
    (bundle / "models" / "earlier").mkdir(exist_ok=True)
    torch.save(before, bundle / "models" / "earlier" / "model.pt")
    answer = server.ask("POST", f"/rounds/{PLAIN}/back")
    assert answer.status == 409 and "during a training" in answer.body["detail"]
    assert server.ask("POST", f"/train/{PLAIN}?run_sync=true&enqueue=true", {}).status == 400
    assert server.ask("DELETE", "/train/").body["status"] == "STOPPED"
    assert same(before, weights(bundle))
    assert "epoch" not in server.ask("GET", "/info/").body["train_stats"][PLAIN]
    server.wait(lambda: server.ask("GET", "/train/?check_if_running=true").status == 404)
    assert server.start_training(PLAIN).status == 200  # its lock is gone
    assert server.trained()["status"] == "DONE"


def test_a_training_that_needs_too_much_memory_ends_and_changes_nothing(served: Served) -> None:
    server, bundle, _ = served
    before = weights(bundle)
    server.start_training(PLAIN, max_epochs=FOREVER, memory_gb=0.1)
    task = server.trained()
    assert task["status"] == "ERROR"
    assert "memory of a training must be at most 0.1 GiB, got " in str(task["details"])
    assert same(before, weights(bundle)) and overlay(server, "v0").shape == (28, 32, 26)
    server.start_training(PLAIN, memory_gb=-1)
    assert "memory_gb must be above 0, got -1" in str(server.trained()["details"])


def test_labels_may_be_saved_while_a_training_reads_them(served: Served) -> None:
    server, _, studies = served
    assert server.start_training(PLAIN, max_epochs=2).status == 200
    saved = 0
    while server.ask("GET", "/train/").body["status"] in ("SUBMITTED", "RUNNING"):
        name = f"v{saved % 3}"
        assert server.save_label(name, studies / "labels" / f"{name}.nii.gz").status == 200
        saved += 1
    task = server.ask("GET", "/train/").body
    assert task["status"] == "DONE" and saved > 5
    assert "left out" not in str(task["details"])


def test_every_answer_is_logged_and_the_effort_of_a_case_is_shown(served: Served) -> None:
    server, _, studies = served
    places = [[9, 12, 10], [12, 12, 10], [12, 15, 10]]
    for count in (0, 1, 2, 3):
        params = json.dumps({"foreground": places[:count], "client_id": "ann"})
        overlay(server, "v3", CLICK, params)
    refused = json.dumps({"foreground": [[99, 1, 1]], "client_id": "ann"})
    path = f"/infer/{CLICK}?image=v3&output=image"
    assert server.ask("POST", path, params=refused).status == 400
    label = studies / "labels" / "v3.nii.gz"
    own = {"params": json.dumps({"client_id": "ann"}), "label": label}
    assert server.ask("PUT", "/datastore/label?image=v3&tag=final", **own).status == 200
    row = server.ask("GET", "/rounds/effort").body[-1]
    model = server.ask("GET", "/info/").body["models"][CLICK]
    expected = {
        "image": "v3",
        "annotator": "ann",
        "answers": 4,
        "clicks": 3,
        "saved": True,
        "model": CLICK,
        "weights": model["weights"]["saved"],
    }
    assert {key: row[key] for key in expected} == expected
    assert 0 < row["waited"] < row["seconds"] < 60
    page = server.ask("GET", "/rounds/").body.decode()
    assert "<td>ann</td>" in page and "Go back" in page
    server.ask("DELETE", "/datastore/label?id=v3&tag=final")


def test_the_requests_of_3d_slicer_segment_click_save_train_and_go_on(served: Served) -> None:
    """In the order and with the fields of MONAI Label's Slicer module (MONAILabelLib/client.py)."""
    server, _, studies = served
    user = {"client_id": "user-slicer"}
    info = server.ask("GET", "/info/").body
    assert {"background", "foreground"} == set(info["labels"])
    sample = server.ask("POST", "/activelearning/first", user).body
    image = sample["id"]
    assert image not in ("v0", "v1", "v2") and Path(sample["path"]).is_file()
    assert server.ask("GET", f"/datastore/image?image={image}").status == 200

    def infer(model: str, **params: object) -> tuple[np.ndarray, dict]:
        text = json.dumps(user | {"device": "cpu"} | params)
        answer = server.ask("POST", f"/infer/{model}?image={image}", params=text)
        assert answer.status == 200
        return parts(answer.body)

    mask, params = infer(f"{CLICK}_seg")
    assert not mask.any() and params["label_names"] == {"foreground": 1}
    clicks = {"background": [], "foreground": [[9, 12, 10]], "label": "foreground"}
    mask, params = infer(CLICK, **clicks)
    assert mask[9, 12, 10] == 1 and params["label_names"]["foreground"] == 1
    info = [{"name": "foreground", "idx": 1}]
    form = {"params": json.dumps({"label_info": info} | user)}
    path = f"/datastore/label?image={image}&tag=final"
    label = studies / "labels" / f"{image}.nii.gz"
    assert server.ask("PUT", path, **form, label=label).body["label"] == image
    settings = {"max_epochs": 1, "device": "cpu", "multi_gpu": False, "val_split": 0}
    assert server.ask("POST", f"/train/{PLAIN}", user | settings).body["id"]
    server.wait(lambda: server.ask("GET", "/train/?check_if_running=true").status == 404)
    assert server.trained()["status"] == "DONE"
    assert server.ask("POST", "/activelearning/first", user).body["id"] != image

    upload = {"params": json.dumps(user | {"foreground": [], "background": []})}
    answer = server.ask("POST", f"/infer/{PLAIN}?image=new", **upload, file=studies / "v1.nii.gz")
    assert answer.status == 200 and parts(answer.body)[0].any()
    server.ask("DELETE", f"/datastore/label?id={image}&tag=final")


def parts(body: bytes) -> tuple[np.ndarray, dict]:
    """The segmentation and the parameters of a multipart answer."""
    mark = body.split(b"\r\n", 1)[0].removeprefix(b"--").decode()
    head = f"Content-Type: multipart/form-data; boundary={mark}\r\n\r\n".encode()
    found = {
        part.get_param("name", header="Content-Disposition"): part.get_payload(decode=True)
        for part in message_from_bytes(head + body).get_payload()
    }
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(found["image"]))
    return np.asarray(mask.dataobj), json.loads(found["params"])


def test_three_annotators_with_100_clicks_each_and_a_training_lose_no_answer(
    served: Served,
) -> None:
    server, bundle, _ = served
    train_forever(server, bundle)
    logged = len(server.ask("GET", "/rounds/effort").body)
    sizes: list[int] = []
    slowest: list[float] = []

    def work(annotator: int) -> None:
        random = np.random.default_rng(annotator)
        places = random.integers([4, 4, 4], [24, 28, 22], (100, 3)).tolist()
        for count in range(1, 101):
            params = {"foreground": places[:count], "client_id": f"annotator{annotator}"}
            begin = time.monotonic()
            found = overlay(server, f"v{annotator}", CLICK, json.dumps(params))
            slowest.append(time.monotonic() - begin)
            mask = np.asarray(found.dataobj)
            assert all(mask[tuple(place)] == 1 for place in places[:count])
            grown = np.argwhere(mask)
            far = np.linalg.norm(grown[:, None] - np.array(places[:count])[None], axis=2).min(1)
            assert far.max() < 4.5  # nothing of another annotator's clicks
            sizes.append(resident(server))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    rows = [row for row in server.ask("GET", "/rounds/effort").body[logged:] if row["annotator"]]
    assert {(row["image"], row["annotator"]) for row in rows} == {
        (f"v{n}", f"annotator{n}") for n in range(3)
    }
    assert {(row["answers"], row["clicks"]) for row in rows} == {(100, 100)}
    assert len(sizes) == 300 and max(slowest) < 20
    assert np.median(sizes[-50:]) - np.median(sizes[50:100]) < 100  # MiB


def test_inference_goes_before_a_training(served: Served) -> None:
    server, bundle, _ = served
    train_forever(server, bundle)
    begin = time.monotonic()
    overlay(server, "v0")
    assert time.monotonic() - begin < 10
    nice = {
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16]
        for pid in server.left
        if pid != server.process.pid
    }
    assert "5" in nice
