import copy
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fakes import FakeTexts
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from running import free_port
from torch import nn

from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.embeddings.grids import GridStore
from med3dinsight_ext.losses.soft import SoftDiceCELoss
from med3dinsight_ext.models.voxel_head import fit_voxel_head
from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.teachers.towers import ImageTower
from med3dinsight_ext.training import soft_labels
from med3dinsight_ext.training.soft_labels import (
    NetworkLabels,
    SoftLabeld,
    SoftLabels,
    balance,
    unlabelled_items,
)


class Brightness(ImageTower):
    size, mean, std, fingerprint = 64, (0.0,) * 3, (1.0,) * 3, "brightness"

    def load(self) -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(4))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).mean((2, 3))


def ball(folder: Path, seed: int) -> dict:
    """A CT with a bright ball somewhere, and its label, on an uneven left-handed grid."""
    size, random = (30, 34, 24), np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    mask = np.linalg.norm(grid - random.uniform(0.4, 0.6, 3) * size, axis=-1) < 7
    affine = np.diag([-2.0, 2.0, 2.5, 1.0])
    image, label = folder / f"{seed}.nii.gz", folder / f"{seed}-label.nii.gz"
    array = (-100 + 200 * mask + 5 * random.standard_normal(size)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine), image)
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), label)
    return {"image": str(image), "label": str(label), "modality": "CT"}


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_soft_labels_find_what_the_labelled_cases_show(tmp_path: Path) -> None:
    cases = [ball(tmp_path, seed) for seed in range(4)]
    store = GridStore(tmp_path / "s", Teacher(Brightness(), FakeTexts()), ["0"], per_plane=20)
    items = store.fill(cases)
    maker = SoftLabels(tmp_path / "s", 2, (3.0, 3.0, 3.0), hidden=16)
    made = maker.fill(items[:2], items[2:])
    for case, item in zip(cases[2:], made, strict=True):
        image = read_volume(case["image"])
        data = {"image": image, "label": load(item["label"])}
        share = SoftLabeld("label", "image", 2)(data)["label"]
        truth = SoftLabeld("label", "image", 2)({**data, "label": load(case["label"])})["label"]
        assert share.shape == truth.shape == (2, *image.shape[1:])
        assert torch.equal(truth[1].bool(), image[0] > 0)
        assert dice(share[1] > 0.5, truth[1] > 0.5) > 0.75
    before = [Path(item["label"]).stat().st_mtime_ns for item in made]
    again = maker.fill(items[:2], items[2:])
    assert [Path(item["label"]).stat().st_mtime_ns for item in again] == before
    other = SoftLabels(tmp_path / "s", 2, (3.0, 3.0, 3.0), hidden=16, seed=1)
    assert other.fill(items[:2], items[2:3])[0]["label"] != made[0]["label"]


def one_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    items = json.loads((folder / "items.json").read_text())
    teacher = Teacher(Brightness(), FakeTexts())
    store = GridStore(folder / "s", teacher, ["0"], per_plane=20)
    encoded: list[str] = []  # images whose grids or soft labels are made here
    store_write, fitted = store._write, store._fit
    store._write = lambda item, path: (encoded.append(item["image"]), store_write(item, path))[1]  # type: ignore[method-assign]
    store._fit = lambda sample: (encoded.append("whitening"), fitted(sample))[1]  # type: ignore[method-assign]
    maker = SoftLabels(folder / "s", 2, (3.0, 3.0, 3.0), hidden=16)
    with_grids = store.fill(items)
    made = maker.fill(with_grids[:1], with_grids[1:])
    there = [Path(item["label"]).is_file() for item in made]
    (folder / f"{rank}.json").write_text(json.dumps([encoded, there, made]))
    dist.destroy_process_group()


