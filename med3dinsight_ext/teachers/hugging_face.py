"""Image and text towers of transformers checkpoints.

torchvision is not needed: input size, mean and deviation come from the checkpoint's settings.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from med3dinsight_ext.teachers.checkpoints import image_settings, model_fingerprint
from med3dinsight_ext.teachers.towers import ImageTower, TextTower

LOADING = 3  # raise it when loading or pooling changes the embeddings of images


class HuggingFaceModel:
    """One transformers checkpoint, loaded once for both towers of a CLIP-like model."""

    def __init__(self, model: str, revision: str | None = None) -> None:
        self.name, self.revision = model, revision
        self.fingerprint = model_fingerprint(model, revision)

    @cached_property
    def network(self) -> Any:
        """The model with its weights, in float32.

        A pooler that the checkpoint has no weights of is left out: it would be drawn at random.

        Raises:
            ValueError: other weights are missing.
        """
        from transformers import AutoModel

        network, loaded = AutoModel.from_pretrained(
            self.name, revision=self.revision, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(loaded["missing_keys"])
        if others := [key for key in missing if not key.startswith("pooler.")]:
            raise ValueError(
                f"model must have all its weights, got {self.name} without "
                f"{', '.join(others[:3])} ({len(others)} in all); fetch the whole repository (hf "
                "download MODEL --local-dir DIR), or name a checkpoint of "
                f"{type(network).__name__}"
            )
        if missing:
            network.pooler = None
        return network


class HuggingFaceImages(ImageTower):
    """The image side of a transformers checkpoint: CLIP, SigLIP, DINO, ViT, ConvNeXt, ResNet."""

    def __init__(self, source: HuggingFaceModel) -> None:
        self.source, self.fingerprint = source, f"{source.fingerprint}-{LOADING}"
        self.size, self.mean, self.std = image_settings(source.name, source.revision)

    def load(self) -> nn.Module:
        return self.source.network

    def embed(self, pixels: Tensor) -> Tensor:
        model = self.model
        if hasattr(model, "get_image_features"):
            return pooled_output(model.get_image_features(pixel_values=pixels))
        return pooled_output(model(pixel_values=pixels))


class HuggingFaceTexts(TextTower):
    """The text side of a transformers checkpoint: CLIP, SigLIP, or a mean-pooled encoder."""

    def __init__(self, source: HuggingFaceModel) -> None:
        self.source, self.fingerprint = source, source.fingerprint

    def load(self) -> nn.Module:
        return self.source.network

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source.name, revision=self.source.revision)

    @property
    def limit(self) -> int:
        """Tokens of the longest text: the smaller of the model's and the tokenizer's limits."""
        config = self.model.config
        config = getattr(config, "text_config", config)
        positions = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        padding = getattr(positions, "padding_idx", None)  # RoBERTa counts positions from behind it
        places = config.max_position_embeddings - (0 if padding is None else padding + 1)
        return min(places, self.tokenizer.model_max_length)

    def fits(self, text: str) -> bool:
        return len(self.tokenizer(text, verbose=False)["input_ids"]) <= self.limit

    def embed(self, texts: list[str]) -> Tensor:
        model = self.model
        siglip = "siglip" in model.config.model_type  # trained on texts padded to full length
        padding = (
            {"padding": "max_length", "max_length": self.limit} if siglip else {"padding": True}
        )
        tokens = self.tokenizer(texts, return_tensors="pt", **padding).to(self.device)
        if hasattr(model, "get_text_features"):
            return pooled_output(model.get_text_features(**tokens))
        hidden = model(**tokens).last_hidden_state
        weight = tokens["attention_mask"][..., None].to(hidden)
        return (hidden * weight).sum(1) / weight.sum(1)


def pooled_output(output: Any) -> Tensor:
    """The embeddings (n, d) in a transformers model's output."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.flatten(1)
    hidden = output.last_hidden_state
    return hidden[:, 0] if hidden.ndim == 3 else hidden.flatten(2).mean(2)
