import torch
from torch import Tensor

from med3dinsight_ext.models.student import StudentOutput
from med3dinsight_ext.training.inferers import SlidingTokens


def test_a_window_gets_the_slices_in_it_alone() -> None:
    """The token of a slice is the mean over the windows that it cuts, in each window's frame."""
    plane = torch.tensor([[0, 0, 2, 1], [0, 0, 2, 1]])
    position = torch.tensor([[0.1, 0.5, 0.9, 0.3], [0.7, 0.5, 0.6, 0.7]])
    sizes = []

    def student(patch: Tensor, plane: Tensor, position: Tensor) -> StudentOutput:
        sizes.append(plane.shape[1])
        start = patch[:, 0, 0, 0, 0, None]  # where the window begins along x
        return StudentOutput(
            {"image": torch.stack([position, start + 0 * position], 2)}, None, None
        )

    volume = torch.arange(48.0).view(1, 1, 48, 1, 1).expand(2, 1, 48, 16, 16)
    out = SlidingTokens((32, 16, 16), 0.5)(volume, student, plane, position).tokens["image"]
    assert sizes == [4, 4]  # in the windows at 0 and 16 of either volume
    want = torch.tensor([[4.8 / 32, 0], [(24 / 32 + 8 / 32) / 2, 8], [0.9, 8], [0.3, 8]])
    assert torch.allclose(out[0], want)
    sizes.clear()
    SlidingTokens((32, 16, 16), 0.5)(volume[:1], student, plane[:1], position[:1])
    assert sizes == [4, 3]
