from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import BACKBONES, BUNDLES, ROOT, configs

from med3dinsight_ext.io.configs import with_shared
from med3dinsight_ext.io.overrides import FOLDERS, TRACKING, check_overrides


@pytest.fixture
def config(tmp_path: Path) -> str:
    content = {
        "learning_rate": 0.1,
        "patch_size": [96, 96, 96],
        "label_names": ["background", "foreground"],
        "prompts": [],
        "bundle_root": ".",
        "skip_bad": False,
        "train": {"trainer": {"_target_": "X", "max_epochs": 1}, "channels": [16, 32]},
    }
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "argument",
    ["--learning_rate", "--train::trainer::max_epochs", "--train#trainer#amp", "--logging_file"],
)
def test_known_overrides_pass(config: str, argument: str) -> None:
    check_overrides(["run", "--config_file", config, argument, "1"])
    check_overrides(["run", "--config_file", f"['{config}']", f"{argument}=1"])


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("--learning_rat", "learning_rate"),
        ("--train::trainr::amp", "trainer"),
        ("--zzz", "first lines"),
    ],
)
def test_a_mistyped_override_stops_the_run(config: str, argument: str, advice: str) -> None:
    with pytest.raises(SystemExit, match=f"override must name a key .*{advice}"):
        check_overrides(["run", "--config_file", config, argument, "1"])


def test_a_sign_that_monai_replaces_stops_the_run(config: str) -> None:
    for argument in ("--bundle_root=run#3", "--prompts=['grade #1']", "--label_names=['a#']"):
        with pytest.raises(SystemExit, match="must not contain #, for which MONAI writes ::, got"):
            check_overrides(["run", "--config_file", config, argument])
    for argument in ("--learning_rate=@train#trainer#max_epochs", "--train={'a': '@train#b'}"):
        check_overrides(["run", "--config_file", config, argument])


def test_an_address_is_no_folder_to_write_to() -> None:
    files = with_shared(configs("pretrain") / "train.json")
    for name in FOLDERS:
        with pytest.raises(SystemExit, match=f"--{name} must be a path .* s3://b/x; copy to and"):
            check_overrides(["run", "--config_file", str(files), f"--{name}", "s3://b/x"])
        check_overrides(["run", "--config_file", str(files), f"--{name}", "/b/x"])


@pytest.mark.parametrize(
    ("value", "word"), [("false", "False"), ("TRUE", "True"), ("null", "None"), ("NONE", "None")]
)
def test_a_word_that_would_arrive_as_text_stops_the_run(config: str, value: str, word: str) -> None:
    with pytest.raises(SystemExit, match=f"as in Python, got --learning_rate {value}; {word}"):
        check_overrides(["run", "--config_file", config, "--learning_rate", value])
    check_overrides(["run", "--config_file", config, "--learning_rate", word])


@pytest.mark.parametrize("word", ["no", "off", "YES"])
def test_a_word_for_yes_or_no_is_no_boolean(config: str, word: str) -> None:
    with pytest.raises(SystemExit, match=f"must be True or False, got --skip_bad {word}"):
        check_overrides(["run", "--config_file", config, "--skip_bad", word])


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("patch_size", "64", "be a list"),
        ("patch_size", "[64,64]", "have 3 numbers"),
        ("patch_size", "[64,64,a]", "be a list of numbers"),
        ("label_names", "tumour", "be a list"),
    ],
)
def test_a_list_needs_a_list_of_its_length(
    config: str, argument: str, value: str, rule: str
) -> None:
    with pytest.raises(SystemExit, match=f"override must {rule}, got --{argument} .*; write it"):
        check_overrides(["run", "--config_file", config, f"--{argument}", value])


