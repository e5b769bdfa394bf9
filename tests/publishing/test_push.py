"""Uploads to a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import fake_hub

from med3dinsight_ext.publishing.push import push

FILES = {
    "README.md": "---\nlibrary_name: monai\nlicense: apache-2.0\n---\n# Ball\n",
    "configs/metadata.json": json.dumps({"version": "0.2.0", "changelog": {"0.2.0": "more"}}),
    "models/model.pt": "weights",
}


@pytest.fixture
def ball(tmp_path: Path) -> str:
    """A published folder."""
    for name, text in FILES.items():
        (tmp_path / "ball" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ball" / name).write_text(text)
    return str(tmp_path / "ball")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of ann/ball, which is not there yet, on a hub that takes the token "writer"."""
    monkeypatch.setenv("HF_TOKEN", "writer")
    with fake_hub(tmp_path / "repo", "ann/ball") as (url, _):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        yield tmp_path / "repo"


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_folder_arrives_whole_in_a_new_repository(
    ball: str, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(ball, "ann/ball", dry_run=False)
    assert contents(hub) == FILES
    assert "uploaded 3 files to ann/ball" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "features/files.jsonl",
        "predictions/inputs.json",
        "answers/inputs.json",
        "evaluation-scans/datalist.json",
        "models/earlier/run.json",
        "models/round/run.json",
        "models/.training",
        "configs/monailabel_train.json",
        "store/files.jsonl",
        "store/clip/slices.json",
        "models/last.ckpt",
        "datalist.json",
        "configs/split.json",
    ],
)
def test_what_later_commands_wrote_stays_here(name: str, ball: str, hub: Path) -> None:
    (Path(ball) / name).parent.mkdir(parents=True, exist_ok=True)
    (Path(ball) / name).write_text(json.dumps({"image": "scans/jones.nii.gz"}))
    push(ball, "ann/ball", dry_run=False)
    assert contents(hub) == FILES


def test_the_command_of_a_training_in_the_folder_is_not_uploaded(ball: str, hub: Path) -> None:
    (Path(ball) / "models/run.json").write_text(json.dumps({"command": ["python", "x"]}))
    with pytest.raises(ValueError, match="models/run.json must be as publish wrote it, got the c"):
        push(ball, "ann/ball", dry_run=False)
    assert not hub.exists()


def test_an_update_deletes_what_the_release_no_longer_has(ball: str, hub: Path) -> None:
    (Path(ball) / "models/run.json").write_text("{}")
    push(ball, "ann/ball", dry_run=False)
    (hub / "figure.png").write_text("kept")
    (Path(ball) / "models/run.json").unlink()
    push(ball, "ann/ball", dry_run=False, update=True)
    assert contents(hub) == FILES | {"figure.png": "kept"}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "models/run.json", "configs/train.json"])
def test_a_place_on_a_persons_machine_is_not_uploaded(
    name: str, dry_run: bool, ball: str, hub: Path
) -> None:
    (Path(ball) / name).write_text(json.dumps({"image": "/home/ann/scans/jones.nii.gz"}))
    with pytest.raises(ValueError, match=f"a person's machine, got {name}.*/home/ann/scans/jones"):
        push(ball, "ann/ball", dry_run=dry_run)
    assert not hub.exists()


def test_a_repository_that_exists_gets_a_commit_only_if_asked(ball: str, hub: Path) -> None:
    hub.mkdir()
    (hub / "other.md").write_text("kept")
    with pytest.raises(ValueError, match="ann/ball, which exists; --update True adds a commit"):
        push(ball, "ann/ball", dry_run=False)
    assert contents(hub) == {"other.md": "kept"}
    push(ball, "ann/ball", dry_run=False, update=True)
    assert contents(hub) == FILES | {"other.md": "kept"}


def test_a_token_without_the_right_to_write_is_one_line(
    ball: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "reader")
    with pytest.raises(ValueError, match="accepts ann/ball.*403.*check the token's rights"):
        push(ball, "ann/ball", dry_run=False)


def test_a_hub_that_does_not_answer_is_one_line(
    ball: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="accepts ann/ball, got Conn.*repeat it with --update"):
        push(ball, "ann/ball", dry_run=False)


def test_no_token_is_an_error(ball: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="push must have a token, got none; hf auth login"):
        push(ball, "ann/ball", dry_run=False)


def test_a_folder_without_weights_does_not_delete_those_on_the_hub(ball: str, hub: Path) -> None:
    push(ball, "ann/ball", dry_run=False)
    (Path(ball) / "models/model.pt").unlink()
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="must come from publish, got .* without models/model"):
            push(ball, "ann/ball", dry_run=dry_run, update=True)
    assert contents(hub) == FILES


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            '{"version": "0.3.0", "changelog": {"0.2.0": "more"}}',
            "0.3.0, its changelog has",
        ),
        ('{"changelog": {}}', "has version None, which is not"),
        ("{", "metadata.json cannot be read"),
        ("[]", "metadata.json"),
    ],
)
def test_metadata_that_name_no_release_are_an_error_of_the_dry_run(
    text: str, match: str, ball: str
) -> None:
    (Path(ball) / "configs/metadata.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        push(ball, "ann/ball")
