import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from med3dinsight_ext.publishing import export as exports
from med3dinsight_ext.publishing.export import export

for package in exports.NEEDED:
    pytest.importorskip(package, reason=f'exports need {package}: pip install -e ".[publish]"')

SIZE = (16, 32, 16)
HERE = str(Path(torch.__file__).parents[1]).encode()
PLAIN = {"spatial_dims": 3, "in_channels": 1}
UNET = {"_target_": "UNet", **PLAIN, "out_channels": 2, "channels": [4, 8], "strides": [2]}
VIT = {"_target_": "ViT", **PLAIN, "img_size": "@patch_size", "patch_size": [8, 8, 8],
       "hidden_size": 16, "mlp_dim": 16, "num_layers": 2, "num_heads": 2}  # fmt: skip
CLASSIFIER = {"_target_": "med3dinsight_ext.models.classifier.Classifier", "network": "@backbone",
              "out_channels": 3, "patch_size": "@patch_size", "dropout": 0.2}  # fmt: skip
DYNUNET = {"_target_": "DynUNet", **PLAIN, "out_channels": 2, "kernel_size": [3, 3, 3],
           "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8],
           "deep_supervision": True}  # fmt: skip


class Moody(nn.Module):
    """Answers otherwise once it is traced or scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        return found * 1.01 if torch.jit.is_tracing() or torch.jit.is_scripting() else found


class Alone(nn.Module):
    """Takes its batch from the first volume, once it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        size = [int(n) for n in x.shape]
        return self.layer(x).view(size[0], 2, *size[2:])


def bundle(folder: Path, backbone: dict[str, Any], network_def: Any = "@backbone") -> Path:
    """A bundle folder with random weights that no two layers share."""
    config = {"patch_size": list(SIZE), "backbone": backbone, "network_def": network_def}
    for name in ("configs", "models"):
        (folder / name).mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    network = ConfigParser(config).get_parsed_content("network_def")
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    return folder


def answers(folder: Path, volume: Tensor) -> list[Tensor]:
    """First ones of the eager network, of model.ts and of model.onnx."""
    import onnxruntime

    parser = ConfigParser(ConfigParser.load_config_file(str(folder / "configs" / "inference.json")))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    script = torch.jit.load(str(folder / "models" / "model.ts")).eval()
    session = onnxruntime.InferenceSession(str(folder / "models" / "model.onnx"))
    with torch.no_grad():
        found = [network(volume), script(volume), session.run(["pred"], {"image": volume.numpy()})]
        return [torch.as_tensor(x if isinstance(x, Tensor) else x[0]) for x in found]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "models" / "exports.json").read_text())


