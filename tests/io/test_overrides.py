from __future__ import annotations

import json
from pathlib import Path

import pytest

from med3dinsight_ext.io.overrides import check_overrides


@pytest.fixture
def config(tmp_path: Path) -> str:
    content = {
        "learning_rate": 0.1,
        "patch_size": [96, 96, 96],
        "label_names": ["background", "foreground"],
        "prompts": [],
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


@pytest.mark.parametrize(
    ("value", "word"), [("false", "False"), ("true", "True"), ("null", "None")]
)
def test_a_word_that_would_arrive_as_text_stops_the_run(config: str, value: str, word: str) -> None:
    with pytest.raises(SystemExit, match=f"as in Python, got --learning_rate {value}; {word}"):
        check_overrides(["run", "--config_file", config, "--learning_rate", value])


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("patch_size", "64", "be a list"),
        ("patch_size", "[64,64]", "have 3 numbers"),
        ("label_names", "tumour", "be a list"),
    ],
)
def test_a_list_needs_a_list_of_its_length(
    config: str, argument: str, value: str, rule: str
) -> None:
    with pytest.raises(SystemExit, match=f"override must {rule}, got --{argument} .*; write it"):
        check_overrides(["run", "--config_file", config, f"--{argument}", value])


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
