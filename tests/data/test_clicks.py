"""Clicks from the stored file to the network's input, and clicks that training simulates."""

import json
from pathlib import Path
from typing import Any

import fakes
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.networks.nets import UNet
from running import BACKBONES, inference_settings, merged, run, settings, suits
from torch import Tensor, nn

from med3dinsight_ext.data.clicks import (
    AddClicksd,
    SimulatedClicks,
    add_click,
    corrective_click,
    optional_clicks,
)

NAMES = ["background", "foreground"]
SHAPE = (34, 26, 22)
TURN, TILT = 0.4, 0.3
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = (
    np.array([[1, 0, 0], [0, np.cos(TURN), -np.sin(TURN)], [0, np.sin(TURN), np.cos(TURN)]])
    @ np.array([[np.cos(TILT), -np.sin(TILT), 0], [np.sin(TILT), np.cos(TILT), 0], [0, 0, 1]])
    @ np.diag([1.2, 1.0, 2.0])
)
OBLIQUE[:3, 3] = (-31, 12, 7)
AFFINES = {
    "ras": np.diag([1.0, 1, 1, 1]),
    "lps": np.diag([-1.0, -1, 1, 1]),
    "permuted": np.array([[0.0, 0, 1.5, 9], [-1, 0, 0, 0], [0, 1, 0, -40], [0, 0, 0, 1]]),
    "anisotropic": np.diag([0.8, 0.8, 3.0, 1]),
    "oblique": OBLIQUE,
}


class FromClicks(nn.Module):
    """Segments what lies around foreground clicks and no background click; sees no image."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.layer = nn.Conv3d(in_channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        inside = x[:, 2:3] - x[:, 1:2] - 0.3
        return 8 * torch.cat((-inside, inside), 1) + 0 * self.layer(x)


class Recorder(UNet):
    """A small network that keeps the guidance of every training step."""

    seen: list[Tensor] = []

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(3, in_channels, out_channels, (4, 8), (2,), norm="INSTANCE")

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            Recorder.seen.append(x[:, 1:].clone())
        return super().forward(x)


def blob(folder: Path, affine: np.ndarray, centre: tuple[int, int, int]) -> Path:
    """A volume that is bright around one voxel."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    array = 1000 * np.exp(-((grid - centre) ** 2).sum(-1) / 8)
    folder.mkdir()
    nib.save(nib.Nifti1Image(array.astype(np.float32), affine), folder / "a.nii.gz")
    return folder / "a.nii.gz"


def preprocessed(path: Path, **clicks: Any) -> MetaTensor:
    """What the network gets for an item, by the bundle's own inference configs."""
    parser = ConfigParser(merged("seg-finetune", "inference.json", "click_inference.yaml"))
    parser.update({"spacing": [1.0, 1.0, 1.0], "patch_size": [40, 40, 40]})
    item = {"image": str(path), "modality": "MR", **clicks}
    return parser.get_parsed_content("preprocessing")(item)["image"]


def centroid(array: Any) -> np.ndarray:
    weights = np.asarray(array, dtype=float)
    grid = np.stack(np.meshgrid(*map(np.arange, weights.shape), indexing="ij"), -1)
    return (grid * weights[..., None]).sum((0, 1, 2)) / weights.sum()


@pytest.mark.parametrize("kind", AFFINES)
def test_a_click_lands_on_what_was_clicked(kind: str, tmp_path: Path) -> None:
    voxel = (20, 10, 12)
    image = preprocessed(blob(tmp_path / "in", AFFINES[kind], voxel), foreground=[list(voxel)])
    volume, background, foreground = image.as_tensor()
    assert image.shape[0] == 3 and not background.any()
    found = nib.affines.apply_affine(image.affine.numpy(), centroid(foreground))
    expected = nib.affines.apply_affine(AFFINES[kind], voxel)
    assert np.allclose(found, expected, atol=1e-3)
    bright = centroid(volume.clamp(min=0.2) - 0.2)  # what the pipeline made of the file's voxel
    assert np.linalg.norm(bright - centroid(foreground)) < 0.3


@pytest.mark.parametrize("kind", AFFINES)
def test_the_segmentation_follows_the_clicks(kind: str, tmp_path: Path) -> None:
    path = blob(tmp_path / "in", AFFINES[kind], (20, 10, 12))
    (tmp_path / "models").mkdir()
    torch.save(FromClicks().state_dict(), tmp_path / "models" / "model.pt")
    found = []
    for voxel in ([22, 9, 8], [11, 17, 13]):
        items = [{"image": str(path), "Foreground": [voxel], "background": []}]
        (tmp_path / "items.json").write_text(json.dumps(items))
        given = inference_settings(
            "seg-finetune", tmp_path, tmp_path / "in", datalist=str(tmp_path / "items.json"),
            spacing=[1.0, 1.0, 1.0], backbone={"_target_": "test_clicks.FromClicks"},
        )  # fmt: skip
        run("seg-finetune", ["inference.json", "click_inference.yaml"], **given)
        result = nib.load(tmp_path / "eval" / "a_seg.nii.gz")
        assert result.shape == SHAPE and np.allclose(result.affine, AFFINES[kind], atol=1e-4)
        found.append(centroid(result.get_fdata() == 1))
        assert np.linalg.norm(found[-1] - voxel) < 1.5
    assert np.linalg.norm(found[0] - found[1]) > 10


