from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from med3dinsight_ext.reports.figures import CLASS_COLORS, class_colors

VISION = {  # linear RGB as seen; Machado et al. 2009, severity 1
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab(colors: np.ndarray, vision: np.ndarray) -> np.ndarray:
    """CIELAB of sRGB colours (n, 3) in [0, 1]."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.transpose(vision), 0, 1) @ np.transpose(XYZ) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1], 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("vision", VISION)
def test_class_colours_differ_for_everybody(vision: str) -> None:
    seen = lab(np.array([to_rgb(color) for color in CLASS_COLORS]), np.array(VISION[vision]))
    apart = np.linalg.norm(seen[:, None] - seen, axis=2)[np.triu_indices(len(seen), 1)]
    assert apart.min() > 15


def test_a_class_keeps_its_colour_when_classes_are_many() -> None:
    names = [f"organ_{i}" for i in range(len(CLASS_COLORS) + 2)]
    colors = class_colors(names)
    assert class_colors(names[:2]).items() <= colors.items() and len(colors) == len(names)
