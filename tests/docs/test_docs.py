"""Pages agree with the files, commands and configs that they name."""

import ast
import importlib.util
import re
from pathlib import Path
from string import Template

import pytest
import yaml

from med3dinsight_ext.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([
    *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bundles/**/*.md"),
    *ROOT.glob("benchmarks/*.md"), *ROOT.glob("benchmarks/evidence/README.md"),
])  # fmt: skip
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
ASSIGNED = re.compile(r'(?:^|(?<=; ))([A-Z]+)=(?:"([^"\n]*)"|([^\s;]+))', re.MULTILINE)
CONFIG_FILE = re.compile(r'--config_file (?:"\[([^]]+)\]"|([^\s"]+))')
STARTING = {f"m3d.{name}" for name in "pretrain finetune predict evaluate ask embed".split()}
NO_RUN = {"gpu"}  # not measured yet


def test_benchmark_tables_are_generated_from_the_results() -> None:
    path = ROOT / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = path.with_name("README.md").read_text()
    results = {file.stem for file in path.with_name("results").glob("*.json")}
    assert page == tables.readme() and page.count("\n## ") == len(tables.SECTIONS.keys() - NO_RUN)
    assert set(tables.SECTIONS) - NO_RUN == results


def variables(text: str) -> dict[str, str]:
    """Shell variables that a page assigns, expanded in order."""
    found: dict[str, str] = {}
    for name, quoted, bare in ASSIGNED.findall(text):
        found[name] = Template(quoted or bare).safe_substitute(found)
    return found


def config_files(page: Path) -> list[str]:
    """Paths after --config_file on a page, without those that hold placeholders."""
    text = Template(page.read_text("utf-8")).safe_substitute(variables(page.read_text("utf-8")))
    lists = [listed or one for listed, one in CONFIG_FILE.findall(text)]
    paths = [part.strip(" '") for listed in lists for part in listed.split(",")]
    return [path for path in paths if not path.startswith(("NAME/", "runs/"))]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_scripts_that_start_workers_can_be_imported_by_them(page: Path) -> None:
    """Where processes are spawned, each worker imports the script that started it."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.DOTALL):
        free = [node for node in ast.parse(block).body if not isinstance(node, ast.If)]
        calls = [node for part in free for node in ast.walk(part) if isinstance(node, ast.Call)]
        bare = {ast.unparse(call.func) for call in calls} & STARTING
        assert not bare, f'guard {bare} by if __name__ == "__main__":'


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    for link in (link for link in links if "://" not in link):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_commands_on_a_page_exist(page: Path) -> None:
    named = re.findall(r"python -m med3dinsight_ext (?!COMMAND)([\w-]+)", page.read_text("utf-8"))
    assert set(named) <= set(COMMANDS)


@every_page
def test_config_files_on_a_page_exist(page: Path) -> None:
    bundle = page.parents[1] if page.parent.parent.parent.name == "bundles" else ROOT
    assert not [path for path in config_files(page) if not (bundle / path).is_file()]


def test_pages_name_links_commands_and_config_files() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert len(re.findall(r"python -m med3dinsight_ext [\w-]+", text)) > 20
    assert sum(len(config_files(page)) for page in PAGES) > 60


def test_modules_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("## Differences")[0]
    package = ROOT / "med3dinsight_ext"
    files = re.findall(r"`(\w+/[\w/]+\.py)`", text)
    assert len(files) > 12 and not [name for name in files if not (package / name).is_file()]
    folders = set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE))
    own = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders == own - {"bundles"}


def test_the_site_lists_every_page_and_module() -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    nav = set(hooks.entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    pages = {str(page.relative_to(ROOT)) for page in PAGES}
    reference = {f"docs/reference/{name}.md" for name in hooks.reference()}
    assert nav == pages | reference


def test_tests_named_in_the_method_exist() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    names = re.findall(r"`(test_\w+)`", text)
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 8 and not [name for name in names if f"def {name}(" not in written]
