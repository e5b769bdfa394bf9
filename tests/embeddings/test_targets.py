from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from fakes import SIZE, FakeImages, FakeTexts, volume
from monai.data import MetaTensor
from monai.transforms import Compose, Flip, Rotate, Rotate90, Spacing, SpatialCrop, SpatialPad
from safetensors.torch import load_file

from med3dinsight_ext.captions.sources import TemplateCaptions
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.embeddings.targets import (
    PrepareSlices,
    SampleTargetsd,
    map_positions,
    patient_index,
    shuffle_captions,
)
from med3dinsight_ext.teachers.teacher import Teacher

KEYS = (
    "image", "plane", "position", "modality_index", "image_target", "text_target", "has_text",
    "valid", "patient_index",
)  # fmt: skip


def marked(plane: int, index: int) -> MetaTensor:
    """A volume that is 1 on one slice and 0 elsewhere."""
    array = torch.zeros(1, *SIZE)
    array.select(plane + 1, index).fill_(1)
    return MetaTensor(array, affine=torch.diag(torch.tensor([1.5, 1.0, 2.0, 1.0])))


MOVES = {
    "nothing": lambda v: v,
    "flip": Flip(spatial_axis=(0, 2)),
    "crop": SpatialCrop(roi_start=(2, 3, 4), roi_end=(11, 13, 19)),
    "pad": SpatialPad((17, 20, 25)),
    "turn": Rotate90(k=1, spatial_axes=(0, 2)),
    "all": Compose([Flip(0), SpatialPad((20, 20, 24)), Rotate90(1, (1, 2)),
                    SpatialCrop((1, 2, 3), (19, 20, 19))]),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(("plane", "index"), [(0, 5), (1, 8), (2, 9)])
def test_positions_move_with_the_volume_exactly(move: str, plane: int, index: int) -> None:
    source = marked(plane, index)
    copy = MOVES[move](source)
    position = torch.tensor([(index + 0.5) / SIZE[plane]])
    new_plane, new_position = map_positions(
        torch.tensor([plane]),
        position,
        torch.tensor(SIZE),
        source.affine,
        copy.affine,
        copy.shape[1:],
    )
    axis = int(new_plane) + 1
    lit = (copy.as_tensor().amax([a for a in (1, 2, 3) if a != axis])[0] == 1).nonzero().flatten()
    assert lit.tolist() == [round(float(new_position) * copy.shape[axis] - 0.5)]
    assert abs(float(new_position) * copy.shape[axis] - 0.5 - lit[0]) < 1e-4


def test_resampling_keeps_a_slices_place_in_mm() -> None:
    source = marked(2, 9)
    copy = Spacing((3.0, 3.0, 3.0))(source)
    _, position = map_positions(
        torch.tensor([2]),
        torch.tensor([9.5 / 20]),
        torch.tensor(SIZE),
        source.affine,
        copy.affine,
        copy.shape[1:],
    )
    voxel = float(position) * copy.shape[3] - 0.5
    assert abs(float(copy.affine[2, 2]) * voxel + float(copy.affine[2, 3]) - 2.0 * 9) < 1e-3


def test_a_tilted_volume_is_refused() -> None:
    source = marked(2, 9)
    copy = Rotate(0.2)(source)
    with pytest.raises(ValueError, match="got a rotated grid, in which slices tilt"):
        map_positions(
            torch.tensor([2]),
            torch.tensor([0.5]),
            torch.tensor(SIZE),
            source.affine,
            copy.affine,
            copy.shape[1:],
        )


def test_a_sheared_volume_is_refused_by_the_store_until_it_is_resampled(
    teacher: Teacher, tmp_path: Path
) -> None:
    item = volume(tmp_path / "tilted.nii.gz")
    image = nib.load(item["image"])
    sheared = image.affine.copy()
    sheared[1, 2] = 2.0 * math.tan(math.radians(15))  # z steps of 2 mm lean along y
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32), sheared), item["image"])
    store = Store(tmp_path / "s", teacher, TemplateCaptions(), 4)
    with pytest.raises(
        ValueError, match=r"got 15 degrees of shear \(gantry tilt\) in .*tilted.nii"
    ):
        store.fill([item])
    straight = Spacing((1.5, 1.0, 2.0))(read_volume(item["image"]))
    with pytest.raises(ValueError, match="got 15 degrees of shear"):  # stored by an earlier version
        about = torch.tensor([2]), torch.tensor([0.5]), torch.tensor(SIZE), torch.tensor(sheared)
        map_positions(*about, straight.affine, straight.shape[1:])
    nib.save(nib.Nifti1Image(straight[0].numpy(), straight.affine.numpy()), item["image"])
    assert sampled([item], store, 4)["valid"].all()


