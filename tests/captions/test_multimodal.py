"""Prompts, pictures and settings of multimodal captioners."""

from __future__ import annotations

import pytest
import torch
from fakes import FakeMllm


def test_the_prompt_holds_modality_plane_depth_spacing_and_body_part() -> None:
    prompt = FakeMllm().slice_prompt(
        {"modality": "CT", "body_part": "thigh"}, 2, 0.9, [1.0, 2.0, 5.0]
    )
    for word in ("axial", "CT", "thigh", "uppermost", "1 x 2 mm"):
        assert word in prompt
    assert "body" in FakeMllm().slice_prompt({"modality": "CT"}, 0, 0.1, [1, 1, 1])


@pytest.mark.parametrize("prompt", ["{patient} in {plane}", "{", "{depth:d}", "{}"])
def test_a_prompt_with_an_unknown_field_is_an_error(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt must use no field but modality"):
        FakeMllm(prompt=prompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"per_plane": 0}, "per_plane must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"ct_window": "liver"}, "ct_window must be one of soft tissue, lung, bone or all"),
    ],
)
def test_settings_out_of_range_are_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FakeMllm(**change)


def test_ct_is_shown_in_the_chosen_window() -> None:
    shown = torch.stack([torch.full((4, 5, 6), v) for v in (0.2, 0.6, 1.0)])
    grey = FakeMllm(ct_window="lung").pictures(shown, [1, 1, 1], 2, torch.tensor([0.5]))[0]
    colour = FakeMllm(ct_window="all").pictures(shown, [1, 1, 1], 2, torch.tensor([0.5]))[0]
    assert grey.mode == "L" and grey.size == (16, 16) and grey.getpixel((8, 8)) == 153
    assert colour.mode == "RGB" and colour.getpixel((8, 8)) == (51, 153, 255)


def test_captioned_rows_are_spread_evenly_over_a_plane() -> None:
    plane = torch.tensor([0] * 6 + [2] * 2)
    assert FakeMllm(per_plane=3).selected_rows(plane) == [1, 3, 5, 6, 7]


def test_model_calls_are_limited_by_per_plane_and_slices() -> None:
    assert FakeMllm(per_plane=3).max_calls([6, 0, 2]) == 5
