"""Answers that change only around a click, and their history."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor

from med3dinsight_ext.data.clicks import META
from med3dinsight_ext.training.click_inferer import ClickInferer, History
from med3dinsight_ext.training.tta import FlipInferer

NAMES = ["background", "a", "b"]
SIZE = (40, 24, 20)


class Network:
    """Scores the opposite of the volume's sign as soon as the window has a click; keeps inputs."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        x = torch.nn.functional.pad(x, (0,) * 6 + (0, 7 - x.shape[1]))
        guidance = x[:, 1:4]
        mark = x[:, :1] if guidance.any() else torch.zeros_like(x[:, :1])
        return torch.cat([1 - 2 * mark, mark + guidance[:, 1:2], guidance[:, 2:3]], 1)


def volume(*clicks: tuple[float, ...]) -> MetaTensor:
    image = MetaTensor(torch.ones(1, 1, *SIZE))
    image.meta[META] = torch.tensor(clicks, dtype=torch.float64).reshape(-1, 4)
    return image


def inferer(**changes: Any) -> ClickInferer:
    given = {"patch_size": (16, 16, 16), "refine_radius": 5.0, **changes}
    return ClickInferer(SimpleInferer(), NAMES, **given)


def changed(image: MetaTensor, **changes: Any) -> Tensor:
    """Voxels (n, 3) whose class differs from the automatic answer."""
    found = inferer(**changes)(image, Network())[0].argmax(0)
    return found.nonzero()


def test_without_clicks_the_network_answers_once_for_the_whole_volume() -> None:
    network = Network()
    found = inferer()(volume(), network)
    assert len(network.seen) == 1 and network.seen[0].shape == (1, 1, *SIZE)
    assert found.shape == (1, 3, *SIZE) and not found.argmax(1).any()


@pytest.mark.parametrize("place", [(20, 12, 10), (0, 0, 0), (39, 23, 19), (20.4, 3, 9.7)])
def test_a_click_changes_its_surroundings_and_nothing_else(place: tuple[float, ...]) -> None:
    away = (changed(volume((1, *place))) - torch.tensor(place, dtype=torch.float64)).norm(dim=1)
    assert len(away) > 60 and away.max() <= 5
    grid = torch.cartesian_prod(*map(torch.arange, SIZE))
    assert (
        len(away) == ((grid - torch.tensor(place, dtype=torch.float64)).norm(dim=1) <= 5).sum()
    )  # all of the ball


def test_a_click_on_one_organ_leaves_the_correction_of_another() -> None:
    both = inferer()(volume((1, 6, 6, 6), (2, 30, 12, 10)), Network())
    one = inferer()(volume((1, 6, 6, 6)), Network())
    assert torch.equal(both[:, :, :20], one[:, :, :20])
    assert not torch.equal(both[:, :, 20:], one[:, :, 20:])


def test_the_window_has_all_clicks_and_the_answer_so_far() -> None:
    network = Network()
    inferer()(volume((1, 10, 12, 10), (2, 14, 12, 10)), network)
    window = network.seen[-1]
    assert window.shape == (1, 7, 16, 16, 16)  # image, three of guidance, three of the answer
    assert window[0, 2, 10 - 6, 8, 8] == 1 and window[0, 3, 14 - 6, 8, 8] == 1
    assert not window[0, 1].any() and window[0, 2, 10, 8, 8] < 1
    assert torch.equal(window[0, 4:].sum(0), torch.ones(16, 16, 16))
    assert window[0, 5, 10 - 6, 8, 8] == 1 and window[0, 4, 0, 0, 0] == 1  # changed by the first


def test_the_answer_so_far_can_be_left_out() -> None:
    network = Network()
    inferer(earlier_answer=False)(volume((1, 10, 12, 10)), network)
    assert network.seen[-1].shape[1] == 4


def test_a_volume_smaller_than_the_window_is_refined() -> None:
    assert len(changed(volume((1, 20, 12, 10)), patch_size=(64, 64, 64))) > 60


def test_half_a_radius_of_the_window_bounds_the_change() -> None:
    away = changed(volume((1, 20, 12, 10)), refine_radius=100.0) - torch.tensor([20, 12, 10])
    assert away.amin() == -8 and away.amax() == 7  # the window of 16


