"""torchvision's operator schemas, where its compiled part does not load.

A torchvision built for another torch (CUDA beside CPU) registers Python implementations for
operators that only its compiled part declares, and so fails at import. Code that imports
torchvision without calling these operators needs no more than their schemas.
"""

from __future__ import annotations

from typing import Any


def define_operators() -> Any:
    """Declare the operators; they exist as long as the returned ``torch.library.Library``."""
    import torch  # late: the import hook of MONAI Label's environment imports this module

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
