"""Hostile inputs made by hand: what each is, how it must end, and the code that makes and reads it.

``run`` executes them in a guarded worker. The functions return what was read; text in the result
or in the error is matched by the case.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import struct
import subprocess
import tempfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fakes
import nibabel as nib
import numpy as np
import torch
from guard import Outcome, worker
from monai.bundle import ConfigParser
from readers import DECATHLON, answered, lines, read_clicks
from running import ROOT
from volume_writers import write_mhd, write_nrrd

from med3dinsight_ext.captions.cleaning import clean_caption
from med3dinsight_ext.captions.sources import FileCaptions, TemplateCaptions
from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.layouts import read_dataset
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.io.files import HashMemo
from med3dinsight_ext.monailabel.app.requests import (
    check_extension,
    check_name,
    check_training,
    check_values,
    is_inside,
)
from med3dinsight_ext.planning.plan import make_plan
from med3dinsight_ext.publishing.bundle import merged_configs
from med3dinsight_ext.publishing.card import read_card
from med3dinsight_ext.publishing.verify import file_checks
from med3dinsight_ext.reports.caption_page import captions
from med3dinsight_ext.reports.pages import write_csv
from med3dinsight_ext.training.checkpoints import embedding_dims_of, load_weights
from med3dinsight_ext.training.weights import read_weights


class Case(NamedTuple):
    """One hostile input.

    Attributes:
        title: what it is.
        kind: "value" or "refused".
        match: regular expression that the value's repr or the error must match.
        make: writes it into the folder, reads it and returns what was read.
    """

    title: str
    kind: str
    match: str
    make: Callable[[Path], Any]


CASES: dict[str, Case] = {}


def case(title: str, kind: str, match: str) -> Any:
    def register(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        CASES[make.__name__] = Case(title, kind, match, make)
        return make

    return register


def run(names: list[str]) -> dict[str, Outcome]:
    """Outcome of each case; each has a folder of its own in a worker that is shared."""
    with contextlib.suppress(ValueError):
        answered(b"{}")  # the client looks at the platform once
    found = {}
    with tempfile.TemporaryDirectory() as place:

        def call(name: str) -> Any:
            folder = Path(place) / name
            folder.mkdir(exist_ok=True)
            os.chdir(folder)
            return CASES[name].make(folder)

        with worker(call, Path(place), seconds=30) as made:
            found = {name: made(name) for name in names}
        left = [str(path) for path in Path(place).rglob("canary")]
    return found | {name: Outcome("effect", f"code ran: {left}") for name in map(_case_of, left)}


def _case_of(path: str) -> str:
    return next(name for name in CASES if f"/{name}/" in path)


class Evil:
    """Touches a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def zeros(path: Path, gigabytes: float, head: bytes = b"") -> Path:
    """A gzip file of zeros after a head, small on disk."""
    one = gzip.compress(bytes(1 << 24), 9, mtime=0)
    with path.open("wb") as file:
        file.write(gzip.compress(head, mtime=0) if head else b"")
        for _ in range(int(gigabytes * 64)):
            file.write(one)
    return path


def header(shape: tuple[int, ...]) -> bytes:
    """A NIfTI-2 header that claims a shape."""
    made = nib.Nifti2Header()
    made.set_data_dtype(np.float32)
    made["dim"][: len(shape) + 1] = [len(shape), *shape]
    made["pixdim"][1:4], made["vox_offset"], made["magic"] = 1, 544, made.single_magic
    made["sform_code"] = 1
    for i, row in enumerate("xyz"):
        made[f"srow_{row}"] = np.eye(4)[i]
    return made.binaryblock + bytes(4)


# Volumes


@case("gzip bomb: a header extension of 2 GB", "refused", "header extensions .*bomb.nii.gz")
def extension_bomb(folder: Path) -> Any:
    made = bytearray(header((4, 5, 6)))
    made[168:176], made[540] = (2**31).to_bytes(8, "little"), 1  # where voxels begin; extended
    size = np.array([2**31 - 16, 6], "i4").tobytes()
    return read_volume(str(zeros(folder / "bomb.nii.gz", 2, bytes(made) + size)))


@case("NIfTI of 2 kB whose header claims 30,000³ voxels", "refused", "claim.nii")
def header_claims_too_much(folder: Path) -> Any:
    (folder / "claim.nii").write_bytes(header((30_000,) * 3) + bytes(2000))
    return read_volume(str(folder / "claim.nii")).shape


