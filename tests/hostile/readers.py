"""Every reader of files and answers, each with a valid sample of what it reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import fakes
import httpx2
import mutate
import nibabel as nib
import numpy as np
import torch
import yaml
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.transforms import LoadImage
from running import ROOT
from volume_writers import write_dicom, write_mha, write_mhd, write_nrrd

from evidence import results
from med3dinsight_ext.captions import chat
from med3dinsight_ext.captions.answer_log import AnswerLog
from med3dinsight_ext.captions.cleaning import clean_caption
from med3dinsight_ext.captions.sources import FileCaptions, TemplateCaptions, shape_of
from med3dinsight_ext.data.clicks import AddClicksd
from med3dinsight_ext.data.datalists import datalist
from med3dinsight_ext.data.labels import read_label
from med3dinsight_ext.data.laterality import offsets
from med3dinsight_ext.data.volumes import read_volume
from med3dinsight_ext.embeddings.store import Store
from med3dinsight_ext.embeddings.targets import SampleTargetsd
from med3dinsight_ext.io.files import HashMemo
from med3dinsight_ext.monailabel.server import class_names
from med3dinsight_ext.publishing.bundle import merged_configs
from med3dinsight_ext.publishing.card import read_card
from med3dinsight_ext.publishing.scores import read_scores
from med3dinsight_ext.reports.caption_page import read_store
from med3dinsight_ext.teachers.checkpoints import image_settings
from med3dinsight_ext.training.checkpoints import embedding_dims_of, load_weights, resume
from med3dinsight_ext.training.history import read_history
from med3dinsight_ext.training.weights import read_weights

Read = Callable[[Path], Any]


class Reader(NamedTuple):
    """A reader under test.

    Attributes:
        kind: of what it reads, as the goal of minutes is for a kind.
        make: writes a valid sample and what belongs to it into a folder; returns its path.
        read: reads a file of that name in that folder.
        how: mutation that suits the format.
        named: what an error must contain; by default the file's name.
    """

    kind: str
    make: Callable[[Path], Path]
    read: Read
    how: mutate.Mutation
    named: str | None = None


READERS: dict[str, Reader] = {}


def reader(
    name: str, kind: str, make: Callable[[Path], Path], how: mutate.Mutation, **more: Any
) -> Any:
    """Register a reading function."""

    def register(read: Read) -> Read:
        READERS[name] = Reader(kind, make, read, how, **more)
        return read

    return register


def written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    """A maker of one file."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


# Volumes


