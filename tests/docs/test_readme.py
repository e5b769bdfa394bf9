"""The first screen: short, and its commands are those that the tests of the workflows run."""

from __future__ import annotations

import re

from running import ROOT

from med3dinsight_ext.cli import parsed

TEXT = (ROOT / "README.md").read_text("utf-8")


def test_the_page_has_at_most_120_lines_and_the_test_command_of_the_checks() -> None:
    assert len(TEXT.splitlines()) <= 120
    assert 'pip install -e ".[demo,publish,served,test,dev]" && python -m pytest -n 2' in TEXT


def test_three_commands_of_less_than_12_words_lead_to_predictions() -> None:
    start = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)[0].splitlines()
    commands = [line.split() for line in start if "med3dinsight_ext" in line]
    assert [words[3] for words in commands] == ["pretrain", "finetune", "predict"]
    assert all(len(words) < 12 for words in commands)


def test_every_command_of_the_page_takes_its_arguments() -> None:
    lines = re.findall(r"^python -m med3dinsight_ext (\S+) ?(.*)$", TEXT, re.MULTILINE)
    assert len(lines) >= 8
    for name, rest in lines:
        parsed(name, rest.split())
