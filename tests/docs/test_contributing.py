"""The diffs of CONTRIBUTING.md apply to the repository and work."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT

DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
LOSS = """
import torch
from med3dinsight_ext.losses.alignment import AlignmentLoss
from med3dinsight_ext.embeddings.targets import SliceTargets
from med3dinsight_ext.models.student import StudentOutput
zero, yes = torch.zeros(1, 4), torch.ones(1, 4).bool()
unit, volume = torch.eye(4)[None], torch.zeros(1, 1, 2, 2, 2)
number = zero.long()
target = SliceTargets(unit.flip(1), unit, yes, yes, number, zero, number, volume, number)
loss = AlignmentLoss("triplet")
loss(StudentOutput({"joint": unit}, None, None), target)
torch.testing.assert_close(loss.latest.image, torch.tensor(1.2))
torch.testing.assert_close(loss.latest.text, torch.tensor(0.0))
"""
TEACHER = """
import torch
from med3dinsight_ext.teachers.densenet import DenseNetImages
from med3dinsight_ext.teachers.teacher import Teacher
from fakes import FakeTexts
teacher = Teacher(DenseNetImages("densenet.pt", 14), FakeTexts())
assert teacher.encode_image(torch.rand(2, 1, 40, 30)).shape == (2, 1024)
"""
BACKBONE = """
from pathlib import Path
from monai.bundle import ConfigParser
from med3dinsight_ext.io.bundles import backbone_files
from med3dinsight_ext.models.features import find_features
parser = ConfigParser(ConfigParser.load_config_file("bundles/backbones/densenet169.yaml"))
parser["out_channels"] = 2
find_features(parser.get_parsed_content("backbone"), (32, 32, 32))
for bundle, listed in {"pretrain": True, "seg-finetune": False, "cls-finetune": True}.items():
    names = [path.name for path in backbone_files(Path("bundles", bundle))]
    assert ("densenet169.yaml" in names) == listed
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path_factory.mktemp("contribution")
    for name in ("med3dinsight_ext", "bundles", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.pt", "store", "eval")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOSS, TEACHER, BACKBONE], ids=["loss", "teacher", "backbone"])
def test_an_example_of_contributing_works(code: str, patched: Path) -> None:
    import_from = f"import sys; sys.path[:0] = [{str(patched)!r}, {str(patched / 'tests')!r}]\n"
    if code is TEACHER:
        from monai.networks.nets import DenseNet121

        net = DenseNet121(spatial_dims=2, in_channels=3, out_channels=14)
        torch.save(net.state_dict(), patched / "densenet.pt")
    subprocess.run([sys.executable, "-c", import_from + code], cwd=patched, check=True)


def test_the_examples_are_a_loss_a_teacher_and_a_backbone() -> None:
    added = re.findall(r"^\+\+\+ b/(\S+)", "".join(DIFFS), re.MULTILINE)
    assert {Path(name).parent.name for name in added} >= {"losses", "teachers", "backbones"}
