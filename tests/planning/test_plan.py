"""A plan holds for the dataset it was made for, and every bundle takes it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from fakes import write_volumes
from monai.bundle import ConfigParser
from running import BUNDLES, merged

from med3dinsight_ext.data.layouts import read_dataset
from med3dinsight_ext.planning import plan as planning
from med3dinsight_ext.planning.plan import make_plan, read_plan, shown, write_plan
from med3dinsight_ext.planning.run_folder import settle
from med3dinsight_ext.planning.survey import survey

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CPU", planning.Machine(16**3, 0, 2, 4, 1e5, 8, 200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("d"), 3)


@pytest.mark.usefixtures("small")
def test_a_plan_fits_data_and_machine_and_its_file_says_why(folder: Path, tmp_path: Path) -> None:
    found = make_plan(read_dataset(folder), device=CPU)
    settings = found.settings
    assert settings["label_names"] == ["background", "class_1"] and settings["modality"] == "MR"
    assert np.prod(settings["patch_size"]) <= 16**3 * 1.4 and settings["mirror_pairs"] == []
    assert settings["spacing"][0] > 2.0  # coarser, so that so small a patch shows a quarter
    assert set(settings) == set(found.reasons)
    write_plan(found, tmp_path / "plan.yaml", "title")
    text = (tmp_path / "plan.yaml").read_text()
    assert read_plan(tmp_path / "plan.yaml") == settings and text.startswith("# title\n#   3 ima")
    assert " s a step here; patches in a step" in text
    assert " min in the network here; fewer for a try" in text
    chosen = shown(found).splitlines()[len(found.seen) + 1 :]
    assert len(chosen) == len(settings) and not [line for line in chosen if line.endswith("…")]
    assert len(shown(found).splitlines()) < 24 and max(map(len, shown(found).splitlines())) <= 100


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_bundle_takes_the_plan(bundle: str, folder: Path, tmp_path: Path) -> None:
    write_plan(make_plan(read_dataset(folder), device=CPU), tmp_path / "plan.yaml", "t")
    plan = read_plan(tmp_path / "plan.yaml")
    config = merged(bundle, "train.json") | plan
    config["train"]["dataset"] = {"_target_": "Dataset", "data": [{"image": "x"}] * 6}
    parser = ConfigParser(config)
    assert parser.get_parsed_content("max_epochs") == -(-plan["steps"] // (6 // plan["batch_size"]))
    assert parser.get_parsed_content("val_interval") >= 1
    parser["out_channels"] = 1
    parser.parse(True)
    network = parser.get_parsed_content("backbone")
    size = (1, 1, *plan["patch_size"])
    assert network(torch.zeros(size)).shape == size


@pytest.mark.usefixtures("small")
def test_kept_settings_stay_and_classes_are_those_of_the_data(folder: Path) -> None:
    kept = {"spacing": [3.0, 3.0, 3.0], "learning_rate": 0.01}
    found = make_plan(read_dataset(folder), kept, "old.yaml", CPU)
    assert found.settings["spacing"] == [3.0] * 3 and found.settings["learning_rate"] == 0.01
    assert found.reasons["spacing"] == "as in old.yaml" and "label_names" in found.settings


def test_a_list_of_classes_gets_class_names_and_a_patch_of_the_whole_volume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "CPU", planning.Machine(12**3, 0, 2, 4, 1e5, 8, 200))
    dataset = read_dataset(folder, folder / "classification.json")
    settings = make_plan(dataset, device=CPU).settings
    assert settings["backbone"]["norm"] == "BATCH"
    assert settings["class_names"] == ["even", "odd"] and "label_names" not in settings
    numbered = [item | {"label": n % 11} for n, item in enumerate(dataset.items * 11)]
    found = make_plan(dataset._replace(items=numbered), device=CPU).settings
    assert found["class_names"] == [str(n) for n in range(11)]
    assert "larger" not in " ".join(make_plan(dataset, device=CPU).seen)
    fine = make_plan(dataset, {"spacing": [1.0, 1.0, 1.0], "patch_size": [16, 16, 16]}, "f", CPU)
    assert fine.seen[-1] == "3 volumes are larger than the patch, which shows their centre"
    extent = np.array(settings["patch_size"]) * settings["spacing"]
    assert (extent >= np.array([28, 32, 26]) * 2 * 0.9).all()


def test_too_little_memory_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CPU", planning.Machine(16**3, 0, 2, 4, 1e5, 8, 200))
    monkeypatch.setattr(planning, "usable_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="memory must hold a training step, got 0.0 GiB free"):
        make_plan(read_dataset(folder), device=CPU)


def test_less_memory_gives_fewer_patches_before_a_smaller_patch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "CPU", planning.Machine(32**3, 0, 2, 4, 1e5, 8, 200))
    monkeypatch.setattr(planning, "usable_memory", lambda device: 10**6)
    monkeypatch.setattr(
        planning, "step_cost", lambda network, patch, batch: (batch * int(np.prod(patch)) * 20, 1.0)
    )
    settings = make_plan(read_dataset(folder), device=CPU).settings
    assert settings["batch_size"] == 2 and 8_000 < np.prod(settings["patch_size"]) < 17_500


def test_a_name_that_breaks_its_line_begins_no_key_of_a_plan(tmp_path: Path) -> None:
    made = planning.Plan({"a": ["x\nb: 1"]}, {"a": "why\nb: $1\u2028c: 2"}, ["seen\nd: 3"])
    write_plan(made, tmp_path / "plan.yaml", "title\ne: 4")
    assert read_plan(tmp_path / "plan.yaml") == made.settings


def save(path: Path, array: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return str(path)


def test_ct_is_told_by_air_and_its_range_by_the_labelled_voxels(tmp_path: Path) -> None:
    array = np.full((8, 8, 8), -1000, np.int16)
    array[2:6] = np.arange(4 * 64).reshape(4, 8, 8) % 120
    label = (array > -1000).astype(np.uint8)
    item = {"image": save(tmp_path / "a.nii", array), "label": save(tmp_path / "l.nii", label)}
    found = survey([item | {"modality": "auto"}])
    assert (found.modality, found.ct_range) == ("CT", (0.0, 150.0))
    save(tmp_path / "l.nii", 0 * label)
    found = survey([item | {"modality": "auto"}])
    assert (found.modality, found.ct_range) == ("CT", None)


@pytest.mark.parametrize(
    ("array", "rule"),
    [
        (
            np.zeros((9, 9)),
            r"move them away\):\n  volume must be 3D, got shape \(9, 9\) in .*leave 2D and 4D",
        ),
        (np.zeros((9, 9, 1)), r"volume must be 3D, got shape \(9, 9, 1\)"),
        (np.zeros((9, 9, 9, 4)), r"volume must be 3D, got shape \(9, 9, 9, 4\)"),
        (np.eye(9)[..., None] * np.ones(9), "images must not be label maps, got only 2 values"),
    ],
)
def test_pictures_series_and_label_maps_are_no_images(
    array: np.ndarray, rule: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.nii.gz", array.astype(np.float32))
    with pytest.raises(ValueError, match=rule):
        survey([{"image": path, "modality": "auto"}])


def test_a_plan_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(["a"]))
    with pytest.raises(ValueError, match="plan must be readable, got .*p.yaml"):
        read_plan(tmp_path / "p.yaml")


def test_a_modality_holds_for_all_volumes_or_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("med3dinsight_ext.planning.survey.SAMPLE", 3)
    rng = np.random.default_rng(0)
    items = []
    for n in range(5):
        image = 10 + rng.random((12, 12, 12)) if n == 1 else rng.uniform(-1000, 800, (12, 12, 12))
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), tmp_path / f"v{n}.nii.gz")
        items.append({"image": str(tmp_path / f"v{n}.nii.gz"), "modality": "auto"})
    found = survey(items)  # reads the first, third and fifth
    assert (found.modality, found.kinds) == ("auto", ("CT",))
    assert survey(items[2:]).modality == "CT"
    told = [items[0] | {"modality": "CT"}, items[1]]
    assert survey(told)[2:4] == ("auto", ("CT", "MR"))
    assert survey([item | {"modality": "CT"} for item in items]).modality == "CT"


@pytest.mark.usefixtures("small")
def test_the_modality_of_a_pre_training_is_not_that_of_other_volumes(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text("modality: CT\nspacing: [2, 2, 2]\n")
    settings = settle(read_dataset(folder), tmp_path / "new.yaml", str(tmp_path), quiet=True)
    assert (settings["modality"], settings["spacing"]) == ("MR", [2, 2, 2])
