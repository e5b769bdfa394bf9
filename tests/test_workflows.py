"""The front door: commands from a folder, the line that they print, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from fakes import write_volumes
from monai.bundle import ConfigParser
from running import trains_in
from volume_writers import write_dicom

import med3dinsight_ext
from med3dinsight_ext import workflows
from med3dinsight_ext.cli import main
from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.io.bundles import bundles_dir
from med3dinsight_ext.io.configs import with_shared
from med3dinsight_ext.io.files import sha256
from med3dinsight_ext.io.images import open_volume
from med3dinsight_ext.planning.plan import read_plan

TEACHER = {"_target_": "fakes.teacher"}
CONFIG = '{"label_names": ["background", "ball"]}'
SMALL = {"teacher": TEACHER, "per_plane": 8, "slices": 4, "device": "$torch.device('cpu')"}


@pytest.fixture
def scans(small_plans: None) -> Path:
    """Five images, three labels."""
    folder = write_volumes(Path("scans"), 5)
    for name in ("v3", "v4"):
        (folder / "labels" / f"{name}.nii.gz").unlink()
    for name in ("segmentation.json", "classification.json"):
        (folder / name).rename(name)
    return folder


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would be launched."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(workflows, "launch", lambda *words: calls.append(words))
    return calls


@pytest.mark.slow
def test_three_commands_lead_from_a_folder_to_predictions_and_a_page(
    scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = med3dinsight_ext.pretrain("scans", **SMALL)
    assert run == Path("runs/scans/pretrain") and (run / "models" / "student.pt").is_file()
    given = ["--device", SMALL["device"], "--seed", "1"]
    main(["finetune", "scans", "--pretrained", str(run), *given])
    out = capsys.readouterr().out
    assert "plan as in runs/scans/pretrain:" in out and "encoder 100 %" in out
    assert "next: python -m med3dinsight_ext predict runs/scans/finetune FILES" in out
    images = ["scans/v0.nii.gz", "scans/v3.nii.gz"]
    write_dicom(Path("1.2.840"))
    images.insert(0, "1.2.840")
    written = med3dinsight_ext.predict("runs/scans/finetune", *images, device=SMALL["device"])
    assert [path.name for path in written] == [
        "1.2.840_seg.nii.gz",
        "v0_seg.nii.gz",
        "v3_seg.nii.gz",
        "predictions.html",
    ]
    for image, path in zip(images, written, strict=False):
        ours, theirs = nib.load(path), open_volume(image)
        assert ours.shape == theirs.shape and np.allclose(ours.affine, theirs.affine)
    page = written[-1].read_text("utf-8")
    more = med3dinsight_ext.predict(
        "runs/scans/finetune", "scans/v4.nii.gz", device=SMALL["device"]
    )
    assert [path.name for path in more] == ["v4_seg.nii.gz", "predictions.html"]
    both = more[-1].read_text("utf-8")
    assert both.count("<svg") == 4 and "v3.nii.gz" in both and "v4.nii.gz" in both
    assert "v3.nii.gz" in page and page.count("<svg") == 3 and "class_1" in page
    with pytest.raises(
        ValueError, match="without these predictions, got .* with 1.2.840_seg.nii.gz and 2 more"
    ):
        med3dinsight_ext.predict("runs/scans/finetune", *images)
    out_dir = med3dinsight_ext.evaluate("runs/scans/finetune", "scans", device=SMALL["device"])
    assert json.loads((out_dir / "metrics.json").read_text())["cases"] == 3
    out = capsys.readouterr().out
    assert "cases of the training" in out and " --seed 1 " in out
    with pytest.raises(ValueError, match="out must be a new folder, got .*evaluation-scans"):
        med3dinsight_ext.evaluate("runs/scans/finetune", "scans")


def test_the_page_has_earlier_predictions_of_the_same_network_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    homes = [tmp_path / name for name in ("liver", "kidney")]
    images = [tmp_path / place / "scan.nii.gz" for place in ("a", "b")]
    images.append(tmp_path / "other.nii.gz")
    for n, (image, home) in enumerate(zip(images, (homes[0], homes[0], homes[1]), strict=True)):
        image.parent.mkdir(exist_ok=True)
        image.touch()
        rows = [{"image": str(image), "network": str(home)}]
        listed = out / f"inputs-{9 - n}.json"
        listed.write_text(json.dumps(rows))
        os.utime(listed, (n, n))
    scan, other = out / "scan_seg.nii.gz", out / "other_seg.nii.gz"
    scan.touch()
    other.touch()
    assert workflows._earlier(out, homes[0], {}) == {str(images[1]): scan}  # a's was moved away
    assert workflows._earlier(out, homes[1], {}) == {str(images[2]): other}
    assert not workflows._earlier(out, homes[0], {str(images[0]): scan.name})


def test_labels_with_other_numbers_than_the_networks_are_not_scored(
    scans: Path, lines: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    settings = {"label_names": ["background", "big", "small"]}
    plan.write_text(json.dumps(settings))
    (tmp_path / "run" / "models").mkdir(parents=True)
    (tmp_path / "run" / "models" / "model.pt").touch()
    shutil.copy(plan, tmp_path / "run")
    for names, ok in (
        ({"background": 0, "small": 1, "big": 2}, False),
        ({"background": 0, "Big": 1, "small": 2}, True),
        ({"background": 0, "tumour": 1}, True),
    ):
        (scans / "dataset.json").write_text(json.dumps({"labels": names}))
        out = str(tmp_path / str(len(names)) / str(ok))
        if ok:
            med3dinsight_ext.evaluate(str(tmp_path / "run"), "scans", out=out)
            continue
        for command in (
            lambda: med3dinsight_ext.evaluate(str(tmp_path / "run"), "scans", out=out),  # noqa: B023
            lambda: med3dinsight_ext.finetune("scans", plan=str(plan), out=out),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"mean the classes of the training, .*'small', "):
                command()
    assert len(lines) == 2


@pytest.mark.slow
def test_images_without_labels_are_trained_on_with_labels_by_the_first_network(
    scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = SMALL["device"]
    split = {"development": ["v0", "v1", "v3"], "test": ["v2", "v4"]}
    (scans / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match="folder of a training on these 3 cases, got runs/scans/f"):
        med3dinsight_ext.finetune("scans", self_training="runs/scans/finetune")
    first = med3dinsight_ext.finetune("scans", device=cpu)
    line = "with few labels: python -m med3dinsight_ext finetune scans --self_training runs/scans/"
    assert line in capsys.readouterr().out
    run = med3dinsight_ext.finetune("scans", self_training=str(first), device=cpu)
    assert run == Path("runs/scans/self-training")
    record = json.loads((run / "models" / "run.json").read_text())
    assert record["data"]["training"]["unlabelled"] == 1  # v3; v4 is a test case
    assert record["teacher"] is None
    assert len(list((run / "store" / "soft").rglob("*.nii.gz"))) == 1
    out = med3dinsight_ext.evaluate(str(run), "scans", device=cpu)
    scores = json.loads((out / "metrics.json").read_text())
    assert scores["cases_from"] == {"training": 0, "validation": 0, "others": 1}
    for name in ("v3", "v4"):
        shutil.copy(scans / "labels" / "v0.nii.gz", scans / "labels" / f"{name}.nii.gz")
    with pytest.raises(ValueError, match="must hold images without labels for self_training, got"):
        med3dinsight_ext.finetune("scans", self_training=str(first))


def test_the_printed_line_is_the_one_that_runs(
    scans: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[Any, dict[str, Any]]] = []

    class Workflow:
        def __init__(self, files: list[str], **overrides: Any) -> None:
            ran.append((files, overrides))

        initialize = run = finalize = lambda self: None

    monkeypatch.setattr("med3dinsight_ext.training.launch.ConfigWorkflow", Workflow)
    main(["pretrain", "scans", "--steps", "7", "--patch_size", "[16,16,16]"])
    ((files, overrides),) = ran
    (line,) = re.findall(r"^\$ python -m monai.bundle run (.*)$", capsys.readouterr().out, re.M)
    words = shlex.split(line)
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert yaml.safe_load(given.pop("--config_file")) == [
        str(Path(p).resolve().relative_to(Path.cwd()))
        if Path(p).is_relative_to(Path.cwd())
        else os.path.relpath(p)
        for p in files
    ]
    for key, value in given.items():
        assert str(overrides[key[2:]]) == value
    assert given["--steps"] == "7" and given["--patch_size"] == "[16, 16, 16]"
    assert overrides["workflow_type"] == "train"


def test_a_training_in_the_folder_of_its_bundle_predicts_as_it_was_trained(
    scans: Path, lines: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflows, "write_predictions", lambda *words: None)
    for name in ("seg-finetune", "shared"):
        shutil.copytree(bundles_dir() / name, Path("own") / name)
    home = Path("own/seg-finetune")
    (home / "models").mkdir(exist_ok=True)
    (home / "models/model.pt").touch()
    files = with_shared(home / "configs/train.json")
    config = dict(ConfigParser.load_config_files(files)) | {"spacing": [3, 3, 3]}
    record = home / "models/run.json"
    record.write_text(json.dumps({"config": config, "command": ["python"]}))
    workflows.predict(str(home), "scans/v0.nii.gz", out="a", quiet=True)
    assert lines[-1][2]["spacing"] == [3, 3, 3]
    record.write_text(json.dumps({"config": config}))  # as published: inference.json has it
    workflows.predict(str(home), "scans/v0.nii.gz", out="b", quiet=True)
    assert "spacing" not in lines[-1][2]


def test_a_run_may_be_called_as_a_bundle_is(
    scans: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def stop(files: list[str], **_: Any) -> None:
        ran.append(files)
        raise KeyboardInterrupt

    monkeypatch.setattr("med3dinsight_ext.training.launch.ConfigWorkflow", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["pretrain", "scans", "--out", "pretrain"])
    assert Path(ran[0][0]).parts[-3:] == ("pretrain", "configs", "train.json")
    assert Path("pretrain/plan.yaml").is_file()


def test_a_mistyped_key_is_one_line(scans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["pretrain", "scans", "--step", "7"])
    assert capsys.readouterr().err.endswith(
        "error: override must name a key of the config, got --step; did you mean steps?\n"
    )


def test_a_split_keeps_its_test_cases_out_and_captions_are_found(
    scans: Path, lines: list[tuple[Any, ...]]
) -> None:
    ids = {"development": ["v0", "v1", "v3"], "test": ["v2", "v4"]}
    (scans / "split.json").write_text(json.dumps(ids))
    (scans / "captions.jsonl").touch()
    workflows.pretrain("scans", quiet=True)
    settings = lines[0][2]
    assert settings["split"] == "scans/split.json" and settings["captions"].endswith(".jsonl")
    text = Path("runs/scans/pretrain/plan.yaml").read_text()
    assert "3 images, 2 with label maps" in text
    items = json.loads(Path(settings["datalist"]).read_text())
    assert len(items) == 5 and not any("label" in item for item in items)


def test_fine_tuning_lists_labelled_cases_and_takes_the_network_of_the_pre_training(
    scans: Path, lines: list[tuple[Any, ...]]
) -> None:
    workflows.pretrain("scans", quiet=True)
    run = Path("runs/scans/pretrain")
    with pytest.raises(ValueError, match="pretrained must be a folder of a training or a weights"):
        workflows.finetune("scans", pretrained=str(run), quiet=True)
    (run / "models").mkdir(exist_ok=True)
    (run / "models" / "model.pt").touch()
    plan = read_plan(run / "plan.yaml")
    (run / "plan.yaml").write_text(yaml.safe_dump(plan | {"spacing": [4.5, 4.5, 4.5]}))
    workflows.finetune("scans", pretrained=str(run), quiet=True)
    workflows.finetune("scans", pretrained=str(run))  # again
    bundle, overlays, settings, *_ = lines[-1]
    assert lines[-1][:3] == lines[-2][:3]
    assert bundle == "seg-finetune" and settings["pretrained"] == str(run / "models/model.pt")
    assert read_plan(overlays[1])["spacing"] == [4.5, 4.5, 4.5]
    assert len(json.loads(Path(settings["datalist"]).read_text())) == 3


def test_a_list_of_classes_is_a_classification(scans: Path, lines: list[tuple[Any, ...]]) -> None:
    workflows.finetune("scans", labels="classification.json", quiet=True)
    bundle, overlays, *_ = lines[0]
    assert bundle == "cls-finetune" and read_plan(overlays[1])["class_names"] == ["even", "odd"]


def test_a_folder_is_used_again_for_the_same_images_and_plan_alone(
    scans: Path, lines: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    workflows.finetune("scans", out="run", quiet=True)
    workflows.finetune("scans", out="run")
    assert capsys.readouterr().out.startswith("goes on with run/plan.yaml\n")
    Path("other.yaml").write_text("steps: 3\n")
    with pytest.raises(ValueError, match="a training with this plan, got run with another plan"):
        workflows.finetune("scans", out="run", plan="other.yaml")
    shutil.copy(scans / "labels" / "v0.nii.gz", scans / "labels" / "v3.nii.gz")
    with pytest.raises(ValueError, match="on the same images, got run with 1 others; name another"):
        workflows.finetune("scans", out="run")
    assert len(lines) == 2


def test_a_training_from_other_weights_is_not_gone_on_with(
    scans: Path, lines: list[tuple[Any, ...]]
) -> None:
    Path("weights.pt").write_bytes(b"weights")
    workflows.finetune("scans", out="run", quiet=True)
    record = Path("run/models/run.json")
    record.parent.mkdir(exist_ok=True)
    for began, given, other in (
        (None, None, "weights.pt"),
        ({"file": "weights.pt", "sha256": sha256(Path("weights.pt"))}, "weights.pt", None),
    ):
        record.write_text(json.dumps({"pretrained": began}))
        workflows.finetune("scans", out="run", pretrained=given, quiet=True)
        origin = given or "scratch"
        with pytest.raises(ValueError, match=f"training from {other or 'scratch'}, got run, which "
                           f"began from {origin}; name another"):  # fmt: skip
            workflows.finetune("scans", out="run", pretrained=other, quiet=True)
    assert len(lines) == 3
    plan = Path("run/plan.yaml")
    plan.write_text(plan.read_text() + "pretrained: weights.pt\n")
    workflows.finetune("scans", out="run", quiet=True)  # as the plan says
    assert len(lines) == 4


def test_patients_of_a_training_stay_those_of_its_list(
    scans: Path, lines: list[tuple[Any, ...]]
) -> None:
    workflows.finetune("scans", out="run", quiet=True)
    path = Path("run/datalist.json")
    rows = [{**row, "patient": "one"} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(rows))
    workflows.finetune("scans", out="run", quiet=True)
    (Path("run") / "models").mkdir(exist_ok=True)
    (Path("run") / "models" / "model.pt").touch()
    workflows.evaluate("run", "scans", quiet=True)
    for settings in (lines[-2][2], lines[-1][2]):
        listed = json.loads(Path(settings["datalist"]).read_text())
        assert [row["patient"] for row in listed] == ["one"] * 3


def test_a_split_may_name_images_without_a_label(scans: Path, lines: list[tuple[Any, ...]]) -> None:
    ids = {"development": ["v0", "v1", "v3"], "test": ["v2", "v4"]}
    (scans / "split.json").write_text(json.dumps(ids))
    workflows.finetune("scans", out="run", quiet=True)
    own = Path(lines[0][2]["split"])
    assert json.loads(own.read_text()) == {"development": ["v0", "v1"], "test": ["v2"]}
    found = datalist(lines[0][2]["datalist"], "scans", own, "development")
    assert [Path(item["image"]).name for item in found] == ["v0.nii.gz", "v1.nii.gz"]
    (scans / "split.json").write_text(json.dumps(ids | {"test": ["v2", "v9"]}))
    with pytest.raises(ValueError, match=r"split must name ids of the source, got \['v9'\]"):
        workflows.finetune("scans", out="other", quiet=True)


def test_printed_commands_can_be_pasted(
    scans: Path, lines: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    scans.rename("my scans")
    workflows.plan("my scans", out="my plan.yaml")
    workflows.pretrain("my scans", out="my run")
    workflows.finetune("my scans", out="my net")
    shown = [shlex.split(line) for line in capsys.readouterr().out.split("\n") if "next: " in line]
    assert [words[4:] for words in shown] == [
        ["pretrain", "my scans", "--plan", "my plan.yaml"],
        ["finetune", "my scans", "--pretrained", "my run"],
        ["predict", "my net", "FILES"],
        ["evaluate", "my net", "my scans"],
    ]


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_folder_where_another_process_trains_is_left_as_it_is(
    command: str, scans: Path, lines: list[tuple[Any, ...]]
) -> None:
    call = getattr(workflows, command)
    with trains_in(Path("out/models")):
        with pytest.raises(ValueError, match="wait for its end, or name another folder"):
            call("scans", out="out", quiet=True)
        assert [path.name for path in Path("out").iterdir()] == ["models"] and not lines
    call("scans", out="out", quiet=True)
    assert (Path("out") / "plan.yaml").is_file() and len(lines) == 1


def test_plan_writes_a_file_once_and_names_the_next_command(
    scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = med3dinsight_ext.plan("scans")
    out = capsys.readouterr().out
    assert "5 images, 3 with label maps" in out
    assert "pretrain scans --plan runs/scans/plan.yaml" in out.splitlines()[-1]
    assert read_plan("runs/scans/plan.yaml") == settings
    with pytest.raises(ValueError, match="out must be a new file, got runs/scans/plan.yaml"):
        med3dinsight_ext.plan("scans")


def test_a_published_bundle_predicts_by_its_own_configs(
    scans: Path, lines: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[tuple[Any, ...]] = []
    monkeypatch.setattr(workflows, "write_predictions", lambda *words: pages.append(words))
    home = Path("bundle")
    for name, text in (("models/model.pt", ""), ("configs/inference.json", CONFIG)):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    workflows.predict("bundle", "scans/v0.nii.gz", out="new", quiet=True)
    bundle, overlays, settings, *_ = lines[0]
    assert (bundle, overlays) == (home, ["inference.json"]) and settings["output_dir"] == "new"
    assert pages[0][2] == ["background", "ball"]


def test_calls_at_once_have_lists_of_their_own_with_the_modality_of_theirs(
    scans: Path, lines: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflows, "write_predictions", lambda *words: None)
    (Path("run") / "models").mkdir(parents=True)
    (Path("run") / "models" / "model.pt").touch()
    Path("run/plan.yaml").write_text("label_names: [background, ball]\n")
    Path("new.csv").write_text("image,modality\nscans/v1.nii.gz,CT\n")
    workflows.predict("run", "scans/v0.nii.gz")
    workflows.predict("run", "new.csv")
    rows = [json.loads(Path(line[2]["datalist"]).read_text()) for line in lines]
    shown = [(Path(row["image"]).name, row["modality"]) for (row,) in rows]
    assert shown == [("v0.nii.gz", "auto"), ("v1.nii.gz", "CT")]


def test_predictions_are_found_by_their_exact_names_and_those_of_this_call_are_returned(
    scans: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(bundle: Path, files: list[str], settings: dict[str, Any], *more: Any) -> None:
        for item in json.loads(Path(settings["datalist"]).read_text()):
            name = Path(item["image"]).name.replace(".nii.gz", "_seg.nii.gz")
            (Path(settings["output_dir"]) / name).touch()

    def page(path: Path, *more: Any) -> None:
        path.touch()

    monkeypatch.setattr(workflows, "launch", launch)
    monkeypatch.setattr(workflows, "write_predictions", page)
    (Path("run") / "models").mkdir(parents=True)
    (Path("run") / "models" / "model.pt").touch()
    Path("run/plan.yaml").write_text("label_names: [background, ball]\n")
    for name in ("P1_x", "P1", "scan[1]"):
        image = f"{name}.nii.gz"
        shutil.copy(scans / "v0.nii.gz", image)
        written = workflows.predict("run", image)
        assert [path.name for path in written] == [f"{name}_seg.nii.gz", "predictions.html"]
        assert "wrote 2 files to run/predictions" in capsys.readouterr().out
        with pytest.raises(ValueError, match=f"with {re.escape(name)}_seg.nii.gz and 0 more"):
            workflows.predict("run", image)


@pytest.mark.parametrize(
    ("name", "text", "there"),
    [
        ("student.pt", "spacing: [1, 1, 1]\n", "v0_tokens.safetensors"),
        ("model.pt", "class_names: [even, odd]\n", "cases.csv"),
    ],
)
def test_tokens_and_classes_are_not_overwritten_either(
    name: str, text: str, there: str, scans: Path, lines: list[tuple[Any, ...]]
) -> None:
    (Path("run") / "models").mkdir(parents=True)
    for file in {"model.pt", name}:
        (Path("run") / "models" / file).touch()
    Path("run/plan.yaml").write_text(text)
    Path("run/predictions").mkdir()
    (Path("run/predictions") / there).touch()
    with pytest.raises(ValueError, match=f"with {there} and 0 more; name another with --out"):
        workflows.predict("run", "scans/v0.nii.gz")
    assert not lines


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: workflows.finetune("images"), "data must have labels, got none for 2 images in"),
        (lambda: workflows.pretrain("images", split="s.json"), "split.json in .* got s.json; put"),
        (lambda: workflows.finetune("scans", subset="a"), "subset must be that of split.json"),
        (lambda: workflows.finetune("scans", datalist="a.csv"), "datalist must be the first arg"),
        (lambda: workflows.pretrain("scans", dataset_dir="a"), "dataset_dir must be the first arg"),
        (lambda: workflows.pretrain("one"), "at least 2 volumes to pre-train on, got 1 in one"),
        (lambda: workflows.predict("lost", "a.nii.gz"), "model must be a folder with models/model"),
        (lambda: workflows.predict("bare", "a.nii.gz"), "model must hold plan.yaml, got bare"),
        (lambda: workflows.predict("run"), "files must be given, got none; like python -m"),
        (lambda: workflows.predict("run", "x.nii.gz"), "files must exist, got x.nii.gz"),
        (lambda: workflows.predict("run", "one", "images"), "different names, got v0 twice"),
        (
            lambda: workflows.pretrain("$images"),
            r"data must not begin with .*, got '\$images'; give",
        ),
        (lambda: workflows.evaluate("run", "images"), "data must have labels, got none in images"),
    ],
)
def test_what_cannot_be_used_is_one_line(call: Any, rule: str, scans: Path) -> None:
    for name, count in (("images", 2), ("one", 1), ("$images", 2)):
        Path(name).mkdir()
        for i in range(count):
            shutil.copy(scans / f"v{i}.nii.gz", name)
    for name in ("run", "bare"):
        (Path(name) / "models").mkdir(parents=True)
        (Path(name) / "models" / "model.pt").touch()
    Path("run/plan.yaml").write_text("label_names: [background, ball]\n")
    with pytest.raises(ValueError, match=rule):
        call()


def test_other_data_is_scored_whole_and_that_of_the_training_by_its_validation_cases(
    scans: Path, lines: list[tuple[Any, ...]]
) -> None:
    workflows.finetune("scans", out="run", quiet=True)
    (Path("run") / "models").mkdir(exist_ok=True)
    (Path("run") / "models" / "model.pt").touch()
    workflows.evaluate("run", "scans", quiet=True)
    shutil.copytree(scans, "others")
    workflows.evaluate("run", "others", quiet=True)
    own, others = lines[-2][2], lines[-1][2]
    assert "val_fraction" not in own and others["val_fraction"] == 0
    assert own["output_dir"] == "run/evaluation-scans"
    Path("linked").symlink_to(scans)
    workflows.evaluate("run", "linked", out="linked scores", quiet=True)
    assert "val_fraction" not in lines[-1][2]
    shutil.copy(scans / "labels" / "v0.nii.gz", scans / "labels" / "v3.nii.gz")
    with pytest.raises(ValueError, match="got 3 of its 3 and 1 others in scans; name run/datalist"):
        workflows.evaluate("run", "scans", out="grown", quiet=True)
    assert not Path("grown").exists()
    workflows.evaluate("run", "run/datalist.json", out="again", quiet=True)


def test_what_a_training_was_given_beside_its_plan_counts_in_later_commands(
    scans: Path, lines: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[tuple[Any, ...]] = []
    monkeypatch.setattr(workflows, "write_predictions", lambda *words: pages.append(words))
    workflows.finetune("scans", out="run", quiet=True)
    (Path("run") / "models").mkdir(exist_ok=True)
    (Path("run") / "models" / "model.pt").touch()
    planned = read_plan("run/plan.yaml")
    given = {"spacing": [3, 3, 3], "seed": 1, "label_names": ["background", "kidney"]}
    config = planned | given | {"learning_rate": 1.0, "device": "cuda:7"}
    (Path("run") / "models" / "run.json").write_text(json.dumps({"config": config}))
    workflows.predict("run", "scans/v0.nii.gz", quiet=True)
    workflows.evaluate("run", "scans", quiet=True, spacing=[4, 4, 4])
    predicted, evaluated = lines[-2][2], lines[-1][2]
    paths = {"bundle_root", "output_dir", "datalist", "dataset_dir"}
    names = given["label_names"]
    assert predicted.items() >= {"spacing": [3, 3, 3], "label_names": names}.items()
    assert {k: v for k, v in evaluated.items() if k not in paths} == given | {"spacing": [4, 4, 4]}
    assert predicted.keys() - paths == {"spacing", "label_names"} and pages[0][2] == names


def test_a_pre_training_is_scored_with_the_captions_of_the_volumes(
    scans: Path, lines: list[tuple[Any, ...]]
) -> None:
    shutil.copytree(scans, "others")
    (scans / "captions.jsonl").touch()
    workflows.pretrain("scans", out="run", quiet=True)
    used = lines[-1][2]["captions"]
    (Path("run") / "models").mkdir(exist_ok=True)
    for name in ("model.pt", "student.pt"):
        (Path("run") / "models" / name).touch()
    given = {"captions": used, "teacher": TEACHER}
    (Path("run") / "models" / "run.json").write_text(json.dumps({"config": given}))
    workflows.predict("run", "scans/v0.nii.gz", out="new", quiet=True)
    assert lines.pop()[2]["teacher"] == TEACHER | {"_disabled_": "$not @prompts"}
    for name in ("scans", "others"):
        workflows.evaluate("run", name, quiet=True)
    (Path("others") / "captions.jsonl").touch()
    workflows.evaluate("run", "others", out="again", quiet=True)
    found = [call[2].get("captions") for call in lines[1:]]
    assert found == [used, None, "others/captions.jsonl"] and Path(used).is_absolute()
