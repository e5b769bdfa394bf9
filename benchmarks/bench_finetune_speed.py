"""Overhead of the fine-tuning bundles over training without data loading and the bare network.

python benchmarks/bench_finetune_speed.py

- loading: steps a second with the hippocampus config on synthetic volumes of its size, cache warm,
  against the same trainer on fixed tensors.
- inference: seconds for a volume of 256 x 256 x 128 with SegResNet, all transforms but load and
  save, against the bare sliding window on the prepared tensor.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigWorkflow

sys.path.insert(0, str(Path(__file__).parent))
from common import spread, timed, write  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.io.configs import with_shared  # noqa: E402

HERE = Path(__file__).parent
CONFIGS = bundles_dir() / "seg-finetune" / "configs"


def workflow(files: list[str | Path], kind: str, **overrides: Any) -> ConfigWorkflow:
    made = ConfigWorkflow(
        [str(f) for f in files], logging_file=False, workflow_type=kind, **overrides
    )
    made.initialize()
    return made


def loading(root: Path, cases: int = 40, repeats: int = 3) -> dict[str, Any]:
    """Seconds an epoch with the loader and with fixed batches, in turn."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(cases):
        paths = {"image": f"v{i}.nii.gz", "label": f"v{i}_seg.nii.gz"}
        label: np.ndarray = np.zeros((36, 50, 36), np.uint8)
        label[10:20, 10:40, 10:20], label[10:20, 25:40, 10:20] = 1, 2
        image = (random.random(label.shape) + label).astype(np.float32)
        for key, array in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / paths[key])
        rows.append(paths)
    (root / "list.json").write_text(json.dumps(rows))
    made = workflow(
        [*with_shared(CONFIGS / "train.json"), HERE / "hippocampus.yaml"],
        "train",
        bundle_root=str(root),
        dataset_dir=str(root),
        datalist=str(root / "list.json"),
        split=None,
        max_epochs=1,
    )
    trainer = made.parser.get_parsed_content("train::trainer")
    loader = trainer.data_loader
    fixed = [next(iter(loader))] * len(loader)
    real, bare = [], []

    def epoch(data: Any) -> float:
        trainer.data_loader = data
        trainer.state.epoch, trainer.state.iteration, trainer.state.max_epochs = 0, 0, 1
        return timed(trainer.run) / len(loader)

    epoch(loader)  # the cache is warm from here on
    for _ in range(repeats):
        bare.append(epoch(fixed))
        real.append(epoch(loader))
    ratios = [b / r for b, r in zip(bare, real, strict=True)]
    return {
        "step_seconds": spread(real),
        "step_seconds_fixed": spread(bare),
        "throughput_ratio": spread(ratios),
    }


def inference(root: Path, repeats: int = 2) -> dict[str, Any]:
    """Seconds of transforms, sliding window and inversion, and of the bare window."""
    image = np.random.default_rng(0).random((256, 256, 128)).astype(np.float32)
    path = root / "big.nii.gz"
    nib.save(nib.Nifti1Image(image, np.diag([-1.5, -1.5, 1.5, 1.0])), path)
    made = workflow(
        [CONFIGS / "inference.json"],
        "infer",
        bundle_root=str(root),
        dataset_dir=str(root),
        datalist=None,
        overlap=0.25,
    )
    get = made.parser.get_parsed_content
    network, inferer = get("network").eval(), get("inferer")
    before, after = get("preprocessing").transforms, get("postprocessing").transforms
    loaded = before[0]({"image": str(path)})
    ready: dict[str, Any] = {}

    def prepare() -> None:
        data = dict(loaded)
        for transform in before[1:]:
            data = transform(data)
        ready.update(data)

    def window() -> None:
        with torch.no_grad():
            ready["pred"] = inferer(ready["image"][None], network)[0]

    def finish() -> None:
        from monai.data import MetaTensor

        data = {**ready, "pred": MetaTensor(ready["pred"], meta=ready["image"].meta)}
        for transform in after[:-1]:
            data = transform(data)
        assert data["pred"].shape == loaded["image"].shape

    rows = [(timed(prepare), timed(window), timed(finish)) for _ in range(repeats)]
    return {
        "window_seconds": spread([w for _, w, _ in rows]),
        "before_seconds": spread([b for b, _, _ in rows]),
        "after_seconds": spread([a for _, _, a in rows]),
        "overhead": spread([(b + a) / w for b, w, a in rows]),
    }


def main(repeats: int = 2) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = {"loading": loading(Path(folder), repeats=repeats)}
    with tempfile.TemporaryDirectory() as folder:
        figures["inference"] = inference(Path(folder), repeats)
    write("finetune_speed", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    fire.Fire(main)
