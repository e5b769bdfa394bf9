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
from med3dinsight_ext.workflows import plan

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


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("patch_size: 64", "patch_size must be three whole numbers from 1, got 64 in .*p.yaml"),
        ("patch_size: [64, 64]", "patch_size must be three"),
        ("patch_size: [0, 16, 16]", "patch_size must be three"),
        ("spacing: [0, 1, 1]", "spacing must be three numbers of mm above 0"),
        ("batch_size: 0", "batch_size must be a whole number from 1, got 0"),
        ("batch_size: '4'", "batch_size must be a whole number from 1, got '4'"),
        ("steps: 0", "steps must be a whole number from 1"),
        ("label_names: 3", "label_names must be a list of at least two texts"),
        ("label_names: [background, 1]", "label_names must be a list"),
        ("backbone: unet", "backbone must be an object of a _target_, got 'unet'"),
        ("patch_size: [50, 50, 50]", "backbone must take patches of 50 × 50 × 50 voxels, but fail"),
        ("backbone: {_target_: torch.nn.Nope}", "backbone must take patches of .*; correct patch_"),
    ],
)
def test_settings_that_no_step_can_have_are_named(
    given: str, wanted: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text(given)
    with pytest.raises(ValueError, match=wanted):
        settle(read_dataset(folder), tmp_path / "new.yaml", str(tmp_path / "p.yaml"), quiet=True)


def sided(folder: Path) -> Path:
    """Six volumes with labels 1 and 2 on either side, without names of classes."""
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for n in range(6):
        label = np.zeros((24, 20, 16), np.uint8)
        label[4:8, 8:12, 6:10], label[16:20, 8:12, 6:10] = 1, 2
        save(folder / "imagesTr" / f"c{n}.nii.gz", rng.random(label.shape, np.float32) + 1)
        save(folder / "labelsTr" / f"c{n}.nii.gz", label)
    return folder


@pytest.mark.usefixtures("small")
def test_classes_that_get_sides_in_a_plan_are_paired(tmp_path: Path) -> None:
    dataset, path = read_dataset(sided(tmp_path / "d")), tmp_path / "plan.yaml"
    first = settle(dataset, path, None, quiet=True)
    assert (first["mirror_axes"], first["mirror_pairs"]) == ([], [])
    named = path.read_text().replace("class_1", "left cord").replace("class_2", "right cord")
    path.write_text(named)
    found = settle(dataset, tmp_path / "new.yaml", str(path), quiet=True)
    assert (found["mirror_axes"], found["mirror_pairs"]) == ([0], [[1, 2]])
    path.write_text(named.replace("mirror_axes: []", "mirror_axes: [2]"))  # a choice
    found = settle(dataset, tmp_path / "third.yaml", str(path), quiet=True)
    assert (found["mirror_axes"], found["mirror_pairs"]) == ([2], [])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("content", ["half", "empty", "garbage"])
def test_a_broken_label_is_named_beside_all_others(content: str, tmp_path: Path) -> None:
    folder = sided(tmp_path / "d")
    for n in (1, 3):
        path = folder / "labelsTr" / f"c{n}.nii.gz"
        whole = path.read_bytes()
        path.write_bytes({"half": whole[:60], "empty": b"", "garbage": b"hello"}[content])
    with pytest.raises(ValueError) as stop:
        make_plan(read_dataset(folder), device=CPU)
    assert all(f"labelsTr/c{n}.nii.gz" in str(stop.value) for n in (1, 3))


def test_a_split_that_leaves_nothing_is_an_error_of_the_plan(tmp_path: Path) -> None:
    folder = sided(tmp_path / "d")
    (folder / "split.json").write_text('{"development": [], "test": ["c0", "c1"]}')
    with pytest.raises(ValueError, match="development must have an image, got none"):
        make_plan(read_dataset(folder), device=CPU)
    (folder / "split.json").write_text("[1]")
    with pytest.raises(
        ValueError, match=r"split must name lists of ids, got \[1\] in .*split.json"
    ):
        read_dataset(folder).check_split()
    (folder / "split.json").write_text('{"development": ["c0", "c1x"], "test": ["c2"]}')
    with pytest.raises(ValueError, match="c1x"):
        plan(str(folder), out=str(tmp_path / "p.yaml"))


def test_shapes_of_a_list_of_classes_are_images(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", (np.eye(9)[..., None] * np.ones(9)).astype(np.float32))
    assert survey([{"image": path, "modality": "auto", "label": "sick"}]).sampled == 1


def test_labels_of_one_value_give_no_range(tmp_path: Path) -> None:
    array = np.full((8, 8, 8), -1000, np.int16)
    array[2:6] = 40
    item = {"image": save(tmp_path / "a.nii", array), "modality": "CT"}
    item["label"] = save(tmp_path / "l.nii", (array < 0).astype(np.uint8))
    assert survey([item]).ct_range is None


def test_label_maps_and_classes_in_one_list_are_an_error(tmp_path: Path) -> None:
    dataset = read_dataset(sided(tmp_path / "d"))
    mixed = dataset._replace(items=[dataset.items[0], dataset.items[1] | {"label": "sick"}])
    with pytest.raises(ValueError, match=r"all label maps or all classes, got .*c0.* and 'sick'"):
        mixed.segments()
