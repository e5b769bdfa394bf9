"""MONAI Label app over REST: seconds to an overlay and of a click, and the gain of a round.

ENV/bin/python benchmarks/bench_label.py ../shared/data/hippocampus [--out DIR]

ENV is the environment of ``label-install``. A part that is finished is not repeated; give a new DIR
to measure again. Seconds need an idle machine; the JSON has the load average.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from scipy import ndimage
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[0] / "tests")]
import label_running  # noqa: E402

from common import spread, timed, write  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.metrics.bootstrap import bootstrap  # noqa: E402
from med3dinsight_ext.metrics.segmentation import case_scores, mean_scores  # noqa: E402
from med3dinsight_ext.monailabel.label_bundle import label_bundle  # noqa: E402
from med3dinsight_ext.monailabel.server import class_names  # noqa: E402

CONFIGS = bundles_dir() / "seg-finetune" / "configs"
SIZE = 128
PATCH = 96  # of the windows, around clicks too
THREADS = 2
STARTS = 3
CLICKS = 10  # of each start
CASES, CORRECTED, EPOCHS = 35, 5, 100


def start(
    folder: Path, bundles: Sequence[Path], studies: Path, threads: int
) -> label_running.Server:
    """A server of these bundles, started by the command for users."""
    folder.mkdir(parents=True, exist_ok=True)
    port = label_running.free_port()
    words = [f"OMP_NUM_THREADS={threads}", sys.executable, "-m", "med3dinsight_ext", "label"]
    words += ["--studies", str(studies), "--bundles", ",".join(map(str, bundles))]
    label_running.PYTHON = "env"
    return label_running.Server([*words, "--port", str(port)], folder, port)


def granted(answer: label_running.Answer, server: label_running.Server) -> Any:
    """The body of an answer.

    Raises:
        ValueError: the status is not 200.
    """
    if answer.status != 200:
        raise ValueError(f"the server must answer 200, got {answer.status}; read {server.log}")
    return answer.body


def ask(
    server: label_running.Server, model: str, image: str, output: str, clicks: dict[str, Any]
) -> Any:
    """Answer to an inference request: the file's bytes for "image", a dictionary for "json"."""
    path = f"/infer/{model}?image={image}&output={output}"
    return granted(server.ask("POST", path, params=json.dumps(clicks)), server)


def untrained(folder: Path, overlays: Sequence[Path], click: bool = False) -> Path:
    """A bundle as ``label-bundle`` writes it, with a random network's weights."""
    shutil.rmtree(folder, ignore_errors=True)
    files = [CONFIGS / "inference.json", *overlays]
    files += [CONFIGS / "click_inference.yaml"] if click else []
    torch.manual_seed(0)
    parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    weights = folder.with_name(f"{folder.name}.pt")
    torch.save(parser.get_parsed_content("network_def").state_dict(), weights)
    label_bundle(str(folder), str(weights), list(map(str, overlays)), click)
    return folder


def write_volume(path: Path) -> None:
    """Write a head-sized ball of blobs with noise, as whole numbers like those of scanners."""
    random = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(random.standard_normal((SIZE,) * 3), 4)
    away = np.linalg.norm(np.indices((SIZE,) * 3) - SIZE / 2, axis=0)
    values = (away < 0.4 * SIZE) * (600 + 200 * blobs / blobs.std())
    values += 20 * random.standard_normal(values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.clip(0).astype(np.int16), np.eye(4)), path)


def forward(bundle: str) -> None:
    """Print the seconds of a bare network on one volume, as JSON."""
    parser = ConfigParser(ConfigParser.load_config_file(f"{bundle}/configs/inference.json"))
    network = parser.get_parsed_content("network_def").eval()
    volume = torch.rand(1, 1, *[SIZE] * 3)  # whole; the channels of clicks are zero
    with torch.no_grad():
        network(volume)
        print(json.dumps([timed(lambda: network(volume), False) for _ in range(CLICKS)]))


def floor(bundle: Path) -> list[float]:
    """Seconds of ``forward`` in a new process with a server's threads."""
    environment = {**label_running.environment(), "OMP_NUM_THREADS": str(THREADS)}
    words = [sys.executable, __file__, "forward", str(bundle)]
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def one_start(folder: Path, bundles: list[Path], studies: Path) -> dict[str, Any]:
    """Seconds of a server's start, its first overlay and of CLICKS clicks."""
    plain, click = bundles
    load = os.getloadavg()[0]
    begin = perf_counter()
    server = start(folder, bundles, studies, THREADS)
    try:
        first = timed(partial(ask, server, plain.name, "volume", "image", {}), False)
        command = perf_counter() - begin
        names = [name.lower() for name in class_names(click)]
        points = np.random.default_rng(0).integers(20, SIZE - 20, (CLICKS + 1, 3)).tolist()
        given: dict[str, list[Any]] = {name: [] for name in names}
        seconds, latencies = [], []
        for n, point in enumerate(points):  # each request has all clicks so far
            given[names[n % len(names)]].append(point)
            answer = partial(ask, server, click.name, "volume", "image", given)
            seconds.append(timed(answer, False))
            latencies.append(ask(server, click.name, "volume", "json", given)["latencies"])
    finally:
        server.stop()
    return {
        "load_average": load,
        "load_average_after": os.getloadavg()[0],
        "start": server.seconds,
        "first_answer": first,
        "command_to_overlay": command,
        "first_click": seconds[0],
        "click": seconds[1:],
        "network_alone": floor(click),
        "parts": parts(latencies[1:]),
    }


