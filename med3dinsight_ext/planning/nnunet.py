"""Network, spacing and patch of an nnU-Net v2 plan, on the axes of this package.

nnU-Net's arrays have the axes of the stored file in reverse, in the order of its
``transpose_forward``; volumes here are in RAS. So strides, kernels, spacing and patch are turned,
and ``export --to nnunet`` turns the weights back.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib

from med3dinsight_ext.io.images import open_volume
from med3dinsight_ext.io.reading import read_json, readable

logger = logging.getLogger(__name__)
AXES = "nnunet_axes"  # key of the overlay
CONFIGURATION = "3d_fullres"
NETWORKS = "dynamic_network_architectures.architectures."
CLASS = re.compile(r"torch\.nn(\.\w+)+")  # that a plan may name
FIX = "take the file that nnUNetv2_plan_and_preprocess wrote, nnU-Net 2.4 or later"


def read_nnunet(path: str | Path, images: Sequence[str]) -> dict[str, Any]:
    """Settings that give the network of an nnU-Net plan to the bundles.

    Args:
        path: the plan, as nnUNetResEncUNetMPlans.json; its configuration 3d_fullres is read.
        images: NIfTI files of its dataset; most of them tell the order of the stored axes.

    Returns:
        spacing, patch_size, backbone, and nnunet_axes: for each axis of nnU-Net's arrays the axis
        here, 0 for x.

    Raises:
        ValueError: it is no plan of a 3D network with one input channel, or names other classes
            than those of ``dynamic_network_architectures`` and torch.nn.
    """
    content = read_json(path, "nnunet", FIX)
    with readable("nnunet", path, FIX):
        channels = len(content["foreground_intensity_properties_per_channel"])
        if channels != 1:
            raise ValueError(
                f"nnunet must be a plan of one channel, got {channels} in {path}; networks here "
                "take one: plan a dataset with a single channel"
            )
        found = content["configurations"][CONFIGURATION]
        forward = [int(axis) for axis in content["transpose_forward"]]
        turned = content["image_reader_writer"] == "NibabelIOWithReorient"
    stored = [0, 1, 2] if turned else _stored_axes(images)
    with readable("nnunet", path, FIX):
        axes = [stored[2 - axis] for axis in forward]
        if sorted(axes) != [0, 1, 2]:
            raise ValueError(f"transpose_forward must order 3 axes, got {forward}")
        return {
            "spacing": [float(mm) for mm in _turned(found["spacing"], axes)],
            "patch_size": [int(n) for n in _turned(found["patch_size"], axes)],
            "backbone": _backbone(found["architecture"], axes),
            AXES: axes,
        }


def _stored_axes(images: Sequence[str]) -> tuple[int, ...]:
    """Axis of RAS for each axis of the stored file, as most images have it.

    A warning names images that are stored mirrored. Their kernels are not mirrored by the export:
    of strided convolutions that would be another network, as padding is not symmetric.
    """
    affines = []
    for image in images:
        with readable("volume", image):
            affines.append(open_volume(image).affine)
    turns = [nib.io_orientation(affine) for affine in affines]
    if mirrored := [i for i, turn in enumerate(turns) if (turn[:, 1] < 0).any()]:
        codes = "".join(nib.aff2axcodes(affines[mirrored[0]]))
        logger.warning(
            f"{len(mirrored)} of {len(images)} images are stored mirrored to RAS, as "
            f"{images[mirrored[0]]} ({codes}): nnU-Net would get weights for mirrored volumes; "
            'plan it with "overwrite_image_reader_writer": "NibabelIOWithReorient" in its '
            "dataset.json, or store images and labels in RAS"
        )
    orders = Counter(tuple(int(axis) for axis in turn[:, 0]) for turn in turns)
    return orders.most_common(1)[0][0]


def _turned(values: Sequence[Any], axes: Sequence[int]) -> list[Any]:
    """Values along nnU-Net's axes, in the order x, y, z."""
    if len(values) != 3:
        raise ValueError(f"values must be along 3 axes, got {values}")
    return [values[axes.index(axis)] for axis in range(3)]


def _backbone(architecture: dict[str, Any], axes: Sequence[int]) -> dict[str, Any]:
    """Config of the network."""
    name = str(architecture["network_class_name"])
    if not re.fullmatch(re.escape(NETWORKS) + r"unet\.\w+", name):
        raise ValueError(f"network must be a U-Net of {NETWORKS}unet, got {name}")
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture["_kw_requires_import"]:
        if arguments[key] is None:
            continue
        if not CLASS.fullmatch(str(arguments[key])):
            raise ValueError(f"{key} must be a class of torch.nn, got {arguments[key]}")
        arguments[key] = f"${arguments[key]}"
    for key, value in arguments.items():
        if key not in architecture["_kw_requires_import"] and not _is_plain(value):
            raise ValueError(f"{key} must hold numbers, got {value}")
    for key in ("kernel_sizes", "strides"):
        arguments[key] = [_turned(stage, axes) for stage in arguments[key]]
    return {"_target_": name, "input_channels": 1, "num_classes": "@out_channels", **arguments}


def _is_plain(value: Any) -> bool:
    """Whether a value has no text in it, which a config would evaluate."""
    if isinstance(value, dict):
        return all(str(key).isidentifier() and key[0] != "_" for key in value) and all(
            map(_is_plain, value.values())
        )
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float))
