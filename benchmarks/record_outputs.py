"""Records what a checkout computes at fixed seeds: weights, store, metrics, published files.

    python benchmarks/record_outputs.py CHECKOUT OUT.json
    python benchmarks/record_outputs.py --compare BEFORE.json AFTER.json

Every bundle trains two epochs on volumes made here, is evaluated, infers, is exported and
published, each by the command line of that checkout, so that a refactoring is seen to change
nothing, or what it changes is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import load_file

OVERLAY = """
label_names: [background, ball]
class_names: [left, right]
spacing: [2.0, 2.0, 2.0]
patch_size: [16, 16, 16]
per_plane: 4
slices: 6
batch_size: 2
max_epochs: 2
warmup_epochs: 1
val_interval: 1
num_workers: 0
backbone:
  _target_: UNet
  spatial_dims: 3
  in_channels: 1
  out_channels: "@out_channels"
  channels: [4, 8, 16]
  strides: [2, 2]
  num_res_units: 1
  norm: INSTANCE
"""
KEYS = {
    "pretrain": ("label_names", "class_names"),
    "seg-finetune": ("class_names", "per_plane", "slices"),
    "cls-finetune": ("label_names", "per_plane", "slices"),
}


def cohort(folder: Path) -> None:
    """Eight volumes (24, 28, 20) with a ball each, and two folders of four for a classifier."""
    draw = np.random.RandomState(0)
    axes = np.meshgrid(*(np.arange(n) for n in (24, 28, 20)), indexing="ij")
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for number in range(8):
        centre = [6 + 11 * (number % 2), 10 + draw.randint(8), 10]
        ball = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < 25
        volume = draw.rand(*ball.shape) * 50 + 100 * ball + 20
        for name, array in (("imagesTr", volume.astype("f4")), ("labelsTr", ball.astype("u1"))):
            (folder / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), folder / name / f"case_{number}.nii.gz")
        side = folder / "classes" / ("left", "right")[number % 2]
        side.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume.astype("f4"), affine), side / f"case_{number}.nii.gz")
    names = [f"case_{number}.nii.gz" for number in range(8)]
    listed = [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"} for name in names]
    (folder / "dataset.json").write_text(json.dumps({"training": listed}))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hash of named tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def file_hash(path: Path, place: str) -> str:
    """Hash of a file's bytes without ``place``; of its tensors or voxels if it holds such."""
    if path.suffix == ".pt":
        return digest(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        return digest(load_file(path))
    if path.name.endswith(".nii.gz"):
        image: Any = nib.load(path)
        return hashlib.sha256(np.asanyarray(image.dataobj).tobytes()).hexdigest()[:16]
    return hashlib.sha256(path.read_bytes().replace(place.encode(), b"")).hexdigest()[:16]


def files(folder: Path, *patterns: str) -> dict[str, str]:
    """Name to hash of the files that match, wherever the folder lies."""
    place = str(Path(*folder.parts[:3]))  # the temporary folder
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if not found:
        raise ValueError(f"{folder} must hold {patterns}, got none")
    return {str(path.relative_to(folder)): file_hash(path, place) for path in sorted(found)}


class Checkout:
    """Runs the commands of one checkout in a folder of its own."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root = root
        self.work = work
        self.environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def call(self, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.work, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )

    def configs(self, bundle: str, names: tuple[str, ...], overlay: Path) -> list[str]:
        """A bundle's own file, those shared by several bundles, overlays, in order."""
        folder = self.root / "bundles" / bundle / "configs"
        shared = self.root / "bundles" / "shared"
        more = []
        if names[0] == "train" and shared.is_dir():
            more = [shared / "train.json"]
            more += [shared / "finetune.json"] if bundle != "pretrain" else []
        own, *others = (folder / f"{name}.json" for name in names)
        return [str(path) for path in (own, *more, overlay, *others)]

    def run(self, bundle: str, names: tuple[str, ...], *arguments: str) -> None:
        listed = self.configs(bundle, names, self.work / f"{bundle}.yaml")
        text = "[" + ",".join(f"'{name}'" for name in listed) + "]"
        root = str(self.work / bundle)
        self.call("monai.bundle", "run", "--config_file", text, "--bundle_root", root, *arguments)


def steps(checkout: Checkout, data: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and the calls that compute them, in order."""
    work = checkout.work
    seg = ["--dataset_dir", str(data), "--datalist", str(data / "dataset.json")]
    cls = ["--dataset_dir", str(data / "classes")]
    for bundle, given, metrics in (
        ("pretrain", ["--dataset_dir", str(data), "--teacher::size", "64"], "retrieval.json"),
        ("seg-finetune", seg, "metrics.json"),
        ("cls-finetune", cls, "metrics.json"),
    ):
        start = [] if bundle == "pretrain" else ["--pretrained", f"{work}/pretrain/models/model.pt"]
        folder = work / bundle
        infer = ["--dataset_dir", str(data / "imagesTr")]
        if bundle == "pretrain":
            infer += ["--prompts", "['a bright ball','air']", "--teacher::size", "64"]

        def train(bundle: str = bundle, given: list = given, start: list = start) -> Any:
            checkout.run(bundle, ("train",), *given, *start)
            history = (work / bundle / "eval" / "history.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in history]
            for row in rows:
                for key in [k for k in row if "second" in k or "time" in k or "per_s" in k]:
                    del row[key]
            return {"weights": files(work / bundle / "models", "*.pt"), "history": rows}

        def evaluate(bundle: str = bundle, given: list = given, metrics: str = metrics) -> Any:
            checkout.run(bundle, ("train", "evaluate"), *given)
            return json.loads((work / bundle / "eval" / metrics).read_text())

        def inference(bundle: str = bundle, infer: list = infer) -> Any:
            checkout.run(bundle, ("inference",), *infer, "--output_dir", f"{work}/{bundle}/out")
            patterns = ("*.nii.gz", "*.safetensors", "cases.csv", "*.json")
            return files(work / bundle / "out", *patterns)

        def publish(bundle: str = bundle, folder: Path = folder) -> Any:
            task = {"pretrain": "pretraining", "seg-finetune": "segmentation"}
            name = f"ball_mr_{task.get(bundle, 'classification')}"
            checkout.call(
                "med3dinsight_ext", "publish", str(checkout.root / "bundles" / bundle),
                "--weights", f"{folder}/models/model.pt", "--overlays", f"{work}/{bundle}.yaml",
                "--metrics", f"{folder}/eval/{metrics_of[bundle]}",
                "--name", name, "--out", f"{work}/releases",
            )  # fmt: skip
            out = work / "releases" / name
            found = files(out, *(f"{n}*" for n in ("", "configs/", "docs/", "models/")))
            config = json.loads((out / "configs" / "train.json").read_text())
            return {"files": found, "train_keys": sorted(config)}

        def export(bundle: str = bundle) -> Any:
            task = {"pretrain": "pretraining", "seg-finetune": "segmentation"}
            out = work / "releases" / f"ball_mr_{task.get(bundle, 'classification')}"
            checkout.call("med3dinsight_ext", "export", str(out))
            script = torch.jit.load(str(out / "models" / "model.ts"))
            torch.manual_seed(0)
            with torch.no_grad():
                return digest({"output": script(torch.rand(1, 1, 16, 16, 16))})

        yield f"{bundle} train", train
        if bundle == "pretrain":
            yield "store", lambda: files(work / "pretrain" / "store", "**/*.safetensors")
        yield f"{bundle} evaluate", evaluate
        yield f"{bundle} inference", inference
        yield f"{bundle} publish", publish
        yield f"{bundle} export", export


metrics_of = {
    "pretrain": "retrieval.json",
    "seg-finetune": "metrics.json",
    "cls-finetune": "metrics.json",
}


def record(root: Path, out: Path) -> None:
    """Run all steps of a checkout and write what they give."""
    commit = ["git", "-C", str(root), "rev-parse", "HEAD"]
    found: dict[str, Any] = {
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        data, work = Path(folder, "data"), Path(folder, "work")
        for path in (data, work):
            path.mkdir()
        cohort(data)
        for bundle, others in KEYS.items():
            lines = [x for x in OVERLAY.splitlines() if x.split(":")[0] not in others]
            (work / f"{bundle}.yaml").write_text("\n".join(lines) + "\n")
        for name, step in steps(Checkout(root.resolve(), work), data):
            found[name] = step()
            print(name, flush=True)
            text = json.dumps(found, indent=1, sort_keys=True).replace(folder, "FOLDER")
            out.write_text(text + "\n")


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """A line for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            path = f"{where} / {key}"
            if key not in before or key not in after:
                yield f"{path}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], path)
    elif before != after:
        yield f"{where}: {str(before)[:300]} -> {str(after)[:300]}"


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        first, second = (json.loads(Path(name).read_text()) for name in sys.argv[2:4])
        print("\n".join(differences(first, second)) or "equal")
    else:
        record(Path(sys.argv[1]), Path(sys.argv[2]))
