"""Self-contained HTML pages from the jinja2 templates beside this module."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from med3dinsight_ext.io.files import write_atomic
from med3dinsight_ext.reports.figures import svg
from med3dinsight_ext.reports.formatting import number, percent

environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that spreadsheets evaluate


def png_uri(path: Path) -> str:
    """A PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def csp_hash(script: str) -> str:
    """Hash by which a Content-Security-Policy allows an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


environment.filters |= {
    "csp_hash": csp_hash,
    "number": number,
    "percent": percent,
    "png_uri": png_uri,
    "svg": svg,
}


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file; it is complete or absent."""
    write_atomic(Path(path), lambda draft: draft.write_bytes(text.encode("utf-8", "replace")))


def write_csv(path: str | Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as a CSV file; it is complete or absent.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    buffer = io.StringIO()
    csv.writer(buffer).writerows([map(_cell, row) for row in rows])
    write_text(path, buffer.getvalue())


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Write one page that loads nothing from outside.

    Args:
        path: file to write; it is complete or absent.
        template: file in ``templates``; it extends ``base.html``.
        values: ``title``, ``facts`` (name to value, the table at the top), ``run`` (from
            ``run_block``, where there is one) and what else the template shows. Everything is
            escaped; figures become inline SVG.
    """
    write_text(path, environment.get_template(template).render(values))
