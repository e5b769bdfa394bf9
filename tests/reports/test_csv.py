"""Tables that are opened in a spreadsheet."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from med3dinsight_ext.reports.pages import write_csv


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_is_a_formula(sign: str, tmp_path: Path) -> None:
    name = f"{sign}cmd|' /C calc'!A0"
    write_csv(tmp_path / "cases.csv", [["case", "dice"], [name, -0.5], ["a-b=c", 2]])
    with (tmp_path / "cases.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["case", "dice"], [f"'{name}", "-0.5"], ["a-b=c", "2"]]
