"""Published bundles where nothing of ours is: an environment of MONAI and their pins.

MED3D_ZOO_PYTHON names its Python; `.ci/run` shows how it is made.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from test_publish import NAMES, inference_words, published  # noqa: F401

PYTHON = os.environ.get("MED3D_ZOO_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="MED3D_ZOO_PYTHON names no environment of the pins"),
    pytest.mark.slow,
]
PRELUDE = """
import importlib.util, json, runpy, sys
assert importlib.util.find_spec("med3dinsight_ext") is None or {path!r}
for name in {hidden!r}:
    sys.modules[name] = None  # importing it fails, as where it is not installed
"""
OURS_OUTSIDE = ("ball_classification", "ball_deepedit")  # networks whose outermost module is ours
RESULTS = {
    "ball_segmentation": "v0_seg.nii.gz", "ball_deepedit": "v0_seg.nii.gz",
    "ball_classification": "cases.csv", "ball_pretraining": "v0_tokens.safetensors",
}  # fmt: skip


def alone(folder: Path, code: str, words: list[str], path: bool = False) -> str:
    """Output of code in the environment, from an empty folder; ``path`` sets PYTHONPATH."""
    pinned = {
        name: set(
            json.loads((folder.parent / name / "configs" / "metadata.json").read_text())[
                "required_packages_version"
            ]
        )
        for name in NAMES
    }
    hidden = sorted(set.union(*pinned.values()) - pinned[folder.name] - {"pillow"})
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    clean |= {"PYTHONPATH": str(folder)} if path else {}
    elsewhere = folder.parents[1] / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    text = PRELUDE.format(hidden=hidden, path=path) + code
    done = subprocess.run(
        [PYTHON, "-c", text, *words], cwd=elsewhere, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


MONAI = 'sys.argv[0] = "monai.bundle"; runpy.run_module("monai.bundle", run_name="__main__")'


@pytest.mark.parametrize("name", NAMES)
def test_inference_runs_from_any_folder(name: str, published: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = published / name
    alone(folder, MONAI, inference_words(folder, tmp_path))
    (found,) = tmp_path.glob(f"*/{RESULTS[name]}")
    assert found.parent.name == "eval"  # as inference_words gives it


LOAD = """
import torch
from monai.bundle import load
folder, name, size = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
network = load(name, bundle_dir=folder, device="cpu").eval()
state = torch.load(f"{folder}/{name}/models/model.pt", weights_only=True)
assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
print("CHANNELS", network(torch.rand(1, *size)).shape[1])
"""


@pytest.mark.parametrize("name", NAMES)
def test_monai_loads_the_network_with_its_weights(name: str, published: Path) -> None:  # noqa: F811
    folder = published / name
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    image, pred = (
        metadata["network_data_format"][side][key]
        for side, key in (("inputs", "image"), ("outputs", "pred"))
    )
    size = json.dumps([image["num_channels"], *image["spatial_shape"]])
    said = alone(folder, LOAD, [str(published), name, size], path=name in OURS_OUTSIDE)
    assert f"CHANNELS {pred['num_channels']}" in said


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OURS_OUTSIDE])
def test_monai_exports_the_network(name: str, published: Path, tmp_path: Path) -> None:  # noqa: F811
    folder, script = published / name, tmp_path / "model.ts"
    words = [
        "ckpt_export",
        "--net_id",
        "network_def",
        "--filepath",
        str(script),
        "--ckpt_file",
        str(folder / "models" / "model.pt"),
        "--meta_file",
        str(folder / "configs" / "metadata.json"),
        "--config_file",
        str(folder / "configs" / "inference.json"),
        "--bundle_root",
        str(folder),
    ]
    alone(folder, MONAI, words)
    assert script.stat().st_size > 1000
