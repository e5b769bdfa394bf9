"""The bundles' configs as MONAI runs them: in this process, killed and resumed."""

import inspect
import json
import re
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from pydoc import locate
from typing import Any

import fakes
import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from monai.bundle import (
    ComponentLocator,
    ConfigComponent,
    ConfigParser,
    ConfigWorkflow,
    ReferenceResolver,
    verify_net_in_out,
)
from monai.data import MetaTensor
from monai.transforms import Compose
from running import (
    BACKBONES,
    BUNDLES,
    NETWORKS,
    command,
    configs,
    environment,
    inference_settings,
    merged,
    paths,
    run,
    settings,
    suits,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from med3dinsight_ext.io.errors import root_cause

METRICS = {
    "pretrain": "image_within_r1", "seg-finetune": "val_mean_dice", "cls-finetune": "val_auroc",
}  # fmt: skip


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 6)


@pytest.fixture(scope="module", params=BUNDLES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, volumes: Path
) -> tuple[str, dict[str, Any]]:
    """A small bundle that has been trained for two epochs, and its overrides."""
    bundle = request.param
    root = tmp_path_factory.mktemp(bundle)
    changes = settings(bundle, root, volumes, max_epochs=2, **NETWORKS[bundle])
    run(bundle, ["train.json"], **changes)
    return bundle, changes


def inference(trained: tuple[str, dict[str, Any]], volumes: Path, **changes: Any) -> dict[str, Any]:
    bundle, given = trained
    keys = NETWORKS[bundle].keys() - {"val_fraction"}
    small = {key: given[key] for key in keys}
    return inference_settings(bundle, Path(given["bundle_root"]), volumes, **small, **changes)


