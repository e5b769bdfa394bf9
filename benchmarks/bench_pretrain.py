"""Pre-training: overhead of a step, aligned pairs a second, cost of the store.

python benchmarks/bench_pretrain.py [--repeats 3] [--only_store]

Every ratio is taken within one run, the two sides in turn.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import fire
import nibabel as nib
import numpy as np
import ot
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks import nets
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, spread, timed, write  # noqa: E402
from med3dinsight_ext.captions.sources import TemplateCaptions  # noqa: E402
from med3dinsight_ext.data import slicing  # noqa: E402
from med3dinsight_ext.data.volumes import read_volume  # noqa: E402
from med3dinsight_ext.embeddings.store import Store  # noqa: E402
from med3dinsight_ext.embeddings.targets import SampleTargetsd, SliceTargets  # noqa: E402
from med3dinsight_ext.losses.alignment import AlignmentLoss  # noqa: E402
from med3dinsight_ext.models.psat import PSAT  # noqa: E402
from med3dinsight_ext.models.student import Student  # noqa: E402
from med3dinsight_ext.teachers.teacher import bundled  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPACES = {"image": 1280, "text": 384}
DEFAULT_PSAT = partial(PSAT, hidden=256, layers=2, heads=8, queries=4, ffn=512)  # train.json


def networks(size: int) -> dict[str, nn.Module]:
    return {
        "SwinUNETR": nets.SwinUNETR(1, 1, feature_size=24, spatial_dims=3),
        "SegResNet": nets.SegResNet(spatial_dims=3, init_filters=16, out_channels=1),
        "UNETR": nets.UNETR(1, 1, (size,) * 3),
    }


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def targets(volume: Tensor, slices: int) -> SliceTargets:
    b = len(volume)
    yes = torch.ones(b, slices, dtype=torch.bool, device=DEVICE)
    plane = torch.randint(3, (b, slices), device=DEVICE)
    position = torch.rand(b, slices, device=DEVICE)
    image, text = unit(b, slices, SPACES["image"]), unit(b, slices, SPACES["text"])
    return SliceTargets(image, text, yes, yes, plane, position, plane * 0, volume, plane * 0)


def our_step(network: nn.Module, volume: Tensor, slices: int = 16) -> Any:
    student = Student(network, DEFAULT_PSAT, SPACES, volume.shape[2:]).to(DEVICE).train()
    loss = AlignmentLoss().to(DEVICE)
    optimizer = torch.optim.AdamW([*student.parameters(), *loss.parameters()], 1e-4)
    target = targets(volume, slices)

    def step() -> None:
        optimizer.zero_grad()
        loss(student(volume, target.plane, target.position), target).backward()
        optimizer.step()

    return step


def bare_step(network: nn.Module, volume: Tensor) -> Any:
    network = network.to(DEVICE).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(network(volume), volume).backward()
        optimizer.step()

    return step


def overhead(repeats: int, size: int = 96, batch: int = 2) -> dict[str, Any]:
    """Step with 16 slices a volume, store filled, over the bare network's step."""
    found = {}
    for name, network in networks(size).items():
        volume = torch.rand(batch, 1, size, size, size, device=DEVICE)
        ours, bare = our_step(network, volume), bare_step(network, volume)
        ours(), bare()
        pairs = [(timed(ours), timed(bare)) for _ in range(repeats)]
        found[name] = {
            "ours_seconds": spread([a for a, _ in pairs]),
            "bare_seconds": spread([b for _, b in pairs]),
            "ratio": spread([a / b for a, b in pairs]),
        }
        print(name, found[name]["ratio"], flush=True)
    return {"size": size, "batch": batch, "slices": 16, "networks": found}


class PlainPaper(nn.Module):
    """The step of the papers' public code: a 768-wide decoder with 300 queries."""

    def __init__(self, network: nn.Module, channels: int, layer: str) -> None:
        super().__init__()
        self.network = network
        self.network.get_submodule(layer).register_forward_hook(self._keep)
        self.memory = nn.Linear(channels, 768)
        block = nn.TransformerDecoderLayer(768, 8, 1024, 0.1, batch_first=True)
        self.decoder = nn.TransformerDecoder(block, 6)
        self.queries = nn.Parameter(torch.randn(300, 768))
        self.table = nn.Parameter(torch.randn(3, 128, 768))
        self.to_teacher = nn.Linear(768, 512)

    def _keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.features = output

    def forward(self, volume: Tensor, plane: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(volume)
        where = self.table[plane, index][:, None]
        memory = self.memory(self.features.flatten(2).mT) + where
        token = self.decoder(self.queries + where, memory)[:, 0]
        return self.to_teacher(token), output


def clip_like() -> nn.Module:
    """BiomedCLIP's towers by shape (ViT-B/16 at 224, BERT-base at 256 tokens), random weights."""
    import transformers

    text = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 256,
    }
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
        "image_size": 224,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)
    return transformers.CLIPModel(config).eval().requires_grad_(False).to(DEVICE)


