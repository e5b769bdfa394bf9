"""Throughput of captioning by a local model, time to resume, and memory over many slices.

python benchmarks/bench_captions.py [--batches 8] [--volumes 100000] [--slices 10000]

The model has LLaVA's architecture and random weights, wide enough that generate() takes most of the
time.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import fire
import nibabel as nib
import numpy as np
import torch
import transformers as hf
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[0] / "tests")]
from fakes import FakeMllm, teacher  # noqa: E402
from tiny_mllm import WORDS, save, tokenizer  # noqa: E402
from tiny_mllm import llava as tiny  # noqa: E402

from common import spread, timed, write  # noqa: E402
from med3dinsight_ext.captions.local import TransformersCaptions  # noqa: E402
from med3dinsight_ext.captions.multimodal import SliceRequest  # noqa: E402
from med3dinsight_ext.captions.sources import TemplateCaptions  # noqa: E402
from med3dinsight_ext.embeddings.store import Store  # noqa: E402

BATCH, TOKENS, SIDE = 8, 32, 224


def model(folder: Path) -> Path:
    """LLaVA with 12 layers of 512 and CLIP's ViT-B/16 in front."""
    wide = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    vision = hf.CLIPVisionConfig(image_size=SIDE, patch_size=16)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**{**WORDS, **wide}), image_token_index=3
    )
    side = {"height": SIDE, "width": SIDE}
    template = hf.AutoProcessor.from_pretrained(tiny(folder / "tiny")).chat_template
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side),
        tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return save(folder / "wide", hf.LlavaForConditionalGeneration(config), processor)


def against_generate(batches: int, folder: Path) -> dict:
    """Slices a second with ours and with generate() alone on prepared inputs, in turn."""
    ours = TransformersCaptions(str(model(folder)), batch_size=BATCH, max_tokens=TOKENS)
    random = np.random.default_rng(0)
    requests = [
        SliceRequest(0, i, "Name the anatomy.", Image.fromarray(pixels))
        for i, pixels in enumerate(random.integers(0, 255, (BATCH, 448, 448), dtype=np.uint8))
    ]
    ours.network.generation_config.min_new_tokens = TOKENS
    inputs = ours.inputs(requests)

    @torch.no_grad()
    def bare() -> None:
        ours.network.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)

    bare()
    pairs = []
    for _ in range(batches):
        floor = timed(bare)
        pairs.append((floor, timed(lambda: list(ours.answers(requests)))))
    return {
        "batch": BATCH,
        "new_tokens": TOKENS,
        "batches": batches,
        "generate_slices_per_second": spread([BATCH / floor for floor, _ in pairs]),
        "ours_slices_per_second": spread([BATCH / mine for _, mine in pairs]),
        "ratio": spread([floor / mine for floor, mine in pairs]),
    }


def resume(volumes: int, folder: Path) -> dict:
    """Seconds to find that nothing is left to do for this number of volumes."""
    image = folder / "one.nii.gz"
    nib.save(
        nib.Nifti1Image(np.random.default_rng(0).random((8, 9, 10), np.float32), np.eye(4)), image
    )
    root = folder / "many"
    store = Store(root, teacher(), TemplateCaptions(), per_plane=1)
    store.fill([{"image": str(image), "modality": "MR"}])
    items = []
    for number in range(volumes):  # each with its own name and entry
        copy = folder / "images" / f"{number % 1000:03d}" / f"{number}.nii.gz"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(str(number))
        items.append({"image": str(copy), "modality": "MR"})
        target = store.path(items[-1])
        target.parent.mkdir(exist_ok=True)
        target.touch()  # only its existence is checked
    again = Store(root, teacher(), TemplateCaptions(), per_plane=1)
    begin = perf_counter()
    done = again.fill(items)
    assert len(done) == volumes
    return {"volumes": volumes, "seconds": perf_counter() - begin}


def memory(slices: int, folder: Path) -> dict:
    """Resident memory while many slices are captioned and stored."""
    random = np.random.default_rng(0)
    found, per_volume = [], 36
    store = Store(folder / "memory", teacher(), FakeMllm(size=96), per_plane=12)
    for number in range(slices // per_volume + 1):
        image = folder / "volume.nii.gz"
        array = random.random((24, 28, 20), np.float32)
        nib.save(nib.Nifti1Image(array, np.eye(4)), image)
        store.fill([{"image": str(image), "modality": "MR"}])
        if number % 20 == 19:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found.append(pages * resource.getpagesize() / 2**20)
    return {
        "slices": slices,
        "megabytes_every_720_slices": [round(v, 1) for v in found],
        "growth_of_the_second_half_megabytes": found[-1] - found[len(found) // 2],
    }


def main(batches: int = 8, volumes: int = 100_000, slices: int = 10_000) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {"local": against_generate(batches, folder)}
        figures |= {"memory": memory(slices, folder), "resume": resume(volumes, folder)}
    write("captions", figures)


if __name__ == "__main__":
    fire.Fire(main)
