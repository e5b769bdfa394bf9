"""The teacher stage of the pretrain bundle with real models and a real server, by its configs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_mllm
import yaml
from fakes import write_volumes
from running import configs, run, settings

from med3dinsight_ext.captions.local import TransformersCaptions
from med3dinsight_ext.captions.multimodal import MllmCaptions
from med3dinsight_ext.captions.served import ServedCaptions

EMBED = ["train.json", "captioner_local.yaml", "embed.json"]
SERVED = ["train.json", "captioner_served.yaml", "embed.json"]
SMALL = {"captioner::per_plane": 1, "captioner::size": 28, "captioner::max_tokens": 8}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes"), 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_mllm.llava(tmp_path_factory.mktemp("model")))


@pytest.fixture
def server() -> Iterator[str]:
    path = str(Path(__file__).parents[1] / "chat_server.py")
    words = [sys.executable, path, "--models", "tiny"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    process.kill()
    process.communicate()


def captioned(root: Path) -> list[dict[str, Any]]:
    """The captioned slices of a store."""
    entries = [p for p in (root / "store").glob("??/*.json")]
    assert len(entries) == 4
    slices = [row for p in entries for row in json.loads(p.read_text())["slices"]]
    return [row for row in slices if row["status"]]


def test_a_local_model_captions_a_folder_and_is_not_loaded_for_training(
    tmp_path: Path, volumes: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = settings("pretrain", tmp_path, volumes, **{"captioner::model": model, **SMALL})
    run("pretrain", EMBED, **changes)
    assert len(captioned(tmp_path)) == 4 * 3
    monkeypatch.setattr("med3dinsight_ext.captions.local.TransformersCaptions.network", None)
    run("pretrain", EMBED[:2], **changes)
    assert (tmp_path / "models" / "model.pt").exists()


def test_a_served_model_captions_a_folder(
    tmp_path: Path, volumes: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"captioner::url": server, "captioner::model": "tiny", **SMALL}
    run("pretrain", SERVED, **settings("pretrain", tmp_path, volumes, **options))
    assert [row["status"] for row in captioned(tmp_path)] == ["ok"] * 12
    assert "4 volumes are in" in capsys.readouterr().out


def test_a_dry_run_prints_the_cost_and_makes_nothing(
    tmp_path: Path, volumes: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"captioner::model": model, "dry_run": True, **SMALL}
    run("pretrain", EMBED, **settings("pretrain", tmp_path, volumes, **changes))
    assert "at most 48 slices, 12 model calls" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_shard_makes_its_part_of_the_store(tmp_path: Path, volumes: Path) -> None:
    files = ["train.json", "embed.json"]
    run("pretrain", files, **settings("pretrain", tmp_path, volumes, shard="2/2"))
    assert len(list((tmp_path / "store").glob("??/*.safetensors"))) == 2


def test_shuffled_captions_train(tmp_path: Path, volumes: Path) -> None:
    changes = settings("pretrain", tmp_path, volumes, caption_noise=0.5)
    run("pretrain", ["train.json"], **changes)
    assert (tmp_path / "models" / "model.pt").exists()


@pytest.mark.parametrize("name", ["local", "served"])
def test_the_overlays_state_the_defaults_of_their_captioner(name: str) -> None:
    kind = {"local": TransformersCaptions, "served": ServedCaptions}[name]
    text = (configs("pretrain") / f"captioner_{name}.yaml").read_text()
    given = yaml.safe_load(text)["captioner"]
    known = {
        **inspect.signature(MllmCaptions.__init__).parameters,
        **inspect.signature(kind.__init__).parameters,
    }
    assert given.pop("_target_").endswith(kind.__name__) and given.keys() <= known.keys()
    chosen = {"model", "url", "per_plane", "device", "prompt", "concurrency"}
    for key in given.keys() - chosen:
        assert given[key] == known[key].default, key
