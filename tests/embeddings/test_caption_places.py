"""Each caption stays with its slice, from a file or a model's answers to the batch.

A voxel's value is unique in its volume, so the augmented image itself shows which original slice
lies at a target's plane and position.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import nibabel as nib
import numpy as np
import pytest
import torch
from fakes import SIZE, FakeImages, FakeMllm
from monai.data import DataLoader, Dataset
from monai.transforms import (
    Compose,
    RandFlipd,
    RandSpatialCropd,
    SpatialPadd,
)
from safetensors.torch import save_file
from test_targets import MOVES
from torch import Tensor

from med3dinsight_ext.captions.captioner import Captioner
from med3dinsight_ext.captions.cleaning import clean_caption
from med3dinsight_ext.captions.multimodal import SliceRequest
from med3dinsight_ext.captions.sources import FileCaptions, TemplateCaptions
from med3dinsight_ext.data import slicing
from med3dinsight_ext.data.slicing import PLANES
from med3dinsight_ext.data.volumes import ReadVolumed, read_volume
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.embeddings.targets import (
    PrepareSlices,
    SampleTargetsd,
    SliceTargets,
    shuffle_captions,
)
from med3dinsight_ext.teachers.teacher import Teacher
from med3dinsight_ext.teachers.towers import TextTower

Place = tuple[int, int, int]  # volume, plane, index along the cut axis in RAS
COUNT = 3
PLACES = [(v, p, i) for v in range(COUNT) for p in range(3) for i in range(SIZE[p])]
NUMBER = {place: number for number, place in enumerate(PLACES)}


class Words(TextTower):
    """Gives each text a direction of its own."""

    fingerprint = "words"

    def load(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def fits(self, text: str) -> bool:
        return True

    def embed(self, texts: list[str]) -> Tensor:
        seeds = [crc32(text.encode()) for text in texts]
        return torch.stack(
            [torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )


def text_of(place: Place) -> str:
    return f"Tissue number {NUMBER[place]}."


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Volumes that differ in orientation on disk."""
    folder, found = tmp_path_factory.mktemp("volumes"), []
    for number, codes in enumerate(("RAS", "LPS", "SRA")):
        order = np.random.default_rng(number).permutation(int(np.prod(SIZE)))
        array = (1 + order).reshape(SIZE).astype(np.float32)
        image = nib.Nifti1Image(array, np.diag([1.5, 1.0, 2.0, 1.0]))
        path = folder / f"{number}.nii.gz"
        nib.save(image.as_reoriented(nib.orientations.axcodes2ornt(tuple(codes))), path)
        found.append({"image": str(path), "modality": "MR"})
    return found


class Seeing(FakeMllm):
    """Names the slice that its picture shows, whatever else the request holds."""

    def answer(self, request: SliceRequest) -> str:
        shown = np.asarray(request.image, dtype=float)
        number = min(NUMBER.values(), key=lambda n: np.abs(PICTURES[n] - shown).sum())
        return "I'm sorry, but I can't help." if number % 4 == 0 else f"Tissue number {number}."


PICTURES: dict[int, np.ndarray] = {}


@pytest.fixture(scope="module", autouse=True)
def pictures(items: list[dict]) -> None:
    """The picture of every slice, each cut alone."""
    for number, (v, p, i) in enumerate(PLACES):
        volume = read_volume(items[v]["image"])
        shown = slicing.window(volume, "MR")
        position = torch.tensor([(i + 0.5) / SIZE[p]])
        picture = FakeMllm().pictures(shown, volume.pixdim.tolist(), p, position)[0]
        PICTURES[number] = np.asarray(picture, dtype=float)


def from_file(folder: Path, captioned: Callable[[Place], bool]) -> FileCaptions:
    """Rows in any order, by index or by position."""
    rows = []
    for v, p, i in filter(captioned, PLACES):
        row = {"image": f"{v}.nii.gz", "plane": PLANES[p], "caption": text_of((v, p, i))}
        where = {"index": i} if i % 2 else {"position": (i + 0.5) / SIZE[p]}
        rows.append({**row, **where})
    np.random.default_rng(0).shuffle(rows)
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileCaptions(path)