def test_an_oblique_volume_is_not_sheared(teacher: Teacher, tmp_path: Path) -> None:
    item = volume(tmp_path / "oblique.nii.gz")
    image = nib.load(item["image"])
    turned = tilted(0.3, 1.0).numpy() @ image.affine
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32), turned), item["image"])
    store = Store(tmp_path / "s", teacher, TemplateCaptions(), 4)
    assert sampled([item], store, 4)["valid"].all()


def tilted(angle: float, zoom: float) -> torch.Tensor:
    """Affine of voxels of 1 / zoom mm, turned about x."""
    affine = torch.eye(4, dtype=torch.float64) / zoom
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    affine[1:3, 1:3] = torch.tensor(turn, dtype=torch.float64) / zoom
    affine[3, 3] = 1
    return affine


@pytest.mark.parametrize("zoom", [0.25, 1.0, 4.0])
def test_a_tilt_below_a_voxel_in_a_thousand_is_rounding(zoom: float) -> None:
    about = torch.tensor([2]), torch.tensor([0.5]), torch.tensor(SIZE), torch.eye(4)
    plane, position = map_positions(*about, tilted(9e-4, zoom), SIZE)
    assert int(plane) == 2 and position.isfinite()
    with pytest.raises(ValueError, match="got a rotated grid"):
        map_positions(*about, tilted(1.1e-3, zoom), SIZE)


def sampled(items: list[dict], store: Store, slices: int | None, crop: bool = False) -> dict:
    item = store.fill(items)[0]
    image = read_volume(item["image"])
    if crop:
        image = SpatialCrop((0, 0, 0), (6, 8, 10))(image)
    sample = SampleTargetsd("image", store.embedding_dims, slices)
    sample.set_random_state(0)
    return sample({**item, "image": image})


def test_targets_of_an_uncropped_volume_are_the_stored_ones(
    items: list[dict], store: Store
) -> None:
    found = sampled(items, store, None)
    entry = load_file(found["targets"])
    assert torch.equal(found["plane"], entry["plane"].long())
    assert torch.allclose(found["position"], entry["position"])
    assert torch.equal(found["image_target"], entry["image"].float())


def test_a_crop_leaves_only_the_slices_it_holds_and_pads_the_rest(
    items: list[dict], store: Store
) -> None:
    found = sampled(items, store, 12, crop=True)
    valid = found["valid"]
    assert 0 < valid.sum() < 12
    assert ((found["position"][valid] > 0) & (found["position"][valid] < 1)).all()
    assert not found["image_target"][~valid].any() and not found["has_text"][~valid].any()


