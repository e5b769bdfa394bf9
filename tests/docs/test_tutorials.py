"""The commands of the tutorials run, on small volumes and with few steps; the answers' figures."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from fakes import write_volumes
from running import ROOT

from med3dinsight_ext.cli import main, parsed

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("bundles/**/*.md")])
TUTORIALS = ROOT / "docs" / "tutorials"
SMALL = {
    "pretrain": ["--teacher", "{'_target_': 'fakes.teacher'}", "--per_plane", "8", "--slices", "4"],
    "finetune": [],
    "evaluate": [],
}
FEW = ["--steps", "2", "--device", "$torch.device('cpu')"]
HEAVY = ("label-install", "label")  # environments and servers, which tests/monailabel runs


def blocks(page: Path) -> list[str]:
    """Shell code of a page, in lists too."""
    found = re.findall(
        r"^ *```bash\n(.*?)^ *```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return [textwrap.dedent(block).replace("\\\n", " ") for block in found]


def commands(page: Path) -> list[list[str]]:
    """Words of each command of this package on a page."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    ours = [line for line in lines if re.match(r"\S*python -m med3dinsight_ext [a-z]", line)]
    return [shlex.split(line, comments=True)[3:] for line in ours]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_takes_its_arguments(page: Path) -> None:
    for name, *rest in commands(page):
        parsed(name, rest)


def test_pages_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 50


@pytest.fixture
def scans(small_plans: None) -> Path:
    """Five labelled volumes, two of them for tests."""
    folder = write_volumes(Path("scans"), 5)
    for name in ("segmentation.json", "classification.json"):
        (folder / name).unlink()
    split = {"development": ["v0", "v1", "v2"], "test": ["v3", "v4"]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("phd-student", "runs/pretrained/evaluation-scans/metrics.json"),
        ("annotator", "organs/configs/train.json"),
        ("zoo-maintainer", "releases/organ_segmentation/models/model.ts"),
    ],
)
def test_the_commands_of_a_tutorial_run_in_their_order(page: str, made: str, scans: Path) -> None:
    listed = [words for words in commands(TUTORIALS / f"{page}.md") if words[0] not in HEAVY]
    assert len(listed) > 1
    for words in listed:
        words = [word.replace("NAME", "scans").replace("DIR", "scans") for word in words]
        words += [*SMALL[words[0]], *FEW] if words[0] in SMALL else []
        try:
            main(words)
        except SystemExit as end:  # doctor finds that the balls are copies
            assert words[0] == "doctor" and end.code == 1, words
    assert Path(made).is_file(), sorted(Path().glob("*/*"))


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_clicks_of_the_annotators_page_are_those_of_the_results() -> None:
    text = (TUTORIALS / "annotator.md").read_text("utf-8")
    dice = result("clicks_headneck")["arms"]["click_warm"]["validation"]["each"]["dice"]
    first, last = (f"{dice[i]['mean']:.3f}" for i in (0, 5))
    assert f"mean Dice {first} without clicks, {last} after five simulated clicks" in text


def test_the_figures_of_the_answers_are_those_of_the_results() -> None:
    text = (ROOT / "docs" / "faq.md").read_text("utf-8")
    pretrain, frozen, scale = result("pretrain"), result("frozen"), result("scale")
    rate = pretrain["store"]["fill_slices_per_second"]["median"]
    step = pretrain["overhead"]["networks"]["SegResNet"]["ratio"]["median"]
    runs, hippocampus = result("headneck")["runs"], result("hippocampus")
    test = {name: run["test"] for name, run in runs.items()}
    dice = {name: run["mean"]["dice"]["mean"] for name, run in test.items()}
    right, left = (
        {name: run["classes"][f"{side}Parotid"]["dice"]["mean"] for name, run in test.items()}
        for side in ("Right", "Left")
    )
    recall = result("sarcoma")["summary"]["image_within_r1"]
    arms = {name: arm["119"]["mean"] for name, arm in frozen["arms"].items()}
    first = result("commands")["rows"]["headneck_newcomer"]
    minutes = sum(first[name]["seconds"] for name in ("pretrain", "finetune", "predict")) / 60
    took = f"{minutes:.0f} minutes on two threads"
    dice_first = f"{first['test']['mean']['dice']['mean']:.3f}"
    network = (TUTORIALS / "first-network.md").read_text("utf-8")
    assert took in network and f"mean Dice of {dice_first} on" in network
    assert f"{minutes:.0f} minutes on two CPU threads" in (ROOT / "README.md").read_text("utf-8")
    starts = scale["start_seg"]["start"], scale["start_seg"]["resume"]
    for figure in (
        f"{took}, Dice of four organs {dice_first} on test cases",
        f"{rate:.1f} slices a second on two threads",
        f"1,000 volumes of 48 slices in {48000 / rate / 60:.0f} minutes",
        f"{step:.2f} times the network alone",
        f"{runs['auto']['train_seconds'] / 60:.0f} minutes on one thread, Dice {dice['auto']:.3f}",
        f"{hippocampus['train_seconds'] / 60:.0f} minutes on two threads",
        f"two threads, Dice {hippocampus['test']['mean']['dice']['mean']:.3f}",
        f"{frozen['volume_seconds']['trained']:.2f} s a volume",
        f"then {frozen['fit_seconds']['12']:.1f} s for a fit",
        f"itself takes {max(start['gigabytes'] for start in starts):.1f} GB",
        f"{arms['trained']:.3f} with ImageNet's weights and {arms['random']:.3f} with random",
        f"depth for\n{recall['student']['mean'] * 100:.1f} % of the queries",
        f"by chance for {recall['chance'] * 100:.1f} %",
        f"Dice of {right['plain_4mm']:.3f} and the left one of {left['plain_4mm']:.3f}",
        f"with it {right['auto_4mm']:.3f} and {left['auto_4mm']:.3f}",
        f"have {dice['auto_4mm']:.3f} at 4 mm",
        f"AUROC of {arms['reconstruction']:.3f} with 119 labels",
        f"whole method {arms['default_reconstruction_100']:.3f}, from",
        f"from scratch {arms['scratch']:.3f}",
        f"may be better: {arms['trained']:.3f} there",
    ):
        assert figure in text, figure
