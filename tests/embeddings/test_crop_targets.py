from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialCrop, SpatialPad
from test_grids import AFFINES, CHANGES, SHAPE, brightness, decode_hu, pooled_teacher, ramp

from med3dinsight_ext.data.slicing import MODALITIES
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.embeddings.crop_targets import SampleCropsd
from med3dinsight_ext.embeddings.grids import GridStore

__all__ = ["brightness"]  # a fixture


def stored(tmp_path: Path, axis: int, affine: np.ndarray) -> tuple[dict, MetaTensor]:
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0", "1"], per_plane=8)
    (item,) = store.fill([ramp(tmp_path / "ct.nii.gz", axis, affine)])
    return item, read_volume(item["image"])


@pytest.mark.usefixtures("brightness")
@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"rotation"}))
@pytest.mark.parametrize("axis", range(3))
def test_targets_are_the_mean_of_what_the_crop_shows(
    axis: int, change: str, affine: str, tmp_path: Path
) -> None:
    item, volume = stored(tmp_path, axis, AFFINES[affine])
    image = CHANGES[change](volume + 1000)  # 0 is outside
    sampler = SampleCropsd("image", layers=2, slices=None)
    plane, position, means = sampler.crop_means({"image": image, "grids": item["grids"]})
    extent = np.array(SHAPE) * np.asarray(volume.pixdim)
    voxel = 300 / (SHAPE[axis] - 1)  # HU
    cell = 8 / 96 * extent.max() / np.asarray(volume.pixdim)[axis] * voxel  # the coarser one
    assert len(plane) >= 3 and means.shape == (len(plane), 2)
    for p, where, mean in zip(plane.tolist(), position.tolist(), means, strict=True):
        index = where * image.shape[p + 1] - 0.5
        low = min(max(int(index), 0), image.shape[p + 1] - 1)
        high = min(low + 1, image.shape[p + 1] - 1)
        share = min(max(index - low, 0), 1)
        near = image.as_tensor()[0].select(p, low) * (1 - share)
        seen = near + image.as_tensor()[0].select(p, high) * share
        expected = seen[seen > 850].mean() - 1000
        # Cells that the border cuts count whole or not at all; pictures are black behind it.
        fine, coarse = (decode_hu(mean) - expected).abs()
        assert fine < max(voxel, cell / 2) and coarse < max(voxel, cell / 2, 30)


@pytest.mark.usefixtures("brightness")
def test_the_part_outside_of_the_crop_does_not_count(tmp_path: Path) -> None:
    item, volume = stored(tmp_path, 0, AFFINES["isotropic"])
    sampler = SampleCropsd("image", layers=2, slices=None)
    found = []
    for start, end in ((0, 16), (15, 31)):
        crop = SpatialCrop(roi_start=(start, 0, 0), roi_end=(end, *SHAPE[1:]))(volume)
        plane, _, means = sampler.crop_means({"image": crop, "grids": item["grids"]})
        found.append(decode_hu(means[plane == 2]).mean())
    torch.testing.assert_close(found[1] - found[0], torch.tensor(150.0), atol=15, rtol=0)
    padded = SpatialPad((60, 60, 60))(volume)
    whole = sampler.crop_means({"image": volume, "grids": item["grids"]})[2]
    torch.testing.assert_close(
        sampler.crop_means({"image": padded, "grids": item["grids"]})[2], whole
    )


@pytest.mark.usefixtures("brightness")
def test_slices_are_drawn_padded_and_of_unit_length(tmp_path: Path) -> None:
    item, volume = stored(tmp_path, 1, AFFINES["anisotropic"])
    data = {"image": volume, "grids": item["grids"], "patient": "a", "modality": "CT"}
    sampler = SampleCropsd("image", layers=2, slices=5)
    sampler.set_random_state(0)
    one, two = sampler(data), sampler(data)
    assert one["image_target"].shape == (5, 2) and one["valid"].all()
    torch.testing.assert_close(one["image_target"].norm(dim=1), torch.ones(5))
    assert not torch.equal(one["position"], two["position"])
    padded = SampleCropsd("image", layers=2, slices=40)(data)
    shown = len(SampleCropsd("image", 2, None)(data)["plane"])
    assert padded["valid"].tolist() == [True] * shown + [False] * (40 - shown)
    assert shown > 5 and not padded["image_target"][shown:].any()
    assert len(padded["plane"]) == len(padded["has_text"]) == len(padded["patient_index"]) == 40
    far = SpatialCrop(roi_start=(0, 0, 0), roi_end=(1, 1, 1))(volume)
    for count, rows in ((5, 5), (None, 1)):
        found = SampleCropsd("image", 2, count)(data | {"image": far})
        assert found["image_target"].shape == (rows, 2) and found["plane"].shape == (rows,)
        assert not found["valid"].any() and not found["image_target"].any()


@pytest.mark.usefixtures("brightness")
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_modality_is_that_of_the_volume_where_the_list_has_none(
    modality: str, tmp_path: Path
) -> None:
    item = ramp(tmp_path / "a.nii.gz", 0, AFFINES["isotropic"])
    image = nib.load(item["image"])
    array = image.get_fdata(dtype=np.float32) + (300 if modality == "MR" else -300)
    nib.save(nib.Nifti1Image(array, image.affine), item["image"])
    store = GridStore(tmp_path / "s", pooled_teacher(), ["0", "1"], per_plane=4)
    (item,) = store.fill([item | {"modality": "auto"}])
    data = {**item, "image": read_volume(item["image"])}
    found = SampleCropsd("image", 2, 3)(data)["modality_index"]
    assert found.tolist() == [MODALITIES.index(modality)] * 3
