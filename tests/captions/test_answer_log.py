"""A store filled by a multimodal model: answer log, interruptions, shards."""

from __future__ import annotations

import errno
import json
import random
import time
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeMllm, teacher, write_volumes
from safetensors.torch import load_file

from med3dinsight_ext.captions.answer_log import AnswerLog
from med3dinsight_ext.captions.captioner import SlicedVolume
from med3dinsight_ext.captions.multimodal import PROMPT
from med3dinsight_ext.embeddings import entry
from med3dinsight_ext.embeddings.store import Store


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = write_volumes(tmp_path_factory.mktemp("volumes"), 4, (14, 18, 12))
    return [{"image": str(folder / f"v{i}.nii.gz"), "modality": "MR"} for i in range(4)]


def filled(root: Path, items: list[dict], captioner: FakeMllm | None = None, **more: Any) -> Store:
    made = Store(root, teacher(), captioner or FakeMllm(), per_plane=3, **more)
    made.fill(items)
    return made


def content(root: Path) -> dict[str, Any]:
    """Every value of a store: entries, their readable side and the answers."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.suffix == ".safetensors":
            found[name] = {key: v.numpy().tobytes() for key, v in load_file(path).items()}
        elif path.is_file() and name != "files.jsonl":
            found[name] = path.read_text()
    assert sum(name.endswith(".safetensors") for name in found) == 4
    return found


@pytest.fixture(scope="module")
def undisturbed(items: list[dict], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("undisturbed")
    filled(root, items)
    return content(root)


def test_answers_become_captions_and_text_embeddings(items: list[dict], tmp_path: Path) -> None:
    made = filled(tmp_path, items)
    tensors = load_file(made.path(items[0]))
    about = json.loads(made.path(items[0]).with_suffix(".json").read_text())
    captions = [row["caption"] for row in about["slices"] if row["caption"]]
    assert len(captions) == len(tensors["text"]) > 5 and "Tissue of brightness" in captions[0]
    assert torch.allclose(tensors["text"].float(), made.teacher.encode_text(captions), atol=1e-3)
    assert about["captioner"]["prompt"] == PROMPT


def test_refusals_are_recorded_but_not_trained_on(items: list[dict], tmp_path: Path) -> None:
    made = filled(tmp_path, items, FakeMllm(refuses=2))
    about = json.loads(made.path(items[0]).with_suffix(".json").read_text())
    refused = [n for n, row in enumerate(about["slices"]) if row["status"] == "refused"]
    assert refused and about["slices"][refused[0]]["raw"].startswith("I'm sorry")
    assert about["slices"][refused[0]]["caption"] is None
    assert not set(refused) & set(load_file(made.path(items[0]))["text_row"].tolist())


def test_only_per_plane_slices_of_a_plane_are_captioned(items: list[dict], tmp_path: Path) -> None:
    made = filled(tmp_path, items, captioner := FakeMllm(per_plane=1, refuses=10**9))
    assert captioner.calls == 3 * len(items)
    assert len(load_file(made.path(items[0]))["text_row"]) == 3


def test_an_interrupted_run_resumes(items: list[dict], tmp_path: Path, undisturbed: dict) -> None:
    with pytest.raises(ConnectionError, match="start the server"):
        filled(tmp_path, items, FakeMllm(breaks_after=13))
    filled(tmp_path, items, again := FakeMllm())
    assert again.calls == 4 * 9 - 13
    assert content(tmp_path) == undisturbed


def test_a_full_disk_ends_the_run_without_damage(
    items: list[dict], tmp_path: Path, undisturbed: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def full(tensors: dict, path: Path) -> None:
        nonlocal written
        written += 1
        if written > 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        files_save(tensors, path)

    files_save = entry.save_file
    monkeypatch.setattr(entry, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        filled(tmp_path, items)
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    monkeypatch.undo()
    filled(tmp_path, items)
    assert content(tmp_path) == undisturbed


def test_another_teacher_reuses_the_answers(items: list[dict], tmp_path: Path) -> None:
    filled(tmp_path, items)
    other = teacher()
    other.image.fingerprint = "other"
    again = FakeMllm()
    Store(tmp_path, other, again, per_plane=3).fill(items)
    assert again.calls == 0


def test_another_prompt_makes_separate_entries(items: list[dict], tmp_path: Path) -> None:
    first = filled(tmp_path, items)
    second = filled(tmp_path, items, again := FakeMllm(prompt="Which plane is this? {plane}"))
    assert again.calls == 36 and first.path(items[0]) != second.path(items[0])
    about = json.loads(first.path(items[0]).with_suffix(".json").read_text())
    assert about["captioner"]["prompt"] == PROMPT


def test_more_slices_need_only_the_new_answers(items: list[dict], tmp_path: Path) -> None:
    filled(tmp_path, items, FakeMllm(per_plane=1))
    filled(tmp_path, items, again := FakeMllm())
    assert again.calls == 36 - 12


def test_planes_can_be_chosen(items: list[dict], tmp_path: Path) -> None:
    made = filled(tmp_path, items, planes=["axial"])
    assert load_file(made.path(items[0]))["plane"].tolist() == [2] * 3


def test_no_planes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="planes must name at least one"):
        Store(tmp_path, teacher(), FakeMllm(), planes=[])


def test_a_log_keeps_the_answers_around_a_cut_line(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "a.jsonl", {"model": "m"})
    log.add(("axial", 3), "Three.")
    with log.path.open("a") as file:
        file.write('\n{"plane": "axial", "ind')
    again = AnswerLog(tmp_path / "a.jsonl", {"model": "m"})
    again.add(("axial", 1), "One.")
    assert AnswerLog(log.path, {}).answers == {("axial", 3): "Three.", ("axial", 1): "One."}
    assert json.loads(log.path.read_text().splitlines()[0]) == {"model": "m"}


def work(root: Path, items: list[dict], shard: str | None, delay: float, rank: int | None) -> None:
    """What one process of several does."""
    torch.set_num_threads(1)
    if rank is not None:
        where = f"file://{root.with_name('group')}"
        torch.distributed.init_process_group("gloo", where, rank=rank, world_size=2)
    made = Store(root, teacher(), FakeMllm(delay=delay), per_plane=3)
    (root / "ready").touch()
    made.fill(items, shard=shard)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts ``work`` in other processes, which need not import everything anew."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["fakes", "med3dinsight_ext.embeddings.store"])
    yield lambda *arguments: context.Process(target=work, args=arguments)
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["shards", "ranks"])
def test_two_processes_make_the_same_store_as_one(
    how: str, items: list[dict], tmp_path: Path, undisturbed: dict, processes: Any
) -> None:
    ranks = [0, 1] if how == "ranks" else [None, None]
    shards = ["1/2", "2/2"] if how == "shards" else [None, None]
    both = [processes(tmp_path, items, shards[i], 0.02, ranks[i]) for i in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    (tmp_path / "ready").unlink()
    assert content(tmp_path) == undisturbed


def test_ten_kills_at_random_moments_change_nothing(
    items: list[dict], tmp_path: Path, undisturbed: dict, processes: Any
) -> None:
    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in tmp_path.rglob("*.jsonl"))

    moments = random.Random(0)
    answered = []
    for _ in range(10):
        process = processes(tmp_path, items, None, 0.06, None)
        enough = lines() + moments.randint(0, 3)
        process.start()
        while process.is_alive() and not ((tmp_path / "ready").exists() and lines() >= enough):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.06))
        process.kill()
        process.join()
        (tmp_path / "ready").unlink()
        answered.append(sum(len(AnswerLog(p, {}).answers) for p in tmp_path.rglob("*.jsonl")))
    assert answered == sorted(answered), "an answer was lost"
    assert 0 < answered[4] < 36, "the kills came at no interesting moment"
    filled(tmp_path, items, last := FakeMllm())
    assert last.calls == 36 - answered[-1]
    for draft in tmp_path.rglob(".*"):  # of writers that were killed
        draft.unlink()
    assert content(tmp_path) == undisturbed


def test_logged_answers_become_entries_at_once(
    items: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, items)
    other = teacher()
    other.image.fingerprint = "other"
    again = Store(tmp_path, other, FakeMllm(), per_plane=3)
    ahead: list[Path] = []
    waiting: list[int] = []
    cut, write = again.entries.cut, again.entries.write

    def counted_cut(item: dict, path: Path, answers: Path | None) -> SlicedVolume:
        ahead.append(path)
        return cut(item, path, answers)

    def counted_write(*arguments: Any) -> None:
        waiting.append(len(ahead))
        write(*arguments)

    monkeypatch.setattr(again.entries, "cut", counted_cut)
    monkeypatch.setattr(again.entries, "write", counted_write)
    again.fill(items)
    assert waiting[0] <= 3 < len(items)


@pytest.mark.parametrize("cut", [0, 1])
def test_a_line_cut_within_a_letter_is_skipped(cut: int, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "a.jsonl", {})
    log.add(("axial", 1), "Kept.")
    log.add(("axial", 2), "3 µm")
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[: whole.index("µ".encode()) + cut])
    assert AnswerLog(log.path, {}).answers == {("axial", 1): "Kept."}


def test_an_answer_may_hold_any_separator(tmp_path: Path) -> None:
    answer = "One.\u2028Two.\u0085Three.\r\nFour.\x1cFive."
    AnswerLog(tmp_path / "a.jsonl", {}).add(("axial", 1), answer)
    assert AnswerLog(tmp_path / "a.jsonl", {}).answers == {("axial", 1): answer}


def test_saving_a_log_keeps_another_processs_answers(tmp_path: Path) -> None:
    ours, theirs = (AnswerLog(tmp_path / "a.jsonl", {}) for _ in range(2))
    ours.add(("axial", 1), "One.")
    theirs.add(("axial", 2), "Two.")
    ours.save()
    assert set(AnswerLog(tmp_path / "a.jsonl", {}).answers) == {("axial", 1), ("axial", 2)}


def test_copies_of_a_volume_are_captioned_once(items: list[dict], tmp_path: Path) -> None:
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes(Path(items[0]["image"]).read_bytes())
    store = Store(tmp_path / "s", teacher(), captioner := FakeMllm(), per_plane=3)
    ready = store.fill([items[0], {**items[0], "image": str(copy)}])
    assert captioner.calls == 9 and ready[0]["targets"] == ready[1]["targets"]
