import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from fakes import SIZE, FakeMllm, volume
from safetensors.torch import load_file

from med3dinsight_ext.captions.sources import FileCaptions, TemplateCaptions
from med3dinsight_ext.data.patients import patients_of
from med3dinsight_ext.embeddings import entry as entries
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.io.files import HashMemo
from med3dinsight_ext.teachers.teacher import Teacher


def test_an_entry_holds_embeddings_of_slices_and_captions(items: list[dict], store: Store) -> None:
    done = store.fill(items)[0]
    entry = load_file(done["targets"])
    assert entry["image"].shape == (12, 6) and entry["text"].shape == (12, 8)
    about = json.loads(Path(done["targets"]).with_suffix(".json").read_text())
    again = store.teacher.encode_text([row["caption"] for row in about["slices"]])
    assert torch.allclose(entry["text"].float(), again, atol=1e-3)
    assert about["teacher"] == store.teacher.fingerprint and about["modality"] == "MR"


def test_entries_and_answers_are_in_folders_of_two_letters(
    items: list[dict], teacher: Teacher, tmp_path: Path
) -> None:
    asking = Store(tmp_path / "s", teacher, FakeMllm(), per_plane=4)
    entry, answers = asking.path(items[0]), asking.answers_path(items[0])
    assert re.fullmatch(r"[0-9a-f]{32}\.safetensors", entry.name)
    assert entry.parent == asking.root / entry.name[:2]
    assert answers and re.fullmatch(r"[0-9a-f]{32}\.jsonl", answers.name)
    assert answers.parent == asking.root / "answers" / answers.name[:2]


def test_embedding_takes_a_shard_leaves_out_bad_volumes_and_says_where_to_look(
    items: list[dict], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(items[0]["image"]).write_bytes(b"no volume")
    with pytest.raises(ValueError, match="1 bad of 3"):
        store.embed(items)
    store.embed(items, skip_bad=True)
    out = capsys.readouterr().out
    assert f"2 volumes are in {store.root}" in out
    assert f"python -m med3dinsight_ext captions {store.root}\n" in out
    store.embed(items, shard="2/3")
    assert "1 volumes are in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dims",
    [{"image": 6}, {"image": 6, "text": 0}, {"image": 2**20, "text": 8}, {"image": True, "text": 8},
     {"image": 6.0, "text": 8}, {"joint": 6, "image": 6, "text": 8}, {}, [6, 8]],
)  # fmt: skip
def test_a_teachers_file_that_cannot_be_right_is_made_again(dims: object, store: Store) -> None:
    sound = {"image": 6, "text": 8}
    assert store.embedding_dims == sound
    (path,) = store.root.glob("teacher-*.json")
    right = json.loads(path.read_text())
    assert right == {"fingerprint": store.teacher.fingerprint, "embedding_dims": sound}
    for about in (right | {"embedding_dims": dims}, right | {"fingerprint": "another"}):
        path.write_text(json.dumps(about))
        assert store.embedding_dims == sound
        assert json.loads(path.read_text()) == right


def test_a_teachers_file_is_read_again(store: Store) -> None:
    store.embedding_dims  # noqa: B018 (writes the file)
    (path,) = store.root.glob("teacher-*.json")
    kept = json.loads(path.read_text()) | {"embedding_dims": {"image": 2**20 - 1, "text": 1}}
    path.write_text(json.dumps(kept))
    assert store.embedding_dims == {"image": 2**20 - 1, "text": 1}


def test_a_joint_teachers_dims_are_not_those_of_a_pair(store: Store) -> None:
    pair = store.embedding_dims
    store.teacher.joint = True
    assert set(store.embedding_dims) == {"joint"}
    store.teacher.joint = False
    assert store.embedding_dims == pair


def test_copies_are_of_one_patient_whatever_their_captions(
    items: list[dict], teacher: Teacher, tmp_path: Path
) -> None:
    Path(items[1]["image"]).write_bytes(Path(items[0]["image"]).read_bytes())
    row = {"image": items[0]["image"], "plane": "axial", "index": 3, "caption": "A mass."}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    filled = Store(tmp_path / "s", teacher, FileCaptions(tmp_path / "c.jsonl"), 4).fill(items)
    assert filled[0]["targets"] != filled[1]["targets"]
    names = patients_of(filled)
    assert names[0] == names[1] != names[2]