OVERLAYS = {
    "patch_size: 64": "patch_size must be a list, got patch_size: 64 in .*o.yaml; write it like",
    "patch_size: 64 64 64": "patch_size must be a list, got patch_size: 64 64 64 in",
    "patch_size: null": "patch_size must be a list, got patch_size: None in",
    "patch_size: [64, 64]": "patch_size must have 3 numbers, got",
    "patch_size: [64, 64, x]": "patch_size must be a list of numbers, got",
    "patch_size: {x: 64}": "patch_size must be a list, got",
    "label_names: tumour": r"label_names must be a list, got .* write it like \['background'",
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_whose_list_is_none_is_named(config: str, overlay: str, tmp_path: Path) -> None:
    path = tmp_path / "o.yaml"
    path.write_text(overlay + "\n")
    with pytest.raises(SystemExit, match=OVERLAYS[overlay]):
        check_overrides(["run", "--config_file", f"['{config}','{path}']"])


@pytest.mark.parametrize(
    "overlay",
    [
        "patch_size: [64, 64, 32]",
        "patch_size: $[8] * 3",
        'patch_size: ["@a", 8, 8]',
        "other: 3",
        "learning_rate: 1",
        "label_names: [a]",
        "prompts: [a, b]",
        "+prompts: [a]",
    ],
)
def test_overlays_may_replace_a_list_by_a_list(config: str, overlay: str, tmp_path: Path) -> None:
    path = tmp_path / "o.yaml"
    path.write_text(overlay + "\n")
    check_overrides(["run", "--config_file", f"['{config}','{path}']"])


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("key", ["patch_size", "spacing", "ct_range"])
def test_each_bundle_names_a_number_that_should_be_a_list(
    bundle: str, key: str, tmp_path: Path
) -> None:
    (tmp_path / "o.yaml").write_text(f"{key}: 2\n")
    for name in ("train.json", "inference.json"):
        files = [*with_shared(configs(bundle) / name), str(tmp_path / "o.yaml")]
        with pytest.raises(SystemExit, match=f"{key} must be a list, got {key}: 2 in .*o.yaml"):
            check_overrides(["run", "--config_file", str(files)])


def test_every_overlay_passes() -> None:
    overlays = [*BACKBONES.values(), *(p for b in BUNDLES for p in configs(b).glob("*.yaml"))]
    assert len(overlays) > 10
    for path in overlays:
        bundle = path.parts[-3] if path.parts[-3] in BUNDLES else "pretrain"
        base = "inference.json" if "inference" in path.name else "train.json"
        files = [*with_shared(configs(bundle) / base), str(path)]
        check_overrides(["run", "--config_file", str(files)])


def test_an_empty_list_shows_the_value_in_brackets(config: str) -> None:
    with pytest.raises(SystemExit, match=r"write it like \['a mass'\]"):
        check_overrides(["run", "--config_file", config, "--prompts", "a mass"])


@pytest.mark.parametrize(
    "argument",
    [
        "--patch_size=64,64,32",
        "--patch_size=(64, 64, 32)",
        "--patch_size=@spacing",
        "--patch_size=$[8] * 3",
        "--label_names=[background,a,b]",
        "--train::channels=[1]",
    ],
)
def test_lists_are_written_in_many_ways(config: str, argument: str) -> None:
    check_overrides(["run", "--config_file", config, argument])


def test_args_file_is_checked_too(config: str, tmp_path: Path) -> None:
    arguments = tmp_path / "args.json"
    arguments.write_text(json.dumps({"config_file": config, "learning_rat": 1}))
    with pytest.raises(SystemExit, match="did you mean learning_rate"):
        check_overrides(["run", "--args_file", str(arguments)])


def test_other_programs_are_left_alone() -> None:
    check_overrides(["tests/test_workflow.py", "--verbose"])
    check_overrides([])


def test_settings_of_tracking_may_be_overridden_and_monais_own_are_refused(config: str) -> None:
    words = ["run", "--config_file", config]
    more = ["--experiment_name", "organs"]
    for name, file in TRACKING.items():
        check_overrides([*words, "--tracking", str(ROOT / "bundles" / file), *more])
        with pytest.raises(SystemExit, match=f"tracking must be bundles/{file}, got {name}"):
            check_overrides([*words, "--tracking", name])
    with pytest.raises(SystemExit, match="override must name a key .* --experiment_name"):
        check_overrides([*words, *more])
