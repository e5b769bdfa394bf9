import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flip, Rotate, Rotate90, Spacing, SpatialCrop, SpatialPad
from safetensors.torch import load_file

from med3dinsight_ext import store as stores
from med3dinsight_ext.captions import FileCaptions, TemplateCaptions
from med3dinsight_ext.store import HashMemo, PrepareSlices, SampleTargetsd, Store, map_positions
from med3dinsight_ext.teacher import Teacher

SIZE = (12, 16, 20)


def volume(path: Path, seed: int = 0, codes: str = "RAS") -> dict:
    """A random volume on disk and its item."""
    array = np.random.default_rng(seed).random(SIZE, dtype=np.float32)
    image = nib.Nifti1Image(array, np.diag([1.5, 1.0, 2.0, 1.0]))
    turn = nib.orientations.axcodes2ornt(tuple(codes))
    nib.save(image.as_reoriented(turn), path)
    return {"image": str(path), "modality": "MR"}


@pytest.fixture
def items(tmp_path: Path) -> list[dict]:
    return [volume(tmp_path / f"{i}.nii.gz", i) for i in range(3)]


@pytest.fixture
def store(tmp_path: Path, teacher: Teacher) -> Store:
    return Store(tmp_path / "store", teacher, TemplateCaptions(), per_plane=4)


def test_an_entry_holds_what_the_teacher_says_of_its_slices(
    items: list[dict], store: Store
) -> None:
    done = store.fill(items)[0]
    entry = load_file(done["targets"])
    assert entry["image"].shape == (12, 6) and entry["text"].shape == (12, 8)
    about = json.loads(Path(done["targets"]).with_suffix(".json").read_text())
    again = store.teacher.encode_text([row["caption"] for row in about["slices"]])
    assert torch.allclose(entry["text"].float(), again, atol=1e-3)
    assert about["teacher"] == store.teacher.fingerprint and about["modality"] == "MR"


def test_a_full_store_never_wakes_the_teacher(
    items: list[dict], store: Store, tmp_path: Path
) -> None:
    store.fill(items)
    assert store.spaces == {"image": 6, "text": 8}

    class Asleep(Teacher):
        def encode_image(self, slices: torch.Tensor) -> torch.Tensor:
            raise AssertionError("woken")

        encode_text = encode_image  # type: ignore[assignment]

    again = Store(tmp_path / "store", Asleep(*store.teacher._towers), TemplateCaptions(), 4)
    assert [Path(i["targets"]).exists() for i in again.fill(items)] == [True] * 3
    assert again.spaces == {"image": 6, "text": 8}


@pytest.mark.parametrize("change", ["file", "modality", "captions", "per_plane", "seed", "teacher"])
def test_whatever_changes_a_value_changes_the_key(
    change: str, items: list[dict], store: Store, teacher: Teacher, tmp_path: Path
) -> None:
    before = store.path(items[0])
    item, captioner, per_plane, seed = items[0], TemplateCaptions(), 4, 0
    if change == "file":
        volume(tmp_path / "0.nii.gz", seed=9)
    if change == "modality":
        item = {**item, "modality": "PET"}
    if change == "captions":
        captioner = TemplateCaptions("{plane}")
    if change == "per_plane":
        per_plane = 5
    if change == "seed":
        seed = 1
    if change == "teacher":
        teacher.image.fingerprint = "other"
    other = Store(tmp_path / "store", teacher, captioner, per_plane, seed)
    assert other.path(item) != before


def test_a_copy_or_a_touched_file_is_no_new_volume(items: list[dict], store: Store) -> None:
    before = store.path(items[0])
    os.utime(items[0]["image"], (1, 1))
    assert store.path(items[0]) == before


