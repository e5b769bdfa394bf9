"""Hooks of the documentation site: its files, the API reference and the equations.

Pages keep the paths that they have in the repository, so that one relative link works on the site
and in the checkout.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "med3dinsight_ext"
REFERENCE, STYLE = "docs/reference", "docs/site.css"
LINK = re.compile(r"\]\(([^)#\s]+)")
EQUATION = re.compile(r"(?<![\\$\w])\$([^\s$](?:[^$\n]*[^\s$])?)\$(?![\w$])")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Pages of the navigation and the files that they link to, under their own paths."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    made = {f"{REFERENCE}/{name}.md": text for name, text in reference().items()}
    pages = [name for name in entries(config.nav) if name not in made]
    linked = {target for page in pages for target in links(page) if (ROOT / target).is_file()}
    found = [
        File.generated(config, name, abs_src_path=str(ROOT / name))
        for name in sorted({*linked, *pages, STYLE})
    ]
    found += [File.generated(config, name, content=text) for name, text in made.items()]
    return Files([*theme, *found])


def entries(nav: Any) -> Iterator[str]:
    """Paths in the navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for node in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(node)


def links(page: str) -> Iterator[str]:
    """Paths in the repository that a page links to."""
    for link in LINK.findall((ROOT / page).read_text("utf-8")):
        if "://" not in link:
            yield normpath(PurePosixPath(page).parent / link)


def reference() -> dict[str, str]:
    """A page for each folder of the package, and one for the modules beside them.

    Modules are found on disk, so that a new one cannot be left out.
    """
    pages: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name.startswith("__"):
            continue
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        folder = parts[0] if len(parts) > 1 else "commands"
        pages.setdefault(folder, []).append(".".join((PACKAGE.name, *parts)))
    return {
        folder: "\n\n".join([f"# {folder}", *intro(folder), *(f"::: {m}" for m in modules)])
        for folder, modules in pages.items()
    }


def intro(folder: str) -> list[str]:
    """Docstring of a folder of the package, if it has one."""
    path = PACKAGE / folder / "__init__.py"
    found = ast.get_docstring(ast.parse(path.read_text("utf-8"))) if path.is_file() else None
    return [found] if found else []


def public_names() -> str:
    """Table of the public names and the modules that they are imported from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    rows = [
        f"| `{alias.name}` | `{node.module}` |"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGE.name)
        for alias in node.names
    ]
    return "\n".join(["", "| name | imported from |", "|---|---|", *sorted(rows), ""])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """TeX between dollar signs as MathML, which browsers draw without a script."""
    if page.file.src_uri == f"{REFERENCE}/index.md":
        return markdown + public_names()
    parts = CODE.split(markdown)
    parts[::2] = [
        EQUATION.sub(lambda found: f"<span>{convert(found[1])}</span>", part) for part in parts[::2]
    ]
    return "".join(parts)