def nifti(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        fakes.volume(folder / name)
        return folder / name

    return make


def other(write: Callable[[Path], Any], name: str) -> Callable[[Path], Path]:
    """A maker of a volume in another format."""

    def make(folder: Path) -> Path:
        write(folder / name)
        return folder / name

    return make


def series(folder: Path) -> Path:
    write_dicom(folder / "series")
    return folder / "series" / "0002.dcm"


@reader("dicom", "headers", series, mutate.binary, named="series")
def read_series(path: Path) -> Any:
    return read_volume(str(path.parent)).shape


@reader("nrrd", "headers", other(write_nrrd, "v.nrrd"), mutate.binary)
@reader(
    "nrrd_gzip", "headers", other(lambda path: write_nrrd(path, "gzip"), "v.nrrd"), mutate.binary
)
@reader("metaimage", "headers", other(write_mha, "v.mha"), mutate.binary)
@reader("metaimage_header", "headers", other(write_mhd, "v.mhd"), mutate.text)
@reader("nifti", "headers", nifti("v.nii"), mutate.binary)
@reader("nifti_gz", "headers", nifti("v.nii.gz"), mutate.gzipped)
def read_image(path: Path) -> Any:
    return read_volume(str(path)).shape


@reader("nifti_header", "headers", nifti("v.nii"), mutate.binary)
def read_header(path: Path) -> Any:
    return shape_of(str(path))


def label_map(folder: Path) -> Path:
    fakes.volume(folder / "image.nii.gz")
    image: Any = nib.load(folder / "image.nii.gz")
    values = (np.indices(image.shape).sum(0) > 20).astype(np.uint8)
    nib.save(nib.Nifti1Image(values, image.affine), folder / "label.nii.gz")
    return folder / "label.nii.gz"


@reader("label", "headers", label_map, mutate.gzipped)
def read_labels(path: Path) -> Any:
    item = {"image": str(path.with_name("image.nii.gz")), "label": str(path)}
    return read_label(item, ["background", "organ"]), offsets(str(path), 2)


def archive(folder: Path) -> Path:
    images = np.random.default_rng(0).random((2, 4, 5, 6), dtype=np.float32)
    np.savez(folder / "v.npz", train_images=images, train_labels=np.array([[0], [1]]))
    return folder / "v.npz"


@reader("npz", "npz", archive, mutate.zipped)
def read_archive(path: Path) -> Any:
    items = datalist(path)
    return items[:2], [read_volume(item["image"]).shape for item in items[:2]]


# Datalists, splits, captions, clicks


def with_images(name: str, content: str | bytes) -> Callable[[Path], Path]:
    """A maker of a list and its three images."""

    def make(folder: Path) -> Path:
        for i in range(3):
            fakes.volume(folder / f"{i}.nii.gz", i)
        return written(name, content)(folder)

    return make


ROWS = [
    {"image": f"{i}.nii.gz", "label": i, "patient": f"p{i}", "modality": "CT"} for i in range(3)
]
DECATHLON = {"modality": {"0": "MRI"}, "training": ROWS, "test": ["0.nii.gz"], "labels": {"0": "a"}}
CSV = 'image,plane,index,position,caption\n0.nii.gz,axial,3,,"fat, dark"\n1.nii.gz,0,,0.5,liver\n'
CAPTIONS = [
    {"image": "0.nii.gz", "plane": "axial", "index": 3, "size": 20, "caption": "Dark fat."},
    {"image": "1.nii.gz", "plane": 1, "position": 0.5, "text": "Le foie."},
]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@reader("datalist_json", "datalists", with_images("list.json", json.dumps(DECATHLON)), mutate.text)
@reader("datalist_jsonl", "datalists", with_images("list.jsonl", lines(ROWS)), mutate.text)
@reader(
    "datalist_csv",
    "datalists",
    with_images("list.csv", "image,label\n0.nii.gz,a\n1.nii.gz,b\n"),
    mutate.text,
)
def read_list(path: Path) -> Any:
    return datalist(path)


SPLIT = {"development": ["p0", "1"], "test": ["2"], "note": "by date"}


def split(folder: Path) -> Path:
    with_images("list.json", json.dumps(ROWS))(folder)
    return written("split.json", json.dumps(SPLIT))(folder)


@reader("split", "datalists", split, mutate.text)
def read_split(path: Path) -> Any:
    return datalist(path.with_name("list.json"), split=path, subset="development")


@reader("captions_jsonl", "captions", with_images("captions.jsonl", lines(CAPTIONS)), mutate.text)
@reader("captions_csv", "captions", with_images("captions.csv", CSV), mutate.text)
def read_captions(path: Path) -> Any:
    captions = FileCaptions(path)
    items = [{"image": str(path.with_name(f"{i}.nii.gz"))} for i in range(2)]
    captions.check_items(items)
    return [(captions.required(item, fakes.SIZE), captions.fingerprint(item)) for item in items]


CLICKS = [{"image": "0.nii.gz", "organ": [[3, 4, 5], [1.5, 2, 3]], "background": []}]


@lru_cache
def loaded(path: str) -> MetaTensor:
    return LoadImage(image_only=True, ensure_channel_first=True)(path)


@reader(
    "clicks_json", "clicks", with_images("clicks.json", json.dumps(CLICKS)), mutate.text, named=""
)
def read_clicks(path: Path) -> Any:
    item = datalist(path)[0]
    image = loaded(str(path.with_name("0.nii.gz")))
    return AddClicksd("image", ["background", "organ"])(item | {"image": image})["image"].shape


# Configs, cards, scores

OVERLAY = """# An overlay
spacing: [1.5, 1.5, 2.0]
patch_size: [64, 64, 32]
ct_range: &range [-200, 300]
label_names: [background, kidney]
backbone:
  _target_: UNet
  spatial_dims: 3
  channels: [8, 16]
learning_rate: 1.0e-3
"""
CARD = {
    "title": "A network",
    "data": "84 CT scans.",
    "license": "cc-by-4.0",
    "references": ["One."],
}
SCORE = {"mean": 0.8, "low": 0.7, "high": 0.9, "n": 4}
SCORES = {"dice": SCORE, "nsd": SCORE, "hd95": SCORE}
FROM = {"cases_from": {"training": 0, "validation": 3, "others": 1}}
SEGMENTATION = {"classes": {"organ": SCORES}, "mean": SCORES, "tolerance_mm": 2.0, **FROM}
CLASS = {"auroc": 0.7, "balanced_accuracy": 0.7, "f1": 0.7, "ece": 0.1, "sensitivity": 0.6,
         "specificity": 0.7, "n": 4}  # fmt: skip
INTERVALS = {
    f"{key}_{end}": 0.5
    for key in ("auroc", "balanced_accuracy", "f1", "ece")
    for end in ("low", "high")
}
CLASSIFICATION = {
    **CLASS,
    **INTERVALS,
    **FROM,
    "accuracy": 0.7,
    "n": 8,
    "per_class": {"a": CLASS, "b": CLASS},
}
RECALLS = {f"image_within_r1{end}": 0.3 for end in ("", "_low", "_high", "_chance")}
RETRIEVAL = {
    "student": RECALLS | {"image_within_queries": 48.0},
    "volume_zero": RECALLS,
    **FROM,
}


@reader("overlay_yaml", "overlays", written("overlay.yaml", OVERLAY), mutate.text)
@reader(
    "overlay_json",
    "overlays",
    written("overlay.json", json.dumps(yaml.safe_load(OVERLAY))),
    mutate.text,
)
def read_overlay(path: Path) -> Any:
    bundle = ROOT / "bundles" / "seg-finetune"
    return sorted(merged_configs(bundle, str(path), click=False)["train"])


@reader("card", "overlays", written("card.yaml", yaml.safe_dump(CARD)), mutate.text)
def read_model_card(path: Path) -> Any:
    return read_card(path)


@reader(
    "metrics_segmentation",
    "records",
    written("metrics.json", json.dumps(SEGMENTATION)),
    mutate.text,
)
def read_segmentation(path: Path) -> Any:
    return read_scores(path, "segmentation", ["organ"])


@reader(
    "metrics_classification",
    "records",
    written("metrics.json", json.dumps(CLASSIFICATION)),
    mutate.text,
)
def read_classification(path: Path) -> Any:
    return read_scores(path, "classification", ["a", "b"])


@reader(
    "metrics_retrieval", "records", written("retrieval.json", json.dumps(RETRIEVAL)), mutate.text
)
def read_retrieval(path: Path) -> Any:
    return read_scores(path, "pretraining")


METADATA = (ROOT / "bundles/seg-finetune/configs/metadata.json").read_text()


@reader("metadata", "records", written("configs/metadata.json", METADATA), mutate.text)
def read_metadata(path: Path) -> Any:
    return class_names(path.parents[1])


PREPROCESSOR = {"crop_size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3,
                "image_std": [0.2] * 3}  # fmt: skip


@reader(
    "preprocessor",
    "records",
    written("preprocessor_config.json", json.dumps(PREPROCESSOR)),
    mutate.text,
)
def read_preprocessor(path: Path) -> Any:
    return image_settings(str(path.parent))


# Weights


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return fakes.PlainNet().state_dict()


def saved(content: Callable[[], Any], name: str = "model.pt") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content(), folder / name)
        return folder / name

    return make