@case("gzipped NIfTI of 2 kB whose header claims 60,000³ voxels", "refused", "claim.nii.gz")
def gzipped_header_claims_too_much(folder: Path) -> Any:
    content = gzip.compress(header((60_000,) * 3) + bytes(2000))
    (folder / "claim.nii.gz").write_bytes(content)
    return read_volume(str(folder / "claim.nii.gz")).shape


@case(
    "gzip bomb: 4 GB of zeros behind a sound volume", "refused|value", r"bomb.nii.gz|\(1, 4, 5, 6\)"
)
def gzip_bomb(folder: Path) -> Any:
    voxels = np.arange(120, dtype=np.float32).tobytes()
    zeros(folder / "bomb.nii.gz", 4, header((4, 5, 6)) + voxels)
    return tuple(read_volume(str(folder / "bomb.nii.gz")).shape)


@case("NRRD: 4 GB of packed zeros behind a sound volume", "value", r"\(1, 4, 6, 5\)")
def nrrd_bomb(folder: Path) -> Any:
    write_nrrd(folder / "bomb.nrrd", "gzip")
    head, _, _ = (folder / "bomb.nrrd").read_bytes().partition(b"\n\n")
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = (np.arange(120, dtype=np.float32).tobytes(), bytes(2**20))
    first, block = (pack.compress(part) + pack.flush(zlib.Z_FULL_FLUSH) for part in parts)
    (folder / "bomb.nrrd").write_bytes(head + b"\n\n" + first + 4096 * block)
    return tuple(read_volume(str(folder / "bomb.nrrd")).shape)


@case("MetaImage header with 60,000 spaces in a file's name", "refused", "slow.mhd")
def slow_header(folder: Path) -> Any:
    write_mhd(folder / "slow.mhd")
    content = (folder / "slow.mhd").read_bytes().replace(b"slow.raw", b"a" + b" " * 60_000 + b"b")
    (folder / "slow.mhd").write_bytes(content)
    begin = time.process_time()
    with contextlib.suppress(ValueError):
        HashMemo(folder / "files.jsonl")(folder / "slow.mhd")
    if time.process_time() - begin > 2:
        return "slow"
    return read_volume(str(folder / "slow.mhd"))


@case("negative sizes in a header", "refused", "v.nii")
def negative_sizes(folder: Path) -> Any:
    (folder / "v.nii").write_bytes(header((-4, 5, 6)) + bytes(480))
    return read_volume(str(folder / "v.nii"))


@case("symlink loop as a volume", "refused", "loop.nii")
def symlink_loop(folder: Path) -> Any:
    (folder / "loop.nii").symlink_to("loop.nii")
    return read_volume(str(folder / "loop.nii"))


@case("symlink loop of folders below a folder of volumes", "value", r"v\.nii\.gz'\]$")
def symlink_loop_of_folders(folder: Path) -> Any:
    fakes.volume(folder / "v.nii.gz")
    (folder / "again").symlink_to(folder)
    return [item["image"] for item in datalist(folder)]


@case("named pipe in a datalist", "refused", "pipe.nii")
def named_pipe(folder: Path) -> Any:
    os.mkfifo(folder / "pipe.nii")
    (folder / "list.json").write_text('["pipe.nii"]')
    return datalist(folder / "list.json")


@case("named pipe as a volume", "refused", "pipe.nii")
def named_pipe_as_volume(folder: Path) -> Any:
    os.mkfifo(folder / "pipe.nii")
    return read_volume(str(folder / "pipe.nii"))


@case("/dev/zero in a datalist", "refused", "/dev/zero")
def endless_device(folder: Path) -> Any:
    (folder / "list.json").write_text('["/dev/zero"]')
    return datalist(folder / "list.json")


@case("folder that is named like a volume", "refused", "v.nii")
def folder_as_volume(folder: Path) -> Any:
    (folder / "v.nii").mkdir()
    return read_volume(str(folder / "v.nii"))


@case("npz with a pickled object in place of an array", "refused", "v.npz")
def pickled_npz(folder: Path) -> Any:
    np.savez(folder / "v.npz", train_images=np.array([Evil()]), train_labels=np.array([Evil()]))
    return datalist(folder / "v.npz")


