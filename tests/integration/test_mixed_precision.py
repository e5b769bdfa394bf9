"""The bundles in bfloat16, as on a GPU: CUDA's autocast runs on the CPU here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from running import BUNDLES, NETWORKS, inference_settings, run, settings
from torch import nn

BF16 = {"amp": True, "amp_dtype": "$torch.bfloat16"}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 6)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Types of the autocasts that were asked for on CUDA."""
    asked: list[Any] = []
    real = torch.autocast

    def autocast(kind: str, dtype: Any = None, enabled: bool = True, **more: Any) -> torch.autocast:
        if kind == "cuda" and enabled:
            asked.append(dtype)
            kind = "cpu"
        return real(kind, dtype, enabled, **more)

    monkeypatch.setattr(torch, "autocast", autocast)
    return asked


@pytest.mark.parametrize("bundle", BUNDLES)
def test_training_scores_and_predictions_are_in_one_precision(
    bundle: str, kinds: list[Any], volumes: Path, tmp_path: Path
) -> None:
    given = settings(bundle, tmp_path, volumes, **NETWORKS[bundle], **BF16)
    run(bundle, ["train.json"], **given)
    assert kinds and set(kinds) == {torch.bfloat16}
    row = json.loads((tmp_path / "eval" / "history.jsonl").read_text().splitlines()[-1])
    assert row["loss"] == row["loss"]  # no NaN
    kinds.clear()
    run(bundle, ["train.json", "evaluate.json"], **given, output_dir=str(tmp_path / "scores"))
    name = "retrieval" if bundle == "pretrain" else "metrics"
    assert (tmp_path / "scores" / f"{name}.json").is_file() and set(kinds) == {torch.bfloat16}
    kinds.clear()
    own = {key: value for key, value in NETWORKS[bundle].items() if key != "val_fraction"}
    more = BF16 | {"output_dir": str(tmp_path / "predictions")}
    run(bundle, ["inference.json"], **inference_settings(bundle, tmp_path, volumes, **own, **more))
    assert len(list((tmp_path / "predictions").iterdir())) >= 1 and set(kinds) == {torch.bfloat16}


@pytest.mark.parametrize("mode", ["knn", "linear"])
def test_a_fitted_head_answers_as_in_float32(
    mode: str, kinds: list[Any], volumes: Path, tmp_path: Path
) -> None:
    scores = []
    for name, more in (("exact", {"amp": False}), ("half", BF16)):
        given = settings("cls-finetune", tmp_path / name, volumes, **NETWORKS["cls-finetune"])
        given |= {"mode": mode} | more
        run("cls-finetune", ["train.json"], **given)
        workflow = run("cls-finetune", ["train.json", "evaluate.json"], **given)
        network: nn.Module = workflow.parser.get_parsed_content("network_def").eval()
        torch.manual_seed(0)
        with torch.autocast("cuda", torch.bfloat16, enabled=name == "half"), torch.no_grad():
            found = network(torch.rand(2, 1, 32, 32, 32))
        assert found.dtype == torch.float32
        scores.append(found)
    assert torch.allclose(scores[0].softmax(1), scores[1].softmax(1), atol=0.1)