@pytest.mark.parametrize("end", ["low", "high", "high, flipped"])
def test_a_crop_moves_its_slices_and_drops_the_others(
    end: str, items: list[dict], store: Store
) -> None:
    item = store.fill(items)[0]
    entry = load_file(item["targets"])
    size, half = torch.tensor(SIZE), torch.tensor(SIZE) // 2
    start = torch.zeros(3).long() if end == "low" else half
    crop = SpatialCrop(roi_start=start.tolist(), roi_end=(start + half).tolist())
    image = crop(read_volume(item["image"]))
    if "flipped" in end:
        image = Flip((0, 1, 2))(image)
    plane = entry["plane"].long()
    index = (entry["position"] * size[plane]).long() - start[plane]
    if "flipped" in end:
        index = half[plane] - 1 - index
    kept = (index >= 0) & (index < half[plane])
    found = SampleTargetsd("image", store.embedding_dims, 16)({**item, "image": image})
    expected = sorted(
        zip(plane[kept].tolist(), ((index + 0.5) / half[plane])[kept].tolist(), strict=True)
    )
    valid = found["valid"]
    assert 0 < valid.sum() == len(expected) and len(valid) == 16
    pairs = zip(found["plane"][valid].tolist(), found["position"][valid].tolist(), strict=True)
    assert [(p, pytest.approx(t, abs=1e-5)) for p, t in sorted(pairs)] == expected
    assert ((found["position"] >= 0) & (found["position"] <= 1)).all()  # of the padding, too


@pytest.mark.parametrize("side", [-1, 1])
def test_slices_on_the_border_of_a_crop_are_inside(
    side: int, items: list[dict], store: Store, teacher: Teacher, tmp_path: Path
) -> None:
    every = Store(tmp_path / "every", teacher, TemplateCaptions(), per_plane=20)
    item = every.fill(items)[0]
    image = read_volume(item["image"])
    image.affine[:3, 3] += side * 0.5 * torch.tensor([1.5, 1.0, 2.0])
    found = SampleTargetsd("image", every.embedding_dims, None)({**item, "image": image})
    assert len(found["position"]) == sum(SIZE)
    on_it = (found["position"] - (0 if side > 0 else 1)).abs() < 1e-6
    assert on_it.sum() == 3 and found["position"][on_it].frac().eq(0).any()


def test_an_oriented_file_gives_the_same_targets(teacher: Teacher, tmp_path: Path) -> None:
    found = []
    for codes in ("RAS", "LPS", "SRA"):
        item = volume(tmp_path / f"{codes}.nii.gz", codes=codes)
        store = Store(tmp_path / "s", teacher, TemplateCaptions(), 4)
        found.append(sampled([item], store, None))
    for other in found[1:]:
        assert torch.allclose(other["image_target"], found[0]["image_target"], atol=1e-3)
        assert torch.allclose(other["position"], found[0]["position"])


def test_a_crop_without_a_stored_slice_has_invalid_rows_and_a_volume_is_an_error(
    items: list[dict], store: Store
) -> None:
    item = store.fill(items)[0]
    image = MetaTensor(torch.zeros(1, 2, 2, 2), affine=torch.diag(torch.tensor([1.5, 1, 2, 1.0])))
    image.affine[:3, 3] = -500
    found = SampleTargetsd("image", store.embedding_dims, 3)({**item, "image": image})
    assert found["image_target"].shape == (3, 6) and not found["image_target"].any()
    assert not found["valid"].any() and not found["has_text"].any()
    with pytest.raises(ValueError, match="raise per_plane or patch_size"):
        SampleTargetsd("image", store.embedding_dims, None)({**item, "image": image})


def test_the_control_hides_the_volume_from_the_student_alone(
    items: list[dict], store: Store
) -> None:
    found = sampled(items, store, 4)
    batch = {key: found[key][None] for key in KEYS}
    shown, targets, question, _ = PrepareSlices(blank=True)(batch)
    assert not shown.any() and targets.volume.any()
    assert not isinstance(shown, MetaTensor) and torch.equal(question[0], targets.plane)