@case("npz whose member claims 10¹² voxels", "refused", "v.npz")
def npz_claims_too_much(folder: Path) -> Any:
    head = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (10**4,) * 3}
    np.lib.format.write_array_header_1_0(head, about)
    with zipfile.ZipFile(folder / "v.npz", "w") as archive:
        archive.writestr("train_images.npy", head.getvalue())
    return read_volume(f"{folder}/v.npz::train_images::0")


@case("npz bomb: an array of 4 GB in 4 MB", "refused", "v.npz")
def npz_bomb(folder: Path) -> Any:
    head = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (1, 1600, 1600, 1600)}
    np.lib.format.write_array_header_1_0(head, about)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(head.getvalue()) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    with zipfile.ZipFile(folder / "v.npz", "w") as archive:
        archive.writestr("train_images.npy", first + 245 * block + packer.flush())
        (info,) = archive.infolist()
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 245 << 24
    return read_volume(f"{folder}/v.npz::train_images::0").shape


@case("npz with member names that climb out of the folder (zip slip)", "refused", "v.npz")
def zip_slip(folder: Path) -> Any:
    data = io.BytesIO()
    np.save(data, np.zeros((1, 1)))
    with zipfile.ZipFile(folder / "v.npz", "w") as archive:
        for name in ("../../slip_labels.npy", "../../slip_images.npy", "/tmp/slip_labels.npy"):
            archive.writestr(name, data.getvalue())
    return [read_volume(item["image"]) for item in datalist(folder / "v.npz")]


@case("index outside an archive", "refused", "v.npz")
def index_outside(folder: Path) -> Any:
    np.savez(folder / "v.npz", train_images=np.zeros((2, 4, 5, 6)))
    return read_volume(f"{folder}/v.npz::train_images::7")


@case("volume whose name has ::, as members of archives do", "refused", "a::b.nii.gz")
def separator_in_a_name(folder: Path) -> Any:
    fakes.volume(folder / "a::b.nii.gz")
    return read_volume(str(folder / "a::b.nii.gz"))


# Names

NAMES = {
    "newline": "a\nb",
    "quotes": "a'\"`b",
    "markup": "<img src=x onerror=alert(1)>",
    "right_to_left": "a\u202egnp",
    "leading_dash": "-rf",
    "dollar": "$HOME ${x} @a %s",
    "longest": "ä" * 120,
    "not_utf8": os.fsdecode(b"a\xff\xfeb"),
}


def name_case(key: str, name: str) -> None:
    def make(folder: Path) -> Any:
        try:
            (folder / "in").mkdir()
            fakes.volume(folder / "in" / f"{name}.nii.gz")
        except OSError as error:
            return f"the file system refuses the name: {error}"
        store = Store(folder / "store", fakes.teacher(), TemplateCaptions(), per_plane=1)
        done = store.fill(datalist(folder / "in", modality="MR"))
        page = Path(captions(str(folder / "store"))).read_text("utf-8")
        raw = "<img src=x" in page
        outside = [p for p in folder.iterdir() if p.name not in ("in", "store")]
        return len(done), raw, outside

    make.__name__ = f"name_with_{key}"
    shown = {
        "not_utf8": "bytes that are no UTF-8",
        "right_to_left": "a right-to-left mark",
        "longest": "240 bytes",
        "newline": "a newline",
        "quotes": "quotes",
        "markup": "HTML",
        "leading_dash": "a leading dash",
        "dollar": "$, @ and %",
    }[key]
    case(f"volume whose name has {shown}: store and caption page", "value", r"\(1, False, \[\]\)")(
        make
    )


for _key, _name in NAMES.items():
    name_case(_key, _name)


@case("two volumes whose names differ in Unicode normalisation alone", "value", r"^\(2, 2, 1\)$")
def unicode_twins(folder: Path) -> Any:
    (folder / "in").mkdir()
    for i, form in enumerate(("NFC", "NFD")):
        fakes.volume(folder / "in" / f"{unicodedata.normalize(form, 'é')}.nii.gz", i)
    items = datalist(folder / "in", modality="MR")
    store = Store(folder / "store", fakes.teacher(), TemplateCaptions(), per_plane=1)
    names = {"test": [unicodedata.normalize("NFC", "é")]}
    (folder / "split.json").write_text(json.dumps(names))
    chosen = datalist(folder / "in", split=folder / "split.json", subset="test")
    return len(items), len({item["targets"] for item in store.fill(items)}), len(chosen)


# Datalists, splits, captions, clicks


