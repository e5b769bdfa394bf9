"""An nnU-Net plan on the axes of this package; plans that cannot be used, and hostile ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fakes import nnunet_plan

from med3dinsight_ext.planning.nnunet import read_nnunet

PERMUTED = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


def image(path: Path, affine: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), affine), path)
    return str(path)


def written(path: Path, change: Callable[[dict[str, Any]], Any] = dict) -> Path:
    plan = nnunet_plan()
    change(plan)
    path.write_text(json.dumps(plan))
    return path


def test_strides_kernels_patch_and_spacing_are_along_x_y_z(tmp_path: Path) -> None:
    scans = [image(tmp_path / f"{i}.nii.gz", np.diag([-1.0, -1, 1, 1])) for i in range(2)]
    scans.append(image(tmp_path / "2.nii.gz", PERMUTED))
    found = read_nnunet(written(tmp_path / "plans.json"), scans)
    assert found["nnunet_axes"] == [2, 1, 0]  # nnU-Net's first axis is z
    assert found["spacing"] == [0.8, 1.0, 3.0] and found["patch_size"] == [32, 24, 8]
    backbone = found["backbone"]
    assert backbone["strides"] == [[1, 1, 1], [2, 2, 1], [2, 2, 2]]
    assert backbone["kernel_sizes"] == [[3, 3, 1], [3, 3, 3], [3, 3, 3]]
    assert backbone["_target_"].endswith("unet.ResidualEncoderUNet")
    assert backbone["conv_op"] == "$torch.nn.modules.conv.Conv3d" and backbone["dropout_op"] is None
    assert backbone["input_channels"] == 1 and backbone["num_classes"] == "@out_channels"


@pytest.mark.parametrize(
    ("reader", "signs", "text"),
    [
        (
            "SimpleITKIO",
            (-1, -1, 1),
            "1 of 2 images are stored mirrored to RAS, as .*b.nii.gz .LPS.: ",
        ),
        ("SimpleITKIO", (1, 1, 1), None),
        ("NibabelIOWithReorient", (-1, -1, 1), None),
    ],
)
def test_images_stored_mirrored_are_a_warning(
    reader: str,
    signs: tuple[int, ...],
    text: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scans = [image(tmp_path / "a.nii.gz", np.eye(4))]
    scans.append(image(tmp_path / "b.nii.gz", np.diag([*signs, 1.0])))
    change = {"image_reader_writer": reader}
    read_nnunet(written(tmp_path / "plans.json", lambda plan: plan.update(change)), scans)
    assert len(caplog.records) == (text is not None)
    assert text is None or re.match(text, caplog.messages[0])


@pytest.mark.parametrize(
    ("reader", "forward", "axes"),
    [
        ("SimpleITKIO", [0, 1, 2], [0, 2, 1]),
        ("SimpleITKIO", [2, 0, 1], [1, 0, 2]),
        ("NibabelIOWithReorient", [0, 1, 2], [2, 1, 0]),
    ],
)
def test_axes_follow_the_stored_order_the_reader_and_the_transposition(
    reader: str, forward: list[int], axes: list[int], tmp_path: Path
) -> None:
    assert nib.aff2axcodes(PERMUTED) == ("P", "S", "R")  # y, z, x; an array of nnU-Net's: x, z, y
    change = {"image_reader_writer": reader, "transpose_forward": forward}
    path = written(tmp_path / "plans.json", lambda plan: plan.update(change))
    assert read_nnunet(path, [image(tmp_path / "a.nii.gz", PERMUTED)])["nnunet_axes"] == axes


def architecture(plan: dict[str, Any]) -> dict[str, Any]:
    return plan["configurations"]["3d_fullres"]["architecture"]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda p: p["foreground_intensity_properties_per_channel"].update({"1": {}}),
         "nnunet must be a plan of one channel, got 2 in .*plans.json; networks here take one"),
        (lambda p: p["configurations"].clear(),
         "nnunet must be readable, got .*plans.json: KeyError: '3d_fullres'; take the file that"),
        (lambda p: p.update(transpose_forward=[0, 0, 1]), "must order 3 axes, got .0, 0, 1."),
        (lambda p: architecture(p).update(network_class_name="os.system"),
         "network must be a U-Net of dynamic_network_architectures.*got os.system"),
        (lambda p: architecture(p)["arch_kwargs"].update(conv_op="torch.nn.x(open('f'))"),
         "conv_op must be a class of torch.nn, got torch.nn.x"),
        (lambda p: architecture(p)["arch_kwargs"].update(n_stages="$exit()"),
         "n_stages must hold numbers, got .exit"),
        (lambda p: architecture(p)["arch_kwargs"].update(norm_op_kwargs={"_target_": 1}),
         "norm_op_kwargs must hold numbers, got {'_target_'"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_used_is_one_line(
    change: Callable[[dict[str, Any]], Any], rule: str, tmp_path: Path
) -> None:
    scans = [image(tmp_path / "a.nii.gz", np.eye(4))]
    with pytest.raises(ValueError, match=rule) as caught:
        read_nnunet(written(tmp_path / "plans.json", change), scans)
    assert str(tmp_path / "plans.json") in str(caught.value)