@pytest.mark.parametrize(
    ("backbone", "network_def"),
    [(UNET, "@backbone"), (VIT, "@backbone"), (UNET, CLASSIFIER)],
    ids=["convolutions", "transformer", "classifier"],
)
def test_exported_networks_answer_as_the_weights_do(
    backbone: dict[str, Any], network_def: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(str(bundle(tmp_path, backbone, network_def)))
    files = {"model.pt", "model.ts", "model.onnx", "exports.json"}
    assert {path.name for path in (tmp_path / "models").iterdir()} == files
    volume = torch.rand(3, 1, *SIZE, generator=torch.Generator().manual_seed(5))
    truth, *found = answers(tmp_path, volume)
    for answer in found:
        torch.testing.assert_close(answer, truth, rtol=0, atol=1e-5 * float(truth.abs().max()))
    rows = report(tmp_path)
    for name in ("model.ts", "model.onnx"):
        assert rows[name]["shape"] == ["any", 1, *SIZE] and rows[name]["max_relative_error"] < 1e-5
        assert rows[name]["bytes"] == (tmp_path / "models" / name).stat().st_size
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["model.ts", "model.onnx"]


def test_a_network_that_cannot_be_scripted_is_traced_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(str(bundle(tmp_path, DYNUNET)))
    row = report(tmp_path)["model.ts"]
    assert row["way"] == "trace" and row["failed"]["script"].startswith("RuntimeError: Arguments")
    assert f"(failed: script: {row['failed']['script']})" in capsys.readouterr().out


def test_a_format_that_no_way_leads_to_is_listed_with_the_reasons_and_its_old_file_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("\n no operator for this\n in line 3")

    monkeypatch.setattr(exports, "onnx_export", refuse)
    old = bundle(tmp_path, UNET) / "models" / "model.onnx"
    old.write_text("of other weights")
    export(str(tmp_path))
    failed = report(tmp_path)["model.onnx"]["failed"]
    assert set(failed.values()) == {"RuntimeError: no operator for this"} and "trace" in failed
    assert not old.exists() and "way" in report(tmp_path)["model.ts"]
    assert "model.onnx: not exported. trace: RuntimeError" in capsys.readouterr().out


def test_torch_export_stands_in_for_the_trace_and_leaves_no_paths_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exports.onnx_export

    def no_trace(converter_kwargs: dict[str, Any], **given: Any) -> None:
        if not converter_kwargs["dynamo"]:
            raise RuntimeError("unknown channel size")
        whole(converter_kwargs=converter_kwargs, **given)

    monkeypatch.setattr(exports, "onnx_export", no_trace)
    export(str(bundle(tmp_path, UNET)))
    row = report(tmp_path)["model.onnx"]
    assert row["way"] == "torch.export" and row["shape"] == [1, 1, *SIZE]
    assert HERE not in (tmp_path / "models" / "model.onnx").read_bytes()


def test_a_wrong_export_is_an_error_and_is_not_kept(tmp_path: Path) -> None:
    bundle(tmp_path, {"_target_": "test_export.Moody"})
    with pytest.raises(ValueError, match="model.ts must match PyTorch"):
        export(str(tmp_path))
    assert not (tmp_path / "models" / "model.ts").exists()
    assert "differs from PyTorch by 1.0e-02" in report(tmp_path)["model.ts"]["failed"]["trace"]


def test_a_batch_that_the_trace_has_fixed_is_found_out(tmp_path: Path) -> None:
    export(str(bundle(tmp_path, {"_target_": "test_export.Alone"})))
    row = report(tmp_path)["model.ts"]
    assert row["shape"] == [1, 1, *SIZE] and "trace" in row["failed"]


def test_clicks_are_channels_of_the_export(tmp_path: Path) -> None:
    network_def = {
        "_target_": "med3dinsight_ext.data.clicks.optional_clicks",
        "network": "@backbone",
        "channels": 3,
    }
    export(str(bundle(tmp_path, {**UNET, "in_channels": 3}, network_def)))
    assert report(tmp_path)["model.onnx"]["shape"] == ["any", 3, *SIZE]
    truth, *found = answers(tmp_path, torch.rand(2, 3, *SIZE))
    assert all(torch.allclose(answer, truth, atol=1e-5) for answer in found)


def test_the_same_weights_give_the_same_bytes_without_paths_of_this_machine(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(str(bundle(tmp_path / name, UNET)))
        files = [tmp_path / name / "models" / file for file in ("model.ts", "model.onnx")]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    assert not any(HERE in content for content in contents[0])


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "NEEDED", ("onnx_that_nobody_has",))
    with pytest.raises(ModuleNotFoundError, match=r'onnx_that_nobody_has must .* "\.\[publish\]"'):
        export("anything")


def test_a_folder_that_is_no_bundle_and_weights_of_another_network_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="folder must hold configs/inference.json, got .*; give"):
        export(str(tmp_path))
    torch.save({}, bundle(tmp_path, UNET) / "models" / "model.pt")
    with pytest.raises(ValueError, match="weights in .* must fit the network of this config"):
        export(str(tmp_path))
    assert not (tmp_path / "models" / "exports.json").exists()


def test_a_nan_in_any_output_is_found() -> None:
    good, bad = torch.ones(1, 2), torch.full((1, 2), float("nan"))
    assert exports._apart([good, good], [good, good]) == 0
    for found in ([good, bad], [bad, good]):
        with pytest.raises(exports.Differs, match="differs from PyTorch by nan"):
            exports._apart(found, [good, good])
