"""The bundles' configs as MONAI runs them: in this process, killed and resumed, on two ranks."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "bundles" / "pretrain" / "configs"
OVERLAYS = sorted(CONFIGS.glob("backbone_*.yaml"))
SMALL = {  # sizes at which a step takes a second, without changing what is wired to what
    "swinunetr": {"network_def::feature_size": 12, "patch_size": [64, 32, 32]},
    "unetr": {"network_def::hidden_size": 48, "network_def::mlp_dim": 48,
              "network_def::num_heads": 4, "network_def::feature_size": 4},
    "segresnet": {"network_def::init_filters": 8},
    "unet": {"network_def::channels": [4, 8, 8, 16, 16]},
    "dynunet": {"network_def::filters": [4, 8, 8, 16, 16]},
    "mednext": {"network_def::_target_": "MedNeXt", "network_def::init_filters": 4},
    "vit": {"network_def::hidden_size": 48, "network_def::mlp_dim": 48,
            "network_def::num_layers": 2, "network_def::num_heads": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 5)


def settings(root: Path, volumes: Path, **changes: Any) -> dict[str, Any]:
    """Overrides that make a bundle small enough for a test."""
    return {
        "bundle_root": str(root), "dataset_dir": str(volumes),
        "teacher": {"_target_": "fakes.teacher"},
        "spacing": [2.0, 2.0, 2.0], "patch_size": [32, 32, 32], "per_plane": 4, "slices": 4,
        "batch_size": 2, "num_workers": 0, "max_epochs": 1, "val_interval": 1, "val_share": 0.2,
        "device": "$torch.device('cpu')", **changes,
    }  # fmt: skip


def run(files: list[str], **overrides: Any) -> ConfigWorkflow:
    paths = [str(CONFIGS / file) for file in files]
    workflow = ConfigWorkflow(paths, logging_file=False, workflow_type="train", **overrides)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def command(files: list[str], overrides: dict[str, Any]) -> list[str]:
    config = str([str(CONFIGS / file) for file in files])
    words = ["-m", "monai.bundle", "run", "--config_file", config]
    for key, value in overrides.items():
        words += [f"--{key}", str(value)]
    return words


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_every_backbone_the_readme_names_has_an_overlay() -> None:
    names = {path.stem.removeprefix("backbone_") for path in OVERLAYS}
    assert names >= {"swinunetr", "unetr", "segresnet", "unet", "dynunet", "mednext", "vit",
                     "densenet121", "resnet"}  # fmt: skip


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem.removeprefix("backbone_"))
def test_each_backbone_trains_two_steps(overlay: Path, tmp_path: Path, volumes: Path) -> None:
    name = overlay.stem.removeprefix("backbone_")
    small = {**settings(tmp_path, volumes, val_share=0, max_epochs=1), **SMALL.get(name, {})}
    workflow = run(["train.json", overlay.name], **small)
    row = json.loads((tmp_path / "eval" / "history.jsonl").read_text())
    assert row["steps"] == 2 and row["image"] > 0 and row["text"] > 0
    saved = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    network = workflow.parser.get_parsed_content("network_def")
    assert {k: v.shape for k, v in saved.items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    whole = name not in ("vit", "densenet121", "resnet")
    assert (row["reconstruction"] > 0) == whole


def test_a_network_that_is_not_monais_trains_without_code(tmp_path: Path, volumes: Path) -> None:
    run(["train.json"], **settings(tmp_path, volumes, network_def={"_target_": "fakes.PlainNet"}))
    assert "neck.weight" in torch.load(tmp_path / "models" / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, volumes: Path) -> dict[str, Any]:
    """A small bundle that has been trained for two epochs."""
    root = tmp_path_factory.mktemp("bundle")
    changes = settings(root, volumes, max_epochs=2, network_def={"_target_": "fakes.PlainNet"})
    run(["train.json"], **changes)
    return changes


def test_training_writes_what_the_docs_say(trained: dict[str, Any]) -> None:
    root = Path(trained["bundle_root"])
    assert {p.name for p in (root / "models").iterdir()} == {"model.pt", "student.pt", "last.pt"}
    rows = [json.loads(line) for line in (root / "eval" / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"loss", "image", "text", "reconstruction", "seconds", "image_within_r1"} <= rows[
        1
    ].keys()
    assert list((root / "eval").glob("events.out.tfevents.*"))


def test_a_finished_run_is_left_as_it_is(trained: dict[str, Any]) -> None:
    files = [Path(trained["bundle_root"]) / name for name in ("models/model.pt", "models/last.pt")]
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    run(["train.json"], **trained)
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before


def test_evaluation_puts_chance_and_the_control_beside_the_student(trained: dict[str, Any]) -> None:
    run(["train.json", "evaluate.json"], **trained)
    tables = json.loads((Path(trained["bundle_root"]) / "eval" / "retrieval.json").read_text())
    keys = {f"{t}_{s}_r{k}{e}" for t in ("image", "text") for s in ("all", "within")
            for k in (1, 5, 10) for e in ("", "_low", "_high", "_chance")}  # fmt: skip
    assert keys <= tables["student"].keys() and keys <= tables["volume_zero"].keys()
    assert tables["student"]["image_all_r1_chance"] == tables["volume_zero"]["image_all_r1_chance"]


def inference(trained: dict[str, Any], **changes: Any) -> dict[str, Any]:
    keys = (
        "bundle_root",
        "dataset_dir",
        "teacher",
        "spacing",
        "patch_size",
        "network_def",
        "device",
    )
    return {k: trained[k] for k in keys} | {"dataloader::num_workers": 0} | changes


def test_inference_gives_tokens_on_a_grid_and_scores_of_prompts(trained: dict[str, Any]) -> None:
    run(["inference.json"], **inference(trained, prompts=["a ball", "a mass"], grid_per_plane=5))
    results = Path(trained["bundle_root"]) / "eval"
    found = load_file(results / "v0_tokens.safetensors")
    assert found["image"].shape == (15, 6) and found["text"].shape == (15, 8)
    assert torch.allclose(found["position"][:5], (torch.arange(5) + 0.5) / 5)
    assert torch.allclose(found["image"].norm(dim=1), torch.ones(15), atol=1e-5)
    scores = json.loads((results / "v0_text.json").read_text())["prompts"]
    assert scores.keys() == {"a ball", "a mass"}
    assert {len(plane["score"]) for prompt in scores.values() for plane in prompt.values()} == {5}
    assert (results / "v0_text.png").read_bytes().startswith(b"\x89PNG")


def test_embedding_fills_the_store_and_nothing_else(tmp_path: Path, volumes: Path) -> None:
    run(["train.json", "embed.json"], **settings(tmp_path, volumes))
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 5
    assert {p.name for p in tmp_path.iterdir()} == {"store"}


def test_properties_that_tools_look_up_are_there(trained: dict[str, Any]) -> None:
    for files, kind, changes in (
        (["train.json"], "train", trained),
        (["inference.json"], "infer", inference(trained)),
    ):
        paths = [str(CONFIGS / file) for file in files]
        workflow = ConfigWorkflow(paths, logging_file=False, workflow_type=kind, **changes)
        workflow.initialize()
        assert workflow.check_properties() == []


def test_network_in_and_out_are_those_of_the_metadata(tmp_path: Path) -> None:
    verify_net_in_out(
        "network_def", str(CONFIGS / "metadata.json"), str(CONFIGS / "inference.json"),
        device="cpu",
        bundle_root=str(tmp_path), extra_forward_args={}, **{"network_def::init_filters": 8},
    )  # fmt: skip


def components(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        own = [node] if "_target_" in node else []
        return own + [c for value in node.values() for c in components(value)]
    return [c for value in node for c in components(value)] if isinstance(node, list) else []


ALL = sorted([*CONFIGS.glob("*.json"), *CONFIGS.glob("*.yaml")])


@pytest.mark.parametrize(
    "path", [p for p in ALL if p.name != "metadata.json"], ids=lambda p: p.name
)
def test_every_target_of_ours_exists_and_takes_its_arguments(path: Path) -> None:
    from pydoc import locate

    content = ConfigParser.load_config_file(str(path))
    ours = [c for c in components(content) if c["_target_"].startswith("med3dinsight_ext.")]
    for node in ours:
        target = locate(node["_target_"])
        assert target is not None, node["_target_"]
        names = [key for key in node if not key.startswith("_")]
        inspect.signature(target).bind_partial(**dict.fromkeys(names))  # type: ignore[arg-type]


def test_the_paper_overlay_sets_the_papers_recipe() -> None:
    parser = ConfigParser(
        ConfigParser.load_config_files([CONFIGS / "train.json", CONFIGS / "paper.yaml"])
    )
    psat = parser.get("student")["psat"]
    assert (psat["queries"], psat["layers"], psat["ffn"], psat["readout"]) == (
        300,
        6,
        1024,
        "first",
    )
    assert psat["_target_"].endswith("PSAT") and parser.get("student")["network"] == "@network_def"
    loss = parser.get("loss")
    assert (loss["kind"], loss["mass"], loss["epsilon"]) == ("partial_transport", 0.95, 0.03)


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "models" / "last.pt", weights_only=True)


@pytest.mark.slow
def test_killed_and_resumed_ends_where_an_uninterrupted_run_ends(
    tmp_path: Path, volumes: Path
) -> None:
    torch.set_num_threads(1)  # as in the processes to be killed: sums depend on it
    changes = {"network_def": {"_target_": "fakes.PlainNet"}, "max_epochs": 6, "val_interval": 2}
    run(["train.json"], **settings(tmp_path / "whole", volumes, **changes))
    settled = settings(tmp_path / "cut", volumes, **changes)
    log = (tmp_path / "log").open("w")
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, *command(["train.json"], settled)],
            env=environment(),
            stdout=log,
            stderr=log,
        )
        history, begin = tmp_path / "cut" / "eval" / "history.jsonl", time.monotonic()
        seen = len(history.read_text().splitlines()) if history.exists() else 0
        while process.poll() is None and time.monotonic() - begin < 120:
            if history.exists() and len(history.read_text().splitlines()) > seen:
                process.send_signal(signal.SIGKILL)  # within the epoch that follows
            time.sleep(0.002)
        process.wait(10)
        if process.returncode == 0:
            break
    assert process.returncode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-2000:]
    run(["train.json"], **settled)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for part in ("student", "loss"):
        assert all(torch.equal(v, cut[part][k]) for k, v in whole[part].items())
    assert whole["best"] == cut["best"] and whole["trainer"] == cut["trainer"]
    best = [
        torch.load(tmp_path / r / "models" / "model.pt", weights_only=True)
        for r in ("whole", "cut")
    ]
    assert all(torch.equal(v, best[1][k]) for k, v in best[0].items())
    lines = (tmp_path / "cut" / "eval" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_mistyped_override_on_the_command_line_names_the_key(
    tmp_path: Path, volumes: Path
) -> None:
    words = command(["train.json"], settings(tmp_path, volumes)) + ["--learning_rat", "0.1"]
    done = subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.strip().endswith(
        "override must name a key of the config, got --learning_rat; did you mean learning_rate?"
    )


@pytest.mark.slow
def test_two_ranks_train_the_bundle(tmp_path: Path, volumes: Path) -> None:
    changes = settings(
        tmp_path, volumes, network_def={"_target_": "fakes.PlainNet"}, max_epochs=2, val_share=0.4
    )
    del changes["device"]
    words = command(["train.json", "multi_gpu_train.json"], changes)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, [x for x in done.stderr.splitlines() if "rror" in x][:12]
    rows = (tmp_path / "eval" / "history.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2]
    assert (tmp_path / "models" / "model.pt").exists()
