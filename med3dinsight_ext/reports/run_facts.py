"""What a training ran with, as reports and model cards show it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from med3dinsight_ext.training.provenance import UNLABELLED
from med3dinsight_ext.training.record import EARLIER, record_of
from med3dinsight_ext.training.transfer_report import percent

ROWS = ("epochs", "cases", "learning rate", "batch size", "seed", "device", "time (h:mm:ss)",
        "versions", "commit", "pre-trained from")  # fmt: skip
SHOWN = ("epochs", "cases", "pre-trained from", "device", "time (h:mm:ss)", "versions", "commit")


def run_block(weights: str | Path | None) -> dict[str, str]:
    """What a page shows of the training that wrote a weights file; nothing without one.

    Args:
        weights: model.pt, beside its run.json.
    """
    if weights is None:
        return {}
    if not (record := record_of(weights)):
        return {"record": f"none of these weights beside {weights}"}
    facts = {name: text.replace("`", "") for name, text in run_facts(record).items()}
    shown = {name: facts[name] for name in SHOWN}
    command = record.get("command")  # not in published bundles
    return {"command": shlex.join(command), **shown} if command else shown


def run_facts(record: Mapping[str, Any] | None) -> dict[str, str]:
    """Name to text of what a training ran with.

    Args:
        record: from ``read_record``; None gives "not recorded" for all.
    """
    return dict.fromkeys(ROWS, "not recorded") if record is None else _rows(record)


def _rows(record: Mapping[str, Any]) -> dict[str, str]:
    data, code = record["data"], record["code"]
    best, metric = record["best_epoch"], record["best_metric"]
    epochs = str(record["epochs"]) if record["epochs"] else "none, the head was fitted"
    kept = f"; the weights are of epoch {best}" if best else ""
    kept += f", {metric[0]} {metric[1]:.4f}" if best and metric else ""
    again = "".join(f"; resumed after epoch {epoch}" for epoch in record["resumed_after"])
    again += "".join(
        f"; after a round of {row['epochs'] or 'unrecorded'} epochs" for row in record["rounds"]
    )
    held = data.get("validation", {"cases": 0})["cases"]
    soft, volumes = data["training"].get(UNLABELLED), data.get(UNLABELLED, {}).get("cases")
    taught = f", {soft} of them with soft labels" if soft else ""
    taught += f" and {volumes} volumes without labels" if volumes else ""
    others = "; others before it was resumed" if record.get(EARLIER) else ""
    rate, several = record["learning_rate"], record["processes"] > 1
    seconds = record["seconds"]
    machine = record["device"] + (f" × {record['processes']}" if several else "")
    fingerprint = (data["training"]["sha256"] or "not recorded")[:12]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    changed = " with changes" if code and code["changed"] else ""
    return {
        "epochs": f"{epochs}{kept}{again}",
        "cases": f"{data['training']['cases']} for training{taught} (fingerprint {fingerprint}), "
        f"{held} for validation{others}",
        "learning rate": "none" if rate is None else f"{rate:g}",
        "batch size": f"{record['batch_size']}{' a process' if several else ''}",
        "seed": str(record["seed"]),
        "device": machine,
        "time (h:mm:ss)": "not recorded" if seconds is None else str(timedelta(0, round(seconds))),
        "versions": versions,
        "commit": f"`{code['commit']}`{changed}" if code else "not recorded: no checkout",
        "pre-trained from": _source(record["pretrained"]),
    }


def _source(start: Mapping[str, Any] | None) -> str:
    if start is None:
        return "nothing, from scratch"
    share = start["share"] if start["encoder_share"] is None else start["encoder_share"]
    what = "parameters" if start["encoder_share"] is None else "encoder"
    digest = f", sha256 `{start['sha256']}`" if start["sha256"] else ""
    return f"`{start['file']}`{digest}, {percent(share)} of the {what}"
