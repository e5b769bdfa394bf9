"""Slice tokens and texts of a pre-trained network, as functions and as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from fakes import write_volumes
from running import run, settings

import med3dinsight_ext
from med3dinsight_ext.cli import main
from med3dinsight_ext.reports import viewer

OWN = {
    "backbone": {"_target_": "fakes.PlainNet"},
    "spacing": [2.0, 2.0, 2.0],
    "patch_size": [32, 32, 32],
}
CPU = "$torch.device('cpu')"


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("scans"), 3)


@pytest.fixture(scope="module")
def model(scans: Path) -> str:
    """Folder of a pre-training with a teacher that its plan does not name."""
    root = scans / "run"
    run("pretrain", ["train.json"], **settings("pretrain", root, scans, val_fraction=0, **OWN))
    (root / "plan.yaml").write_text(yaml.safe_dump(OWN))
    return str(root)


def test_tokens_of_a_volume_are_unit_vectors_at_places(model: str, scans: Path) -> None:
    volume = str(scans / "v0.nii.gz")
    tokens = med3dinsight_ext.embed(model, volume, grid_per_plane=5, device=CPU)
    assert tokens["plane"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert tokens["position"][:5].tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert tokens["image"].shape == (15, 6) and tokens["text"].shape == (15, 8)
    torch.testing.assert_close(tokens["image"].norm(dim=1), torch.ones(15))
    other = med3dinsight_ext.embed(model, str(scans / "v1.nii.gz"), grid_per_plane=5, device=CPU)
    assert not torch.allclose(tokens["image"], other["image"])


def test_an_answer_about_a_volume_of_the_same_name_stays(
    model: str, scans: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    med3dinsight_ext.ask(model, str(scans / "v1.nii.gz"), "noise", out=out, device=CPU)
    before = (tmp_path / "out" / "v1_text.json").read_bytes()
    (tmp_path / "v1.nii.gz").write_bytes((scans / "v0.nii.gz").read_bytes())
    with pytest.raises(ValueError, match="about another volume of this name, got .*v1_text.json"):
        med3dinsight_ext.ask(model, str(tmp_path / "v1.nii.gz"), "noise", out=out, device=CPU)
    assert (tmp_path / "out" / "v1_text.json").read_bytes() == before
    same = f"{scans}/../{scans.name}/v1.nii.gz"
    med3dinsight_ext.ask(model, same, "a ball", out=out, device=CPU)


def test_a_question_is_answered_by_places_and_a_page(
    model: str, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = str(scans / "v0.nii.gz")
    main(["ask", model, volume, "a bright ball", "noise", "--device", CPU])
    said = capsys.readouterr().out
    folder = Path(model) / "answers"
    found = json.loads((folder / "v0_text.json").read_text())["prompts"]
    assert list(found) == ["a bright ball", "noise"]
    axial = found["noise"]["axial"]
    assert len(axial["score"]) == len(axial["position"]) == 32
    assert f"axial {axial['best']:.2f} of the extent" in said
    if viewer.niivue():
        assert f"look at {folder / 'v0_text.html'}" in said
        assert "a bright ball" in (folder / "v0_text.html").read_text("utf-8")
    again = med3dinsight_ext.ask(model, volume, "noise", quiet=True, device=CPU)
    assert again["noise"]["axial"]["score"] == pytest.approx(axial["score"], abs=1e-4)


@pytest.mark.parametrize("place", ["data/sub1/scan.nii.gz", "link.nii.gz"])
def test_a_volume_below_data_or_behind_a_link_is_named_by_its_own_file(
    model: str, scans: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(scans / "v0.nii.gz")  # as git-annex stores files
    found = med3dinsight_ext.ask(model, place, "noise", out="out", quiet=True, device=CPU)
    assert "noise" in found and Path(f"out/{path.name.removesuffix('.nii.gz')}_text.json").is_file()
    assert len(med3dinsight_ext.embed(model, place, grid_per_plane=5, device=CPU)["plane"]) == 15


def test_wrong_questions_are_one_line(model: str, scans: Path, tmp_path: Path) -> None:
    volume = str(scans / "v0.nii.gz")
    with pytest.raises(ValueError, match="texts must be given, got none; like .* ask .*run"):
        med3dinsight_ext.ask(model, volume)
    with pytest.raises(ValueError, match="must begin with a letter or digit, got '.exit"):
        med3dinsight_ext.ask(model, volume, "$exit()")
    with pytest.raises(ValueError, match="volume must exist, got .*none.nii; correct the path"):
        med3dinsight_ext.embed(model, str(scans / "none.nii"))
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no volume")
    with pytest.raises(ValueError, match="broken.nii.gz"):
        med3dinsight_ext.embed(model, str(broken), device=CPU)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").touch()
    (tmp_path / "plan.yaml").write_text("label_names: [background, ball]")
    with pytest.raises(ValueError, match="model must be a pre-training, got .*which is fine-tuned"):
        med3dinsight_ext.embed(str(tmp_path), volume)
