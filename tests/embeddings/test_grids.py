from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from fakes import FakeTexts
from monai.data import MetaTensor
from monai.transforms import (
    Affine,
    Compose,
    Flip,
    Rotate90,
    ScaleIntensityRange,
    Spacing,
    SpatialCrop,
    Transform,
)
from safetensors.torch import load_file

from med3dinsight_ext.data import slicing
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.embeddings import grids as grids_module
from med3dinsight_ext.embeddings.grid_targets import PrepareGrids, SampleGridsd
from med3dinsight_ext.embeddings.grid_volumes import codes_on_grid
from med3dinsight_ext.embeddings.grids import GridStore, cell_voxels
from med3dinsight_ext.embeddings.whitening import STEP, Whitening, decode, fit_whitening
from med3dinsight_ext.models.pyramid import sample_points
from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.teachers.towers import ImageTower

SHAPE = (31, 26, 22)
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([2.0, 1.5, 3.0]), [10, -20, 5]
)
AFFINES = {
    "isotropic": np.diag([2.0, 2.0, 2.0, 1.0]),
    "anisotropic": np.diag([1.5, 1.0, 4.0, 1.0]),
    "left to right": np.diag([-2.0, -1.0, 3.0, 1.0]),
    "oblique": OBLIQUE,
}
CHANGES: dict[str, Transform] = {
    "none": Compose([]),
    "flip": Flip(0),
    "flips": Flip([1, 2]),
    "crop": SpatialCrop(roi_start=(5, 3, 4), roi_end=(24, 20, 19)),
    "quarter turn": Rotate90(1, (0, 1)),
    "spacing": Spacing((2.5, 2.0, 1.8), mode="bilinear"),
    "rotation": Affine(rotate_params=(0.3, 0.1, -0.2), padding_mode="zeros", image_only=True),
    "all": Compose([
        Spacing((2.0, 1.7, 2.2)), Flip(1), SpatialCrop(roi_start=(4, 3, 2), roi_end=(16, 15, 14))
    ]),
}  # fmt: skip


class PooledPixels(ImageTower):
    """Two layers whose cells hold the mean of the pixels under them."""

    size, mean, std, fingerprint = 96, (0.0,) * 3, (1.0,) * 3, "pooled-pixels"

    def load(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.AvgPool2d(2))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).mean((2, 3))


def ramp(path: Path, axis: int, affine: np.ndarray) -> dict:
    """A CT whose HU, -100 to 200, are a linear function of one voxel axis."""
    along = np.linspace(-100, 200, SHAPE[axis]).reshape([-1 if a == axis else 1 for a in range(3)])
    nib.save(nib.Nifti1Image(np.broadcast_to(along, SHAPE).astype(np.float32), affine), path)
    return {"image": str(path), "modality": "CT"}


