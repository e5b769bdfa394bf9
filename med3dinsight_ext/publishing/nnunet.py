"""A trained network as weights that nnU-Net v2 starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from med3dinsight_ext.planning.nnunet import AXES, NETWORKS
from med3dinsight_ext.training.encoder import trained_network
from med3dinsight_ext.training.weights import write_torch

FILE = "nnunet.pth"


def export_nnunet(folder: str | Path) -> Path:
    """Write models/nnunet.pth of a training, for ``nnUNetv2_train -pretrained_weights``.

    nnU-Net takes all weights but the last layers', and stops if a shape differs. Kernels are turned
    to the axes of its arrays.

    Args:
        folder: of a training whose plan was made with ``--nnunet``, or of its published bundle.

    Raises:
        ValueError: the network is none of nnU-Net's, or its axes are not known.
    """
    network, config = trained_network(folder)
    if not type(network).__module__.startswith(NETWORKS) or AXES not in config:
        raise ValueError(
            f"folder must hold a network of an nnU-Net plan, got {type(network).__name__} in "
            f"{folder} without {AXES}; plan with --nnunet, then train with that plan"
        )
    weights = turned(network.state_dict(), config[AXES])
    path = Path(folder) / "models" / FILE
    write_torch(path, {"network_weights": weights})
    print(
        f"wrote {path}: nnUNetv2_train DATASET 3d_fullres FOLD -p PLANS -pretrained_weights {path}"
    )
    return path


def turned(weights: dict[str, Tensor], axes: Sequence[int]) -> dict[str, Tensor]:
    """Weights of the same network for volumes with other axes.

    Args:
        weights: name to tensor; those of 3D convolutions are (out, in, x, y, z).
        axes: for each axis of the other volumes the axis here.
    """
    order = (0, 1, *(2 + axis for axis in axes))
    return {
        name: value.permute(order).contiguous() if value.ndim == 5 else value
        for name, value in weights.items()
    }
