"""nnU-Net's own planning and training around a pre-training here, in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import med3dinsight_ext
from med3dinsight_ext.publishing.export import export

PYTHON = os.environ.get("MED3D_NNUNET_PYTHON", "")
WHY = "" if PYTHON else "set MED3D_NNUNET_PYTHON to the python of an environment with nnunetv2"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY), reason=WHY)]
NAME, PLANS = "Dataset901_Ball", "nnUNetResEncUNetMPlans"
TRAIN = """
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

initialize = nnUNetTrainer.initialize

def shortly(self):
    self.num_epochs = 2
    self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1
    initialize(self)

nnUNetTrainer.initialize = shortly
run_training_entry()
"""  # another trainer's name would make nnU-Net import all of them, and timm, which needs CUDA
COUNT = """
import json, sys
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
found = json.load(open(sys.argv[1]))["configurations"]["3d_fullres"]["architecture"]
network = get_network_from_plans(found["network_class_name"], found["arch_kwargs"],
                                 found["_kw_requires_import"], 1, 2)
print(json.dumps(list(network.state_dict())))
"""


def write_dataset(folder: Path) -> None:
    """Five coarse volumes, stored along y, z and x, in nnU-Net's layout."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    affine = np.array([[0.0, 0, 1.5, 0], [-1.5, 0, 0, 0], [0, 4.5, 0, 0], [0, 0, 0, 1]])
    grid = np.stack(np.meshgrid(*map(np.arange, (40, 12, 36)), indexing="ij"), -1)
    for i in range(5):
        random = np.random.default_rng(i)
        ball = np.linalg.norm((grid - (18 + i, 6, 17)) * (1, 3, 1), axis=-1) < 9
        array = (100 + 50 * ball + 20 * random.random(ball.shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, affine), folder / "imagesTr" / f"v{i}_0000.nii.gz")
        label = nib.Nifti1Image(ball.astype(np.uint8), affine)
        nib.save(label, folder / "labelsTr" / f"v{i}.nii.gz")
    described = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1},
                 "numTraining": 5, "file_ending": ".nii.gz"}  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(described))


def nnunet(root: Path, command: str, *words: str) -> str:
    """Output of a command of nnU-Net."""
    own = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    own |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | own
    program = str(Path(PYTHON).with_name(command)) if command[0] == "n" else PYTHON
    ran = subprocess.run([program, *words], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran.stdout


def test_nnunet_trains_from_a_network_that_was_pretrained_for_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "raw" / NAME
    write_dataset(raw)
    nnunet(tmp_path, "nnUNetv2_plan_and_preprocess", "-d", "901", "-pl", "nnUNetPlannerResEncM",
           "-c", "3d_fullres", "-np", "1", "-npfp", "1")  # fmt: skip
    plans = tmp_path / "preprocessed" / NAME / f"{PLANS}.json"
    content = json.loads(plans.read_text())
    small = content["configurations"]["3d_fullres"]
    kwargs = small["architecture"]["arch_kwargs"]
    assert kwargs["strides"][1] == [1, 2, 2]  # so that turned axes matter
    kwargs["features_per_stage"] = [4 * n for n in range(1, 1 + kwargs["n_stages"])]
    kwargs["n_blocks_per_stage"] = [1] * kwargs["n_stages"]
    small["batch_size"] = 2
    plans.write_text(json.dumps(content))

    med3dinsight_ext.plan(str(raw), nnunet=str(plans), out="plan.yaml")
    run = med3dinsight_ext.pretrain(
        str(raw), plan="plan.yaml", out="run", steps=2, per_plane=4, slices=4, batch_size=2,
        val_fraction=0, teacher={"_target_": "fakes.teacher"}, device="$torch.device('cpu')",
    )  # fmt: skip
    export(str(run), to="nnunet")

    said = nnunet(tmp_path, "python", "-c", TRAIN, "901", "3d_fullres", "0", "-p", PLANS,
                  "-device", "cpu", "-pretrained_weights",
                  str(run / "models" / "nnunet.pth"))  # fmt: skip
    names = json.loads(nnunet(tmp_path, "python", "-c", COUNT, str(plans)).splitlines()[-1])
    loaded = re.findall(r"^(\S+) shape torch.Size", said, re.M)
    assert set(loaded) == {name for name in names if ".seg_layers." not in name}
    assert sum(name.startswith("encoder.") for name in loaded) > 30
    assert "Epoch 1" in said and "Training done." in said
