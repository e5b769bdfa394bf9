from functools import partial

import pytest
import torch
from fakes import PlainNet
from monai.networks import nets
from torch import Tensor, nn

from med3dinsight_ext.models.features import (
    as_grid,
    encoder_parameters,
    extract_features,
    find_features,
    first_output,
    token_grid,
)
from med3dinsight_ext.models.psat import PSAT
from med3dinsight_ext.models.student import Student, block_mask

SIZE = (32, 16, 48)
SMALL = partial(PSAT, hidden=16, heads=4, ffn=16, layers=1)


def student(network: nn.Module | None = None, **changes: object) -> Student:
    return Student(network or PlainNet(), SMALL, {"image": 5, "text": 3}, SIZE, **changes)


def ask(b: int = 2, s: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.rand(b, 1, *SIZE), torch.randint(3, (b, s)), torch.rand(b, s)


def test_a_foreign_network_gives_tokens_and_reconstruction() -> None:
    out = student()(*ask())
    assert {k: tuple(v.shape) for k, v in out.tokens.items()} == {
        "image": (2, 3, 5),
        "text": (2, 3, 3),
    }
    assert out.reconstruction is not None and out.reconstruction.shape == (2, 1, *SIZE)


def test_one_network_pass_however_many_slices() -> None:
    """Defect 13."""
    whole = student()
    before = whole.network.calls
    whole(*ask(s=40))
    assert whole.network.calls == before + 1


def test_in_evaluation_the_network_stops_at_its_features() -> None:
    whole, reached = student().eval(), []
    whole.network.up.register_forward_hook(lambda *_: reached.append(True))
    question = ask()
    assert whole(*question).reconstruction is None and not reached
    features, output = extract_features(whole.network, whole.features, question[0])
    assert output.shape == question[0].shape and reached
    assert torch.equal(features, whole.encode(question[0])[0])


def test_features_of_a_module_that_runs_at_many_depths_are_the_deepest() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.deeper = nn.Conv3d(1, 3, 2, 2), nn.Conv3d(3, 3, 2, 2)
            self.up, self.act = nn.ConvTranspose3d(3, 1, 4, 4), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.up(self.act(self.deeper(self.act(self.down(x))))))

    network, volume = Shared(), torch.rand(1, 1, *SIZE)
    found = find_features(network, SIZE, "act")
    assert found == ("act", 3, (8, 4, 12), 2)
    for stop in (False, True):
        assert extract_features(network, found, volume, stop)[0].shape == (1, 3, 8, 4, 12)


def test_network_keeps_its_names_and_weights() -> None:
    network = PlainNet()
    names = set(network.state_dict())
    assert set(student(network).network.state_dict()) == names
    assert student(network).network is network


def test_features_come_from_the_neck() -> None:
    assert find_features(PlainNet(), SIZE) == ("neck", 6, (4, 2, 6), 1)
    assert find_features(PlainNet(), SIZE, "down") == ("down", 4, (8, 4, 12), 1)


def test_the_dry_run_leaves_modes_and_batch_statistics() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 2, 2), nn.BatchNorm3d(2), nn.Dropout3d())
    network[2].eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    find_features(network, SIZE)
    assert (network.training, network[1].training, network[2].training) == (True, True, False)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (nets.SegResNet(init_filters=8, out_channels=1), "down_layers.3"),
        (nets.ViT(1, SIZE, (16, 16, 16), 24, 32, 1, 2, classification=True), "norm"),
        (nets.resnet18(spatial_dims=3, n_input_channels=1), "layer4"),
    ],
    ids=["SegResNet", "ViT with class token", "ResNet"],
)
def test_deepest_features_are_the_encoders_end(network: nn.Module, layer: str) -> None:
    assert find_features(network, SIZE).layer == layer


def test_tokens_of_a_vit_keep_their_place() -> None:
    tokens = torch.arange(2 * 1 * 3.0).view(1, 6, 1)
    with_class = torch.cat((torch.full((1, 1, 1), -1.0), tokens), 1)
    assert torch.equal(as_grid(with_class, SIZE)[0, 0], tokens.view(2, 1, 3))


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [(6, SIZE, (2, 1, 3)), (64, (8, 8, 8), (4, 4, 4)), (64, (5, 5, 5), None), (7, SIZE, None)],
)
def test_a_grid_of_tokens_divides_the_volume(
    tokens: int, size: tuple[int, int, int], grid: tuple[int, int, int] | None
) -> None:
    assert token_grid(tokens, size) == grid