def stored(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(state(), folder / "model.safetensors")
    return folder / "model.safetensors"


@reader("weights_pt", "checkpoints", saved(state), mutate.zipped)
@reader("weights_safetensors", "safetensors", stored, mutate.safetensors)
def read_any_weights(path: Path) -> Any:
    return {name: tuple(value.shape) for name, value in read_weights(path).items()}


@reader("network_pt", "checkpoints", saved(state), mutate.zipped)
def read_network(path: Path) -> Any:
    return load_weights(fakes.PlainNet(), path)


def training() -> dict[str, Any]:
    network = fakes.PlainNet()
    trainer = Engine(lambda engine, batch: None)
    trainer.run([0, 1], max_epochs=2)
    optimiser = torch.optim.Adam(network.parameters())
    return {"network": network, "trainer": trainer, "optimizer": optimiser}


def run_state() -> dict[str, Any]:
    return {name: value.state_dict() for name, value in training().items()}


@reader("checkpoint", "checkpoints", saved(run_state, "last.ckpt"), mutate.zipped)
def read_checkpoint(path: Path) -> Any:
    objects = training()
    return resume(path, objects, objects["trainer"])


def student() -> dict[str, Any]:
    return {"network.a": torch.zeros(2), "heads.image.weight": torch.zeros(6, 4)}


@reader("student_pt", "checkpoints", saved(student, "student.pt"), mutate.zipped)
def read_student(path: Path) -> Any:
    return embedding_dims_of(path)


# The store, logs and results


def small_store(folder: Path) -> Store:
    item = fakes.volume(folder / "v.nii.gz")
    store = Store(folder / "store", fakes.teacher(), TemplateCaptions(), per_plane=2)
    store.fill([item])
    store.embedding_dims  # noqa: B018 (writes the teacher's file)
    return store


def entry(end: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        small_store(folder)
        (path,) = (folder / "store").glob(f"??/*{end}")
        return path

    return make


@reader("entry", "safetensors", entry(".safetensors"), mutate.safetensors)
def read_entry(path: Path) -> Any:
    image = loaded(str(path.parents[2] / "v.nii.gz"))
    sample = SampleTargetsd("image", {"image": 6, "text": 8}, slices=4)
    found = sample({"image": image, "targets": str(path)})
    return {key: tuple(found[key].shape) for key in ("image_target", "text_target", "plane")}


@reader(
    "entry_json",
    "records",
    entry(".json"),
    mutate.text,
    named="store must be a folder with entries",
)
def read_entry_json(path: Path) -> Any:
    return read_store(path.parents[1], 3, 0).total.slices


def teacher_file(folder: Path) -> Path:
    store = small_store(folder)
    (path,) = store.root.glob("teacher-*.json")
    return path


@reader("teacher_json", "records", teacher_file, mutate.text)
def read_teacher(path: Path) -> Any:
    return Store(path.parent, fakes.teacher(), TemplateCaptions()).embedding_dims


LOG = [{"plane": "axial", "index": i, "answer": f"Slice {i}."} for i in range(4)]


@reader(
    "answer_log", "answers", written("log.jsonl", '{"kind": "mllm"}\n' + lines(LOG)), mutate.text
)
def read_log(path: Path) -> Any:
    log = AnswerLog(path, {"kind": "mllm"})
    log.add(("axial", 9), "Nine.")
    log.save()
    return AnswerLog(path, {}).answers["axial", 9]


MEMO = ["/a/b.nii.gz", 10, 2 * 10**18, "ab" * 32]


@reader("hash_memo", "records", written("files.jsonl", "\n" + json.dumps(MEMO)), mutate.text)
def read_memo(path: Path) -> Any:
    return len(HashMemo(path)._known)


HISTORY = [{"epoch": i, "steps": 2, "loss": 0.5, "seconds": 1.0} for i in (1, 2)]


@reader("history", "records", written("history.jsonl", lines(HISTORY)), mutate.text)
def read_training_history(path: Path) -> Any:
    return [row["epoch"] for row in read_history(path)]


RUNS = gzip.compress(lines([{"name": "a", "metrics": {"dice": 0.5}}, {"name": "b"}]).encode())


def gzipped_text(data: bytes, rng: Any) -> bytes:
    return mutate.gzipped(data, rng, mutate.text)


@reader("evidence_runs", "records", written("cpu.jsonl.gz", RUNS), gzipped_text)
def read_runs(path: Path) -> Any:
    return list(results.read("cpu", path.parent))


# A caption server

ANSWER = {"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": "Fat."},
          "finish_reason": "stop"}], "usage": {"total_tokens": 100}}  # fmt: skip


