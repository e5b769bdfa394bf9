import json
from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNETR, DenseNet, DynUNet, SegResNet, SwinUNETR, UNet, ViT
from safetensors.torch import save_file
from torch import nn

from med3dinsight_ext.models.features import encoder_parameters
from med3dinsight_ext.training.transfer import (
    Transfer,
    load_pretrained,
    match,
    transfer_report,
)

SIZE = (32, 32, 32)


def unet(out: int = 1, width: int = 4, channels: int = 1) -> UNet:
    return UNet(3, channels, out, (width, 8, 8), (2, 2), num_res_units=1, norm="INSTANCE")


def saved(network: nn.Module, path: Path) -> Path:
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize(
    "network",
    [
        SegResNet(3, 8, 1, 1),
        unet(),
        UNETR(1, 1, SIZE, 4, 48, 48, 4),
        DenseNet(3, 1, 2, 4, 4, (2, 2)),
        ViT(1, SIZE, (16,) * 3, 48, 48, 2, 4),
    ],
    ids=lambda n: type(n).__name__,
)
def test_encoder_parameters_are_those_that_move_the_features(network: nn.Module) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    names = encoder_parameters(network, SIZE)
    assert 0 < len(names) == len(set(names)) <= len(dict(network.named_parameters()))
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_encoder_of_segresnet_is_what_its_class_calls_encode() -> None:
    network = SegResNet(3, 8, 1, 1)
    expected = [
        n for n, _ in network.named_parameters() if n.startswith(("convInit", "down_layers"))
    ]
    # convInit acts first, then the stages in order
    names = encoder_parameters(network, SIZE)
    assert sorted(names) == sorted(expected) and names[0] == "convInit.conv.weight"
    assert names[-1].startswith("down_layers.3")


def test_a_frozen_encoder_is_still_found() -> None:
    network = unet()
    expected = encoder_parameters(network, SIZE)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    assert encoder_parameters(network, SIZE) == expected
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["pt", "safetensors", "nested", "ddp", "student"])
def test_weights_arrive_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    source, target = unet(), unet(out=3)
    state = source.state_dict()
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "nested":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif kind == "ddp":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    elif kind == "student":
        inside = {f"network.{k}": v for k, v in state.items()} | {"psat.x": torch.zeros(1)}
        torch.save({"student": inside, "trainer": {"epoch": 3}}, path)
    else:
        torch.save(state, path)
    encoder = encoder_parameters(target, SIZE)
    report = load_pretrained(target, path, encoder=encoder)
    assert report.encoder_share == 1 and set(encoder) <= set(report.loaded)
    assert all(torch.equal(target.state_dict()[n], state[n]) for n in report.loaded)
    last = {n for n in state if n.startswith("model.2")}  # both layers that make classes
    assert set(report.skipped) <= last and report.skipped and "(1," in str(report)
    assert 0.8 < report.share < 1 and "encoder 100 %" in str(report)


def test_share_counts_parameters_not_tensors(tmp_path: Path) -> None:
    target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
    path = tmp_path / "a.pt"
    torch.save({k: v for k, v in target.state_dict().items() if k.startswith("0")}, path)
    assert load_pretrained(target, path, min_match=0.1).share == pytest.approx(9 / 29)