def test_training_writes_what_the_docs_say(trained: tuple[str, dict[str, Any]]) -> None:
    bundle, changes = trained
    root = Path(changes["bundle_root"])
    files = {"model.pt", "last.ckpt", "run.json"} | (
        {"student.pt"} if bundle == "pretrain" else set()
    )
    assert {p.name for p in (root / "models").iterdir()} == files
    rows = [json.loads(line) for line in (root / "eval" / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"loss", "seconds", METRICS[bundle]} <= rows[1].keys()
    if bundle == "pretrain":
        assert {"image", "text", "reconstruction"} <= rows[1].keys()
    else:
        assert json.loads((root / "eval" / "transfer.json").read_text())["file"] == ""
    events = EventAccumulator(str(root / "eval")).Reload()
    assert events.Scalars(METRICS[bundle])
    tags = {"pretrain": ["validation/retrieval"], "seg-finetune": ["validation/overlay"]}
    pictures = events.Tags()["images"]
    assert pictures == tags.get(bundle, [])
    for tag in pictures:
        pixels = [imread(BytesIO(found.encoded_image_string)) for found in events.Images(tag)]
        assert len(pixels) == 2 and all(picture.std() > 0.05 for picture in pixels)


def test_a_finished_run_is_left_as_it_is(trained: tuple[str, dict[str, Any]]) -> None:
    bundle, changes = trained
    files = [
        Path(changes["bundle_root"]) / name for name in ("models/model.pt", "models/last.ckpt")
    ]
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    run(bundle, ["train.json"], **changes)
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before


@pytest.mark.parametrize("trained", ["pretrain"], indirect=True)
def test_evaluation_puts_chance_and_the_control_beside_the_student(
    trained: tuple[str, dict[str, Any]],
) -> None:
    _, changes = trained
    run("pretrain", ["train.json", "evaluate.json"], **changes)
    tables = json.loads((Path(changes["bundle_root"]) / "eval" / "retrieval.json").read_text())
    keys = {
        f"{t}_{s}_r{k}{e}"
        for t in ("image", "text")
        for s in ("all", "within")
        for k in (1, 5, 10)
        for e in ("", "_low", "_high", "_chance")
    }
    assert keys <= tables["student"].keys() and keys <= tables["volume_zero"].keys()
    assert tables["student"]["image_all_r1_chance"] == tables["volume_zero"]["image_all_r1_chance"]


@pytest.mark.parametrize(
    ("shape", "value", "reason"),
    [
        ((9, 8, 7, 5), 0.0, r"be 3D, got .*9, 8, 7"),
        ((9, 8, 7), np.nan, "be finite, got 1 NaN"),
        ((9, 8), 0.0, "be 3D, got .*9, 8"),
        ((9, 1, 7), 0.0, r"be thicker than one voxel, got \(9, 1, 7\)"),
    ],
)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_inference_names_a_bad_volume(
    bundle: str, shape: tuple[int, ...], value: float, reason: str, tmp_path: Path
) -> None:
    voxels = np.random.default_rng(0).random(shape, np.float32)
    voxels.flat[5] = value
    path = str(tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    transforms = ConfigParser(merged(bundle, "inference.json")).get_parsed_content("preprocessing")
    with pytest.raises(RuntimeError) as caught:
        transforms({"image": path})
    assert re.fullmatch(f"volume must {reason}.* in {path}; .*", str(root_cause(caught.value)))


@pytest.mark.parametrize("key", ["load_transforms", "preprocessing"])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_path_alone_is_scaled_by_the_modality_of_the_plan(
    bundle: str, key: str, tmp_path: Path
) -> None:
    """As MONAI Label, whose items have no modality, applies a network to a CT without air."""
    voxels = np.linspace(-100, 200, 9 * 8 * 7, dtype=np.float32).reshape(9, 8, 7)
    path = str(tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    nib.save(nib.Nifti1Image(np.uint8(voxels > 0), np.eye(4)), tmp_path / "label.nii.gz")
    config = merged(bundle, "inference.json" if key == "preprocessing" else "train.json")
    config |= {"modality": "CT", "spacing": [1.0] * 3, "patch_size": [9, 8, 7]}
    found = ConfigParser(config).get_parsed_content(key)
    image = Compose(found)({"image": path, "label": str(tmp_path / "label.nii.gz")})["image"]
    expected = ((torch.from_numpy(voxels) + 200) / 500).clamp(0, 1)
    torch.testing.assert_close(image.as_tensor()[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("trained", ["pretrain"], indirect=True)
def test_inference_gives_tokens_on_a_grid_and_scores_of_prompts(
    trained: tuple[str, dict[str, Any]], volumes: Path
) -> None:
    _, changes = trained
    given = inference(trained, volumes, prompts=["a ball", "a mass"], grid_per_plane=5)
    run("pretrain", ["inference.json"], **given)
    results = Path(changes["bundle_root"]) / "eval"
    found = load_file(results / "v0_tokens.safetensors")
    assert found["image"].shape == (15, 6) and found["text"].shape == (15, 8)
    assert torch.allclose(found["position"][:5], (torch.arange(5) + 0.5) / 5)
    assert torch.allclose(found["image"].norm(dim=1), torch.ones(15), atol=1e-5)
    scores = json.loads((results / "v0_text.json").read_text())["prompts"]
    assert scores.keys() == {"a ball", "a mass"}
    assert {len(plane["score"]) for prompt in scores.values() for plane in prompt.values()} == {5}
    assert (results / "v0_text.png").read_bytes().startswith(b"\x89PNG")


def test_embedding_fills_the_store_and_nothing_else(tmp_path: Path, volumes: Path) -> None:
    run("pretrain", ["train.json", "embed.json"], **settings("pretrain", tmp_path, volumes))
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 6
    assert {p.name for p in tmp_path.iterdir()} == {"store"}


def test_pre_training_takes_labels_on_some_of_its_volumes(tmp_path: Path, volumes: Path) -> None:
    paths = sorted(map(str, volumes.glob("*.nii.gz")))
    items = [{"image": path} for path in paths]
    for item in items[1:]:
        item["label"] = item["image"]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(items))
    changes = {"datalist": str(listed), "val_fraction": 0.0, "batch_size": 3}
    given = settings("pretrain", tmp_path / "run", volumes, **changes)
    run("pretrain", ["train.json"], **given)
    assert (tmp_path / "run/models/model.pt").exists()


def test_properties_that_tools_look_up_are_there(
    trained: tuple[str, dict[str, Any]], volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, changes = trained
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    overlays = ["evaluate.json", "multi_gpu_train.json"]
    overlays += ["embed.json"] if bundle == "pretrain" else []
    jobs = [(["train.json"], "train", changes)]
    jobs += [(["train.json", overlay], "train", changes) for overlay in overlays]
    jobs += [(["inference.json"], "infer", inference(trained, volumes))]
    for files, kind, given in jobs:
        listed = paths(bundle, files)
        workflow = ConfigWorkflow(listed, logging_file=False, workflow_type=kind, **given)
        workflow.initialize()
        try:
            assert workflow.check_properties() == [], files
        finally:
            workflow.finalize()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_network_in_and_out_are_those_of_the_metadata(bundle: str, tmp_path: Path) -> None:
    verify_net_in_out(
        "network_def",
        str(configs(bundle) / "metadata.json"),
        str(configs(bundle) / "inference.json"),
        device="cpu",
        bundle_root=str(tmp_path),
        extra_forward_args={},
        **{"backbone::init_filters": 8},
    )


def components(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        own = [node] if "_target_" in node else []
        return own + [c for value in node.values() for c in components(value)]
    return [c for value in node for c in components(value)] if isinstance(node, list) else []


ALONE = ("train.json", "inference.json")
OVERLAYS = [
    (bundle, path.name)
    for bundle in BUNDLES
    for path in sorted([*configs(bundle).glob("*.json"), *configs(bundle).glob("*.yaml")])
    if path.name not in (*ALONE, "metadata.json")
]
CONFIGS = [(bundle, (name,)) for bundle in BUNDLES for name in ALONE] + [
    (bundle, (ALONE["inference" in name], name)) for bundle, name in OVERLAYS
]
LOCATOR = ComponentLocator()


@pytest.mark.parametrize(("bundle", "files"), CONFIGS, ids=lambda given: "-".join(given))
def test_every_target_exists_and_takes_its_arguments(bundle: str, files: tuple[str, ...]) -> None:
    nodes = components(merged(bundle, *files))
    assert nodes
    for node in nodes:
        target = locate(str(ConfigComponent(node, locator=LOCATOR).resolve_module_name()))
        assert target is not None, node["_target_"]
        names = [key for key in node if not key.startswith("_")]
        inspect.signature(target).bind_partial(**dict.fromkeys(names))  # type: ignore[arg-type]


@pytest.mark.parametrize(("bundle", "files"), CONFIGS, ids=lambda given: "-".join(given))
def test_every_reference_names_a_key(bundle: str, files: tuple[str, ...]) -> None:
    config = merged(bundle, *files)
    parser = ConfigParser(config)
    absent = [id for id in ReferenceResolver.find_refs_in_config(config, "") if id not in parser]
    assert not absent


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_backbone_is_built_in_the_bundles_that_its_header_lists(bundle: str) -> None:
    assert suits(bundle)
    for name in suits(bundle):
        for file in ALONE:
            parser = ConfigParser(merged(bundle, file, BACKBONES[name]))
            with torch.device("cpu" if "swin" in name else "meta"):  # Swin reads its own values
                assert isinstance(parser.get_parsed_content("backbone"), nn.Module), name


def test_what_monai_label_needs_of_the_segmentation_configs() -> None:
    train = merged("seg-finetune", "train.json")
    handlers = train["train"]["handlers"]
    assert all(isinstance(handler, dict) for handler in handlers)
    assert not any("CheckpointLoader" in node["_target_"] for node in components(handlers))
    assert "data" in train["train"]["dataset"] and "data" in train["validate"]["dataset"]
    infer = ConfigParser.load_config_file(str(configs("seg-finetune") / "inference.json"))
    assert {"network_def", "preprocessing", "postprocessing", "inferer", "device"} <= infer.keys()
    names = [step["_target_"] for step in infer["postprocessing"]["transforms"]]
    assert names[:3] == ["Activationsd", "Invertd", "Lambdad"]


@pytest.mark.parametrize(("overlay", "flips"), [(None, False), ("dense.yaml", True)])
def test_pre_training_mirrors_no_volume_whose_texts_name_a_side(
    overlay: str | None, flips: bool
) -> None:
    files = ["train.json", *([overlay] if overlay else [])]
    parser = ConfigParser(merged("pretrain", *files))
    augment = Compose(parser.get_parsed_content("train::augment")).set_random_state(0)
    image = MetaTensor(torch.rand(1, *[max(parser["patch_size"])] * 3), affine=torch.eye(4))
    signs = [float(augment({"image": image})["image"].affine[0, 0]) for _ in range(12)]
    assert (min(signs) < 0) == flips


def test_the_paper_overlay_sets_the_papers_recipe() -> None:
    parser = ConfigParser(merged("pretrain", "train.json", "paper.yaml"))
    psat = parser.get("student")["psat"]
    assert (psat["queries"], psat["layers"], psat["ffn"], psat["readout"]) == (
        300,
        6,
        1024,
        "first",
    )
    assert psat["_target_"].endswith("PSAT") and parser.get("student")["network"] == "@network_def"
    parts = {key: psat[key] for key in ("hidden", "out_channels")}
    assert parts == {"hidden": 768, "out_channels": 768}  # then one linear layer
    loss = parser.get("loss")
    assert (loss["kind"], loss["mass"], loss["epsilon"]) == ("partial_transport", 0.95, 0.03)


@pytest.mark.parametrize(
    ("bundle", "overlay", "key"),
    [
        ("pretrain", "dense.yaml", "embedded_items"),
        ("pretrain", "crop.yaml", "embedded_items"),
        ("pretrain", "volume.yaml", "embedded_items"),
        ("seg-finetune", "unlabelled.yaml", "unlabelled_items"),
        ("seg-finetune", "mean_teacher.yaml", "train::unlabelled_items"),
    ],
)
def test_overlays_name_bad_volumes_or_leave_them_out(
    bundle: str, overlay: str, key: str, volumes: Path, tmp_path: Path
) -> None:
    images = [*(str(path) for path in volumes.glob("*.nii.gz")), str(tmp_path / "bad.nii.gz")]
    listed = tmp_path / "more.json"
    listed.write_text(json.dumps([{"image": path, "modality": "MR"} for path in images]))
    (tmp_path / "bad.nii.gz").write_text("no volume")
    given = {"datalist" if bundle == "pretrain" else "unlabelled": str(listed)}
    given |= {"teacher": {"_target_": "test_dense.teacher"}, "store_dir": str(tmp_path)}
    given |= {"per_plane": 2, "device": "$torch.device('cpu')"}
    if bundle != "pretrain":
        given |= {"train_items": [], "val_items": []}
    config = merged(bundle, "train.json", overlay) | {"dataset_dir": str(volumes)} | given

    def items(skip_bad: bool) -> list[dict]:
        parser = ConfigParser(config | {"skip_bad": skip_bad})
        parser.parse()
        parser.get_parsed_content("imports")
        return parser.get_parsed_content(key)

    with pytest.raises(RuntimeError) as error:
        items(False)
    assert "1 bad of 7" in str(error.getrepr(chain=True))
    assert [item["image"] for item in items(True)] == images[:-1]


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "models" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_killed_and_resumed_ends_where_an_uninterrupted_run_ends(
    bundle: str, tmp_path: Path, volumes: Path
) -> None:
    torch.set_num_threads(1)  # as in the processes to be killed: sums depend on it
    changes = {**NETWORKS[bundle], "max_epochs": 6, "val_interval": 2}
    if bundle != "pretrain":
        changes["ema_decay"] = 0.9
    run(bundle, ["train.json"], **settings(bundle, tmp_path / "whole", volumes, **changes))
    settled = settings(bundle, tmp_path / "cut", volumes, **changes)
    log = (tmp_path / "log").open("w")
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, *command(bundle, ["train.json"], settled)],
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
    run(bundle, ["train.json"], **settled)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    parts = ("student", "loss") if bundle == "pretrain" else ("network", "average")
    for part in parts:
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
    given = settings("pretrain", tmp_path, volumes)
    words = [*command("pretrain", ["train.json"], given), "--learning_rat", "0.1"]
    done = subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.strip().endswith(
        "override must name a key of the config, got --learning_rat; did you mean learning_rate?"
    )


@pytest.mark.slow
def test_a_failed_run_ends_with_its_cause(tmp_path: Path, volumes: Path) -> None:
    given = settings("seg-finetune", tmp_path, volumes, label_names=["background"])
    words = command("seg-finetune", ["train.json"], given)
    done = subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert (
        done.stderr.strip()
        .split("\n")[-1]
        .startswith("ValueError: label_names must name the background and a class")
    )
