"""The command line: help, errors, and what is imported."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import import_module

import pytest
from running import environment

from med3dinsight_ext.cli import COMMANDS, main, parsed


@pytest.mark.parametrize("words", [["--help"], ["publish", "--help"], ["bundles"]], ids=" ".join)
def test_light_commands_import_neither_torch_nor_monai(words: list[str]) -> None:
    code = (
        "import sys; from med3dinsight_ext.cli import main\ntry:\n  main(sys.argv[1:])\nfinally:\n"
    )
    code += "  assert not {'torch', 'monai', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=20,
    )
    assert done.returncode == 0 and done.stdout and not done.stderr


def test_libraries_draw_no_bars_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    with pytest.raises(SystemExit, match="1"):
        main(["plan", "nowhere"])
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_with_the_arguments_that_its_help_shows(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    text = capsys.readouterr().out
    module, _, function = COMMANDS[name].rpartition(".")
    signature = inspect.signature(getattr(import_module(module), function))
    assert text.startswith("NAME\n") and name in text
    for argument in signature.parameters.values():
        assert argument.name in text.lower() or argument.kind is argument.VAR_KEYWORD


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["publsh"], "error: unknown command publsh; did you mean publish?"),
        (["--verison"], "error: unknown command --verison; see python -m med3dinsight_ext --help"),
        (
            ["publish", "b", "--weigths", "x"],
            "error: unknown flag --weigths; did you mean --weights?",
        ),
        (["push", "a", "--dry-rn=3"], "error: unknown flag --dry_rn; did you mean --dry_run?"),
        (
            ["doctor", "--zzz"],
            "error: unknown flag --zzz; see python -m med3dinsight_ext doctor --help",
        ),
        (
            ["verify"],
            "error: no value for the required argument: folder; see python -m "
            "med3dinsight_ext verify --help",
        ),
        (
            ["bundles", "more"],
            "error: could not consume arg: more; see python -m med3dinsight_ext bundles --help",
        ),
    ],
)
def test_wrong_words_are_one_line_and_exit_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    told = capsys.readouterr()
    assert told.err == f"{line}\n" and not told.out


def test_wrong_input_is_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["init", "new", "--bundle", "pretain"]
    with pytest.raises(SystemExit, match="1"):
        main(words)
    assert capsys.readouterr().err == (
        "error: bundle must be the name of a bundle, got pretain; did you mean pretrain?\n"
    )
    monkeypatch.setenv("MED3D_TRACEBACK", "1")
    with pytest.raises(ValueError, match="got pretain"):
        main(words)


def test_the_cause_inside_of_monais_error_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        try:
            raise ValueError("image must be a file")
        except ValueError as error:
            raise RuntimeError("Failed to evaluate") from error

    monkeypatch.setattr("med3dinsight_ext.io.bundles.bundles", fail)
    with pytest.raises(SystemExit, match="1"):
        main(["bundles"])
    assert capsys.readouterr().err == "error: image must be a file\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("med3dinsight_ext.io.bundles.bundles", lambda: {}["key"])
    with pytest.raises(KeyError, match="key"):
        main(["bundles"])


def test_values_are_python_literals_by_position_and_by_name() -> None:
    found = parsed("push", ["folder", "--repo=ann/ball", "--dry-run", "False"])
    assert found == {"folder": "folder", "repo": "ann/ball", "dry_run": False, "update": False}
    found = parsed("transfer-report", ["a.pt", "b.json", "--spacing", "[1,2,3]"])
    assert found == {"weights": "a.pt", "network": "b.json", "spacing": [1, 2, 3]}


@pytest.mark.parametrize("words", [["--quiet", "false"], ["--quiet=false"], ["--quiet", "No"]])
def test_a_word_for_a_switch_that_is_not_python_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed("plan", ["d", *words])
    value = words[-1].rpartition("=")[2]
    assert f"--quiet must be True or False, got {value}" in capsys.readouterr().err


@pytest.mark.parametrize("switch", ["--quiet", "--quiet=True"])
def test_a_switch_takes_no_word_that_follows(switch: str) -> None:
    for words in (["m", switch, "a.nii", "b.nii"], [switch, "m", "a.nii", "b.nii"]):
        found = parsed("predict", words)
        assert (found["model"], found["files"]) == ("m", ("a.nii", "b.nii"))
        assert found["quiet"] is True and found["verbose"] is False
    assert parsed("ask", ["m", "v.nii", switch, "the liver"])["texts"] == ("the liver",)
    assert parsed("predict", ["m", "--quiet", "False", "a.nii"])["files"] == ("a.nii",)


def test_names_of_files_are_no_literals() -> None:
    found = parsed("predict", ["2024", "data#2", "1_2", "a,b", "--out", "0x10", "--steps", "20"])
    assert found["model"] == "2024" and found["files"] == ("data#2", "1_2", "a,b")
    assert found["out"] == "0x10" and found["steps"] == 20 and found["quiet"] is False
    listed = parsed("label", ["scans", "--bundles", "['a','b,c']"])
    assert listed["bundles"] == ["a", "b,c"]
    assert parsed("label", ["scans", "--bundles", "a,b"])["bundles"] == "a,b"
    assert parsed("plan", ["d", "--quiet", "--labels", "None"]) == {
        "data": "d", "labels": None, "out": None, "base": None, "nnunet": None, "quiet": True
    }  # fmt: skip
