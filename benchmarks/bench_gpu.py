"""Training step and store filling on one GPU, against the bare network and the bare encoder.

python benchmarks/bench_gpu.py [--smoke]

- steps: bf16 at 96^3, fused AdamW: the bare network's loop; the student's loop with 16 slices a
  volume; the same through MONAI's trainer with the handlers of a run; and switches. Ratios are of
  alternating repeats. ``synchronisations`` counts the waits for the device in one trainer's step.
- filling: images a second of the store's filling from .nii.gz CTs with one reader and with
  several, against the encoder alone on batches from memory (ViT-B/16 at 224, random weights).

``--smoke`` runs everything small. results/gpu.json is written after each part; a part that
fails leaves its error there.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from common import spread, timed, write  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPACES = {"joint": 512}
BF16 = partial(torch.autocast, DEVICE.type, torch.bfloat16)


def networks(small: bool) -> dict[str, Callable[[], nn.Module]]:
    from monai.networks import nets

    if small:
        return {"SegResNet 8": lambda: nets.SegResNet(init_filters=8, out_channels=1)}
    depths: dict[str, Any] = {"blocks_down": (1, 3, 4, 6, 6), "blocks_up": (1, 1, 1, 1)}
    return {
        "SwinUNETR 48": lambda: nets.SwinUNETR(1, 1, feature_size=48, spatial_dims=3),
        "SegResNet 32": lambda: nets.SegResNet(init_filters=32, out_channels=1),
        # a residual encoder with the depths of nnU-Net's ResEnc presets
        "SegResNetDS 32 (1, 3, 4, 6, 6)": lambda: nets.SegResNetDS(3, 32, 1, 1, **depths),
    }


def optimizer_of(modules: list[nn.Module]) -> torch.optim.Optimizer:
    parameters = [value for module in modules for value in module.parameters()]
    return torch.optim.AdamW(parameters, 1e-4, fused=True)


def bare_step(network: nn.Module, volume: Tensor) -> Callable[[], None]:
    optimizer = optimizer_of([network.train()])

    def step() -> None:
        optimizer.zero_grad()
        with BF16():
            output = network(volume)
        F.mse_loss(output.float(), volume.float()).backward()
        optimizer.step()

    return step


def batch_of(volume: Tensor, slices: int = 16) -> dict[str, Tensor]:
    """What the loader gives for a batch, in pinned memory."""
    b = len(volume)
    yes, number = torch.ones(b, slices, dtype=torch.bool), torch.arange(b)[:, None]
    unit = [F.normalize(torch.randn(b, slices, SPACES["joint"]), dim=-1) for _ in range(2)]
    batch = {
        "image": volume.cpu(),
        "plane": torch.randint(3, (b, slices)),
        "position": torch.rand(b, slices),
        "image_target": unit[0],
        "text_target": unit[1],
        "has_text": yes,
        "valid": yes,
        "modality_index": torch.zeros(b, slices).long(),
        "patient_index": number.expand(b, slices).contiguous(),
    }
    return {k: v.pin_memory() for k, v in batch.items()} if DEVICE.type == "cuda" else batch


def student_parts(network: nn.Module, size: int) -> tuple[nn.Module, nn.Module]:
    from med3dinsight_ext.losses.alignment import AlignmentLoss
    from med3dinsight_ext.models.psat import PSAT
    from med3dinsight_ext.models.student import Student

    psat = partial(PSAT, hidden=256, layers=2, heads=8, queries=4, ffn=512)  # as in train.json
    student = Student(network, psat, SPACES, (size,) * 3).to(DEVICE).train()
    return student, AlignmentLoss().to(DEVICE)


def student_step(network: nn.Module, batch: dict[str, Tensor], size: int) -> Callable[[], None]:
    from med3dinsight_ext.embeddings.targets import PrepareSlices

    student, loss = student_parts(network, size)
    optimizer, prepare = optimizer_of([student, loss]), PrepareSlices()

    def step() -> None:
        volume, target, where, _ = prepare(batch, DEVICE, True)
        optimizer.zero_grad()
        with BF16():
            value = loss(student(volume, *where), target)
        value.backward()
        optimizer.step()

    return step


def trainer_steps(network: nn.Module, batch: dict[str, Tensor], size: int, folder: str) -> Any:
    """A function that trains n steps through MONAI's trainer."""
    from monai.engines import SupervisedTrainer

    from med3dinsight_ext.embeddings.targets import PrepareSlices
    from med3dinsight_ext.training.engine import StopOnNan
    from med3dinsight_ext.training.history import History, Progress

    student, loss = student_parts(network, size)

    def latest() -> dict[str, Tensor]:
        return loss.latest._asdict()

    trainer = SupervisedTrainer(
        DEVICE,
        1,
        [batch],
        student,
        optimizer_of([student, loss]),
        loss,
        prepare_batch=PrepareSlices(),
        non_blocking=True,
        decollate=False,
        amp=DEVICE.type == "cuda",
        amp_kwargs={"dtype": torch.bfloat16},
        train_handlers=[StopOnNan(), Progress(latest), History(f"{folder}/h.jsonl", latest)],
    )

    def run(steps: int) -> None:
        trainer.data_loader = [batch] * steps
        trainer.state.epoch, trainer.state.iteration, trainer.state.max_epochs = 0, 0, 1
        trainer.state.epoch_length = steps
        trainer.run()

    return run


