from __future__ import annotations

import numpy as np
import pytest
import torch

from med3dinsight_ext.planning.dry_step import build, step_cost
from med3dinsight_ext.planning.rules import (
    covering_spacing,
    fitting_patch,
    steps_for,
    target_spacing,
    unet,
)


def test_a_coarse_axis_gets_its_10th_percentile_but_not_a_finer_spacing_than_the_others() -> None:
    shapes = np.array([[300, 300, 40]] * 3)
    spacings = np.array([[0.8, 0.8, 3], [0.8, 0.8, 5], [0.8, 0.8, 6.0]])
    assert target_spacing(spacings, shapes) == [0.8, 0.8, 3.4]
    spacings[0, 2] = 0.1
    assert target_spacing(spacings, shapes)[2] == 0.8  # 1.08 is less than twice the finest
    assert target_spacing(spacings, np.array([[300, 300, 150]] * 3)) == [0.8, 0.8, 5.0]


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 0.7, 5), (3, 1, 1)])
@pytest.mark.parametrize("shape", [(35, 51, 36), (300, 280, 40), (512, 512, 600), (5, 90, 90)])
def test_a_patch_fits_the_volume_the_limit_and_the_network(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    patch, strides = fitting_patch(shape, spacing, 60_000, 3)
    factor = np.prod(strides, 0)
    assert (np.array(patch) % factor == 0).all() or min(patch) == 8
    assert np.prod(patch) <= 60_000 * 1.35
    assert (np.array(patch) < np.array(shape) + factor + 8).all()
    network = build(unet(4, 3, strides), torch.device("cpu"))
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *patch)).shape == (1, 1, *patch)


def test_a_thin_axis_is_halved_later() -> None:
    _, strides = fitting_patch((256, 256, 20), (0.5, 0.5, 5.0), 200_000, 3)
    assert [step[2] for step in strides] == [1, 1, 1] and strides[0][:2] == [2, 2]


def test_spacing_is_made_coarser_only_until_the_patch_shows_enough() -> None:
    assert covering_spacing((100, 100, 100), (1, 1, 1), 300_000) == [1.0, 1.0, 1.0]
    found = covering_spacing((512, 512, 100), (0.8, 0.8, 3.0), 330_000)
    seen = np.prod((512, 512, 100) * np.array([0.8, 0.8, 3.0]) / found)
    assert 330_000 / seen == pytest.approx(0.25, abs=0.03) and found[0] == found[1] < found[2]
    whole = covering_spacing((100, 100, 100), (1, 1, 1), 64**3, 1.0)
    assert np.prod(100 / np.array(whole)) <= 64**3


def test_smaller_patches_get_more_steps_within_limits() -> None:
    assert steps_for(1_000_000, 8e8, 600, 2500) == 800
    assert steps_for(10_000_000, 8e8, 600, 2500) == 600
    assert steps_for(1_000, 8e8, 600, 2500) == 2500


def test_a_dry_step_costs_more_for_more_voxels() -> None:
    network = build(unet(4, 2, [[2, 2, 2]] * 2), torch.device("cpu"))
    (small, seconds), (large, _) = (step_cost(network, [n] * 3, 2) for n in (8, 24))
    assert 0 < small < large and seconds > 0


def test_a_given_backbone_may_need_the_patch_and_return_several_outputs() -> None:
    vit = {
        "_target_": "ViT", "in_channels": 1, "img_size": "@patch_size", "patch_size": 16,
        "hidden_size": 12, "mlp_dim": 12, "num_layers": 1, "num_heads": 2,
    }  # fmt: skip
    network = build(vit, torch.device("cpu"), (32, 32, 16))
    assert step_cost(network, (32, 32, 16), 1)[0] > 0


def test_a_dry_step_costs_more_for_more_classes() -> None:
    backbone, patch = unet(4, 2, [[2, 2, 2]] * 2), (16, 16, 16)
    networks = (build(backbone, torch.device("cpu"), patch, classes) for classes in (2, 50))
    few, many = (step_cost(network, patch, 1)[0] for network in networks)
    assert many > few


def test_spacings_of_micro_ct_are_kept() -> None:
    native = target_spacing(np.array([[0.00412] * 3]), np.array([[500] * 3]))
    assert native == [0.00412] * 3
    assert covering_spacing([500] * 3, native, 330_000)[0] == pytest.approx(0.0189, rel=0.1)