def pooled_teacher() -> Teacher:
    return Teacher(PooledPixels(), FakeTexts())


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are the soft-tissue window alone, 0.125 a standard deviation, around the middle."""

    def first_channel(features: torch.Tensor, *_: object) -> Whitening:
        mean = torch.zeros(3, 10, features.shape[1])
        mean[:, 0, 0] = 0.5
        basis = torch.zeros(features.shape[1], 1)
        basis[0] = 8
        return Whitening(mean, torch.ones(features.shape[1]), basis, torch.ones(2))

    monkeypatch.setattr(grids_module, "fit_whitening", first_channel)


@pytest.mark.usefixtures("brightness")
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("axis", range(3))
def test_codes_lie_where_the_student_sees_what_the_teacher_saw(
    axis: int, change: str, affine: str, tmp_path: Path
) -> None:
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0", "1"], per_plane=8)
    (item,) = store.fill([ramp(tmp_path / "ct.nii.gz", axis, AFFINES[affine])])
    image = CHANGES[change](read_volume(item["image"]) + 1000)  # 0 is outside
    sampler = SampleGridsd("image", layers=2, points=400, threshold=850)
    sampler.set_random_state(0)
    batch = sampler({"image": image, "grids": item["grids"]})
    volume = read_volume(item["image"])
    spacing = np.asarray(volume.pixdim)
    step = np.linalg.solve(np.asarray(volume.affine), np.asarray(image.affine))
    compared = 0
    for n, stride in enumerate((4, 8)):
        points = batch["points"][n][batch[f"valid_{n}"]]
        teacher = decode_hu(batch[f"codes_{n}"][batch[f"valid_{n}"]])
        seen = sample_points(image.as_tensor()[None], points[None], image.shape[1:])[0] - 1000
        # A cell that the border of the volume or of the crop cuts is a mean of less.
        mm = stride / 2 / PooledPixels.size * (np.array(SHAPE) * spacing).max()
        stored = torch.as_tensor(nib.affines.apply_affine(step, points.numpy()))
        whole = inside(stored, SHAPE, mm / spacing + 0.5) & inside(points, image.shape[1:], 1.0)
        error = (teacher - seen)[whole].abs() / (300 / (SHAPE[axis] - 1))
        compared += len(error)
        assert not len(error) or error.max() < 0.5
    assert compared > 20


def inside(points: torch.Tensor, size: Sequence[int], margin: float | np.ndarray) -> torch.Tensor:
    margin = torch.as_tensor(margin)
    return ((points >= margin) & (points <= torch.tensor(size) - 1 - margin)).all(1)


def decode_hu(codes: torch.Tensor) -> torch.Tensor:
    return (codes / 8) * 400 + 40


@pytest.mark.parametrize("plane", range(3))
def test_cells_are_where_cut_shows_them(plane: int) -> None:
    axes = torch.meshgrid(*(torch.arange(n).float() for n in SHAPE), indexing="ij")
    spacing, position = (1.5, 2.0, 3.0), torch.tensor([0.2, 0.7])
    shown = slicing.cut(torch.stack(axes), spacing, plane, position, 96)
    cells = torch.nn.functional.avg_pool2d(shown, 4).flatten(2).mT
    expected = cell_voxels(SHAPE, spacing, plane, position, 24, 96)
    inside = ((expected > 1) & (expected < torch.tensor(SHAPE) - 2)).all(-1)
    assert inside.sum() > 200
    assert (cells.double() - expected)[inside].abs().max() < 0.1


def test_whitened_codes_have_unit_variance_and_no_position() -> None:
    torch.manual_seed(0)
    fraction, plane = torch.rand(4000, 3), torch.randint(3, (4000,))
    signal = torch.randn(4000, 3) @ torch.randn(3, 12)
    features = 5 * fraction[:, [0]] ** 2 + plane[:, None] + signal
    fitted = fit_whitening(features, plane, fraction, 8)
    codes = decode(fitted.encode(features, plane, fraction))
    assert codes.shape == (4000, 3)  # the rank of what is left
    assert torch.allclose(codes.mT.cov(), torch.eye(3), atol=0.05)
    assert abs(np.corrcoef(codes[:, 0], fraction[:, 0])[0, 1]) < 0.02
    assert 0 < fitted.explained[0] < 1 and fitted.explained[1] > 0.999


def test_int8_codes_are_close() -> None:
    fitted = Whitening(torch.zeros(3, 10, 1), torch.ones(1), torch.ones(1, 1), torch.ones(2))
    values = torch.linspace(-6, 6, 50)[:, None]
    found = decode(fitted.encode(values, torch.zeros(50).long(), torch.rand(50, 3)))
    assert (found - values.clamp(-4, 4)).abs().max() <= 0.5 / STEP + 1e-6


@pytest.fixture
def items(tmp_path: Path) -> list[dict]:
    return [
        ramp(tmp_path / f"{i}.nii.gz", i, AFFINES["isotropic"] * [[1 + i / 10]] * 4)
        if i < 3
        else ramp(tmp_path / f"{i}.nii.gz", 0, OBLIQUE)
        for i in range(4)
    ]


def test_only_what_is_missing_is_made(items: list[dict], tmp_path: Path) -> None:
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0"], per_plane=3)
    done = store.fill(items)
    assert store.dims == [load_file(done[0]["grids"])["codes.0"].shape[2]]
    Path(done[1]["grids"]).unlink()

    class Asleep(PooledPixels):
        def embed(self, pixels: torch.Tensor) -> torch.Tensor:
            calls.append(len(pixels))
            return super().embed(pixels)

    calls: list[int] = []
    again = GridStore(tmp_path / "s", Teacher(Asleep(), FakeTexts()), ["0"], per_plane=3)
    again.teacher.image.__class__.__name__ = "PooledPixels"
    assert [i["grids"] for i in again.fill(items)] == [i["grids"] for i in done]
    slices = len(load_file(done[1]["grids"])["plane"])
    assert sum(calls) == 1 + slices  # the size check and one volume


def test_a_missing_volume_is_left_out(items: list[dict], tmp_path: Path) -> None:
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0"], per_plane=3)
    Path(items[0]["image"]).unlink()
    with pytest.raises(ValueError, match=rf"1 bad of {len(items)}.*\n.*{items[0]['image']}"):
        store.fill(items)
    found = store.fill(items, skip_bad=True)
    assert [item["image"] for item in found] == [item["image"] for item in items[1:]]


def test_new_volumes_leave_the_others_grids(items: list[dict], tmp_path: Path) -> None:
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0"], per_plane=3)
    first = store.fill(items[:2])
    assert store.fill(items)[:2] == first
    elsewhere = GridStore(tmp_path / "t", pooled_teacher(), ["0"], per_plane=3).fill(items[2:])
    names = {Path(item["grids"]).name for item in store.fill(items)}
    assert not names & {Path(item["grids"]).name for item in elsewhere}  # another whitening


@pytest.mark.parametrize("change", [{"codes": 2}, {"layers": ["1"]}, {"seed": 1}, {"per_plane": 4}])
def test_settings_change_the_key(change: dict, items: list[dict], tmp_path: Path) -> None:
    kept = {"layers": ["0"], "per_plane": 3}
    one = GridStore(tmp_path / "s", pooled_teacher(), **kept).fill(items[:2])
    two = GridStore(tmp_path / "s", pooled_teacher(), **{**kept, **change}).fill(items[:2])
    assert not {i["grids"] for i in one} & {i["grids"] for i in two}


def test_a_limit_on_size_is_kept(items: list[dict], tmp_path: Path) -> None:
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0"], per_plane=3, limit_gb=1e-6)
    with pytest.raises(ValueError, match="grids must fit into limit_gb=1e-06, got up to"):
        store.fill(items)


def test_items_without_grids_are_refused(items: list[dict]) -> None:
    with pytest.raises(ValueError, match="pass them through GridStore.fill"):
        SampleGridsd("image", 1)({"image": read_volume(items[0]["image"])})


def test_a_batch_holds_codes_and_points_of_each_layer(items: list[dict], tmp_path: Path) -> None:
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0", "1"], codes=2, per_plane=4)
    scale = ScaleIntensityRange(-200, 300, 0, 1)
    sampler = SampleGridsd("image", layers=2, points=5000)
    batch = [
        sampler({"image": scale(read_volume(i["image"])), "grids": i["grids"]})
        for i in store.fill(items[:2])
    ]
    crop = {
        k: torch.stack([torch.as_tensor(b[k]) for b in batch]) for k in batch[0] if k != "grids"
    }
    volume, targets, (points,), _ = PrepareGrids()(crop)
    assert type(volume) is not MetaTensor and volume.shape == (2, 1, *SHAPE)
    assert points.shape == (2, 2, 5000, 3)
    assert [tuple(c.shape) for c in targets.codes] == [(2, 5000, d) for d in store.dims]
    for valid, codes in zip(targets.valid, targets.codes, strict=True):
        assert 0 < valid.sum() < valid.numel() and codes[~valid].abs().max() == 0


@pytest.mark.usefixtures("brightness")
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("change", ["none", "flips", "rotation", "all"])
@pytest.mark.parametrize("axis", range(3))
def test_codes_on_a_voxel_grid_are_what_the_voxels_show(
    axis: int, change: str, affine: str, tmp_path: Path
) -> None:
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0"], per_plane=10)
    (item,) = store.fill([ramp(tmp_path / "ct.nii.gz", axis, AFFINES[affine])])
    volume = read_volume(item["image"])
    image = CHANGES[change](volume + 1000)
    codes = codes_on_grid(item["grids"], image.affine, image.shape[1:])
    assert codes.shape == (len(load_file(item["grids"])["plane"].unique()), *image.shape[1:])
    voxels = torch.stack(torch.meshgrid(*map(torch.arange, image.shape[1:]), indexing="ij"), -1)
    step = np.linalg.solve(np.asarray(volume.affine), np.asarray(image.affine))
    stored = torch.as_tensor(nib.affines.apply_affine(step, voxels.flatten(0, 2).numpy()))
    whole = inside(stored, SHAPE, 5.0) & (image.as_tensor().flatten() > 850)
    others = [p for p in range(3) if p != axis]  # along the ramp no slice shows anything
    assert whole.sum() > 100
    seen = image.as_tensor().flatten()[whole] - 1000
    for code in decode_hu(codes.float()).flatten(1)[:, whole]:
        assert (code - seen).abs().max() / (300 / (SHAPE[axis] - 1)) < 0.6
    assert len(codes) == len(others)


def test_a_whitening_of_fewer_or_of_unlike_volumes_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def noise(name: str, scale: float) -> dict:
        array = scale * np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / name)
        return {"image": str(tmp_path / name), "modality": "CT"}

    few, many = noise("a.nii.gz", 10), noise("b.nii.gz", 200)
    for items in ([few], [few, many]):
        caplog.clear()
        GridStore(tmp_path / "s", pooled_teacher(), ["1"], per_plane=4).fill(items)
    (fewer, clipped) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "whitened by 1 volumes of an earlier run, instead of 2 of these; remove" in fewer
    assert "of the codes are clipped: their whitening was fitted on unlike volumes" in clipped
    for part in (fewer, clipped):
        path = next(Path(word) for word in part.split() if "whitening-" in word)
        path.unlink(missing_ok=True)
    caplog.clear()
    GridStore(tmp_path / "s", pooled_teacher(), ["1"], per_plane=4).fill([few, many])
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


class NotFinite(PooledPixels):
    """Gives NaN for slices of which it is told."""

    broken = False

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().embed(pixels * torch.nan if self.broken else pixels)


@pytest.mark.parametrize("first", [True, False])  # the whitening is fitted on it, or was before
def test_features_that_are_not_finite_are_of_a_bad_volume(first: bool, tmp_path: Path) -> None:
    items = [ramp(tmp_path / f"{axis}.nii.gz", axis, np.eye(4)) for axis in range(3)]
    tower = NotFinite()
    read = GridStore._slices

    def slices(store: GridStore, item: dict) -> grids_module.Slices:
        tower.broken = item is items[1]
        return read(store, item)

    store = GridStore(tmp_path / "s", Teacher(tower, FakeTexts()), ["0", "1"], 2, per_plane=8)
    if not first:
        store.fill(items[:1])
    store._slices = slices.__get__(store)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"1 bad of 3(.|\n)*1\.nii\.gz.* got NaN .* float32"):
        store.fill(items)
    kept = store.fill(items, skip_bad=True)
    assert [item["image"] for item in kept] == [items[0]["image"], items[2]["image"]]
    assert not store.path(items[1]).exists()


def test_broken_files_of_a_store_are_named(tmp_path: Path) -> None:
    item = ramp(tmp_path / "ct.nii.gz", 0, np.eye(4))
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0"], 2, per_plane=8)
    (filled,) = store.fill([item])
    path = Path(filled["grids"])
    path.write_bytes(path.read_bytes()[:100])
    volume = read_volume(item["image"])
    wrong = f"grids must be readable, got {path}: .*; delete it, and the next run makes it again"
    with pytest.raises(ValueError, match=wrong):
        SampleGridsd("image", layers=1, points=4)({"image": volume, "grids": str(path)})
    with pytest.raises(ValueError, match=wrong):
        codes_on_grid(path, volume.affine, volume.shape[1:])
    (whitening,) = (tmp_path / "s" / "grids").glob("whitening-*")
    whitening.write_bytes(b"")
    with pytest.raises(ValueError, match=f"whitening must be readable, got {whitening}"):
        store.fill([item])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"per_plane": 0}, "per_plane must be a whole number from 1, got 0"),
        ({"per_plane": 2.5}, "per_plane must be a whole number from 1, got 2.5"),
        ({"planes": []}, "planes must name at least one plane"),
        ({"layers": []}, "layers must name at least one layer"),
    ],
)
def test_settings_that_give_no_slice_are_not_blamed_on_volumes(
    settings: dict, match: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        GridStore(tmp_path, pooled_teacher(), **settings)