@case("datalist that climbs to /etc/passwd", "refused", "/etc/passwd")
def path_traversal(folder: Path) -> Any:
    (folder / "list.json").write_text('["../../../../../../../../../../etc/passwd"]')
    return [read_volume(item["image"]) for item in datalist(folder / "list.json")]


@case("captions of an image outside the root that does not exist", "refused", "captions.jsonl")
def traversal_in_captions(folder: Path) -> Any:
    row = {"image": "../../../../nothing.nii", "plane": 0, "index": 0, "caption": "a"}
    (folder / "captions.jsonl").write_text(json.dumps(row))
    return FileCaptions(folder / "captions.jsonl").rows


@case("split file with one list twice: the second would replace the first", "refused", "split.json")
def duplicate_keys(folder: Path) -> Any:
    for i in range(2):
        fakes.volume(folder / f"{i}.nii.gz")
    (folder / "split.json").write_text('{"test": ["0"], "test": ["1"]}')
    return datalist(folder, split=folder / "split.json", subset="test")


@case("row of captions with one key twice", "refused", "captions.jsonl line 1")
def duplicate_keys_in_a_row(folder: Path) -> Any:
    fakes.volume(folder / "a.nii.gz")
    row = '{"image": "a.nii.gz", "plane": 0, "index": 1, "index": 2, "caption": "b"}'
    (folder / "captions.jsonl").write_text(row)
    return FileCaptions(folder / "captions.jsonl").rows


@case("NaN and Infinity as index and position", "refused", "captions.jsonl line 1")
def json_nan(folder: Path) -> Any:
    fakes.volume(folder / "a.nii.gz")
    row = '{"image": "a.nii.gz", "plane": 0, "index": Infinity, "position": NaN, "caption": "b"}'
    (folder / "captions.jsonl").write_text(row)
    return FileCaptions(folder / "captions.jsonl").rows


@case("JSON nested 100,000 deep", "refused", "list.json")
def deep_json(folder: Path) -> Any:
    (folder / "list.json").write_text("[" * 100_000)
    return datalist(folder / "list.json")