@lru_cache
def client(_: int = 0) -> Any:
    made = chat.connect(chat.base_url("http://localhost:9/v1"), "", 1, 5.0)
    return made


def answered(data: bytes) -> str:
    """The caption that a server's body becomes; a refused request is a ValueError."""

    def reply(_: Any) -> Any:
        return httpx2.Response(200, content=data, headers={"content-type": "application/json"})

    client()._client._transport = httpx2.MockTransport(reply)
    try:
        text, _ = chat.complete(client(), {"model": "m", "messages": []})
    except chat.RequestFailed as error:
        raise ValueError(f"{error.kind}: {error.message}"[:300]) from error
    return repr(clean_caption(text))


def answer_file(folder: Path) -> Path:
    answered(json.dumps(ANSWER).encode())  # the client looks at the platform once
    return written("answer.json", json.dumps(ANSWER))(folder)


@reader("server_answer", "answers", answer_file, mutate.text, named="")
def read_answer(path: Path) -> Any:
    return answered(path.read_bytes())


@reader(
    "caption_text",
    "answers",
    written("a.txt", "<think>x</think>**Sure:** The liver, 3 cm. Fat."),
    mutate.text,
    named="",
)
def read_caption(path: Path) -> Any:
    return clean_caption(path.read_bytes().decode("utf-8", "replace"))
