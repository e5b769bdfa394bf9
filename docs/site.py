"""Hooks of the documentation site: which files it holds, and its equations.

Pages keep the paths that they have in the repository, so that one relative link works on the site
and in the checkout.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SUFFIXES = {".md", ".png", ".svg", ".json", ".jsonl", ".yaml", ".yml", ".txt", ".py", ".cfg"}
LARGEST = 2 << 20  # bytes; larger files are not part of the site
EQUATION = re.compile(r"(?<![\\$\w])\$([^\s$](?:[^$\n]*[^\s$])?)\$(?![\w$])")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """The repository's pages, and what they link to, under their own paths."""
    theme = [file for file in files if not file.src_uri.endswith(".md") and file.generated_by]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    pages = [
        File.generated(config, name, abs_src_path=str(ROOT / name))
        for name in listed
        if (Path(name).suffix in SUFFIXES or Path(name).name == "LICENSE")
        and not name.startswith((".", "tests/"))
        and (ROOT / name).is_file()
        and (ROOT / name).stat().st_size < LARGEST
    ]
    return Files([*theme, *pages])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """TeX between dollar signs as MathML, which browsers draw without a script."""
    parts = CODE.split(markdown)
    parts[::2] = [EQUATION.sub(lambda found: convert(found[1]), part) for part in parts[::2]]
    return "".join(parts)