def paper_step(size: int, batch: int) -> Any:
    network = nets.SegResNet(spatial_dims=3, init_filters=16, out_channels=1)
    model = PlainPaper(network, 128, "down_layers.3").to(DEVICE).train()
    teacher: Any = clip_like()
    optimizer = torch.optim.Adam(model.parameters(), 1e-5, weight_decay=1e-5)
    volume = torch.rand(batch, 1, size, size, size, device=DEVICE)
    images = torch.rand(batch, 3, 224, 224, device=DEVICE)
    tokens = torch.randint(3, 1000, (batch, 256), device=DEVICE)
    plane = torch.randint(3, (batch,), device=DEVICE)
    index = torch.randint(size // 2, (batch,), device=DEVICE)
    uniform = torch.full((batch,), 1 / batch, device=DEVICE)
    mass = torch.tensor(0.95, device=DEVICE)

    def transport(z: Tensor, y: Tensor) -> Tensor:
        cost = 1 - F.normalize(z, dim=1) @ F.normalize(y, dim=1).mT
        plan = ot.partial.entropic_partial_wasserstein(
            uniform, uniform, cost / cost.max(), reg=0.03, m=mass
        )
        return -(torch.eye(batch, device=DEVICE) / batch * (plan + 1e-10).log()).sum()

    def step() -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            output = teacher(input_ids=tokens, pixel_values=images)
        z, rebuilt = model(volume, plane, index)
        loss = transport(z, output.image_embeds) + transport(z, output.text_embeds)
        (loss + F.mse_loss(rebuilt, volume)).backward()
        optimizer.step()

    return step


def pairs_per_second(repeats: int, size: int = 64, batch: int = 10) -> dict[str, Any]:
    """Aligned slices a second, ours (store filled) and the papers' step, SegResNet."""
    volume = torch.rand(batch, 1, size, size, size, device=DEVICE)
    network = nets.SegResNet(spatial_dims=3, init_filters=16, out_channels=1)
    ours, plain = our_step(network, volume), paper_step(size, batch)
    ours(), plain()
    pairs = [(timed(ours), timed(plain)) for _ in range(repeats)]
    print("pairs", pairs, flush=True)
    return {
        "size": size,
        "batch": batch,
        "teacher_of_the_plain_step": "ViT-B/16 and BERT-base of BiomedCLIP's shape, random weights",
        "ours_per_second": spread([16 * batch / a for a, _ in pairs]),
        "plain_per_second": spread([batch / b for _, b in pairs]),
        "ratio": spread([16 * b / a for a, b in pairs]),
    }


def store_cost(repeats: int, step_seconds: float, volumes: int = 6) -> dict[str, Any]:
    """Share of sampling in a step of two volumes; filling against the bare encoder."""
    teacher = bundled(224)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        random = np.random.default_rng(0)
        items = []
        for i in range(volumes):
            array = random.normal(100, 30, (128, 128, 96)).astype(np.float32)
            nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 2.0, 1])), root / f"{i}.nii.gz")
            items.append({"image": str(root / f"{i}.nii.gz"), "modality": "MR"})
        slices = []
        for item in items:
            volume = read_volume(item["image"])
            shown = slicing.window(volume, "MR")
            plane, position = slicing.choose(shown, 16, 0)
            spacing = volume.pixdim.tolist()
            slices += [slicing.cut(shown, spacing, p, position[plane == p], 224) for p in range(3)]
        slices = [torch.cat(slices[i : i + 3]) for i in range(0, len(slices), 3)]  # per volume
        count = sum(map(len, slices))
        teacher.encode_image(slices[0]), teacher.encode_text(["warm"])
        rates = []
        for repeat in range(repeats):
            store = Store(root / f"store{repeat}", teacher, TemplateCaptions(), 16, device=DEVICE)
            filling = timed(partial(store.fill, items))
            bare = timed(lambda: [teacher.encode_image(part) for part in slices])
            rates.append((count / filling, count / bare))
            print("store", rates[-1], flush=True)
        done = store.fill(items)
        sample = SampleTargetsd("image", store.embedding_dims, 16)
        images = [read_volume(item["image"]) for item in done]
        data = [{**item, "image": image} for item, image in zip(done, images, strict=True)]
        assert isinstance(data[0]["image"], MetaTensor)
        begin = perf_counter()
        for _ in range(20):
            for item in data:
                sample(item)
        seconds = (perf_counter() - begin) / (20 * volumes)
    return {
        "sample_seconds_per_volume": seconds,
        "share_of_a_step_of_two": 2 * seconds / step_seconds,
        "fill_slices_per_second": spread([a for a, _ in rates]),
        "bare_slices_per_second": spread([b for _, b in rates]),
        "fill_ratio": spread([a / b for a, b in rates]),
    }


def main(repeats: int = 3, only_store: bool = False) -> None:
    torch.manual_seed(0)
    if only_store:
        kept = json.loads((RESULTS / "pretrain.json").read_text())
        seconds = kept["store"]["step_seconds"]
        kept["store"] = store_cost(repeats, seconds) | {"step_seconds": seconds}
        write("pretrain", {key: kept[key] for key in ("overhead", "pairs", "store")})
        return
    steps = overhead(repeats)
    fastest = min(n["ours_seconds"]["median"] for n in steps["networks"].values())
    figures = {
        "overhead": steps,
        "pairs": pairs_per_second(repeats),
        "store": store_cost(repeats, fastest) | {"step_seconds": fastest},
    }
    write("pretrain", figures)


if __name__ == "__main__":
    fire.Fire(main)