def test_two_ranks_share_the_grids_and_wait_for_them(tmp_path: Path) -> None:
    cases = [ball(tmp_path, seed) for seed in range(4)]
    (tmp_path / "items.json").write_text(json.dumps(cases))
    mp.spawn(one_rank, (free_port(), tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    images = [case["image"] for case in cases]
    assert first[0] == ["whitening", *images[::2]] and second[0] == images[1::2]
    assert first[1] == second[1] == [True] * 3
    assert first[2] == second[2]
    assert len(list((tmp_path / "s" / "soft").iterdir())) == 3


def test_the_head_is_fitted_on_a_limited_number_of_voxels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_labels, "FIT_ROWS", 1000)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(soft_labels, "fit_voxel_head", lambda *given, **_: seen.append(given[:2]))
    items = [ball(tmp_path, seed) for seed in range(2)]
    items = GridStore(tmp_path / "s", Teacher(Brightness(), FakeTexts()), ["0"]).fill(items)
    SoftLabels(tmp_path / "s", 2, (3.0, 3.0, 3.0)).fit(items)
    features, labels = seen[0]
    assert len(features) == len(labels) == 1000
    # Bright voxels are the ball's, so rows of both are still those of one voxel.
    assert np.corrcoef(features[:, 0], labels[:, 1])[0, 1] > 0.6
    assert 0 < labels[:500, 1].sum() < 250 and 0 < labels[500:, 1].sum() < 250


def threshold(folder: Path) -> tuple[nn.Module, Path]:
    """A network of one weight and one bias, and the file of those that find the ball."""
    network = nn.Conv3d(1, 2, 1)
    found = copy.deepcopy(network)
    with torch.no_grad():
        found.weight.copy_(torch.tensor([-20.0, 20.0]).view(2, 1, 1, 1, 1))
        found.bias.copy_(torch.tensor([8.0, -8.0]))  # equal at 0.4, 0 HU
    torch.save(found.state_dict(), folder / "model.pt")
    return network, folder / "model.pt"


def test_a_network_s_predictions_are_soft_labels_alone_or_beside_the_head(tmp_path: Path) -> None:
    cases = [ball(tmp_path, seed) for seed in range(4)]
    network, weights = threshold(tmp_path)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    labels = NetworkLabels(network, weights, (16, 16, 16), (2.0, 2.0, 2.5))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    alone = SoftLabels(tmp_path / "s", 2, (2.0, 2.0, 2.5), network=labels, head=False)
    [item] = alone.fill(cases[:2], cases[2:3])
    truth, share = load(cases[2]["label"]), load(item["label"])
    assert share.shape == (2, *truth.shape[1:])
    assert dice(share[1] > 127, truth[0] > 0) > 0.95
    store = GridStore(tmp_path / "s", Teacher(Brightness(), FakeTexts()), ["0"], per_plane=20)
    items = store.fill(cases)
    found = []
    guessed = [alone.fill(cases, [{**cases[0], "modality": m}]) for m in ("CT", "auto")]
    assert guessed[0][0]["label"] != guessed[1][0]["label"]  # it decides how a volume is scaled
    for source in ({}, {"network": labels}):
        maker = SoftLabels(tmp_path / "s", 2, (2.0, 2.0, 2.5), hidden=16, **source)
        found.append(load(maker.fill(items[:2], items[2:3])[0]["label"]))
    assert (2 * found[1] - found[0] - share).abs().max() <= 26  # small shares were cut to 0
    with pytest.raises(ValueError, match="soft labels need a source"):
        SoftLabels(tmp_path / "s", 2, (2.0, 2.0, 2.5), head=False)


def load(path: str) -> torch.Tensor:
    from monai.transforms import LoadImage, Orientation

    volume = LoadImage(image_only=True, ensure_channel_first=True, reader="NibabelReader")(path)
    return Orientation("RAS", labels=None)(volume)


def test_a_head_learns_what_is_not_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 3)
    inside = (x.norm(dim=1) < 1.3).long()
    y = nn.functional.one_hot(inside, 2).float()
    hits = [
        (fit_voxel_head(x, y, hidden, steps=300, batch=512)(x).argmax(1) == inside).float().mean()
        for hidden in (0, 32)
    ]
    assert hits[1] > 0.95 > hits[0]