def test_a_background_click_takes_away_what_a_foreground_click_gave(tmp_path: Path) -> None:
    path = blob(tmp_path / "in", AFFINES["lps"], (20, 10, 12))
    clicks = {"foreground": [[20, 10, 12], [8, 8, 8]], "background": [[8.4, 8, 8]]}
    image = preprocessed(path, **clicks)[None].as_tensor()
    kept = FromClicks()(image).argmax(1)[0]
    one = FromClicks()(preprocessed(path, foreground=[[20, 10, 12]])[None].as_tensor()).argmax(1)[0]
    assert kept.any() and torch.equal(kept, one)


def test_without_clicks_a_network_segments_alone(tmp_path: Path) -> None:
    path = blob(tmp_path / "in", AFFINES["oblique"], (20, 10, 12))
    image, empty = preprocessed(path), preprocessed(path, foreground=[], background=[])
    assert torch.equal(image, empty) and not image[1:].any()
    network = optional_clicks(UNet(3, 3, 2, (4, 8), (2,)), NAMES).eval()
    with torch.no_grad():
        volume = image[None, :, :32, :32, :32].as_tensor()
        assert torch.equal(network(volume[:, :1]), network(volume))
        volume[:, 1] = 1
        assert not torch.equal(network(volume[:, :1]), network(volume))


def test_clicks_do_not_stay_in_the_item(tmp_path: Path) -> None:
    image = MetaTensor(torch.zeros(1, 4, 5, 6), meta={"original_affine": np.eye(4)})
    image.meta["spatial_shape"] = (4, 5, 6)
    item = AddClicksd("image", NAMES)({"image": image, "Background": [[1, 2, 3]], "other": [1]})
    assert item.keys() == {"image", "other"} and item["image"][1, 1, 2, 3] == 1


BAD = {
    "outside": ({"foreground": [[1, 2, 3], [5, 40, 2]]}, r"inside the volume, 0 to \[33, 25, 21\], "
                r"got \[5.0, 40.0, 2.0\] for foreground"),
    "negative": ({"background": [[-1, 2, 3]]}, r"inside the volume.* got \[-1.0, 2.0, 3.0\]"),
    "not finite": ({"background": [[float("nan"), 2, 3]]}, "inside the volume.* got .nan"),
    "unknown": ({"liver": [[1, 2, 3]]}, "of the labels background, foreground, got 1 on 'liver'"),
    "two numbers": ({"foreground": [[1, 2]]}, r"\[i, j, k\] each, got \[\[1, 2\]\] for foreground"),
    "flat": ({"foreground": [1, 2, 3]}, r"\[i, j, k\] each, got \[1, 2, 3\] for foreground"),
    "text": ({"foreground": [["1", "2", "3"]]}, r"\[i, j, k\] each"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_click_is_named(kind: str, tmp_path: Path) -> None:
    clicks, message = BAD[kind]
    path = blob(tmp_path / "in", AFFINES["permuted"], (20, 10, 12))
    with pytest.raises((ValueError, RuntimeError)) as caught:
        preprocessed(path, **clicks)
    cause = caught.value.__cause__ or caught.value  # Compose wraps what a transform raises
    with pytest.raises(ValueError, match=message):
        raise cause


def test_clicks_on_an_image_without_a_file_are_refused() -> None:
    item = {"image": MetaTensor(torch.zeros(1, 4, 5, 6)), "foreground": [[1, 2, 3]]}
    with pytest.raises(ValueError, match="an image without original_affine; read it with Load"):
        AddClicksd("image", NAMES)(item)


def test_where_clicks_meet_the_higher_counts() -> None:
    channel = torch.zeros(9, 8, 7)
    add_click(channel, (4, 3, 3), 1.5)
    once = channel.clone()
    add_click(channel, (4, 3, 3), 1.5)
    assert torch.equal(channel, once) and once[4, 3, 3] == 1
    assert once[6, 3, 3] == pytest.approx(np.exp(-4 / 4.5))
    with pytest.raises(ValueError, match="click_sigma must be above 0 voxels, got 0"):
        add_click(channel, (4, 3, 3), 0)


def test_the_worst_error_is_clicked_where_it_is_deepest() -> None:
    label = np.zeros((20, 12, 10), int)
    label[2:9, 2:9, 2:9] = 2
    prediction = label.copy()
    prediction[2:9, 2:9, 2:7] = 1  # 7 x 7 x 5 wrong
    prediction[14:18, 2:6, 2:6] = 1  # 4 x 4 x 4 wrong: background there
    number, voxel = corrective_click(prediction, label)
    assert number == 2 and voxel == (5, 5, 4)
    prediction[2:9, 2:9, 2:9] = 2
    number, voxel = corrective_click(prediction, label)
    assert number == 0 and voxel in set(np.ndindex(18, 6, 6)) - set(np.ndindex(14, 6, 6))
    assert corrective_click(label, label) is None


def test_a_drawn_click_is_in_an_error_and_has_its_true_class() -> None:
    random = np.random.RandomState(0)
    label, prediction = random.randint(0, 3, (2, 7, 6, 5))
    clicks = [corrective_click(prediction, label, random) for _ in range(50)]
    assert len(set(clicks)) > 20 and {number for number, _ in clicks} == {0, 1, 2}
    assert all(label[v] == number != prediction[v] for number, v in clicks)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_volumes(tmp_path_factory.mktemp("volumes"), 6)


def trained(root: Path, volumes: Path, **changes: Any) -> list[Tensor]:
    """Guidance (b, labels, x, y, z) of every step of a training by the configs."""
    backbone = {"_target_": "test_clicks.Recorder", "out_channels": "@out_channels",
                "in_channels": "$1 + len(@label_names)"}  # fmt: skip
    given = settings("seg-finetune", root, volumes, backbone=backbone, **changes)
    Recorder.seen.clear()
    run("seg-finetune", ["train.json", "click.yaml"], **given)
    return list(Recorder.seen)


def test_training_clicks_on_some_items_and_leaves_others_alone(
    tmp_path: Path, volumes: Path
) -> None:
    guidance = torch.cat(trained(tmp_path, volumes, max_epochs=4, val_fraction=0))
    used = guidance.flatten(1).amax(1)
    assert len(used) == 24 and set(used.tolist()) == {0.0, 1.0}
    assert 0.1 < (used == 0).float().mean() < 0.6
    peaks = (guidance == 1).flatten(1).sum(1)
    assert peaks.max() > 2 and peaks.max() <= 5
    assert (guidance == 1).sum((0, 2, 3, 4)).min() > 0  # on both labels
    assert {p.name for p in (tmp_path / "models").iterdir()} == {
        "model.pt", "last.ckpt", "run.json"
    }  # fmt: skip


@pytest.mark.parametrize(("share", "used"), [(1.0, {0.0}), (0.0, {1.0})])
def test_the_share_without_clicks_is_what_was_asked(
    share: float, used: set[float], tmp_path: Path, volumes: Path
) -> None:
    guidance = torch.cat(trained(tmp_path, volumes, automatic_share=share, val_fraction=0))
    assert set(guidance.flatten(1).amax(1).tolist()) == used


def test_a_run_that_is_repeated_clicks_alike(tmp_path: Path, volumes: Path) -> None:
    runs = [trained(tmp_path / name, volumes, max_epochs=2) for name in "ab"]
    assert runs[0] and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][-1])


