from collections.abc import Callable

import pytest
import torch
from monai.networks.nets import SegResNet, UNet, ViT
from torch import nn

from med3dinsight_ext.embeddings.grid_targets import GridTargets
from med3dinsight_ext.losses.dense import DenseLoss, code_loss
from med3dinsight_ext.models.dense import DenseStudent, hidden_at
from med3dinsight_ext.models.features import find_features, pyramid_of
from med3dinsight_ext.models.pyramid import find_pyramid, sample_points

SIZE = (24, 16, 32)


def unet() -> UNet:
    return UNet(3, 1, 1, (8, 16, 32), (2, 2), num_res_units=1)


def test_a_unet_s_levels_are_its_decoder_s_and_its_deepest() -> None:
    found = find_pyramid(unet(), SIZE)
    assert [f.grid for f in found] == [(12, 8, 16), (6, 4, 8)]
    assert [f.channels for f in found] == [16, 48]  # with the skip connections
    assert find_pyramid(unet(), SIZE, levels=1) == found[:1]


def test_segresnet_has_a_full_level_without_its_output() -> None:
    network = SegResNet(init_filters=8, in_channels=1, out_channels=1)
    found = find_pyramid(network, SIZE)
    assert [f.grid for f in found] == [SIZE, (12, 8, 16), (6, 4, 8)]
    assert found[0].channels == 8


def test_a_vit_has_the_one_level_that_it_has() -> None:
    network = ViT(1, (16, 16, 16), (8, 8, 8), hidden_size=12, mlp_dim=8, num_layers=1, num_heads=2)
    (found,) = find_pyramid(network, (16, 16, 16))
    assert found.grid == (2, 2, 2) and found.channels == 12


