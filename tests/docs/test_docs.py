"""The docs say what the files say."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bundles/*/docs/*.md")])


def test_benchmark_tables_are_generated_from_the_results() -> None:
    path = ROOT / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = path.with_name("README.md").read_text()
    results = list(path.with_name("results").glob("*.json"))
    assert page == tables.readme() and results and page.count("\n## ") == len(results)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    broken = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not broken


def test_tests_named_in_the_method_exist() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    names = re.findall(r"`(test_\w+)`", text)
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 8 and not [name for name in names if f"def {name}(" not in written]
