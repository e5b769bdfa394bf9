"""What an entry holds, and what of a damaged one is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from med3dinsight_ext.captions.captioner import SlicedVolume
from med3dinsight_ext.captions.cleaning import Reply
from med3dinsight_ext.captions.sources import FileCaptions, TemplateCaptions
from med3dinsight_ext.data.volumes import guess_modality, read_volume
from med3dinsight_ext.embeddings.entry import EntryMaker, SliceChoice, read_entry
from med3dinsight_ext.embeddings.store import Store, _known_dims, read_ahead
from med3dinsight_ext.teachers.teacher import Teacher


@pytest.fixture
def item(tmp_path: Path) -> dict[str, Any]:
    return fakes.volume(tmp_path / "0.nii.gz")


@pytest.fixture
def path(item: dict[str, Any], teacher: Teacher, tmp_path: Path) -> Path:
    """Of an entry with a caption for each of 12 slices."""
    return Path(Store(tmp_path / "s", teacher, TemplateCaptions(), 4).fill([item])[0]["targets"])


def about(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text("utf-8"))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_embeddings_that_are_not_finite_are_not_stored(
    tower: str, item: dict[str, Any], teacher: Teacher, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def embed(given: Any) -> Tensor:
        return torch.full((len(given), 6 if tower == "image" else 8), torch.nan)

    monkeypatch.setattr(getattr(teacher, tower), "embed", embed)
    store = Store(tmp_path / "s", teacher, TemplateCaptions(), 4)
    with pytest.raises(ValueError, match=f"{tower} embeddings must be finite, got .*0.nii.gz"):
        store.fill([item])
    assert not list(store.root.rglob("*.safetensors"))


def test_one_volume_of_embeddings_that_are_not_finite_does_not_stop_the_others(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [fakes.volume(tmp_path / f"{n}.nii.gz", n) for n in range(3)]
    calls: list[int] = []
    embed = teacher.image.embed

    def broken_first(pixels: Tensor) -> Tensor:
        calls.append(1)
        return embed(pixels) * (torch.nan if len(calls) == 1 else 1)

    monkeypatch.setattr(teacher.image, "embed", broken_first)
    store = Store(tmp_path / "s", teacher, TemplateCaptions(), 4)
    with pytest.raises(ValueError, match=r"1 bad of 3(.|\n)*embeddings must be finite, got"):
        store.fill(items)
    assert len(list(store.root.rglob("*.safetensors"))) == 2


def test_a_sound_entry_is_read_whole(path: Path) -> None:
    found, stored = read_entry(path), load_file(path)
    assert found["text_row"].tolist() == list(range(12)) and set(found["plane"].tolist()) == {
        0,
        1,
        2,
    }
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())


def put(name: str, index: Any, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(entry: dict[str, Tensor]) -> None:
        entry[name][index] = value

    return change


@pytest.mark.parametrize(
    "damage",
    [
        put("plane", 5, 3),
        put("text_row", 0, -1),
        put("text_row", 11, 12),
        put("image", (3, 2), float("nan")),
        put("position", 1, float("inf")),
        put("affine", 0, 0),
        lambda entry: entry.update(affine=torch.eye(5, 4)),
        lambda entry: entry.update(image=entry["image"][:11].contiguous()),
        lambda entry: entry.update(text=entry["text"][1:].contiguous()),
        lambda entry: entry.update(size=entry["size"][:2].contiguous()),
        lambda entry: entry.pop("modality"),
    ],
)
def test_one_wrong_number_of_an_entry_is_an_error_that_names_it(
    damage: Callable[[dict[str, Tensor]], Any], path: Path
) -> None:
    entry = load_file(path)
    damage(entry)
    save_file(entry, path)
    with pytest.raises(ValueError, match=f"entry .*{path.name}.*delete it"):
        read_entry(path)


@pytest.mark.parametrize("modality", ["auto", "PET", "CT"])
def test_the_modality_is_guessed_only_where_it_is_not_given(
    modality: str, item: dict[str, Any], teacher: Teacher, tmp_path: Path
) -> None:
    guessed = guess_modality(read_volume(item["image"]))
    assert guessed not in ("PET", "CT")
    store = Store(tmp_path / "s", teacher, TemplateCaptions(), 2)
    done = Path(store.fill([{**item, "modality": modality}])[0]["targets"])
    assert about(done)["modality"] == (guessed if modality == "auto" else modality)


class Ends(TemplateCaptions):
    """Requires the first and the last slice of each plane, at the ends of the extent."""

    def required(self, item: dict, shape: Any = None) -> tuple[Tensor, Tensor]:
        return torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0.0, 1.0] * 3)


def test_a_slice_at_the_end_of_the_extent_is_the_last(
    item: dict[str, Any], teacher: Teacher, tmp_path: Path
) -> None:
    volume = EntryMaker(teacher, Ends(), SliceChoice(1, 0, [0, 1, 2])).cut(item, tmp_path, None)
    for p, n in enumerate(fakes.SIZE):
        found = volume.position[volume.plane == p].tolist()
        assert (found[0], found[-1]) == pytest.approx((0.5 / n, (n - 0.5) / n))


def test_the_json_is_readable_and_holds_similarities_of_a_joint_space(
    item: dict[str, Any], tmp_path: Path
) -> None:
    class Joint(Teacher):
        def encode_text(self, texts: list[str]) -> Tensor:
            return super().encode_text(texts)[:, :6]

    fake = fakes.teacher()
    joint = Joint(fake.image, fake.text)
    joint.joint = True
    rows = [{"image": "0.nii.gz", "plane": "axial", "index": 7, "caption": "größer als üblich"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = Store(tmp_path / "s", joint, FileCaptions(tmp_path / "c.jsonl"), 2)
    done = Path(store.fill([item])[0]["targets"])
    assert "größer als üblich" in done.with_suffix(".json").read_text("utf-8")
    entry, (row,) = load_file(done), [r for r in about(done)["slices"] if r["caption"]]
    product = entry["image"][entry["text_row"].long()].float() * entry["text"].float()
    assert row["similarity"] == round(float(product.sum()), 4)
    assert [r["similarity"] for r in about(done)["slices"]].count(None) == 6


def test_the_raw_answer_is_kept_where_there_is_no_caption(
    item: dict[str, Any], teacher: Teacher, tmp_path: Path
) -> None:
    maker = EntryMaker(teacher, TemplateCaptions(), SliceChoice(1, 0, [0, 1, 2]))
    volume: SlicedVolume = maker.cut(item, tmp_path / "e.safetensors", None)
    replies = {0: Reply("a liver", "ok", "A liver!"), 1: Reply(None, "refused", "I can't.")}
    maker.write(volume, replies)
    rows = about(tmp_path / "e.safetensors")["slices"]
    assert [(r["caption"], r["status"], r.get("raw")) for r in rows] == [
        ("a liver", "ok", None),
        (None, "refused", "I can't."),
        (None, None, None),
    ]


def test_an_entry_lies_in_a_folder_of_the_first_letters_of_its_name(path: Path) -> None:
    assert len(path.stem) == 32 and set(path.stem) <= set("0123456789abcdef")
    assert path.parent.name == path.stem[:2]


@pytest.mark.parametrize("joint", [False, True])
def test_a_plan_is_the_size_of_embeddings_text_and_numbers(
    joint: bool, item: dict[str, Any], teacher: Teacher, tmp_path: Path
) -> None:
    teacher.joint = joint
    store = Store(tmp_path / "s", teacher, TemplateCaptions(), per_plane=4)
    width = 12 if joint else 14  # numbers of an image and a text, 2 bytes each
    found = store.plan([item])
    assert found["slices"] == 12 and found["missing"] == 1
    assert found["gigabytes"] == pytest.approx((12 * (2 * width + 300) + 1500) / 1e9)


@pytest.mark.parametrize("count", [199, 200, 201, 401])
def test_a_plan_looks_at_two_hundred_volumes_at_most(
    count: int,
    item: dict[str, Any],
    teacher: Teacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(
        "med3dinsight_ext.embeddings.store.shape_of", lambda image: seen.append(image) or (9, 9, 9)
    )
    store = Store(tmp_path / "s", teacher, TemplateCaptions(), per_plane=4)
    found = store.plan([item] * count)
    assert found["slices"] == 12 * count and len(seen) == -(-count // -(-count // 200))


def test_embed_takes_a_shard_and_says_how_to_look(
    item: dict[str, Any], teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = fakes.volume(tmp_path / "1.nii.gz", 1)
    bad = {**item, "image": str(tmp_path / "gone.nii.gz")}
    store = Store(tmp_path / "s", teacher, TemplateCaptions(), 1)
    store.embed([item, bad, other], True, "1/1")
    out = capsys.readouterr().out
    assert "2 volumes are in" in out and f"med3dinsight_ext captions {tmp_path / 's'}" in out
    store.embed([item, other], shard="2/2")
    assert "1 volumes are in" in capsys.readouterr().out


def test_a_store_that_cannot_be_written_warns(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "s").write_text("a file in the place of the folder")
    assert Store(tmp_path / "s", teacher, TemplateCaptions()).embedding_dims["image"] == 6
    assert "could not be written" in caplog.text


@pytest.mark.parametrize(
    ("dims", "sound"),
    [
        ({"joint": 1}, True),
        ({"image": 768, "text": 2**20 - 1}, True),
        ({"joint": 2**20}, False),
        ({"image": 6, "text": 0}, False),
        ({"image": 0, "text": 6}, False),
        ({"joint": -3}, False),
        ({"joint": 5.5}, False),
        ({"joint": True}, False),
        ({"image": 6}, False),
        ({}, False),
    ],
)
def test_dimensions_are_taken_from_a_sound_file_alone(
    dims: dict[str, Any], sound: bool, tmp_path: Path
) -> None:
    file = tmp_path / "teacher.json"
    file.write_text(json.dumps({"fingerprint": "f", "embedding_dims": dims}))
    assert _known_dims(file, "f") == (dims if sound else None)
    assert _known_dims(file, "another") is None


def test_two_volumes_are_read_ahead() -> None:
    taken = []

    def paths() -> Any:
        for name in "abcdef":
            taken.append(name)
            yield Path(name)

    pairs = read_ahead(lambda path: path, paths())  # type: ignore[arg-type, return-value]
    assert next(pairs)[0] == Path("a") and taken == ["a", "b", "c"]
    assert [path.name for path, _ in pairs] == list("bcdef")