def test_one_channel_weights_arrive_and_learn_to_listen(tmp_path: Path, volumes: Path) -> None:
    torch.save(Recorder(1, 2).state_dict(), tmp_path / "one.pt")
    root = tmp_path / "click"
    trained(root, volumes, pretrained=str(tmp_path / "one.pt"), automatic_share=0.0)
    report = json.loads((root / "eval" / "transfer.json").read_text())
    assert set(report["extended"].values()) == {"2 extra input channels start at zero"}
    assert report["encoder_share"] == 1 and not report["skipped"]
    state = torch.load(root / "models" / "model.pt", weights_only=True)
    assert all(state[name][:, 1:].abs().min() > 0 for name in report["extended"])


def test_a_click_network_is_evaluated_without_clicks(tmp_path: Path, volumes: Path) -> None:
    trained(tmp_path, volumes)
    backbone = {"_target_": "test_clicks.Recorder", "in_channels": 3, "out_channels": 2}
    given = settings("seg-finetune", tmp_path, volumes, backbone=backbone)
    run("seg-finetune", ["train.json", "evaluate.json", "click.yaml"], **given)
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["cases"] == 1


@pytest.mark.parametrize("name", suits("seg-finetune"))
def test_every_backbone_takes_clicks(name: str) -> None:
    size = (96, 96, 96) if name == "unetr" else (64, 32, 32)
    for first, last in (("train.json", "click.yaml"), ("inference.json", "click_inference.yaml")):
        parser = ConfigParser(merged("seg-finetune", first, BACKBONES[name], last))
        if "swin" in name:
            parser["backbone"]["feature_size"] = 12
        with torch.device("cpu" if "swin" in name else "meta"):
            if name == "vnet":  # repeats its input to 16 channels
                with pytest.raises(RuntimeError, match="Failed to"):
                    parser.get_parsed_content("network_def")
                continue
            network = parser.get_parsed_content("network_def").eval()
            assert network(torch.zeros(1, 1, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_clicks": 0}, "max_clicks must be at least 1, got 0"),
        ({"automatic_share": 1.5}, r"automatic_share must be in \[0, 1\], got 1.5"),
    ],
)
def test_a_bad_dial_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedClicks(NAMES, **changes)