def test_hashes_are_remembered_and_a_cut_line_is_survived(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("x")
    memo = HashMemo(tmp_path / "files.jsonl")
    digest = memo(file)
    memo.save()
    with (tmp_path / "files.jsonl").open("a") as out:
        out.write('["half')
    again = HashMemo(tmp_path / "files.jsonl")
    assert list(again._known.values()) == [digest]


def test_all_bad_volumes_are_named_at_once_and_good_ones_are_kept(
    items: list[dict], store: Store, tmp_path: Path
) -> None:
    Path(items[0]["image"]).write_bytes(b"no volume")
    nan = nib.Nifti1Image(np.full(SIZE, np.nan, np.float32), np.eye(4))
    nib.save(nan, items[1]["image"])
    with pytest.raises(ValueError, match=r"2 bad of 3.*skip_bad(.|\n)*0\.nii\.gz(.|\n)*1\.nii\.gz"):
        store.fill(items)
    assert [i["image"] for i in store.fill(items, skip_bad=True)] == [items[2]["image"]]


def test_a_store_of_only_bad_volumes_is_an_error_even_when_they_may_be_skipped(
    items: list[dict], store: Store
) -> None:
    Path(items[0]["image"]).write_bytes(b"no volume")
    with pytest.raises(ValueError, match="1 bad of 1"):
        store.fill(items[:1], skip_bad=True)


def test_a_killed_write_leaves_no_entry(
    items: list[dict], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(tensors: object, draft: Path) -> None:
        draft.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(stores, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        store.fill(items)
    monkeypatch.undo()
    assert not list(store.root.rglob("*.safetensors*"))
    assert all(load_file(i["targets"])["image"].isfinite().all() for i in store.fill(items))


def test_filling_twice_gives_the_same_values(
    items: list[dict], teacher: Teacher, tmp_path: Path
) -> None:
    once, twice = (
        load_file(Store(tmp_path / name, teacher, TemplateCaptions(), 4).fill(items)[0]["targets"])
        for name in ("a", "b")
    )
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)


def test_captioned_slices_are_embedded_beside_the_drawn_ones(
    items: list[dict], teacher: Teacher, tmp_path: Path
) -> None:
    rows = [{"image": "0.nii.gz", "plane": "axial", "index": 7, "caption": "a mass"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = Store(tmp_path / "s", teacher, FileCaptions(tmp_path / "c.jsonl"), per_plane=2)
    with_text, without = (load_file(i["targets"]) for i in store.fill(items)[:2])
    row = int(with_text["text_row"])
    assert (int(with_text["plane"][row]), float(with_text["position"][row])) == (2, 7.5 / 20)
    assert torch.allclose(with_text["text"].float(), teacher.encode_text(["a mass"]), atol=1e-3)
    assert "text" not in without and len(without["text_row"]) == 0


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
        torch.tensor([2]), torch.tensor([9.5 / 20]), torch.tensor(SIZE),
        source.affine, copy.affine, copy.shape[1:],
    )  # fmt: skip
    voxel = float(position) * copy.shape[3] - 0.5
    assert abs(float(copy.affine[2, 2]) * voxel + float(copy.affine[2, 3]) - 2.0 * 9) < 1e-3


def test_a_tilted_volume_is_refused() -> None:
    source = marked(2, 9)
    copy = Rotate(0.2)(source)
    with pytest.raises(ValueError, match="got a rotated grid, in which slices tilt"):
        map_positions(
            torch.tensor([2]), torch.tensor([0.5]), torch.tensor(SIZE),
            source.affine, copy.affine, copy.shape[1:],
        )  # fmt: skip


def sampled(items: list[dict], store: Store, slices: int | None, crop: bool = False) -> dict:
    from med3dinsight_ext.volumes import read_volume

    item = store.fill(items)[0]
    image = read_volume(item["image"])
    if crop:
        image = SpatialCrop((0, 0, 0), (6, 8, 10))(image)
    sample = SampleTargetsd("image", store.spaces, slices)
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


def test_an_oriented_file_gives_the_same_targets(teacher: Teacher, tmp_path: Path) -> None:
    found = []
    for codes in ("RAS", "LPS", "SRA"):
        item = volume(tmp_path / f"{codes}.nii.gz", codes=codes)
        store = Store(tmp_path / "s", teacher, TemplateCaptions(), 4)
        found.append(sampled([item], store, None))
    for other in found[1:]:
        assert torch.allclose(other["image_target"], found[0]["image_target"], atol=1e-3)
        assert torch.allclose(other["position"], found[0]["position"])


def test_a_crop_without_a_stored_slice_is_an_error(items: list[dict], store: Store) -> None:
    item = store.fill(items)[0]
    image = MetaTensor(torch.zeros(1, 2, 2, 2), affine=torch.diag(torch.tensor([1.5, 1, 2, 1.0])))
    image.affine[:3, 3] = -500
    with pytest.raises(ValueError, match="raise per_plane or patch_size"):
        SampleTargetsd("image", store.spaces)({**item, "image": image})


def test_the_control_hides_the_volume_from_the_student_alone(
    items: list[dict], store: Store
) -> None:
    found = sampled(items, store, 4)
    keys = ("image", "plane", "position", "image_target", "text_target", "has_text", "valid")
    batch = {k: found[k][None] for k in keys}
    shown, targets, question, _ = PrepareSlices(blank=True)(batch)
    assert not shown.any() and targets.volume.any()
    assert not isinstance(shown, MetaTensor) and torch.equal(question[0], targets.plane)