def parts(latencies: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of each step in the server's answers."""
    rows = []
    for answer in latencies:
        row = {key: answer[key] for key in ("total", "infer", "write")}
        for stage, steps in answer["transform"].items():
            row |= {f"{stage} {name}": seconds for name, seconds in steps.items()}
        rows.append(row)
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def answers(root: Path) -> dict[str, Any]:
    """Seconds on 128 x 128 x 128 voxels with quickstart.yaml's U-Net, in windows."""
    write_volume(root / "studies" / "volume.nii.gz")
    size = root / "size.json"
    size.write_text(json.dumps({"spacing": [1.0] * 3, "patch_size": [PATCH] * 3}))
    overlays = [CONFIGS / "quickstart.yaml", size]
    bundles = [untrained(root / "small", overlays)]
    bundles.append(untrained(root / "deepedit_small", overlays, click=True))
    rows = [one_start(root / "server", bundles, root / "studies") for _ in range(STARTS)]
    single = ("start", "first_answer", "command_to_overlay", "first_click")
    seconds = {key: spread([row[key] for row in rows]) for key in single}
    for key in ("click", "network_alone"):
        seconds[key] = spread([x for row in rows for x in row[key]])
    return {"threads": THREADS, "size": SIZE, "patch": PATCH, "seconds": seconds, "starts": rows}


def dice(
    server: label_running.Server, bundle: Path, cases: Sequence[str], data: Path
) -> list[float]:
    """Mean Dice over the classes of each case, segmented by the server."""
    names, found = class_names(bundle), []
    for case in tqdm(cases, "Asking"):
        file = gzip.decompress(ask(server, bundle.name, case, "image", {}))
        mask: Any = nib.Nifti1Image.from_bytes(file)
        truth: Any = nib.load(data / "labelsTr" / f"{case}.nii.gz")
        maps = [torch.from_numpy(np.array(x.dataobj, np.int16))[None] for x in (mask, truth)]
        spacing = [float(mm) for mm in truth.header.get_zooms()[:3]]
        found.append(mean_scores(case_scores(maps[0], maps[1], spacing, names))["dice"])
    return found


def correct_and_train(root: Path, data: Path) -> dict[str, Any]:
    """Segment development cases, correct a few, train on these, and segment the others again."""
    cases = json.loads((data / "split.json").read_text())["development"][:CASES]
    studies = root / "studies"
    studies.mkdir(parents=True, exist_ok=True)
    for case in cases:
        shutil.copy(data / "imagesTr" / f"{case}.nii.gz", studies)
    bundle = untrained(root / "hippocampus", [HERE / "hippocampus.yaml"])
    corrected, rest = cases[:CORRECTED], cases[CORRECTED:]
    load = os.getloadavg()[0]
    server = start(root / "server", [bundle], studies, 1)
    try:
        before = dice(server, bundle, rest, data)
        for case in corrected:
            granted(server.save_label(case, data / "labelsTr" / f"{case}.nii.gz"), server)
        granted(server.start_training(bundle.name, max_epochs=EPOCHS), server)
        begin, ended = perf_counter(), ("DONE", "ERROR")
        server.wait(lambda: server.ask("GET", "/train/").body["status"] in ended, 3600)
        seconds = perf_counter() - begin
        if server.ask("GET", "/train/").body["status"] == "ERROR":
            raise ValueError(f"the training must end well, got an error; read {server.log}")
        after = dice(server, bundle, rest, data)
    finally:
        server.stop()
    gain = torch.tensor(after) - torch.tensor(before)
    measured = {"before": torch.tensor(before), "after": torch.tensor(after), "gain": gain}
    return {
        "start_from": "random weights",
        "load_average": load,
        "threads": 1,
        "epochs": EPOCHS,
        "corrected": len(corrected),
        "cases": len(rest),
        "train_seconds": seconds,
        "dice": {k: bootstrap(v, torch.arange(len(v)))._asdict() for k, v in measured.items()},
        "dice_of_cases": {"before": before, "after": after},
    }


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures of a part: those in its file, or measured now."""
    if not path.exists():
        found = measure()
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def main(data: str, out: str = "label_run") -> None:
    """Measure both parts and write results/label.json."""
    root = Path(out).absolute()
    root.mkdir(parents=True, exist_ok=True)
    figures = {
        "monailabel": version("monailabel"),
        "answers": kept(root / "answers.json", partial(answers, root / "answers")),
        "round": kept(root / "round.json", partial(correct_and_train, root / "round", Path(data))),
    }
    write("label", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["forward"]:
        forward(sys.argv[2])
    else:
        fire.Fire(main)