def test_a_filled_store_lets_go_of_its_networks(
    items: list[dict], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(store.teacher, "free", lambda: freed.append("teacher"))
    monkeypatch.setattr(store.captioner, "free", lambda: freed.append("captioner"))
    store.fill(items)
    assert freed == ["teacher", "captioner"]
    store.fill(items)  # nothing was loaded
    assert freed == ["teacher", "captioner"]


def test_a_full_store_never_runs_the_teacher(
    items: list[dict], store: Store, tmp_path: Path
) -> None:
    store.fill(items)
    assert store.embedding_dims == {"image": 6, "text": 8}

    class Failing(Teacher):
        def encode_image(self, slices: torch.Tensor) -> torch.Tensor:
            raise AssertionError("run")

        encode_text = encode_image  # type: ignore[assignment]

    again = Store(
        tmp_path / "store", Failing(store.teacher.image, store.teacher.text), TemplateCaptions(), 4
    )
    assert [Path(i["targets"]).exists() for i in again.fill(items)] == [True] * 3
    assert again.embedding_dims == {"image": 6, "text": 8}


@pytest.mark.parametrize("change", ["file", "modality", "captions", "per_plane", "seed", "teacher"])
def test_whatever_changes_a_value_changes_the_key(
    change: str, items: list[dict], store: Store, teacher: Teacher, tmp_path: Path
) -> None:
    before = store.path(items[0])
    item, captioner, per_plane, seed = items[0], TemplateCaptions(), 4, 0
    if change == "file":
        volume(tmp_path / "0.nii.gz", seed=9)
    if change == "modality":
        item = {**item, "modality": "PET"}
    if change == "captions":
        captioner = TemplateCaptions("{plane}")
    if change == "per_plane":
        per_plane = 5
    if change == "seed":
        seed = 1
    if change == "teacher":
        teacher.image.fingerprint = "other"
    other = Store(tmp_path / "store", teacher, captioner, per_plane, seed)
    assert other.path(item) != before


def test_a_copy_or_a_touched_file_is_no_new_volume(items: list[dict], store: Store) -> None:
    before = store.path(items[0])
    os.utime(items[0]["image"], (1, 1))
    assert store.path(items[0]) == before


def test_hashes_are_remembered_and_a_cut_line_is_survived(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("x")
    memo = HashMemo(tmp_path / "files.jsonl")
    digest = memo(str(file))
    with (tmp_path / "files.jsonl").open("a") as out:
        out.write('\n["half')
    again = HashMemo(tmp_path / "files.jsonl")
    assert again.get(file) == again(file) == digest


def test_all_bad_volumes_are_named_at_once_and_good_ones_are_kept(
    items: list[dict], store: Store, tmp_path: Path
) -> None:
    Path(items[0]["image"]).write_bytes(b"no volume")
    nan = nib.Nifti1Image(np.full(SIZE, np.nan, np.float32), np.eye(4))
    nib.save(nan, items[1]["image"])
    with pytest.raises(ValueError, match=r"2 bad of 3.*skip_bad(.|\n)*0\.nii\.gz(.|\n)*1\.nii\.gz"):
        store.fill(items)
    assert [i["image"] for i in store.fill(items, skip_bad=True)] == [items[2]["image"]]


def test_a_store_of_only_bad_volumes_is_an_error_even_when_they_may_be_skipped(
    items: list[dict], store: Store
) -> None:
    Path(items[0]["image"]).write_bytes(b"no volume")
    with pytest.raises(ValueError, match="1 bad of 1"):
        store.fill(items[:1], skip_bad=True)


def test_a_killed_write_leaves_no_entry(
    items: list[dict], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(tensors: object, draft: Path) -> None:
        draft.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(entries, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        store.fill(items)
    monkeypatch.undo()
    assert not list(store.root.rglob("*.safetensors*"))
    assert all(load_file(i["targets"])["image"].isfinite().all() for i in store.fill(items))


def test_filling_twice_gives_the_same_values(
    items: list[dict], teacher: Teacher, tmp_path: Path
) -> None:
    once, twice = (
        load_file(Store(tmp_path / name, teacher, TemplateCaptions(), 4).fill(items)[0]["targets"])
        for name in ("a", "b")
    )
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)


def test_captioned_slices_are_embedded_beside_the_drawn_ones(
    items: list[dict], teacher: Teacher, tmp_path: Path
) -> None:
    rows = [{"image": "0.nii.gz", "plane": "axial", "index": 7, "caption": "a mass"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = Store(tmp_path / "s", teacher, FileCaptions(tmp_path / "c.jsonl"), per_plane=2)
    with_text, without = (load_file(i["targets"]) for i in store.fill(items)[:2])
    row = int(with_text["text_row"])
    assert (int(with_text["plane"][row]), float(with_text["position"][row])) == (2, 7.5 / 20)
    assert torch.allclose(with_text["text"].float(), teacher.encode_text(["a mass"]), atol=1e-3)
    assert "text" not in without and len(without["text_row"]) == 0


def test_a_plan_prints_the_cost_and_makes_nothing(
    items: list[dict], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = store.plan(items)
    assert plan["missing"] == 3 and plan["slices"] == 3 * 12 and plan["calls"] == 0
    assert "3 volumes, 3 of them not in" in capsys.readouterr().out
    assert not list(store.root.rglob("*.safetensors"))
    store.fill(items)
    made = sum(p.stat().st_size for p in store.root.rglob("*") if p.is_file()) / 1e9
    assert made / 2 < plan["gigabytes"] < 2 * made
    assert store.plan(items)["missing"] == 0


@pytest.mark.parametrize("joint", [False, True])
def test_a_plan_counts_half_precision_numbers_and_texts(
    joint: bool, items: list[dict], teacher: Teacher, tmp_path: Path
) -> None:
    both = Teacher(teacher.image, teacher.text, joint=joint)
    plan = Store(tmp_path / "s", both, TemplateCaptions(), per_plane=4).plan(items)
    numbers = 2 * 6 if joint else 6 + 8  # an image and a text a slice
    assert plan["gigabytes"] * 1e9 == pytest.approx(36 * (2 * numbers + 300) + 3 * 1500)


def test_a_plan_of_many_volumes_reads_two_hundred_headers(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    shape = "med3dinsight_ext.embeddings.store.shape_of"
    monkeypatch.setattr(shape, lambda path: read.append(path) or SIZE)
    items = []
    for i in range(401):
        (tmp_path / f"{i}.nii").write_text(str(i))
        items.append({"image": str(tmp_path / f"{i}.nii"), "modality": "MR"})
    plan = store.plan(items)
    assert len(read) == 134 and read[1] == items[3]["image"]
    assert plan["slices"] == 401 * 12
    bytes_of_all = 401 * (12 * (2 * 14 + 300) + 1500)
    assert plan["gigabytes"] * 1e9 == pytest.approx(bytes_of_all)


def test_a_plan_names_the_answers_that_are_logged(
    items: list[dict], teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asking = Store(tmp_path / "s", teacher, FakeMllm(breaks_after=5), per_plane=4)
    assert asking.plan(items)["calls"] == 36
    with pytest.raises(ConnectionError, match="start the server"):
        asking.fill(items)
    assert "(5 answers are logged)" not in capsys.readouterr().out
    plan = asking.plan(items)
    assert (plan["calls"], plan["logged"]) == (36, 5)  # of slices that may not be chosen again
    assert "36 model calls (5 answers are logged), " in capsys.readouterr().out
    more = Store(tmp_path / "s", teacher, FakeMllm(), per_plane=5)
    asked = more.plan(items)["calls"]
    more.fill(items)
    assert more.captioner.calls <= asked


def test_a_volume_that_is_replaced_while_it_is_read_makes_no_entry(
    items: list[dict], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = store.entries.cut

    def replacing(item: dict, *rest: object) -> object:
        if item["image"] == items[1]["image"]:
            volume(Path(item["image"]), 7)
        return cut(item, *rest)

    monkeypatch.setattr(store.entries, "cut", replacing)
    with pytest.raises(ValueError, match=r"got 1 bad of 3.*\n.*stay as it is while it"):
        store.fill(items)
    assert len(list(store.root.glob("??/*.safetensors"))) == 2


def test_voxels_in_a_file_of_their_own_belong_to_the_key(store: Store, tmp_path: Path) -> None:
    items = []
    for seed, name in enumerate("ab"):
        array = np.random.default_rng(seed).random(SIZE, np.float32)
        nib.save(nib.Nifti1Pair(array, np.eye(4)), tmp_path / f"{name}.img")
        items.append({"image": str(tmp_path / f"{name}.hdr"), "modality": "MR"})
    assert (tmp_path / "a.hdr").read_bytes() == (tmp_path / "b.hdr").read_bytes()
    first, other = (item["targets"] for item in store.fill(items))
    assert first != other
    shutil.copy(tmp_path / "b.img", tmp_path / "a.img")
    assert store.fill(items)[0]["targets"] == other


def test_a_plan_hashes_no_volume_and_measures_what_some_take(
    items: list[dict], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 0 < store.plan(items)["hours"] < 0.1
    assert "hours beside the model's with 1 readers of" in (out := capsys.readouterr().out)
    assert "as 3 volumes took" in out and "nothing was made" in out
    assert not (store.root / "files.jsonl").exists()


def test_a_plan_survives_bad_volumes_and_counts_them(
    items: list[dict], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(items[0]["image"]).write_bytes(b"no volume")
    nib.save(nib.Nifti1Image(np.ones((4, 5), np.float32), np.eye(4)), items[1]["image"])
    assert store.plan(items)["slices"] == 12
    assert "2 of 3 sampled cannot be read" in capsys.readouterr().out


def test_a_missing_file_is_a_bad_volume(items: list[dict], store: Store) -> None:
    Path(items[0]["image"]).unlink()
    with pytest.raises(ValueError, match="1 bad of 3.*(.|\n)*image must be a file"):
        store.fill(items)
    assert len(store.fill(items, skip_bad=True)) == 2


def test_a_file_name_need_not_be_utf_8(tmp_path: Path, store: Store) -> None:
    item = volume(tmp_path / os.fsdecode(b"M\xfcller.nii.gz"))
    done = Path(store.fill([item])[0]["targets"])
    assert "M\\udcfcller" in done.with_suffix(".json").read_text()


def test_a_full_store_can_be_read_where_nothing_can_be_written(
    items: list[dict], store: Store, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fill(items)
    (store.root / "files.jsonl").unlink()
    (store.root / "files.jsonl").mkdir()  # cannot be appended to, even by root
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "files.jsonl")
    again = Store(store.root, teacher, TemplateCaptions(), per_plane=4)
    assert len(again.fill(items)) == 3


def test_one_plane_may_be_named_without_a_list(tmp_path: Path, teacher: Teacher) -> None:
    assert Store(tmp_path, teacher, TemplateCaptions(), planes="axial").choice.planes == [2]
