from pathlib import Path

import numpy as np
import pytest

from med3dinsight_ext.data.chunks import BrokenChunks, ChunkFile, write_chunks


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4096, (70, 33, 90), dtype=np.uint16)


@pytest.mark.parametrize(
    ("start", "size"),
    [
        ((0, 0, 0), (70, 33, 90)),
        ((31, 1, 60), (34, 32, 20)),
        ((-5, 20, 80), (9, 30, 30)),
        ((80, 0, 0), (4, 4, 4)),
        ((-9, 0, 0), (4, 4, 4)),
    ],
)
def test_a_region_is_the_array_in_its_units_and_zero_outside(
    array: np.ndarray, start: tuple, size: tuple, tmp_path: Path
) -> None:
    write_chunks(tmp_path / "a.b2nd", array, {"name": "x"}, low=-2.0, step=0.5)
    file = ChunkFile(tmp_path / "a.b2nd")
    assert file.about["name"] == "x" and file.shape == array.shape
    wide = np.pad(array * 0.5 - 2.0, 100)
    expected = wide[tuple(slice(a + 100, a + 100 + n) for a, n in zip(start, size, strict=True))]
    found = file.read(start, size)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_few_bytes_are_read_for_a_patch(array: np.ndarray, tmp_path: Path) -> None:
    big = np.tile(array, (4, 8, 3))  # 280 x 264 x 270
    write_chunks(tmp_path / "a.b2nd", big, {})

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    ChunkFile(tmp_path / "a.b2nd").read((60, 60, 60), (32, 32, 32))
    assert bytes_read() - before < 0.2 * (tmp_path / "a.b2nd").stat().st_size


def test_a_changed_or_cut_file_is_found(array: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.b2nd"
    write_chunks(path, array, {})
    sound = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(sound), 60):
        broken = bytearray(sound)
        broken[place] ^= 1 << random.integers(8)
        path.write_bytes(broken)
        try:
            found = ChunkFile(path).read((0, 0, 0), array.shape)
        except BrokenChunks:
            continue
        np.testing.assert_array_equal(found, array)  # a bit that nothing depends on
    for length in (0, 10, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(BrokenChunks, match=r"chunks must .*a\.b2nd"):
            ChunkFile(path).read((0, 0, 0), array.shape)


def test_a_missing_file_is_broken(tmp_path: Path) -> None:
    with pytest.raises(BrokenChunks, match="got .*none"):
        ChunkFile(tmp_path / "none")
