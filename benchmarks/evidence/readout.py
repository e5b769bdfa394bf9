"""Linear probes of the teacher's embeddings and of pre-trained networks' features.

    python benchmarks/evidence/readout.py ../shared/data [--out DIR] [--budget pilot]

Writes readout-BUDGET.json: AUROC on adrenal's held-out development cases for the teacher's image
embeddings (their mean over a volume's slices), for a fresh network's features, and for the features
of each network that run.py has pre-trained for the budget and left in DIR; twenty draws of labelled
cases. Networks that are in the file already are not probed again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fire
import torch
import yaml
from monai.bundle import ConfigParser
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import write  # noqa: E402
from evidence import results  # noqa: E402
from evidence.planning import items_of  # noqa: E402
from med3dinsight_ext.captions.sources import TemplateCaptions  # noqa: E402
from med3dinsight_ext.data.splits import take  # noqa: E402
from med3dinsight_ext.embeddings.store import Store  # noqa: E402
from med3dinsight_ext.io.bundles import bundles_dir  # noqa: E402
from med3dinsight_ext.io.configs import with_shared  # noqa: E402
from med3dinsight_ext.metrics.classification import class_scores  # noqa: E402
from med3dinsight_ext.models.classifier import pooled_features  # noqa: E402
from med3dinsight_ext.models.probes import linear_probe  # noqa: E402
from med3dinsight_ext.teachers.teacher import bundled  # noqa: E402

LABELS, DRAWS = (12, 119), 20
Features = tuple[Tensor, Tensor]  # of the training cases and of the evaluation cases


def probe(features: Features, train: list[Any], evaluation: list[Any]) -> dict[str, list[float]]:
    """AUROC of a linear probe for each draw of labelled cases, by their number."""
    place = {item["image"]: i for i, item in enumerate(train)}
    labels = torch.tensor([item["label"] for item in evaluation])
    found: dict[str, list[float]] = {}
    for count in LABELS:
        for seed in range(DRAWS):
            chosen = take(train, count, seed)
            rows = features[0][[place[item["image"]] for item in chosen]]
            classes = torch.tensor([item["label"] for item in chosen])
            scores = class_scores(linear_probe(rows, classes, features[1]), labels)
            found.setdefault(str(count), []).append(round(scores["auroc"], 5))
    return found


def main(data: str, out: str = "evidence_runs", budget: str = "pilot") -> None:
    """Probe the teacher, a fresh network and the networks of a budget.

    Args:
        data: folder that holds the plan's data folders.
        out: folder of run.py's stores and weights.
        budget: name of the budget.
    """
    plan = yaml.safe_load((HERE / "plan.yaml").read_text())
    train, evaluation = items_of(plan["data"]["adrenal"], Path(data).resolve(), "held_out")
    pretrain = plan["pretrain"]
    teacher = bundled(pretrain["teacher"]["size"])
    store = Store(Path(out) / "store", teacher, TemplateCaptions(), pretrain["per_plane"])
    entries = [
        [load_file(i["targets"])["image"] for i in store.fill(p)] for p in (train, evaluation)
    ]
    means = [torch.stack([e.float().mean(0) for e in part]) for part in entries]
    before = HERE / f"readout-{budget}.json"
    report = json.loads(before.read_text())["auroc"] if before.exists() else {}
    report["teacher"] = probe((means[0], means[1]), train, evaluation)

    config = ConfigParser.load_config_files(
        with_shared(bundles_dir() / "cls-finetune/configs/train.json")
    )
    task = plan["tasks"]["adrenal"]
    for key in ("spacing", "patch_size", "class_names"):
        config[key] = task[key]
    backbone = plan["backbones"]["unet_batch"]["backbone"] | {"out_channels": 1}
    config |= {"device": "cpu", "num_workers": 0, "backbone": backbone}
    batches = []
    for items in (train, evaluation):  # once for all networks
        config["probe_loader"]["dataset"]["data"] = items
        batches.append(list(ConfigParser(config).get_parsed_content("probe_loader")))
    found = sorted(Path(out, budget).glob("*-unet_batch-*-pretrain-s*/models/model.pt"))
    finished = results.read(budget)
    files = [path for path in found if path.parts[-3] in finished]
    for path in [None, *(file for file in files if file.parts[-3] not in report)]:
        torch.manual_seed(0)
        classifier = ConfigParser(config).get_parsed_content("network_def")
        if path:
            classifier.network.load_state_dict(torch.load(path, weights_only=True))
        parts = [pooled_features(classifier, part, torch.device("cpu"))[0] for part in batches]
        name = path.parts[-3] if path else "scratch"
        report[name] = probe((parts[0], parts[1]), train, evaluation)
        print(name, {n: sum(v) / DRAWS for n, v in report[name].items()}, flush=True)
    write(f"readout-{budget}", {"score": "held_out", "auroc": report}, HERE)


if __name__ == "__main__":
    fire.Fire(main)
