"""What of the label app needs no MONAI Label: which case is next, and what has to be installed."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from label_running import small_bundle

from med3dinsight_ext.monailabel import server as label
from med3dinsight_ext.monailabel.app import compatibility
from med3dinsight_ext.monailabel.app.kcenter_greedy import Features, kcenter_greedy


@pytest.mark.parametrize("seed", range(5))
def test_the_pick_is_farthest_from_its_nearest_labelled_case(seed: int) -> None:
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
    rows = (features - features.mean(0)) / features.std(0, correction=0)
    labelled = [2, 7, 8]
    nearest = [min(float((row - rows[i]).norm()) for i in labelled) for row in rows]
    assert kcenter_greedy(features, labelled) == max(range(12), key=nearest.__getitem__)


def test_without_a_label_the_pick_is_the_most_ordinary_case() -> None:
    features = torch.tensor([[0.0, 0], [4, 0], [0, 4], [4, 4], [2.1, 1.9]])
    assert kcenter_greedy(features, []) == 4


def test_the_pick_does_not_depend_on_the_scale_of_a_feature() -> None:
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    scaled = features * torch.tensor([1e4, 1, 1e-3, 1, 1]) + 3
    assert kcenter_greedy(features, [3]) == kcenter_greedy(scaled, [3])


def test_a_feature_that_never_varies_does_no_harm() -> None:
    features = torch.tensor([[0.0, 7], [1, 7], [5, 7]])
    assert kcenter_greedy(features, [0]) == 2


def test_there_is_no_pick_where_all_have_labels() -> None:
    with pytest.raises(ValueError, match="features must have a row without a label, got 2 with"):
        kcenter_greedy(torch.zeros(2, 3), [0, 1])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle")


def test_features_are_computed_once_for_an_images_content(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = fakes.write_volumes(tmp_path / "volumes", 2)
    features, asked = Features(bundle), []
    compute = features.compute
    monkeypatch.setattr(features, "compute", lambda image: asked.append(image) or compute(image))
    first, other = (features(str(volumes / f"v{i}.nii.gz")) for i in (0, 1))
    assert first.shape == (8,) and not torch.equal(first, other)
    (volumes / "same.nii.gz").write_bytes((volumes / "v0.nii.gz").read_bytes())
    assert torch.equal(features(str(volumes / "same.nii.gz")), first) and len(asked) == 2
    again = Features(bundle)
    monkeypatch.setattr(again, "compute", lambda _: pytest.fail("was computed again"))
    assert torch.equal(again(str(volumes / "v0.nii.gz")), first)


def test_other_weights_have_other_features(bundle: Path, tmp_path: Path) -> None:
    image = str(fakes.write_volumes(tmp_path / "volumes", 1) / "v0.nii.gz")
    first = Features(bundle)(image)
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    weights["neck.bias"] += 1
    torch.save(weights, bundle / "models" / "model.pt")
    assert torch.allclose(Features(bundle)(image), first + 1, atol=1e-4)


def test_a_volume_larger_than_a_patch_is_seen_as_a_whole(bundle: Path, tmp_path: Path) -> None:
    image = str(fakes.write_volumes(tmp_path / "volumes", 1, (60, 32, 26)) / "v0.nii.gz")
    features = Features(bundle)
    volume = features.preprocessing({"image": image})["image"][None].as_tensor()
    parts = [features.classifier.pooled(volume[:, :, x : x + 32]) for x in (0, 28)]
    assert torch.allclose(features(image), torch.cat(parts).mean(0).detach(), atol=1e-5)


@pytest.mark.parametrize("many", [str, list])
def test_bundles_are_found_by_their_folders(bundle: Path, many: type) -> None:
    other = small_bundle(bundle.parent / "other")
    given: Any = f"{bundle},{other}" if many is str else [bundle, str(other)]
    assert label.find_bundles(given) == [bundle, other]


@pytest.mark.parametrize(
    ("take_away", "message"),
    [
        ("models/model.pt", "has no models/model.pt; train it first"),
        ("configs/train.json", "has no configs/train.json; correct the path"),
    ],
)
def test_a_bundle_that_lacks_a_file_is_named(bundle: Path, take_away: str, message: str) -> None:
    (bundle / take_away).unlink()
    with pytest.raises(ValueError, match=f"bundles must be folders .* but {bundle} {message}"):
        label.find_bundles(str(bundle))


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"but {tmp_path}/none has no configs/metadata.json"):
        label.find_bundles(f"{tmp_path}/none")


def test_two_bundles_of_one_name_are_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match="must have different folder names, got .'bundle', 'bun"):
        label.find_bundles([bundle, bundle])


def test_bundles_with_other_classes_are_not_served_together(bundle: Path) -> None:
    other = small_bundle(bundle.parent / "other")
    path = other / "configs" / "metadata.json"
    path.write_text(path.read_text().replace('"foreground"', '"liver"'))
    with pytest.raises(
        ValueError, match="must have the same classes, got .*'liver'.* a server for"
    ):
        label.find_bundles([bundle, other])


def test_a_bundle_that_predicts_other_classes_than_its_metadata_is_refused(bundle: Path) -> None:
    for stem in ("train", "inference"):
        path = bundle / "configs" / f"{stem}.json"
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), "label_names": ["background", "liver"]}))
        with pytest.raises(ValueError, match=f"label_names of {path} must be the classes of its"):
            label.find_bundles(str(bundle))
        path.write_text(before)


def test_class_names_come_in_the_order_of_their_values(bundle: Path) -> None:
    path = bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = {
        str(i): f"c{i}" for i in (2, 11, 0, 1, 3, 10, 4, 5, 6, 7, 8, 9)
    }
    path.write_text(json.dumps(metadata))
    assert label.class_names(bundle) == [f"c{i}" for i in range(12)]


def test_an_environment_without_monai_label_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="label needs monailabel==0.8.5, got no monailabel in"):
        label.label(studies=".", bundles="none")
    assert "\n  python -m med3dinsight_ext label-install FOLDER\n" in str(label.environment_fault())


def test_another_version_of_monai_label_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(label, "version", lambda name: "0.7.0")
    assert "needs monailabel==0.8.5, got 0.7.0 in" in str(label.environment_fault())


def test_the_pinned_environment_has_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"monailabel": "0.8.5", "torchvision": "0.28.0", "pydicom-seg": "0.4.1"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(label, "version", versions.__getitem__)
    assert label.environment_fault() is None


def test_a_folder_with_other_files_is_not_made_an_environment(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="target must be new or an environment, got"):
        label.install(str(tmp_path))


def test_what_is_installed_alone_is_pinned_exactly() -> None:
    resolved, alone = label.requirements()
    assert len(resolved) > 20 and all("==" in line for line in alone)
    assert "torch==2.13.*" in resolved


def test_the_hook_line_installs_the_repairs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for _ in range(2):
        exec(compatibility.HOOK)
    assert sum(isinstance(finder, compatibility.Repairs) for finder in sys.meta_path) == 1


def test_the_uids_that_pydicom_3_moved_are_found_where_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uid = types.SimpleNamespace(SegmentationStorage="1.2.3", generate_uid=None)
    monkeypatch.setitem(sys.modules, "pydicom", types.SimpleNamespace(uid=uid))
    monkeypatch.setitem(sys.modules, "pydicom.uid", uid)
    spec = compatibility.Repairs().find_spec(compatibility.UIDS, None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    compatibility.Repairs().exec_module(module)
    assert module.SegmentationStorage == "1.2.3" and not hasattr(module, "generate_uid")


def test_operators_are_defined_only_beside_a_cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert compatibility.define_operators() == ()
    monkeypatch.setattr(torch.version, "cuda", None)
    library = compatibility.define_operators()
    assert torch.ops.torchvision.nms.default and torch.ops.torchvision.qnms.default
    del library