def teacher(texts: TextTower | None = None) -> Teacher:
    return Teacher(FakeImages(), texts or Words())


def some(place: Place) -> bool:
    return NUMBER[place] % 3 != 0


class Filled(NamedTuple):
    store: Store
    items: list[dict]


@pytest.fixture(scope="module")
def by_file(items: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    captions = from_file(Path(items[0]["image"]).parent, some)
    store = Store(tmp_path_factory.mktemp("file"), teacher(), captions, per_plane=5)
    return Filled(store, store.fill(items))


class Numbered(TemplateCaptions):
    """A template's captions, whose embeddings are kept from volume to volume."""

    def caption(self, item: dict, plane: Any, position: Any) -> list[str | None]:
        number = int(Path(item["image"]).name[0])
        pairs = zip(plane.tolist(), position.tolist(), strict=True)
        return [text_of((number, p, int(t * SIZE[p]))) for p, t in pairs]


@pytest.fixture(scope="module")
def by_template(items: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    store = Store(tmp_path_factory.mktemp("template"), teacher(), Numbered(), per_plane=5)
    return Filled(store, store.fill(items))


@pytest.fixture(scope="module")
def by_model(items: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Answers out of order, some refused; killed twice and resumed, in shards, then as a whole."""
    root = tmp_path_factory.mktemp("model")

    def fill(captioner: Captioner, shard: str | None = None, per_plane: int = 7) -> Filled:
        store = Store(root, teacher(), captioner, per_plane=per_plane)
        return Filled(store, store.fill(items, shard=shard))

    for breaks_after, shard in ((3, "1/2"), (8, "2/2"), (20, None)):
        with pytest.raises(ConnectionError):
            fill(Seeing(breaks_after=breaks_after), shard)
    fill(Seeing(), "2/2")
    fill(Seeing(), per_plane=4)  # shares the answers, but not the slices
    return fill(Seeing())


@cache
def embeddings_of(image: str) -> tuple[list[tuple[int, int]], Tensor]:
    """Every slice of a volume and its embedding, each cut and embedded alone."""
    volume = read_volume(image)
    shown, spacing = slicing.window(volume, "MR"), volume.pixdim.tolist()
    slots = [(p, i) for p in range(3) for i in range(SIZE[p])]
    pixels = [
        slicing.cut(shown, spacing, p, torch.tensor([(i + 0.5) / SIZE[p]]), FakeImages.size)
        for p, i in slots
    ]
    return slots, torch.cat([teacher().encode_image(one) for one in pixels])


def nearest(embedding: Tensor, known: Tensor) -> int:
    """The one known vector that an embedding in float16 equals."""
    distance = (known - embedding).abs().amax(1)
    best, second = distance.sort().values[:2].tolist()
    assert best < 1e-3 and second > 2 * best, (best, second)
    return int(distance.argmin())


def seen(volume: Tensor, plane: int, position: float, source: Tensor) -> tuple[int, int]:
    """Plane and index, in the source, of the slice at a place of an augmented volume."""
    size = volume.shape[plane + 1]
    values = volume[0].select(plane, min(int(position * size), size - 1)).flatten()
    index = (source[0].flatten().argsort()[values[values > 0].long() - 1]).numpy()
    axes = np.stack(np.unravel_index(index, SIZE))
    constant = [axis for axis in range(3) if len(set(axes[axis])) == 1]
    assert len(constant) == 1
    return constant[0], int(axes[constant[0], 0])


def check(
    targets: SliceTargets, row: int, number: int, items: list[dict], texts: TextTower | None = None
) -> list[Place]:
    """Check a row of a batch against its own pixels; the places of its captions."""
    image = items[number]["image"]
    source = read_volume(image).as_tensor()
    slots, known = embeddings_of(image)
    known_texts = teacher(texts).encode_text([text_of(place) for place in PLACES])
    found = []
    for s in targets.valid[row].nonzero().flatten().tolist():
        here = seen(
            targets.volume[row], int(targets.plane[row, s]), float(targets.position[row, s]), source
        )
        assert slots[nearest(targets.image[row, s], known)] == here
        if targets.has_text[row, s]:
            place = PLACES[nearest(targets.text[row, s], known_texts)]
            assert place == (number, *here)
            found.append(place)
        else:
            assert not targets.text[row, s].any()
    padding = ~targets.valid[row]
    assert not targets.has_text[row, padding].any() and not targets.image[row, padding].any()
    return found


def sampled(
    filled: Filled, number: int, move: Callable[[Any], Any], slices: int | None, seed: int = 0
) -> SliceTargets:
    """A batch of one volume."""
    item = filled.items[number]
    sample = SampleTargetsd("image", filled.store.embedding_dims, slices)
    sample.set_random_state(seed)
    data = sample({**item, "image": move(read_volume(item["image"]))})
    batch = {key: value[None] for key, value in data.items() if isinstance(value, Tensor)}
    return PrepareSlices()(batch)[1]


@pytest.mark.parametrize("source", ["by_file", "by_model", "by_template"])
@pytest.mark.parametrize("slices", [None, 5, 60])
@pytest.mark.parametrize("move", MOVES)
def test_a_target_belongs_to_the_slice_that_the_volume_shows_there(
    move: str, slices: int | None, source: str, request: pytest.FixtureRequest
) -> None:
    filled = request.getfixturevalue(source)
    for number in range(COUNT):
        targets = sampled(filled, number, MOVES[move], slices)
        assert check(targets, 0, number, filled.items)


def test_no_caption_of_a_file_is_lost(by_file: Filled) -> None:
    for number in range(COUNT):
        targets = sampled(by_file, number, MOVES["flip"], None)
        found = check(targets, 0, number, by_file.items)
        assert sorted(found) == [place for place in PLACES if place[0] == number and some(place)]


class SixWords(Words):
    """In the space of the images."""

    def embed(self, texts: list[str]) -> Tensor:
        return super().embed(texts)[:, :6]


def test_captions_that_are_similar_enough_stay_with_their_slices(
    items: list[dict], tmp_path: Path
) -> None:
    captions = from_file(Path(items[0]["image"]).parent, some)
    store = Store(tmp_path, Teacher(FakeImages(), SixWords(), joint=True), captions, per_plane=5)
    for number, item in enumerate(store.fill(items)):
        sample = SampleTargetsd("image", store.embedding_dims, None, min_similarity=0.0)
        data = sample({**item, "image": read_volume(item["image"])})
        batch = {key: value[None] for key, value in data.items() if isinstance(value, Tensor)}
        found = check(PrepareSlices()(batch)[1], 0, number, items, SixWords())
        assert 5 < len(found) < sum(place[0] == number and some(place) for place in PLACES) - 5


def test_a_recorded_similarity_is_that_of_the_slice_and_its_caption(
    items: list[dict], tmp_path: Path
) -> None:
    captions = from_file(Path(items[0]["image"]).parent, some)
    joint = Teacher(FakeImages(), SixWords(), joint=True)
    item = Store(tmp_path, joint, captions, per_plane=5).fill(items)[0]
    slots, known = embeddings_of(item["image"])
    rows = json.loads(Path(item["targets"]).with_suffix(".json").read_text())["slices"]
    for row in (row for row in rows if row["caption"]):
        image = known[slots.index((PLANES.index(row["plane"]), row["index"]))]
        expected = float(image @ joint.encode_text([row["caption"]])[0])
        assert row["similarity"] == pytest.approx(expected, abs=2e-3)


def test_a_model_s_refusals_and_answers_are_recorded_at_their_slices(by_model: Filled) -> None:
    for number in range(COUNT):
        path = Path(by_model.items[number]["targets"]).with_suffix(".json")
        rows = json.loads(path.read_text())["slices"]
        assert {row["status"] for row in rows} == {"ok", "refused"}
        for row in rows:
            place = number, PLANES.index(row["plane"]), row["index"]
            refused = NUMBER[place] % 4 == 0
            assert row["status"] == ("refused" if refused else "ok")
            assert row["caption"] == (None if refused else clean_caption(text_of(place)).text)


@pytest.mark.parametrize("source", ["by_file", "by_model"])
def test_captions_stay_with_their_slices_through_a_loader(
    source: str, request: pytest.FixtureRequest
) -> None:
    filled = request.getfixturevalue(source)
    transform = Compose(
        [
            ReadVolumed("image"),
            SpatialPadd("image", (14, 14, 22)),
            RandSpatialCropd("image", (9, 10, 12), random_size=False),
            RandFlipd("image", 0.5, 0),
            SampleTargetsd("image", filled.store.embedding_dims, slices=9),
        ]
    ).set_random_state(3)
    items = [{**item, "number": i} for i, item in enumerate(filled.items)]
    captions = 0
    loader = DataLoader(Dataset(items * 4, transform), batch_size=3, shuffle=True)
    for batch in loader:
        targets = PrepareSlices()(batch)[1]
        for row, number in enumerate(batch["number"].tolist()):
            captions += len(check(targets, row, number, items))
    assert captions > 30


def test_shuffled_captions_are_those_that_the_shuffle_names(by_file: Filled) -> None:
    texts = teacher().encode_text([text_of(place) for place in PLACES])
    shuffled = Filled(by_file.store, shuffle_captions(by_file.items, 0.5, seed=1))
    number_of = {item["targets"]: number for number, item in enumerate(by_file.items)}
    changed = 0
    for number, item in enumerate(shuffled.items):
        targets = sampled(shuffled, number, MOVES["nothing"], None)
        captioned = targets.has_text[0].nonzero().flatten().tolist()
        for row, s in enumerate(captioned):
            plane = int(targets.plane[0, s])
            own = number, plane, int(targets.position[0, s] * SIZE[plane])
            place = PLACES[nearest(targets.text[0, s], texts)]
            if row not in item["texts_from"]:
                assert place == own
                continue
            path, other = item["texts_from"][row]
            of_other = [p for p in PLACES if p[0] == number_of[path] and some(p)]
            assert place == of_other[other] != own
            changed += 1
    assert changed == round(0.5 * sum(map(some, PLACES)))


def drawn(
    folder: Path, items: list[dict], captioned: int, others: int, slices: int, seed: int
) -> dict:
    """A sample of an entry with axial slices, some of them captioned."""
    count = captioned + others
    tensors = {
        "plane": torch.full((count,), 2, dtype=torch.uint8),
        "position": (torch.arange(count) + 0.5) / SIZE[2],
        "image": torch.randn(count, 3).half(),
        "text": torch.randn(captioned, 2).half(),
        "text_row": torch.randperm(count)[:captioned].sort().values.int(),
        "modality": torch.tensor(1),
        "affine": torch.diag(torch.tensor([1.5, 1.0, 2.0, 1.0])).double(),
        "size": torch.tensor(SIZE),
    }
    save_file(tensors, folder / "entry.safetensors")
    sample = SampleTargetsd("image", {"image": 3, "text": 2}, slices)
    sample.set_random_state(seed)
    image = read_volume(items[0]["image"])
    return sample({"targets": str(folder / "entry.safetensors"), "image": image})


@pytest.mark.parametrize(
    ("captioned", "others", "slices", "expected"),
    [
        (8, 8, 4, 2),
        (8, 8, 5, 3),
        (8, 1, 4, 3),
        (1, 8, 4, 1),
        (8, 0, 4, 4),
        (0, 8, 4, 0),
        (8, 8, 1, 1),
        (3, 2, 9, 3),
    ],
)
def test_half_of_the_sampled_slices_have_a_caption(
    captioned: int, others: int, slices: int, expected: int, items: list[dict], tmp_path: Path
) -> None:
    """Where there are as many of both; what one kind lacks, the other fills."""
    found = drawn(tmp_path, items, captioned, others, slices, seed=0)
    assert int(found["has_text"].sum()) == expected
    assert int(found["valid"].sum()) == min(slices, captioned + others)


def test_every_slice_is_drawn_at_times_and_none_twice(items: list[dict], tmp_path: Path) -> None:
    seen_before = set()
    for seed in range(40):
        positions = drawn(tmp_path, items, 6, 6, 4, seed)["position"].tolist()
        assert len(set(positions)) == 4
        seen_before.update(positions)
    assert len(seen_before) == 12
