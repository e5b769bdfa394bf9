from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from med3dinsight_ext.captions.sources import FileCaptions
from med3dinsight_ext.data import demo_cohort as cohorts
from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.demo_cohort import make_cohort
from med3dinsight_ext.data.volumes import read_volume


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if cohorts.find_spec("nilearn") is None:
        pytest.skip("nilearn, whose wheel holds the template, is not installed")
    return make_cohort(tmp_path_factory.mktemp("data") / "cohort", n=3, seed=3)


def cases(cohort: Path) -> list[tuple[dict, torch.Tensor, torch.Tensor]]:
    return [
        (item, read_volume(item["image"])[0], read_volume(item["label"])[0])
        for item in datalist(cohort / "dataset.json")
    ]


def test_the_cohort_is_a_dataset_with_split_and_captions(cohort: Path) -> None:
    items = datalist(cohort / "dataset.json", split=cohort / "split.json", subset="development")
    assert len(items) == 2 and items[0]["modality"] == "MR"
    FileCaptions(cohort / "captions.jsonl").check_items(items)
    assert "Copyright (C) 1993" in (cohort / "SOURCE.txt").read_text()


def test_cohort_images_and_labels_lie_on_each_other(cohort: Path) -> None:
    for _, image, label in cases(cohort):
        background, grey, white = (image[label == k].mean() for k in range(3))
        assert background < 0.4 * grey and grey < 0.95 * white


def test_cohort_cases_differ(cohort: Path) -> None:
    (_, _, first), (_, _, second), *_ = cases(cohort)
    assert (first != second).float().mean() > 0.02


def test_every_second_cohort_case_has_a_lesion_of_its_own_brightness(cohort: Path) -> None:
    found = [case for case in cases(cohort) if (case[2] == 3).any()]
    assert len(found) == 2
    for _, image, label in found:
        contrast = image[label == 3].mean() / image[label == 2].mean()
        assert abs(contrast - 1) > 0.1


def test_cohort_captions_tell_what_the_labels_show(cohort: Path) -> None:
    sides = 0
    for item, _, label in cases(cohort):
        captions = FileCaptions(cohort / "captions.jsonl")
        plane, position = captions.required(item, label.shape)
        for p, t, text in zip(
            plane, position, captions.caption(item, plane, position), strict=True
        ):
            section = label.select(int(p), int(t * label.shape[int(p)]))
            assert (" mm" in text) == (int((section == 3).sum()) >= 3)
            if p > 0 and "hemisphere" in text:  # x runs to the right
                middle = (label > 0).nonzero()[:, 0].float().mean()
                right = (section == 3).nonzero()[:, 0].float().mean() > middle
                assert ("right hemisphere" in text) == bool(right)
                sides += 1
    assert sides


def test_the_same_seed_gives_the_same_cohort(cohort: Path, tmp_path: Path) -> None:
    again = make_cohort(tmp_path / "again", n=3, seed=3)
    files = sorted(path.relative_to(cohort) for path in cohort.rglob("*.*"))
    assert len(files) == 10
    for file in files:
        if file.suffix == ".gz":
            pair = [np.asarray(nib.load(folder / file).dataobj) for folder in (cohort, again)]
            assert np.array_equal(*pair)
        else:
            assert (cohort / file).read_text() == (again / file).read_text()


def test_another_seed_gives_another_cohort(cohort: Path, tmp_path: Path) -> None:
    other = make_cohort(tmp_path / "other", n=2, seed=4)
    labels = [read_volume(str(f / "labelsTr" / "case_000.nii.gz")) for f in (cohort, other)]
    assert (labels[0] != labels[1]).float().mean() > 0.02


def test_a_complete_cohort_is_left_as_it_is(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohorts, "load_template", lambda: pytest.fail("made again"))
    assert make_cohort(cohort, n=3, seed=3) == cohort


def test_a_cohort_never_overwrites_a_folder(cohort: Path) -> None:
    with pytest.raises(
        ValueError, match="folder must be new, or hold the cohort {'n': 3, 'seed': 9}"
    ):
        make_cohort(cohort, n=3, seed=9)


def test_a_cohort_that_breaks_off_leaves_nothing(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(cohorts, "caption_rows", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_cohort(tmp_path / "cohort", n=2)
    assert not list(tmp_path.iterdir())


def test_a_cohort_needs_two_cases(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        make_cohort(tmp_path / "cohort", n=1)


def test_a_cohort_without_nilearn_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohorts, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[demo\]'"):
        make_cohort(tmp_path / "cohort")