def huge_line(name: str, head: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        with path.open("wb") as file:
            file.write(head)
            file.truncate(1 << 30)  # sparse: no disk is used
        return path

    return make


@case("JSONL with a line of 1 GB", "refused", "list.jsonl")
def gigabyte_line(folder: Path) -> Any:
    return datalist(huge_line("list.jsonl", b'{"image": "')(folder))


@case("CSV with a line of 1 GB", "refused", "captions.csv")
def gigabyte_line_of_csv(folder: Path) -> Any:
    return FileCaptions(huge_line("captions.csv", b"image,caption\na,")(folder))


@case("JSON datalist of 1 GB on one line", "refused", "list.json")
def gigabyte_of_json(folder: Path) -> Any:
    return datalist(huge_line("list.json", b'["')(folder))


@case("integer of 100,000 digits", "refused", "list.json")
def huge_integer(folder: Path) -> Any:
    (folder / "list.json").write_text('[{"image": "a.nii", "label": ' + "9" * 100_000 + "}]")
    return datalist(folder / "list.json")


@case("section of a datalist that is no list", "refused", "list.json")
def odd_section(folder: Path) -> Any:
    (folder / "list.json").write_text(json.dumps(DECATHLON | {"training": {"a": 1}}))
    return datalist(folder / "list.json")


def planned(data: Path, key: str) -> Any:
    """A plan's value of a key, as a bundle gets it."""
    made = make_plan(read_dataset(data), device=torch.device("cpu"))
    return ConfigParser(made.settings).get_parsed_content(key)


CLASS = "$__import__('os').system('touch canary') or 'malignant'"


@case(
    "class of a list whose name is an expression", "refused", "labels must not begin with .*rename"
)
def expression_as_a_class(folder: Path) -> Any:
    rows = ["image,label"]
    for i, name in enumerate(("benign", CLASS)):
        fakes.volume(folder / f"{i}.nii.gz", i)
        rows.append(f"{i}.nii.gz,{name}")
    (folder / "list.csv").write_text("\n".join(rows))
    return planned(folder / "list.csv", "class_names")


@case("class of a dataset.json whose name is an expression", "refused", "labels must not .*json")
def expression_in_a_dataset_json(folder: Path) -> Any:
    for i in range(2):
        fakes.volume(folder / f"{i}.nii.gz", i)
        fakes.volume(folder / f"{i}_seg.nii.gz", i)
    described = {"labels": {"background": 0, CLASS: 1}}
    (folder / "dataset.json").write_text(json.dumps(described))
    return planned(folder, "label_names")


@case("click at NaN", "refused", "inside the volume")
def click_at_nan(folder: Path) -> Any:
    fakes.volume(folder / "0.nii.gz")
    (folder / "clicks.json").write_text('[{"image": "0.nii.gz", "organ": [[NaN, 1e308, -1e309]]}]')
    return read_clicks(folder / "clicks.json")


# Configs and cards


@case("YAML that runs a command where it is loaded (overlay)", "refused", "over.yaml")
def yaml_command(folder: Path) -> Any:
    (folder / "over.yaml").write_text('a: !!python/object/apply:os.system ["touch canary"]')
    return merged(folder / "over.yaml")


@case("YAML that runs a command where it is loaded (card)", "refused", "card.yaml")
def yaml_command_in_a_card(folder: Path) -> Any:
    (folder / "card.yaml").write_text('title: !!python/object/apply:os.system ["touch canary"]')
    return read_card(folder / "card.yaml")


def bomb(key: str) -> str:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join([*rows, f"{key}: *a9\n"])


@case("YAML of 600 bytes with anchors that stand for 9¹⁰ values (card)", "refused", "card.yaml")
def anchor_bomb_in_a_card(folder: Path) -> Any:
    (folder / "card.yaml").write_text(bomb("title"))
    return read_card(folder / "card.yaml")


@case("YAML of 600 bytes with anchors that stand for 9¹⁰ values (overlay)", "refused", "over.yaml")
def anchor_bomb(folder: Path) -> Any:
    (folder / "over.yaml").write_text(bomb("label_names"))
    return merged(folder / "over.yaml")


@case("overlay with an expression: merging does not evaluate it", "value", "True")
def expression_is_not_evaluated_by_merging(folder: Path) -> Any:
    (folder / "over.yaml").write_text("label_names: $__import__('os').system('touch canary')")
    return "canary" in str(merged(folder / "over.yaml")["train"]["label_names"])


def merged(path: Path) -> Any:
    return merged_configs(ROOT / "bundles" / "seg-finetune", str(path), click=False)


@case("published folder with expressions: the checks of its files evaluate none", "value", "FAIL")
def checks_of_files_run_nothing(folder: Path) -> Any:
    bundle = folder / "bundle"
    for name in ("train", "inference", "metadata"):
        path = bundle / "configs" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"network_def": "$__import__('os').system('touch canary')"}))
    real, subprocess.run = subprocess.run, None  # type: ignore[assignment]
    try:  # black and others are programs, which the guard forbids
        return [check.state for check in file_checks(bundle)]
    finally:
        subprocess.run = real


# Weights


@case("weights with a pickle that runs a command", "refused", "model.pt")
def evil_weights(folder: Path) -> Any:
    torch.save({"a": torch.zeros(2), "b": Evil()}, folder / "model.pt")
    return read_weights(folder / "model.pt")


@case("the same in the legacy format", "refused", "model.pt")
def evil_legacy_weights(folder: Path) -> Any:
    torch.save({"b": Evil()}, folder / "model.pt", _use_new_zipfile_serialization=False)
    return read_weights(folder / "model.pt")


@case("the same as a network to evaluate", "refused", "model.pt")
def evil_network(folder: Path) -> Any:
    torch.save(Evil(), folder / "model.pt")
    return load_weights(fakes.PlainNet(), folder / "model.pt")


@case("the same as a student", "refused", "student.pt")
def evil_student(folder: Path) -> Any:
    torch.save({"heads.a.weight": Evil()}, folder / "student.pt")
    return embedding_dims_of(folder / "student.pt")


@case("a bare pickle under the name of weights", "refused", "model.pt")
def bare_pickle(folder: Path) -> Any:
    (folder / "model.pt").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    return read_weights(folder / "model.pt")


@case("TorchScript under the name of weights", "refused", "model.pt")
def torchscript_as_weights(folder: Path) -> Any:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "model.pt"))
    return read_weights(folder / "model.pt")


@case("tensor of 10¹² numbers over one stored number", "refused", "model.pt")
def expanded_tensor(folder: Path) -> Any:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, folder / "model.pt")
    return {name: value.shape for name, value in read_weights(folder / "model.pt").items()}


