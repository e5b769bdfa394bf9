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


def windows(size: int, patch: int, *overlap: float) -> tuple[list[float], Tensor]:
    """Starts of the windows along x, and the tokens of slices at its ends and between."""
    starts = []

    def student(patch: Tensor, plane: Tensor, position: Tensor) -> StudentOutput:
        starts.append(float(patch[0, 0, 0, 0, 0]))
        tokens = {"image": position[..., None], "text": 2 * position[..., None]}
        return StudentOutput(tokens, None, None)

    volume = torch.arange(float(size)).view(1, 1, size, 1, 1).expand(1, 1, size, 4, 4)
    plane, position = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0.0, 0.25, 1.0, 0.0]])
    out = SlidingTokens((patch, 4, 4), *overlap)(volume, student, plane, position, unused=1)
    assert out.reconstruction is None and torch.equal(2 * out.tokens["image"], out.tokens["text"])
    return starts, out.tokens["image"][0, :, 0]


def test_slices_at_the_ends_of_the_volume_have_tokens() -> None:
    starts, tokens = windows(16, 8, 0.5)
    assert starts == [0, 4, 8] and tokens.tolist() == [0, (4 / 8 + 0) / 2, 1, 0]


def test_windows_overlap_by_a_quarter_by_default_and_move_by_a_voxel_at_least() -> None:
    assert windows(20, 8)[0] == [0, 6, 12] == windows(20, 8, 0.25)[0]
    assert windows(4, 2, 0.9)[0] == [0, 1, 2]
