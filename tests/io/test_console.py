from __future__ import annotations

import io

import pytest

from med3dinsight_ext.io.console import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_plain_lines_in_a_file_and_one_line_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = {"file": io.StringIO(), "terminal": Terminal()}
    shown = {}
    for name, stream in streams.items():
        monkeypatch.setattr("sys.stderr", stream)
        for _ in Bar(range(300), "embed", unit="volume", file=stream):
            pass
        shown[name] = stream.getvalue()
    first, last = shown["file"].splitlines()
    assert "\r" not in shown["file"]
    assert first.startswith("embed:   0%") and "300/300" in last
    assert shown["terminal"].startswith("\r") and shown["terminal"].count("\n") == 1
