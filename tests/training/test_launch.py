import ast
import shlex
from pathlib import Path

import pytest

from med3dinsight_ext.training import launch
from med3dinsight_ext.training.launch import quoted


def test_only_values_that_need_quotes_have_them() -> None:
    assert [quoted(value) for value in ("a/b-1.nii", 3, "[1, 2]")] == ["a/b-1.nii", "3", '"[1, 2]"']


def test_paths_of_configs_may_hold_commas_and_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Flow:
        def __init__(self, files: list[str], **_: object) -> None:
            seen.extend(files)

        def initialize(self) -> None: ...

        run = finalize = initialize

    seen: list[str] = []
    monkeypatch.setattr(launch, "ConfigWorkflow", Flow)
    overlay = tmp_path / "Smith, John" / "plan.yaml"
    overlay.parent.mkdir()
    overlay.write_text("spacing: [2, 2, 2]\n")
    launch.bundle_run("seg-finetune", ["train.json", str(overlay)])
    assert seen[-1] == str(overlay)
    line = next(line for line in capsys.readouterr().out.splitlines() if line[:1] == "$")
    files = ast.literal_eval(shlex.split(line)[shlex.split(line).index("--config_file") + 1])
    assert Path(files[-1]).resolve() == overlay and len(files) == len(seen)