@contextmanager
def counted() -> Iterator[list[int]]:
    """Number of waits for the device within."""
    found = [0]
    if DEVICE.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found[0] = sum("synchroniz" in str(one.message) for one in seen)


def alternate(calls: dict[str, Callable[[], Any]], repeats: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step of each call, and its ratio to ``bare`` in the same repeat."""
    for call in calls.values():
        call()
    rows = [{name: timed(call) / steps for name, call in calls.items()} for _ in range(repeats)]
    return {
        name: {
            "milliseconds": spread([1000 * row[name] for row in rows]),
            "ratio": spread([row[name] / row["bare"] for row in rows]),
        }
        for name in calls
    }


def one_network(make: Callable[[], nn.Module], smoke: bool) -> dict[str, Any]:
    size, steps, repeats = (32, 2, 2) if smoke else (96, 8, 3)
    volume = torch.rand(2, 1, size, size, size, device=DEVICE)
    batch = batch_of(volume)
    last = volume.to(memory_format=torch.channels_last_3d)

    def times(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps):
                step()

        return run

    with tempfile.TemporaryDirectory() as folder:
        train = trainer_steps(make(), batch, size, folder)
        network = make().to(DEVICE).to(memory_format=torch.channels_last_3d)
        calls = {
            "bare": times(bare_step(make().to(DEVICE), volume)),
            "student": times(student_step(make(), batch, size)),
            "trainer": lambda: train(steps),
            "bare, channels_last_3d": times(bare_step(network, last)),
        }
        found = alternate(calls, repeats, steps)
        train(steps)
        with counted() as few:
            train(steps)
        with counted() as many:
            train(2 * steps)
    return {**found, "synchronisations": (many[0] - few[0]) / steps, "size": size, "batch": 2}


def compiled(smoke: bool) -> dict[str, Any]:
    """The bare step with and without ``torch.compile``; SegResNet."""
    make = next(make for name, make in networks(smoke).items() if name.startswith("SegResNet "))
    size, steps = (32, 2) if smoke else (96, 10)
    volume = torch.rand(2, 1, size, size, size, device=DEVICE)
    plain, fast = make().to(DEVICE), make().to(DEVICE)
    one, other = bare_step(plain, volume), bare_step(torch.compile(fast), volume)
    start = timed(other)
    calls: dict[str, Callable[[], Any]] = {
        "bare": lambda: [one() for _ in range(steps)],
        "compiled": lambda: [other() for _ in range(steps)],
    }
    return {**alternate(calls, 3, steps), "compile_seconds": start}


def teacher(smoke: bool) -> Any:
    """A CLIP-like teacher by shape, with random weights."""
    import transformers

    from med3dinsight_ext.teachers.teacher import Teacher
    from med3dinsight_ext.teachers.towers import ImageTower, TextTower

    class Images(ImageTower):
        size, mean, std, fingerprint = 224, (0.5,) * 3, (0.25,) * 3, "random"

        def load(self) -> nn.Module:
            config = transformers.CLIPVisionConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                num_hidden_layers=1 if smoke else 12,
                patch_size=16,
                image_size=224,
                projection_dim=512,
            )
            return transformers.CLIPVisionModelWithProjection(config)

        def embed(self, pixels: Tensor) -> Tensor:
            return self.model(pixels).image_embeds

    class Texts(TextTower):
        fingerprint = "length"

        def fits(self, text: str) -> bool:
            return True

        def embed(self, texts: list[str]) -> Tensor:
            return torch.tensor([[len(text), *range(1, 512)] for text in texts]).float()

    return Teacher(Images(), Texts(), True, 16 if smoke else 128).on(DEVICE)


def ct(size: tuple[int, int, int], seed: int) -> np.ndarray:
    """An int16 CT-like volume: an ellipse of soft tissue in air, with noise."""
    random = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in size), indexing="ij")
    body = axes[0] ** 2 / 0.7 + axes[1] ** 2 / 0.5 < 1
    noise = random.normal(0, 12, size).astype(np.float32)
    return np.where(body, 40 + 60 * np.sin(9 * axes[2] + 5 * axes[0]) + noise, -1000).astype("i2")


def volumes(root: Path, count: int, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """CT-like volumes of 1 x 1 x 2 mm as .nii.gz."""
    import nibabel as nib

    base, items = ct(size, 0), []
    for i in range(count):
        path = root / f"v{i}.nii.gz"
        nib.save(nib.Nifti1Image(np.roll(base, i, 2), np.diag([1.0, 1.0, 2.0, 1.0])), path)
        items.append({"image": str(path), "modality": "CT"})
    return items


def filling(smoke: bool) -> dict[str, Any]:
    import nibabel as nib

    from med3dinsight_ext.captions.sources import TemplateCaptions
    from med3dinsight_ext.embeddings.store import Store

    size = (64, 64, 32) if smoke else (256, 256, 128)
    readers = min(16, os.cpu_count() or 1)
    count = 4 if smoke else 2 * readers
    encoder = teacher(smoke)
    images = torch.rand(16 if smoke else 1024, 3, 224, 224)
    images = images.pin_memory() if DEVICE.type == "cuda" else images
    encoder.encode_image(images)
    bare = [len(images) / timed(partial(encoder.encode_image, images)) for _ in range(3)]
    found: dict[str, Any] = {"size": size, "bare_images_per_second": spread(bare)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = ct(size, 0)

        def save(i: int) -> dict[str, str]:
            image = nib.Nifti1Image(np.roll(base, i, 2), np.diag([1.0, 1.0, 2.0, 1.0]))
            nib.save(image, root / f"{i}.nii.gz")
            return {"image": str(root / f"{i}.nii.gz"), "modality": "CT"}

        with ThreadPoolExecutor(readers) as pool:
            items = list(pool.map(save, range(count)))
        threads = torch.get_num_threads()
        for n, part in ((1, items[: max(2, count // 8)]), (readers, items)):
            torch.set_num_threads(max(1, threads // n))
            store = Store(root / f"s{n}", encoder, TemplateCaptions(), 16, 0, DEVICE, readers=n)
            seconds = timed(partial(store.fill, part))
            slices = sum(len(entry) for entry in _slices(root / f"s{n}"))
            row = {"readers": n, "volumes": len(part), "images_per_second": slices / seconds}
            found.setdefault("rows", []).append(row)
        torch.set_num_threads(threads)
    return found


def _slices(root: Path) -> Iterator[Tensor]:
    from safetensors.torch import load_file

    for path in root.glob("*/*.safetensors"):
        yield load_file(path)["plane"]


def main(smoke: bool = False) -> None:
    torch.manual_seed(0)
    parts: dict[str, Callable[[], Any]] = {
        name: partial(one_network, make, smoke) for name, make in networks(smoke).items()
    }
    parts |= {"filling": partial(filling, smoke), "compile": partial(compiled, smoke)}
    figures: dict[str, Any] = {"smoke": smoke, "parts": {}}
    for name, part in parts.items():
        try:
            figures["parts"][name] = part()
        except Exception as error:  # one part must not cost the others on a rented machine
            traceback.print_exc()
            figures["parts"][name] = {"error": f"{type(error).__name__}: {error}"}
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        write("gpu_smoke" if smoke else "gpu", figures)


if __name__ == "__main__":
    main("--smoke" in sys.argv[1:])
