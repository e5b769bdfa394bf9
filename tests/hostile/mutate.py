"""Seeded mutations of valid files: of bytes, of tokens, and inside gzip, zip and safetensors."""

from __future__ import annotations

import gzip
import io
import random
import re
import struct
import zipfile
from collections.abc import Callable

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = (
    "0", "-1", "-0.0", "1e309", "-1e309", "1e-320", "NaN", "Infinity", "-Infinity", "null", "true",
    "2147483648", "-9223372036854775809", "18446744073709551616", "9" * 400, "9" * 5000, "0x10",
    "1_000", "٣", "[]", "{}", '"1"',
)  # fmt: skip
TEXTS = (
    "", " ", "\\u0000", "\\ud800", "\u202e\u2066gnp", "e\u0301", "\u2028", "\ufeff", "..", "/",
    "../../../../etc/passwd", "/dev/zero", "~", "a\\nb", "'\\\"", "::", "a::b::c", "a::b::-1",
    "${HOME}", "$import os", "%s%n", "{modality.__class__}", "A" * 5000, "\U0001f9e0",
)  # fmt: skip
TREES = (
    "[" * 3000,
    "{" * 3000,
    '{"a":' * 2000,
    "[" * 50 + "]" * 50,
    "&a [*a]",
    "!!python/name:os.system",
)
BINARY = (0, 1, -1, 2**7, 2**15 - 1, -(2**15), 2**31 - 1, -(2**31))
FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-38)
TOKEN = re.compile(rb'-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|"(?:[^"\\]|\\.)*"|true|false|null')
EVIL_PICKLE = b"cos\nsystem\n(S'touch canary'\ntR"


def flip(data: bytes, rng: random.Random) -> bytes:
    """Flip 1 to 8 bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Cut the end off."""
    return data[: rng.randrange(len(data) + 1)]


def _chunk(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + 2 ** rng.randint(0, 10))


def remove(data: bytes, rng: random.Random) -> bytes:
    """Remove a chunk."""
    start, end = _chunk(data, rng)
    return data[:start] + data[end:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """Repeat a chunk, 1 to 50 times."""
    start, end = _chunk(data, rng)
    return data[:end] + data[start:end] * rng.randint(1, 50) + data[end:]


def move(data: bytes, rng: random.Random) -> bytes:
    """Copy a chunk over another place."""
    (start, end), at = _chunk(data, rng), rng.randrange(len(data) + 1)
    return data[:at] + data[start:end] + data[at + end - start :]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Insert random bytes, or a pickle that would run a command."""
    at = rng.randrange(len(data) + 1)
    new = EVIL_PICKLE if rng.random() < 0.2 else rng.randbytes(rng.randint(1, 40))
    return data[:at] + new + data[at:]


def number(data: bytes, rng: random.Random) -> bytes:
    """Overwrite an aligned 2, 4 or 8 bytes with an extreme integer or float."""
    kind = rng.choice("hifdq")
    value = rng.choice(FLOATS if kind in "fd" else BINARY)
    if kind == "h":
        value = max(-(2**15), min(2**15 - 1, int(value)))
    new = struct.pack("<" + kind, value)
    head = min(len(data), 400) if rng.random() < 0.8 else len(data)  # most headers are short
    at = rng.randrange(head // 2 + 1) * 2
    return data[:at] + new + data[at + len(new) :]


def token(data: bytes, rng: random.Random) -> bytes:
    """Replace a number or quoted text by another one, by deep nesting, or by another token."""
    found = list(TOKEN.finditer(data))
    if not found:
        return insert(data, rng)
    here = rng.choice(found)
    new = rng.choice(
        (
            rng.choice(NUMBERS).encode(),
            b'"' + rng.choice(TEXTS).encode() + b'"',
            rng.choice(TEXTS).encode(),
            rng.choice(TREES).encode(),
            rng.choice(found)[0],
        )
    )
    return data[: here.start()] + new + data[here.end() :]


def line(data: bytes, rng: random.Random) -> bytes:
    """Remove, repeat or swap lines, or change the line ends."""
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.randrange(4)
    if how == 0:
        del lines[at]
    elif how == 1:
        lines.insert(other, lines[at])
    elif how == 2:
        lines[at], lines[other] = lines[other], lines[at]
    return (b"\r" if how == 3 else b"\n").join(lines)


RAW: tuple[Mutation, ...] = (flip, truncate, remove, repeat, move, insert)


def binary(data: bytes, rng: random.Random) -> bytes:
    """One mutation of a binary file; most are of numbers."""
    return rng.choice((number, number, number, *RAW))(data, rng)


def text(data: bytes, rng: random.Random) -> bytes:
    """One mutation of a text; most are of tokens."""
    return rng.choice((token, token, token, token, line, *RAW))(data, rng)


def gzipped(data: bytes, rng: random.Random, inner: Mutation = binary) -> bytes:
    """A mutation of the content, or of the compressed file."""
    if rng.random() < 0.2:
        return rng.choice(RAW)(data, rng)
    return gzip.compress(inner(gzip.decompress(data), rng), 1, mtime=0)


def zipped(data: bytes, rng: random.Random) -> bytes:
    """A mutation of a member's content or name, or of the archive."""
    if rng.random() < 0.2:
        return rng.choice((number, *RAW))(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(members))
    if rng.random() < 0.5:  # the program of a checkpoint rather than its numbers
        at = next((i for i, (info, _) in enumerate(members) if info.filename.endswith(".pkl")), at)
    stream = io.BytesIO()
    how = rng.random()
    with zipfile.ZipFile(stream, "w") as archive:
        for i, (info, content) in enumerate(members):
            name = info.filename
            if i == at and how < 0.1:
                continue
            if i == at and how < 0.2:
                name = rng.choice(("../" + name, "/tmp/" + name, name.upper(), "a" * 300))
            elif i == at:
                content = rng.choice((binary, text))(content, rng)
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """A mutation of the JSON header with a matching length, or of the bytes."""
    if rng.random() < 0.3:
        return binary(data, rng)
    size = struct.unpack("<Q", data[:8])[0]
    header = text(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def mutant(data: bytes, how: Mutation, seed: int) -> bytes:
    """One to three mutations of ``data``; the same seed gives the same bytes."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = how(data, rng)
        except Exception:  # gzip, zlib and zipfile each have their own
            break  # an earlier mutation broke the envelope
    return data