@case("safetensors whose header claims 2⁶⁰ bytes", "refused", "model.safetensors")
def safetensors_header(folder: Path) -> Any:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return read_weights(folder / "model.safetensors")


@case("safetensors whose tensor overlaps another", "refused", "model.safetensors")
def safetensors_overlap(folder: Path) -> Any:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    head = json.dumps({"a": one, "b": one}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
    return read_weights(folder / "model.safetensors")


# Server answers


@case("answer nested 100,000 deep", "refused", "malformed")
def deep_answer(folder: Path) -> Any:
    return answered(b'{"choices":' + b"[" * 100_000)


@case("answer of 3 MB", "refused", "longer than")
def huge_answer(folder: Path) -> Any:
    text = json.dumps({"choices": [{"message": {"content": "x" * 3_000_000}}]})
    return answered(text.encode())


@case("answer whose key is half a surrogate pair", "refused", "malformed")
def half_a_surrogate(folder: Path) -> Any:
    return answered(b'{"\\ud800": 1, "choices": null}')


@case("caption with a script: the page holds no markup of it", "value", "False")
def script_in_a_caption(folder: Path) -> Any:
    fakes.volume(folder / "a.nii.gz")
    rows = [{"image": "a.nii.gz", "plane": 2, "index": 3, "caption": "</script><script>alert(1)"}]
    (folder / "captions.jsonl").write_text(lines(rows))
    found = FileCaptions(folder / "captions.jsonl")
    Store(folder / "store", fakes.teacher(), found, per_plane=1).fill(
        datalist(folder, modality="MR")
    )
    return "<script>alert" in Path(captions(str(folder / "store"))).read_text("utf-8")


@case("caption that backtracks in every pattern", "value", "Reply")
def slow_caption(folder: Path) -> Any:
    return [
        clean_caption(text * 1500)[1:2] and clean_caption(text * 1500).__class__
        for text in ("*a ", "[(", "<a", "aA", "# ", "__ ", "```", "\n- ")
    ]


# REST


@case("image id ../../x over REST", "refused", "image must be a plain name")
def traversal_in_an_image_id(folder: Path) -> Any:
    return check_name("../../x", "image")


@case(
    "tag with a path, a control character or a leading dot over REST",
    "value",
    r"^\[True, True, True, True, True\]$",
)
def odd_tags(folder: Path) -> Any:
    def refused(name: str) -> bool:
        try:
            check_name(name, "tag")
        except ValueError:
            return True
        return False

    return [refused(name) for name in ("a/b", "..", "a\\b", "a\nb", "ä" * 101)]


@case("case whose name is a formula, in cases.csv", "value", "^\"'=HYPERLINK")
def formula_in_a_table(folder: Path) -> Any:
    write_csv(folder / "cases.csv", [["=HYPERLINK(A1)", 0.5]])
    return (folder / "cases.csv").read_text()


@case("upload of a .py file over REST", "refused", "image must end in")
def upload_of_code(folder: Path) -> Any:
    return check_extension("/tmp/a.py", "image")


@case("inference of a path of the server over REST", "value", "^False$")
def path_of_the_server(folder: Path) -> Any:
    (folder / "link.nii").symlink_to("/etc/passwd")
    return is_inside(str(folder / "link.nii"), [folder])


@case(
    "training with max_epochs \"$__import__('os')…\" over REST",
    "refused",
    "max_epochs must be a plain value",
)
def expression_over_rest(folder: Path) -> Any:
    return check_values({"max_epochs": "$__import__('os').system('touch canary')"})


@case("training with max_epochs {'_target_': 'os.system', …} over REST", "refused", "plain keys")
def component_over_rest(folder: Path) -> Any:
    return check_values({"max_epochs": {"_target_": "os.system", "command": "touch canary"}})


@case(
    "training with an uploaded config as tracking over REST", "refused", "tracking must be one of"
)
def config_as_tracking_over_rest(folder: Path) -> Any:
    path = folder / "evil.json"
    path.write_text('{"configs": {"a": "$__import__(\'os\').system(\'touch canary\')"}}')
    return check_training({"max_epochs": 1, "tracking": [str(path)]})


@case("request with a key of MONAI's configs over REST", "refused", "plain keys")
def config_key_over_rest(folder: Path) -> Any:
    return check_values({"a": [{"train#trainer::max_epochs": 1}]})