def test_swinunetr_takes_monais_self_supervised_encoder_by_a_rename_table(tmp_path: Path) -> None:
    network = SwinUNETR(1, 2, feature_size=12)
    inner = {k: torch.randn_like(v) for k, v in network.swinViT.named_parameters()}
    path = tmp_path / "model_swinvit.pt"
    index = {k: v for k, v in network.swinViT.state_dict().items() if "position_index" in k}
    theirs = {f"module.{k.replace('mlp.linear', 'mlp.fc')}": v for k, v in (inner | index).items()}
    torch.save({"state_dict": theirs, "epoch": 1}, path)
    rename = {r"^module\.": "swinViT.", r"mlp\.fc": "mlp.linear"}
    encoder = encoder_parameters(network, (64, 32, 32))
    with pytest.raises(ValueError, match=r"fill 100 % of the encoder's .*; min_match lets"):
        load_pretrained(network, path, rename, encoder=encoder)  # encoder10 is not in it
    report = load_pretrained(network, path, rename, 0.2, encoder)
    assert {f"swinViT.{k}" for k in inner} <= set(report.loaded)
    oracle = SwinUNETR(1, 2, feature_size=12)
    oracle.load_from(torch.load(path, weights_only=True))  # MONAI's own
    expected = oracle.swinViT.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in network.swinViT.state_dict().items())


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (unet(channels=2), "takes 2 input channels .* and 1 in the .* with in_channels=2\n"),
        (unet(width=8), "another width or patch size"),
        (SegResNet(3, 8, 1, 1), "another backbone, or names with another prefix"),
    ],
    ids=["channels", "width", "backbone"],
)
def test_what_does_not_fit_names_the_cause(source: nn.Module, cause: str, tmp_path: Path) -> None:
    target = unet()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match=cause):
        path = saved(source, tmp_path / "a.pt")
        load_pretrained(target, path, encoder=encoder_parameters(target, SIZE))
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


GROWING = {
    "SegResNet": lambda c: SegResNet(3, 8, c, 2),
    "UNet": lambda c: unet(2, 8, c),  # two convolutions read the input: the residual one too
    "SwinUNETR": lambda c: SwinUNETR(c, 2, feature_size=12),
    "DynUNet": lambda c: DynUNet(3, c, 2, [3] * 3, [1, 2, 2], [2, 2], [4, 8, 8], res_block=True),
}


@pytest.mark.parametrize("name", GROWING)
def test_extra_input_channels_start_without_effect(name: str, tmp_path: Path) -> None:
    one, three = GROWING[name](1).eval(), GROWING[name](3).eval()
    encoder = [n for n, _ in three.named_parameters()]
    report = load_pretrained(three, saved(one, tmp_path / "a.pt"), None, 1.0, encoder, True)
    readers = [n for n, p in three.named_parameters() if p.shape != one.get_parameter(n).shape]
    assert list(report.extended) == readers and len(readers) == {
        "SegResNet": 1,
        "SwinUNETR": 3,
    }.get(name, 2)
    assert f"extended {readers[0]}: 2 extra input channels start at zero" in str(report)
    volume, size = torch.rand(1, 3, 64, 32, 32), (64, 32, 32)
    with torch.no_grad():
        expected = one(volume[:, :1])
        assert torch.allclose(three(volume), expected, atol=1e-5)
        volume[:, 1:] = 0
        assert torch.allclose(three(volume), expected, atol=1e-5)
    assert report.encoder_share == 1 and expected.shape[2:] == size