def test_a_history_computes_only_new_clicks_and_takes_clicks_back() -> None:
    network, kept = Network(), inferer()
    kept.history = History()
    one, two = (1, 6, 6, 6), (2, 12, 12, 10)
    first = kept(volume(one), network)
    assert len(network.seen) == 2
    second = kept(volume(one, two), network)
    assert len(network.seen) == 3
    assert torch.equal(kept(volume(one), network), first)  # undo
    assert torch.equal(kept(volume(two, one), network), second)  # viewers sort by label
    assert not kept(volume(), network).argmax(1).any()
    assert len(network.seen) == 3
    assert torch.equal(inferer()(volume(one, two), Network()), second)
    kept(volume(two), network)
    assert len(network.seen) == 4


def test_a_long_history_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("med3dinsight_ext.training.click_inferer.MOST_STEPS", 2)
    network, kept = Network(), inferer()
    kept.history = History()
    calls = []
    for x in (6, 7, 6, 8, 6, 7, 6):  # of the automatic answer and of each new click
        kept(volume((1, x, 6, 6)), network)
        calls.append(len(network.seen))
    assert calls == [2, 3, 3, 4, 5, 6, 6]  # the third click is one too many: forgotten at the next


def test_a_click_is_a_disc_of_three_voxels_in_a_ball_of_sixteen_by_default() -> None:
    networks = [Network(), Network(), Network()]
    given: list[dict[str, Any]] = [{}, {"radius": 3.0, "refine_radius": 16.0, "shape": "disc"}]
    found = [
        ClickInferer(SimpleInferer(), NAMES, (40, 24, 20), **more)(volume((1, 20, 12, 10)), network)
        for more, network in zip([*given, {"radius": 6.0}], networks, strict=True)
    ]
    assert torch.equal(found[0], found[1])
    one, same, wider = (network.seen[-1] for network in networks)
    assert torch.equal(one, same) and wider[:, 2].sum() > one[:, 2].sum()
    away = found[0][0].argmax(0).nonzero() - torch.tensor([20, 12, 10])
    assert away.abs().amax(0)[0] == 16


def test_a_repeated_click_is_answered() -> None:
    once, twice = (inferer()(volume(*[(1, 6, 6, 6)] * n), Network()) for n in (1, 2))
    assert torch.equal(once, twice)


def test_mirrored_windows_swap_guidance_and_answer() -> None:
    network = Network()
    flips = FlipInferer(SlidingWindowInferer((16,) * 3, 1), (0,), ((1, 2),))
    found = ClickInferer(flips, NAMES, (16,) * 3)(volume((1, 20, 12, 10)), network)
    plain, mirrored = network.seen[-2:]
    order = [0, 1, 3, 2, 4, 6, 5]
    assert plain.shape[1] == 7 and torch.equal(mirrored, plain.flip(2)[:, order])
    assert found.shape == (1, 3, *SIZE)


def test_what_cannot_be_refined_is_named() -> None:
    with pytest.raises(ValueError, match="refine_radius must be at least 1 voxel, got 0.5"):
        inferer(refine_radius=0.5)
    with pytest.raises(ValueError, match="batch_size must be 1 for clicks, got 2"):
        inferer()(torch.zeros(2, 1, *SIZE), Network())


def test_a_clicked_voxel_has_its_class_whatever_the_network_says() -> None:
    clicks = (2, 6, 6, 6), (2, 30, 12, 10.4), (1, 20, 6, 6), (0, 20.4, 6, 6), (2, 30, 6, 6)
    clicks = *clicks, (1, 31, 6, 6)

    def stubborn(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(5 + 0 * x[:, :1], (0,) * 6 + (0, 2))

    scores = inferer(refine_radius=8.0)(volume(*clicks), stubborn)
    found = scores[0].argmax(0)
    assert found[6, 6, 6] == 2 and found[30, 12, 10] == 2
    assert found[20, 6, 6] == 0  # clicks of two classes on one voxel leave it to the network
    assert found[30, 6, 6] == 2 and found[31, 6, 6] == 1  # side by side, each has its own
    assert scores.softmax(1)[0, 2, 6, 6, 6] > 0.95


def test_voxels_as_unsure_as_a_click_follow_it_and_others_do_not() -> None:
    def doubtful(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[:, :1], (0,) * 6 + (0, 2))

    click = torch.tensor([19.0, 12.0, 10.0])
    image = volume((2, *click.tolist()))
    image[:] = 5.0
    image[:, :, 21:] = 60.0
    found = inferer(refine_radius=8.0)(image, doubtful)[0].argmax(0)
    away = torch.cdist(found.nonzero().float(), click[None])
    # a rise of 5 and the margin of 4 falls below 5 after 3.5 sqrt(2 log 1.8) voxels
    assert found[19, 12, 13] == 2 and 3.6 < away.max() < 3.8
    assert not found[21:].any()
