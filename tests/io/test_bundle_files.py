"""Where the bundles are, and the config files that make up a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from med3dinsight_ext.io.bundles import (
    BUNDLES,
    backbone_files,
    bundles_dir,
    init,
    kind_of,
)


def bundle_with(folder: Path, name: str, **inference: object) -> Path:
    (folder / name / "configs").mkdir(parents=True)
    (folder / name / "configs" / "inference.json").write_text(json.dumps(inference))
    (folder / name / "configs" / "train.json").write_text("{}")
    return folder / name


def test_backbones_are_those_that_name_the_bundle(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, "seg-finetune")
    (tmp_path / "backbones").mkdir()
    for name, bundles in {"unet": "pretrain, seg-finetune", "vit": "pretrain"}.items():
        (tmp_path / "backbones" / f"{name}.yaml").write_text(f"# A\n# Bundles: {bundles}.\n")
    assert backbone_files(bundle) == [tmp_path / "backbones" / "unet.yaml"]


def test_the_bundles_are_there_and_have_their_kinds() -> None:
    kinds = [kind_of(bundles_dir() / name) for name in BUNDLES]
    assert kinds == ["pretraining", "segmentation", "classification"]


def test_init_copies_what_runs_do_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    for name in (*BUNDLES, "shared"):
        bundle_with(source, name)
        for folder in ("models", "eval", "store"):
            (source / name / folder).mkdir()
            (source / name / folder / "large.pt").touch()
    monkeypatch.setattr("med3dinsight_ext.io.bundles.bundles_dir", lambda: source)
    init(str(tmp_path / "all"))
    init(str(tmp_path / "one"), bundle="pretrain")
    found = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.glob("*/*/*/*.json")}
    due = {("all", name) for name in (*BUNDLES, "shared")} | {
        ("one", "pretrain"),
        ("one", "shared"),
    }
    assert {pair for pair in found if pair[0] != "source"} == due
    assert not [*(tmp_path / "all").rglob("*.pt"), *(tmp_path / "one").rglob("*.pt")]


@pytest.mark.parametrize(
    ("target", "bundle", "message"),
    [
        ("full", None, "target must be a new or empty folder, got .*full"),
        ("full/file", None, "target must be a new or empty folder, got .*file"),
        ("new", "seg-fintune", "got seg-fintune; did you mean seg-finetune"),
        ("new", "x", "got x; one of pretrain, seg-finetune, cls-finetune"),
    ],
)
def test_what_cannot_be_copied_is_an_error(
    target: str, bundle: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match=message):
        init(str(tmp_path / target), bundle)
    assert not (tmp_path / "new").exists()