def test_hard_labels_cost_what_monai_s_loss_says() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, 4)
    goal = nn.functional.one_hot(torch.randint(3, (2, 6, 5, 4)), 3).movedim(-1, 1).float()
    expected = DiceCELoss(softmax=True, batch=True)(logits, goal)
    assert torch.allclose(SoftDiceCELoss()(logits, goal), expected, atol=1e-4)


def test_undecided_voxels_do_not_count() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 4, 4, 4)
    goal = torch.full((1, 2, 4, 4, 4), 0.5)
    goal[..., :2] = torch.tensor([0.9, 0.1]).view(1, 2, 1, 1, 1)
    changed = logits.clone()
    changed[..., 2:] += torch.randn(1, 2, 4, 4, 2) * 5
    loss = SoftDiceCELoss()
    assert torch.allclose(loss(logits, goal), loss(changed, goal))
    assert SoftDiceCELoss(soft_weight=0.0)(logits, goal) == 0


def test_a_soft_label_that_is_sure_everywhere_has_the_weight_of_soft_ones() -> None:
    image = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.eye(4))
    sure = torch.zeros(2, 4, 4, 4)
    sure[0] = 250  # 5 of 255 were below LEAST
    logits = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.eye(4))
    for label, weight in ((sure, 0.0), (drawn, 1.0)):
        data = {"image": image, "label": MetaTensor(label, affine=torch.eye(4))}
        goal = SoftLabeld("label", "image", 2)(data)["label"][None]
        whole = SoftDiceCELoss()(logits, goal)
        assert SoftDiceCELoss(soft_weight=0.0)(logits, goal) == weight * whole


def test_known_cases_are_no_unlabelled_ones(tmp_path: Path) -> None:
    cases = [ball(tmp_path, seed) for seed in range(2)]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"image": f"{n}.nii.gz", "label": "x.nii.gz"} for n in range(2)]))
    found = unlabelled_items(str(listed), "CT", [{"image": "elsewhere.nii.gz"}])
    assert [item["image"] for item in found] == [case["image"] for case in cases]
    assert not any("label" in item for item in found)
    with pytest.raises(ValueError, match=r"no labelled, validation or test case, got 1: .*1.nii"):
        unlabelled_items(str(listed), "CT", [], cases[1:])
    (tmp_path / "copies").mkdir()
    shutil.copy(cases[0]["image"], tmp_path / "copies" / "other_name.nii.gz")
    with pytest.raises(ValueError, match=r"test case, got 1: .*other_name.nii.gz"):
        unlabelled_items(str(tmp_path / "copies"), "CT", cases[:1])
    assert unlabelled_items(str(tmp_path / "copies"), "CT", cases[1:])
    with pytest.raises(ValueError, match="unlabelled must be a datalist or folder, got none"):
        unlabelled_items(None, "CT")


def test_half_of_the_items_are_labelled() -> None:
    few, many = [{"image": "a"}, {"image": "b"}], [{"image": str(n)} for n in range(5)]
    names = [item["image"] for item in balance(few, many)]
    assert len(names) == 10 and names[:5] == ["a", "b", "a", "b", "a"]
    assert balance(few, []) == few
    named = [item | {"patient": "p"} for item in few]
    assert balance(named, many) == balance(few, many)  # a batch needs the same fields


def test_labels_of_other_classes_are_refused(tmp_path: Path) -> None:
    image = read_volume(ball(tmp_path, 0)["image"])
    with pytest.raises(ValueError, match="label must have 1 or 4 channels, got 3"):
        SoftLabeld("label", "image", 4)({"image": image, "label": image.repeat(3, 1, 1, 1)})