def test_tokens_of_uneven_patches_have_the_grid_of_their_embedding() -> None:
    size = {"hidden_size": 12, "mlp_dim": 8, "num_layers": 1, "num_heads": 2}
    network = nets.ViT(1, (16, 16, 16), (8, 8, 4), **size)
    found = find_features(network, (16, 16, 16))
    assert (found.layer, found.grid) == ("norm", (2, 2, 4))
    assert any("attn" in name for name in encoder_parameters(network, (16, 16, 16)))
    volume = torch.rand(1, 1, 16, 16, 16)
    features, output = extract_features(network, found, volume)
    assert torch.equal(features.flatten(2).mT, output[0])


def test_what_is_no_feature_map_has_no_grid() -> None:
    for other in (torch.zeros(1, 2, 5), torch.zeros(1, 5), torch.zeros(1, 3, 2, 2, 49), "text"):
        assert as_grid(other, SIZE) is None  # two tokens may be the scores of two classes


def test_the_output_is_the_first_of_several() -> None:
    assert first_output((1, 2)) == first_output([1, 2]) == first_output(1) == 1
    stacked = torch.rand(2, 3, 1, 4, 4, 4)  # DynUNet's
    assert torch.equal(first_output(stacked), stacked[:, 0])


def test_a_network_that_stacks_its_levels_is_asked_to_reconstruct() -> None:
    network = nets.DynUNet(
        3, 1, 1, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 4, 8], deep_supervision=True,
        deep_supr_num=1,
    )  # fmt: skip
    whole = Student(network, partial(PSAT, hidden=8, heads=2), {"image": 4}, SIZE)
    found = whole(torch.rand(1, 1, *SIZE), torch.zeros(1, 1).long(), torch.full((1, 1), 0.5))
    assert found.reconstruction is not None and found.reconstruction.shape == (1, 1, *SIZE)


def test_gradient_reaches_the_encoder_through_tokens_alone() -> None:
    whole = student()
    sum(t.square().sum() for t in whole(*ask()).tokens.values()).backward()
    assert whole.network.down[0].weight.grad.abs().sum() > 0
    assert whole.network.up.weight.grad is None


def test_evaluation_hides_nothing_and_training_hides_the_share_asked_for() -> None:
    """Defect 9: the loss counts hidden voxels, which the network has not seen."""
    whole = student(mask_ratio=0.5, mask_block=8)
    shown = []
    whole.network.register_forward_pre_hook(lambda _, args: shown.append(args[0]))
    volume, *question = ask()
    mask = whole(volume, *question).mask
    assert mask is not None and mask.float().mean() == 0.5
    assert not shown[0][mask].any() and torch.equal(shown[0][~mask], volume[~mask])
    assert whole.eval()(volume, *question).mask is None


def test_masks_hide_the_same_number_of_whole_blocks() -> None:
    mask = block_mask(torch.zeros(3, 1, 8, 16, 24), 0.25, 8)
    blocks = mask.view(3, 1, 8, 2, 8, 3, 8).permute(0, 3, 5, 1, 2, 4, 6).flatten(3).float().mean(-1)
    assert set(blocks.unique().tolist()) <= {0.0, 1.0}
    assert blocks.flatten(1).sum(1).tolist() == [2.0] * 3


def test_an_uneven_size_is_masked_to_its_border() -> None:
    assert block_mask(torch.zeros(1, 1, 5, 7, 9), 0.9, 4).shape == (1, 1, 5, 7, 9)


def test_a_small_volume_hides_a_block() -> None:
    assert block_mask(torch.zeros(2, 1, 8, 8, 16), 0.2, 8).flatten(1).float().mean(1).eq(0.5).all()


def test_a_classifier_has_no_reconstruction() -> None:
    whole = student(nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2))
    assert whole(*ask()).reconstruction is None


def test_errors_name_the_remedy() -> None:
    with pytest.raises(
        ValueError,
        match="feature_layer must name a module of PlainNet, got 'nekc'; its top .* down, neck, up",
    ):
        find_features(PlainNet(), SIZE, "nekc")
    with pytest.raises(ValueError, match="feature_layer must give features"):
        find_features(nn.Sequential(nn.Flatten(), nn.Linear(32 * 16 * 48, 3)), SIZE)
    with pytest.raises(ValueError, match="set its input channels to 1"):
        find_features(nn.Conv3d(2, 1, 1), SIZE)
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got 1"):
        student(mask_ratio=1)