def test_extra_input_channels_are_refused_unless_asked_for(tmp_path: Path) -> None:
    path = saved(unet(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="start at zero with add_channels=True"):
        load_pretrained(unet(channels=3), path)
    with pytest.raises(ValueError, match="takes 3 input channels in the file and 1 in the"):
        load_pretrained(unet(), saved(unet(channels=3), path), add_channels=True)


def test_only_input_layers_take_extra_channels(tmp_path: Path) -> None:
    def net(hidden: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(hidden, 4, 3, groups=1))

    path = saved(net(2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"skipped  1\.weight: its shape in the file is \(4, 2"):
        load_pretrained(net(4), path, add_channels=True)


@pytest.mark.parametrize("share", [0, -0.5, 1.01])
def test_a_share_to_match_is_above_zero_and_at_most_one(share: float, tmp_path: Path) -> None:
    path = saved(nn.Linear(1, 1), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"min_match must be in \(0, 1\], got {share}"):
        load_pretrained(nn.Linear(1, 1), path, min_match=share)


def test_shares_of_one_weight_and_of_none(tmp_path: Path) -> None:
    one = nn.Linear(1, 1, bias=False)
    report = load_pretrained(one, saved(one, tmp_path / "a.pt"), encoder=["weight"])
    assert report.share == report.encoder_share == 1
    match(one.state_dict(), one.state_dict(), report, [], [])
    assert report.share == report.encoder_share == 0


def test_one_extra_channel_of_a_lone_convolution_and_none_where_the_sizes_agree(
    tmp_path: Path,
) -> None:
    path = saved(nn.Conv3d(1, 2, 1), tmp_path / "a.pt")
    report = load_pretrained(nn.Conv3d(2, 2, 1), path, add_channels=True)
    assert report.extended == {"weight": "1 extra input channel starts at zero"}
    assert not load_pretrained(nn.Conv3d(1, 2, 1), path, add_channels=True).extended


def test_clicks_for_fewer_labels_do_not_grow(tmp_path: Path) -> None:
    path = saved(nn.Conv3d(5, 2, 1), tmp_path / "a.pt")  # image, two clicks, two earlier answers
    with pytest.raises(ValueError, match=r"its shape in the file is \(2, 5"):
        load_pretrained(nn.Conv3d(7, 2, 1), path, add_channels=True)


def test_a_report_on_weights_of_several_gpus_knows_their_prefix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = unet()
    path = saved(network, tmp_path / "a.pt")
    ddp = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save(ddp, tmp_path / "ddp.pt")
    transfer_report(str(tmp_path / "ddp.pt"), str(path))
    assert "100 %" in capsys.readouterr().out


def test_a_networks_own_module_prefix_is_kept(tmp_path: Path) -> None:
    target = nn.ModuleDict({"module": nn.Linear(2, 3)})
    source = {f"module.{k}": v for k, v in nn.Linear(2, 3).state_dict().items()}
    torch.save({**source, "module.extra": torch.zeros(1)}, tmp_path / "a.pt")
    report = load_pretrained(target, tmp_path / "a.pt")
    assert sorted(report.loaded) == ["module.bias", "module.weight"]
    assert report.unused == ["module.extra"]
    torch.save({**source, "other": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="another backbone"):
        load_pretrained(nn.Linear(2, 3), tmp_path / "b.pt")  # not all names have the prefix


@pytest.mark.parametrize(
    ("source", "target", "cause"),
    [
        (nn.Conv3d(4, 8, 1), nn.Conv3d(6, 8, 1), "another width or patch size"),
        (nn.Conv3d(3, 8, 1), nn.Conv3d(6, 8, 1), "weight takes 3 input channels"),
        (nn.Conv1d(2, 8, 1), nn.Conv1d(1, 8, 1), "weight takes 2 input channels"),
        (nn.Linear(2, 3), nn.Linear(1, 3), "another width or patch size"),
    ],
)
def test_few_input_channels_of_a_convolution_are_those_of_an_image(
    source: nn.Module, target: nn.Module, cause: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=cause):
        load_pretrained(target, saved(source, tmp_path / "a.pt"))


class Positioned(nn.Module):
    """An embedding of positions before a layer."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.layer, self.pos = nn.Linear(width, 9), nn.Parameter(torch.zeros(tokens))


def test_the_position_embedding_is_named_beside_other_layers_that_do_not_fit(
    tmp_path: Path,
) -> None:
    path = saved(Positioned(4, 5), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="the position embedding has another length"):
        load_pretrained(Positioned(6, 7), path, min_match=0.9)


def test_the_cause_is_looked_for_in_the_encoder(tmp_path: Path) -> None:
    names = {"enc_a": nn.Linear(1, 1), "enc_b": nn.Linear(1, 1), "enc_c": nn.Linear(1, 1)}
    target = nn.ModuleDict({**names, "head": nn.Linear(2, 2)})
    encoder = [n for n, _ in target.named_parameters() if n.startswith("enc")]
    torch.save(
        {"head.weight": torch.zeros(9), "x": torch.ones(1), "y": torch.ones(1)}, tmp_path / "a.pt"
    )
    cause = r"\(file: head\.weight, x …; network: enc_a\.weight, enc_a\.bias …\)"
    with pytest.raises(ValueError, match=f"another backbone, or names with another .*{cause}"):
        load_pretrained(target, tmp_path / "a.pt", encoder=encoder)


def test_a_transfer_adds_no_channels_unless_asked_to(tmp_path: Path) -> None:
    path = saved(nn.Conv3d(1, 2, 1), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="add_channels=True"):
        Transfer(nn.Conv3d(2, 2, 1), path, tmp_path / "t.json").load()
    Transfer(nn.Conv3d(2, 2, 1), path, tmp_path / "t.json", add_channels=True).load()
    assert "weight" in json.loads((tmp_path / "t.json").read_text())["extended"]


def test_layers_that_differ_otherwise_do_not_grow(tmp_path: Path) -> None:
    def net(channels: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(channels, 4, 3), nn.Conv3d(channels, out, 3))

    path = saved(net(1, 2), tmp_path / "a.pt")
    report = load_pretrained(net(3, 5), path, min_match=0.1, add_channels=True)
    assert list(report.extended) == ["0.weight"]
    assert sorted(report.skipped) == ["1.bias", "1.weight"]
    torch.save(nn.Sequential(nn.Conv3d(1, 4, 3)).state_dict(), path)
    report = load_pretrained(net(3, 5), path, min_match=0.1, add_channels=True)
    assert report.skipped["1.weight"] == "not in the file"


def test_a_transfer_logs_its_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Transfer(unet(), saved(unet(), tmp_path / "a.pt"), tmp_path / "t.json").load()
    assert "-> UNet" in caplog.text


def test_another_patch_size_is_named(tmp_path: Path) -> None:
    path = saved(ViT(1, (32,) * 3, (16,) * 3, 48, 48, 2, 4), tmp_path / "a.pt")
    target = ViT(1, (48, 32, 32), (16,) * 3, 48, 48, 2, 4)
    with pytest.raises(ValueError, match="another length, so another patch_size"):
        load_pretrained(target, path)


def test_transfer_writes_its_report_and_keeps_it_in_the_checkpoint(tmp_path: Path) -> None:
    target = unet(out=3)
    transfer = Transfer(
        target,
        saved(unet(), tmp_path / "a.pt"),
        tmp_path / "x" / "t.json",
        encoder=encoder_parameters(target, SIZE),
    )
    transfer.load()
    written = json.loads((tmp_path / "x" / "t.json").read_text())
    assert written["encoder_share"] == 1 and written["skipped"]
    torch.save(transfer.state_dict(), tmp_path / "s.pt")
    other = Transfer(target, None, tmp_path / "t.json")
    other.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert other.report == transfer.report
    scratch = Transfer(target, None, tmp_path / "t.json")
    assert "from scratch" in str(scratch.load())


def test_the_command_prints_the_report_of_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bundles = Path(__file__).parents[2] / "bundles"
    path = saved(SegResNet(3, 8, 1, 1, blocks_down=(1, 2, 2, 4)), tmp_path / "a.pt")
    overrides = {"backbone::init_filters": 8, "patch_size": [32, 32, 32]}
    transfer_report(str(path), str(bundles / "seg-finetune/configs/train.json"), **overrides)
    out = capsys.readouterr().out
    assert "-> SegResNet" in out and "encoder 100 %" in out and "skipped  conv_final.2" in out
    transfer_report(str(path), str(saved(unet(), tmp_path / "b.pt")))
    assert "loaded   0 of" in capsys.readouterr().out
    transfer_report(str(path), str(path))
    out = capsys.readouterr().out
    assert "100 %" in out and "loaded   0" not in out