class Windows(nn.Module):
    """As in Swin transformers: tensors with channels last between feature maps, and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv3d(1, 8, 3, 2, 1), nn.LayerNorm(8)
        self.pad, self.up = nn.ConstantPad3d(1, 0.0), nn.Conv3d(8, 9, 3)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        found = self.norm(self.down(volume).movedim(1, -1)).movedim(-1, 1)
        return self.up(self.pad(found))


@pytest.mark.parametrize("size", [SIZE, (12, 8, 16)])
def test_channels_last_and_padded_tensors_are_no_levels(size: tuple[int, ...]) -> None:
    network = Windows()
    assert [(f.layer, f.channels) for f in find_pyramid(network, size)] == [("up", 9)]
    network.norm.register_forward_pre_hook(same_size_alone(size))
    with pytest.raises(ValueError, match="failed with: one size"):
        find_features(network, [2 * n for n in size])
    assert ("up", 9) in [(f.layer, f.channels) for f in find_pyramid(network, size)]


def same_size_alone(size: tuple[int, ...]) -> Callable[..., None]:
    """A hook that lets no other input through."""

    def check(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[1] * 2 != size[0]:
            raise ValueError("one size")

    return check


def test_named_layers_are_taken_in_their_order() -> None:
    names = ["model.2", "model.0"]
    assert [f.layer for f in find_pyramid(unet(), SIZE, names)] == names
    with pytest.raises(ValueError, match="feature_layer must name a module of UNet, got"):
        find_pyramid(unet(), SIZE, ["model.7"])


def test_a_network_of_few_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="name modules as feature_layers"):
        find_pyramid(nn.Sequential(nn.Conv3d(1, 2, 3, 2, 1)), SIZE)


def test_the_pyramid_is_what_the_modules_return() -> None:
    network = nn.Sequential(nn.Conv3d(1, 8, 1), nn.AvgPool3d(2), nn.Conv3d(8, 9, 1))
    volume = torch.rand(2, 1, *SIZE)
    values, output = pyramid_of(network, find_pyramid(network, SIZE), volume)
    assert torch.equal(values[0], network[0](volume)) and torch.equal(values[1], output)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_features_are_sampled_at_voxel_coordinates(stride: int) -> None:
    axes = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in SIZE), indexing="ij"))
    pooled = nn.functional.avg_pool3d(axes[None], stride)
    points = stride + torch.rand(1, 50, 3) * (torch.tensor(SIZE) - 2.0 * stride - 1)
    assert torch.allclose(sample_points(pooled, points, SIZE), points, atol=1e-4)


def test_points_of_half_precision_features_are_where_they_were() -> None:
    ramp = torch.arange(96.0).view(1, 1, 96, 1, 1)
    points = torch.tensor([[[33.3, 0, 0], [70.7, 0, 0]]])
    found = sample_points(ramp.bfloat16(), points, (96, 1, 1))
    assert torch.allclose(found[0, :, 0], points[0, :, 0], atol=1e-3)


def test_hidden_points_are_those_in_hidden_blocks() -> None:
    mask = torch.zeros(2, 1, *SIZE, dtype=torch.bool)
    mask[1, 0, 8:16, :8, 24:] = True
    points = torch.tensor([[9.4, 3.0, 31.4], [7.0, 3.0, 31.0]]).expand(2, 1, 2, 3)
    assert hidden_at(mask, points).tolist() == [[[False, False]], [[True, False]]]


def targets(student: DenseStudent, volume: torch.Tensor, count: int = 40) -> GridTargets:
    points = torch.rand(len(volume), 2, count, 3) * (torch.tensor(SIZE) - 1)
    codes = [torch.randn(len(volume), count, d) for d in (5, 3)]
    valid = [torch.ones(len(volume), count, dtype=torch.bool) for _ in codes]
    return GridTargets(codes, valid, points, volume)


def test_gradient_reaches_every_level_and_head() -> None:
    torch.manual_seed(0)
    student = DenseStudent(unet(), [5, 3], SIZE, mask_ratio=0.5)
    volume = torch.rand(2, 1, *SIZE)
    target = targets(student, volume)
    loss = DenseLoss(reconstruction_weight=10.0)
    total = loss(student(volume, target.points), target)
    total.backward()
    missing = [name for name, p in student.named_parameters() if p.grad is None]
    assert not missing
    expected = loss.latest.dense + 10 * loss.latest.reconstruction
    assert torch.allclose(total, expected)


def test_a_head_at_points_is_a_convolution_there() -> None:
    student = DenseStudent(unet(), [5], SIZE).eval()
    volume, points = torch.rand(1, 1, *SIZE), torch.rand(1, 1, 9, 3) * 12
    features, _ = pyramid_of(student.network, student.levels, volume)
    head = student.heads[0][0]
    dense = nn.functional.conv3d(features[0], head.weight[:, :, None, None, None], head.bias)
    expected = sample_points(dense, points[:, 0], SIZE)
    assert torch.allclose(student(volume, points).codes[0][0], expected, atol=1e-5)


def test_only_hidden_and_valid_points_count() -> None:
    torch.manual_seed(0)
    student = DenseStudent(unet(), [5, 3], SIZE, mask_ratio=0.5)
    volume = torch.rand(2, 1, *SIZE)
    target = targets(student, volume)
    output = student(volume, target.points)
    before = DenseLoss()(output, target)
    for n, codes in enumerate(target.codes):
        codes[~output.hidden[:, n]] = 100.0
    assert torch.allclose(DenseLoss()(output, target), before)
    assert DenseLoss(visible_weight=0.1)(output, target) > 2 * before


@pytest.mark.parametrize("kind", ["smooth_l1", "cosine"])
def test_equal_codes_cost_nothing(kind: str) -> None:
    codes, weight = torch.randn(2, 7, 4), torch.ones(2, 7)
    assert code_loss(codes, codes, weight, kind) < 1e-6
    assert code_loss(codes, -codes, weight, kind) > 0.5
    assert code_loss(codes, -codes, 0 * weight, kind) == 0


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="kind must be one of smooth_l1, cosine, got 'l2'"):
        DenseLoss("l2")
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\)"):
        DenseStudent(unet(), [4], SIZE, mask_ratio=1)
    with pytest.raises(ValueError, match="weights must be >= 0 and one of them above"):
        DenseLoss(dense_weight=0)