def test_volumes_of_one_patient_have_one_number(items: list[dict], store: Store) -> None:
    """By the item's patient; without one each file is its own."""
    named = [item | {"patient": name} for item, name in zip(items, "aab", strict=True)]
    numbers = []
    for ready in (store.fill(named), store.fill(items)):
        sample = SampleTargetsd("image", store.embedding_dims, 4)
        found = [sample({**i, "image": read_volume(i["image"])})["patient_index"] for i in ready]
        assert all(len(one) == 4 and len(one.unique()) == 1 for one in found)
        numbers.append([int(one[0]) for one in found])
    (a, again, b), alone = numbers
    assert a == again != b and len(set(alone)) == 3
    unknown = [
        {**item, "patient": name} for item, name in zip(items, ("", None, "NA"), strict=True)
    ]
    assert [int(patient_index(item, "image")) for item in unknown] == [
        int(patient_index(item, "image")) for item in items
    ]


def test_a_prepared_batch_has_each_target_under_its_name(items: list[dict], store: Store) -> None:
    found = sampled(items, store, 4)
    batch = {key: found[key][None] for key in KEYS}
    shown, targets, (plane, position), more = PrepareSlices()(batch)
    assert torch.equal(shown, batch["image"].as_tensor()) and more == {}
    assert torch.equal(plane, batch["plane"]) and torch.equal(position, batch["position"])
    for name, key in {
        "image": "image_target",
        "text": "text_target",
        "has_text": "has_text",
        "valid": "valid",
        "plane": "plane",
        "position": "position",
        "modality": "modality_index",
        "patient": "patient_index",
    }.items():
        assert getattr(targets, name).data_ptr() == batch[key].data_ptr(), name
    assert torch.equal(targets.volume, shown)


