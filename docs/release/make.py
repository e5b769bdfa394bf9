"""Makes the example bundles: trained, scored, published and verified.

python docs/release/make.py ../shared/data [--runs DIR] [--out DIR] [--only hippocampus]
    [--small True]

A finished training in --runs is not repeated, so it may be that of bench_finetune.py (a folder
hippocampus_run). --small True trains for one epoch on six cases, to try the way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fire

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
from bench_finetune import trained  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.publishing.publish import publish  # noqa: E402
from med3dinsight_ext.publishing.verify import verify  # noqa: E402

EXAMPLES = {  # card: bundle, name
    "hippocampus": ("seg-finetune", "med3dinsight_hippocampus_segmentation"),
    "adrenal": ("cls-finetune", "med3dinsight_adrenal_classification"),
    "sarcoma": ("pretrain", "med3dinsight_sarcoma_pretraining"),
}


def sources(example: str, data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides that name an example's cases, of its training and of its evaluation."""
    if example == "adrenal":
        file = {"dataset_dir": str(data / "adrenal" / "adrenalmnist3d_64.npz")}
        return file | {"subset": "train"}, file | {"subset": "test"}
    folder = data / example
    lists = {
        "hippocampus": {"datalist": "dataset.json"},
        "sarcoma": {"datalist": "index.json", "captions": "captions.jsonl"},
    }[example] | {"split": "split.json"}
    source = {"dataset_dir": str(folder)} | {k: str(folder / name) for k, name in lists.items()}
    return source, source


def main(
    data: str, runs: str = ".", out: str = "releases", only: str | None = None, small: bool = False
) -> None:
    """Make all examples, or ``only`` one."""
    for example, (bundle, name) in EXAMPLES.items():
        if only not in (None, example):
            continue
        train, test = sources(example, Path(data))
        folder = Path(runs) / f"{example}_run"
        if small:
            train = train | {"max_epochs": 1}
            if bundle != "pretrain":
                train["max_cases"] = 6
        scores = trained(example, bundle, str(folder), train, test)
        publish(
            str(bundles_dir() / bundle),
            weights=str(folder / "models" / "model.pt"),
            name=name,
            out=out,
            metrics=str(scores),
            card=str(HERE / f"{example}.yaml"),
        )
        verify(str(Path(out) / name))


if __name__ == "__main__":
    fire.Fire(main)
