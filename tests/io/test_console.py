from __future__ import annotations

import io
import time

import pytest

from med3dinsight_ext.io import console
from med3dinsight_ext.io.console import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, pause: float = 0.0) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    for i in Bar(range(300), "embed", unit="volume", file=stream):
        time.sleep(pause * (i == 0))
    return stream.getvalue()


def test_a_bar_is_plain_lines_in_a_file_and_one_line_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_terminal = bar(Terminal(), monkeypatch)
    assert on_terminal.startswith("\r") and on_terminal.count("\n") == 1
    monkeypatch.setattr(console, "SECONDS", 0.05)
    in_file = bar(io.StringIO(), monkeypatch, pause=0.1)
    first, last = in_file.splitlines()[0], in_file.splitlines()[-1]
    assert "\r" not in in_file
    assert first.startswith("embed:") and "300/300" in last


def test_short_work_writes_nothing_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar(io.StringIO(), monkeypatch) == ""