class Few(TemplateCaptions):
    """A text for the first slices alone."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def caption(self, item: dict, plane: torch.Tensor, position: torch.Tensor) -> list[str | None]:
        names = [f"{'e' * (i + 1)} {'a' * (i % 3)}" for i in range(self.count)]
        return [*names, *[None] * (len(plane) - self.count)]


@pytest.mark.parametrize(
    ("captioned", "slices", "expected"),
    [(6, 4, 2), (6, 5, 3), (6, 1, 1), (11, 6, 5), (1, 6, 1), (9, 12, 9)],
)
def test_half_of_the_slices_have_a_caption_and_more_only_where_others_run_out(
    captioned: int, slices: int, expected: int, items: list[dict], teacher: Teacher, tmp_path: Path
) -> None:
    store = Store(tmp_path / "s", teacher, Few(captioned), per_plane=4)  # 12 slices
    found = sampled(items, store, slices)
    assert int(found["has_text"].sum()) == expected and found["valid"].all()
    entry = load_file(found["targets"])
    place = {
        (int(p), round(float(t), 4)): row
        for row, (p, t) in enumerate(zip(entry["plane"], entry["position"], strict=True))
    }
    rows = [
        place[int(p), round(float(t), 4)]
        for p, t in zip(found["plane"], found["position"], strict=True)
    ]
    assert len(set(rows)) == slices
    for i, row in enumerate(rows):
        assert torch.equal(found["image_target"][i], entry["image"][row].float())
        if found["has_text"][i]:
            text = entry["text"][entry["text_row"].tolist().index(row)].float()
            assert torch.equal(found["text_target"][i], text)
        else:
            assert not found["text_target"][i].any()


def test_targets_without_a_text_space_have_texts_of_no_length(
    items: list[dict], teacher: Teacher, tmp_path: Path
) -> None:
    item = Store(tmp_path / "s", teacher, Few(0), per_plane=4).fill(items)[0]
    found = SampleTargetsd("image", {"image": 6})({**item, "image": read_volume(item["image"])})
    assert found["text_target"].shape == (16, 0) and not found["has_text"].any()


def test_what_cannot_be_sampled_is_named(items: list[dict], store: Store) -> None:
    with pytest.raises(TypeError, match="min_similarity must be a number or None, got '0.2'"):
        SampleTargetsd("image", {"joint": 6}, min_similarity="0.2")
    with pytest.raises(ValueError, match="slices must be at least 1, got 0"):
        SampleTargetsd("image", {"joint": 6}, 0)
    with pytest.raises(TypeError, match="image must be a MetaTensor, got Tensor"):
        SampleTargetsd("image", store.embedding_dims, 1)({"image": torch.zeros(1, 2, 3, 4)})


def texts(items: list[dict], embedding_dims: dict[str, int]) -> list[torch.Tensor]:
    """The text targets of whole volumes."""
    sample = SampleTargetsd("image", embedding_dims, None)
    return [sample({**i, "image": read_volume(i["image"])})["text_target"] for i in items]


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_share_of_the_captions_changes_places(
    share: float, teacher: Teacher, items: list[dict], tmp_path: Path
) -> None:
    store = Store(tmp_path / "s", teacher, Numbered(), per_plane=4)
    ready = store.fill(items)
    before = torch.cat(texts(ready, store.embedding_dims))
    after = torch.cat(texts(shuffle_captions(ready, share, seed=1), store.embedding_dims))
    changed = (before - after).abs().amax(1) > 1e-4
    assert int(changed.sum()) == round(share * len(before))
    assert torch.equal(*(t.sort(0).values for t in (before, after))), "a caption was lost"


def test_shuffling_is_seeded_and_none_is_none(items: list[dict], store: Store) -> None:
    ready = store.fill(items)
    assert shuffle_captions(ready, 0.5, 3) == shuffle_captions(ready, 0.5, 3)
    assert shuffle_captions(ready, 0.5, 3) != shuffle_captions(ready, 0.5, 4)
    assert shuffle_captions(ready, 0.0) == ready


@pytest.mark.parametrize("share", [-0.1, 1.5, 20, "0.2"])
def test_a_share_beyond_one_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match=rf"share must lie in \[0, 1\], got {share}"):
        shuffle_captions([], share)


def test_one_caption_alone_changes_places_with_another(items: list[dict], store: Store) -> None:
    ready = store.fill(items)  # 36 captions
    found = [
        place for item in shuffle_captions(ready, 0.03) for place in item["texts_from"].items()
    ]
    assert len(found) == 2
    assert shuffle_captions(ready, 0.03) == shuffle_captions(ready, 0.03, 0)


def test_captions_unlike_their_slice_are_left_out(items: list[dict], tmp_path: Path) -> None:
    teacher = Teacher(FakeImages(), Alike(), joint=True)
    store = Store(tmp_path / "s", teacher, Numbered(), per_plane=4)
    item = store.fill(items)[0]
    entry = load_file(item["targets"])
    similarity = (entry["image"].float() * entry["text"].float()).sum(1)
    bar = float(similarity.median())
    sample = SampleTargetsd("image", store.embedding_dims, None, min_similarity=bar)
    found = sample({**item, "image": read_volume(item["image"])})
    assert found["has_text"].tolist() == (similarity >= bar).tolist()
    assert 0 < found["has_text"].sum() < len(similarity)
    [shuffled] = shuffle_captions([item], 1.0)  # the bar is for a slice's own caption
    other = sample({**shuffled, "image": read_volume(item["image"])})
    assert torch.equal(other["has_text"], found["has_text"])
    assert not torch.equal(other["text_target"], found["text_target"])


def test_a_similarity_bar_needs_one_space(store: Store) -> None:
    with pytest.raises(ValueError, match="min_similarity must be None, got 0.2: .* two spaces"):
        SampleTargetsd("image", store.embedding_dims, min_similarity=0.2)


class Numbered(TemplateCaptions):
    """Another text for each slice."""

    def caption(self, item: dict, plane: torch.Tensor, position: torch.Tensor) -> list[str | None]:
        name = "abcdefghijklmnopqrstuvwxyz"[int(Path(item["image"]).name[0]) * 3 :]
        return [f"{'e' * (i + 1)}{name[:i]}" for i in range(len(plane))]


class Alike(FakeTexts):
    """Texts in the space of the images."""

    def embed(self, texts: list[str]) -> torch.Tensor:
        return super().embed(texts)[:, :6]
