"""Clicks from the stored file to the network's input, and clicks that training simulates."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from monai.networks.nets import UNet
from running import BACKBONES, inference_settings, merged, run, suits
from torch import Tensor, nn

from med3dinsight_ext.data.clicks import META, AddClicksd, draw_click, optional_clicks, to_grid
from med3dinsight_ext.training.click_inferer import ClickInferer

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

    def __init__(self, in_channels: int = 5) -> None:
        super().__init__()
        self.layer = nn.Conv3d(in_channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        inside = x[:, 2:3] - x[:, 1:2] - 0.5
        return 8 * torch.cat((-inside, inside), 1) + 0 * self.layer(x)


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
    ((number, *place),) = image.meta[META].tolist()
    assert number == 1 and image.shape[0] == 1
    found = nib.affines.apply_affine(image.affine.numpy(), place)
    expected = nib.affines.apply_affine(AFFINES[kind], voxel)
    assert np.allclose(found, expected, atol=1e-3)
    bright = centroid(image[0].clamp(min=0.2) - 0.2)  # what the pipeline made of the file's voxel
    assert np.linalg.norm(bright - place) < 0.3


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
            "seg-finetune",
            tmp_path,
            tmp_path / "in",
            datalist=str(tmp_path / "items.json"),
            spacing=[1.0, 1.0, 1.0],
            backbone={"_target_": "test_clicks.FromClicks"},
        )
        run("seg-finetune", ["inference.json", "click_inference.yaml"], **given)
        result = nib.load(tmp_path / "eval" / "a_seg.nii.gz")
        assert result.shape == SHAPE and np.allclose(result.affine, AFFINES[kind], atol=1e-4)
        found.append(centroid(result.get_fdata() == 1))
        assert np.linalg.norm(found[-1] - voxel) < 1.5
    assert np.linalg.norm(found[0] - found[1]) > 10


def test_a_background_click_takes_away_what_a_foreground_click_gave(tmp_path: Path) -> None:
    path = blob(tmp_path / "in", AFFINES["lps"], (20, 10, 12))

    def segmented(**clicks: Any) -> Tensor:
        inferer = ClickInferer(SimpleInferer(), NAMES, (40, 40, 40))
        network = optional_clicks(FromClicks(), 5)
        return inferer(preprocessed(path, **clicks)[None], network).argmax(1)[0]

    kept = segmented(foreground=[[20, 10, 12], [8, 8, 8]], background=[[8.4, 8, 8]])
    assert kept.any() and torch.equal(kept, segmented(foreground=[[20, 10, 12]]))


def test_without_clicks_a_network_segments_alone(tmp_path: Path) -> None:
    path = blob(tmp_path / "in", AFFINES["oblique"], (20, 10, 12))
    image, empty = preprocessed(path), preprocessed(path, foreground=[], background=[])
    assert torch.equal(image, empty)
    assert image.meta[META].shape == empty.meta[META].shape == (0, 4)
    network = optional_clicks(UNet(3, 5, 2, (4, 8), (2,)), 5).eval()
    with torch.no_grad():
        volume = F.pad(image[None, :, :32, :32, :32].as_tensor(), (0,) * 6 + (0, 4))
        assert torch.equal(network(volume[:, :1]), network(volume))
        volume[:, 1] = 1
        assert not torch.equal(network(volume[:, :1]), network(volume))


def test_clicks_do_not_stay_in_the_item() -> None:
    image = MetaTensor(torch.zeros(1, 4, 5, 6), meta={"original_affine": np.eye(4)})
    image.meta["spatial_shape"] = (4, 5, 6)
    item = AddClicksd("image", NAMES)({"image": image, "Background": [[1, 2, 3]], "other": [1]})
    assert item.keys() == {"image", "other"} and META not in image.meta
    assert item["image"].meta[META].tolist() == [[0, 1, 2, 3]]


def test_clicks_come_in_the_order_of_their_lists_and_in_turn_between_labels() -> None:
    image = MetaTensor(torch.zeros(1, 4, 5, 6), meta={"original_affine": np.eye(4)})
    image.meta["spatial_shape"] = (4, 5, 6)
    clicks = {"foreground": [[3, 0, 0], [1, 0, 0]], "background": [[2, 0, 0]]}
    found = AddClicksd("image", NAMES)({"image": image, **clicks})["image"].meta[META]
    assert found[:, :2].tolist() == [[0, 2], [1, 3], [1, 1]]


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


def test_a_click_is_a_ball_of_ones_with_an_edge_of_one_voxel() -> None:
    channel = torch.zeros(12, 11, 10)
    draw_click(channel, (5.5, 5, 4), 2.5)
    away = torch.cartesian_prod(*map(torch.arange, channel.shape)) - torch.tensor([5.5, 5, 4])
    expected = (3 - away.norm(dim=1)).clamp(0, 1).view(channel.shape)
    assert torch.allclose(channel, expected)
    draw_click(channel, (5.5, 5, 4), 2.5)
    assert torch.allclose(channel, expected)  # where clicks meet the higher counts
    draw_click(channel, (-9, 5, 4), 2.5)  # outside
    draw_click(channel, (5, 5, 30), 2.5)
    assert torch.allclose(channel, expected)
    with pytest.raises(ValueError, match="click_radius must be at least 1 voxel, got 0"):
        draw_click(channel, (4, 3, 3), 0)
    with pytest.raises(ValueError, match="click_shape must be disc or gaussian, got 'ball'"):
        draw_click(channel, (4, 3, 3), 2, "ball")
    gaussian = torch.zeros(9, 8, 7)
    draw_click(gaussian, (4, 3, 3), 1.5, "gaussian")
    assert gaussian[4, 3, 3] == 1 and gaussian[6, 3, 3] == pytest.approx(np.exp(-4 / 4.5))


def test_a_gaussian_ends_at_three_standard_deviations_along_each_axis() -> None:
    channel, centre, radius = torch.zeros(14, 13, 12), (6, 6, 5), 1.5
    draw_click(channel, centre, radius, "gaussian")
    away = torch.cartesian_prod(*map(torch.arange, channel.shape)) - torch.tensor(centre)
    expected = torch.exp(-away.pow(2).sum(1) / (2 * radius**2))
    expected[away.abs().amax(1) > 3 * radius] = 0
    assert torch.allclose(channel, expected.view(channel.shape))


def test_a_click_of_one_voxel_reaches_the_border() -> None:
    channel = torch.zeros(4, 4, 4)
    draw_click(channel, (0, 0, 3), 1)
    assert channel[0, 0, 3] == 1 and channel[1, 0, 3] == 0.5
    assert float(channel.sum()) == pytest.approx(1 + 3 * 0.5 + 3 * (1.5 - 2**0.5))


@pytest.mark.parametrize("point", [[-0.5, 0, 0], [0, 4.5, 0], [0, 0, 6.2]])
def test_a_click_beyond_the_faces_of_the_outer_voxels_is_outside(point: list[float]) -> None:
    meta = {"original_affine": np.eye(4), "spatial_shape": (4, 5, 6)}
    image = MetaTensor(torch.zeros(1, 4, 5, 6), meta=meta)
    with pytest.raises(ValueError, match="inside the volume"):
        to_grid(image, [point], "a")
    inside = [[-0.49, 0, 0], [0, 4.49, 0], [0, 0, 5.4]]
    assert np.allclose(to_grid(image, inside, "a"), inside)


@pytest.mark.parametrize("point", [[1, "2", 3], [True, 0, 0], [2**53 + 1, 0, 0], [0, 0, -(2**60)]])
def test_a_click_is_three_numbers_that_a_float_holds(point: list[Any]) -> None:
    item = {"image": MetaTensor(torch.zeros(1, 4, 5, 6)), "foreground": [[1, 2, 3], point]}
    with pytest.raises(ValueError, match=r"clicks must be \[i, j, k\] each"):
        AddClicksd("image", NAMES)(item)


@pytest.mark.parametrize("name", suits("seg-finetune"))
def test_every_backbone_takes_clicks(name: str) -> None:
    size = (96, 96, 96) if name == "unetr" else (64, 32, 32)
    for first, last in (("train.json", "click.yaml"), ("inference.json", "click_inference.yaml")):
        parser = ConfigParser(merged("seg-finetune", first, BACKBONES[name], last))
        if "swin" in name:
            parser["backbone"]["feature_size"] = 12
        with torch.device("cpu" if "swin" in name else "meta"):
            if name in ("vnet", "resenc"):  # repeats its input to 16 channels; input_channels
                with pytest.raises(RuntimeError, match="Failed to"):
                    parser.get_parsed_content("network_def")
                continue
            network = parser.get_parsed_content("network_def").eval()
            assert network(torch.zeros(1, 1, *size)).shape == (1, 2, *size)
