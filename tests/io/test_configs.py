"""Config files that bundles share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser
from running import BUNDLES, ROOT, configs, merged

from med3dinsight_ext.io.configs import check_plain, missing_shared, with_shared
from med3dinsight_ext.io.overrides import check_overrides

FILES = {
    "pretrain": ["train.json"],
    "seg-finetune": ["train.json", "finetune.json"],
    "cls-finetune": ["train.json", "finetune.json"],
}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_training_config_is_followed_by_the_shared_files(bundle: str) -> None:
    own = configs(bundle) / "train.json"
    expected = [own, *(ROOT / "bundles" / "shared" / name for name in FILES[bundle])]
    assert with_shared(own) == [str(path) for path in expected]
    assert missing_shared(merged(bundle, "train.json")) == []


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("name", ["inference.json", "evaluate.json", "multi_gpu_train.json"])
def test_other_configs_need_no_shared_file(bundle: str, name: str) -> None:
    assert with_shared(configs(bundle) / name) == [str(configs(bundle) / name)]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_published_training_config_needs_no_shared_file(bundle: str, tmp_path: Path) -> None:
    path = tmp_path / "released" / "configs" / "train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(merged(bundle, "train.json")))
    assert with_shared(path) == [str(path)]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_no_file_replaces_a_key_of_another(bundle: str) -> None:
    """Later files win, so a key in two of them would make their order matter."""
    seen: set[tuple[str, ...]] = set()
    for path in with_shared(configs(bundle) / "train.json"):
        keys: set[tuple[str, ...]] = set()
        for key, value in ConfigParser.load_config_file(path).items():
            name = key.removeprefix("+")
            merges = isinstance(value, dict) and name in ("train", "validate", "train_handlers")
            keys |= {(name, part) for part in value} if merges else {(name,)}
        assert not (keys & seen) - {("imports",)}, path
        seen |= keys


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_command_without_a_shared_file_ends_with_its_name(bundle: str, count: int) -> None:
    files = with_shared(configs(bundle) / "train.json")
    arguments = ["run", "--config_file", str(files[:count])]
    if count == len(files):
        check_overrides(arguments)
        return
    names = " and ".join(f"bundles/shared/{name}" for name in FILES[bundle][count - 1 :])
    with pytest.raises(SystemExit, match=f"config_file must name {names} after configs/train"):
        check_overrides(arguments)


@pytest.mark.parametrize("bundle", ["pretrain", "seg-finetune"])
@pytest.mark.filterwarnings("ignore:Can't merge entry")
def test_shared_files_in_front_of_the_training_config_are_named(bundle: str) -> None:
    files = [*with_shared(configs(bundle) / "train.json")[::-1]]
    with pytest.raises(SystemExit, match="config_file must name bundles/shared/train.json"):
        check_overrides(["run", "--config_file", str(files)])


@pytest.mark.parametrize("text", ["$exec('')", "@key", "%key", "met #1"])
def test_a_text_that_a_config_would_not_leave_alone_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="labels must not begin with .* or contain #, got .*;"):
        check_plain("labels", ["good 1", text], "mend it")
    check_plain("labels", ["a $ b @ c % d"], "mend it")
