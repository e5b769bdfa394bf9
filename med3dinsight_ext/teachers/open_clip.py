"""Image and text towers of open_clip checkpoints, such as BiomedCLIP."""

from __future__ import annotations

import json
import sys
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from med3dinsight_ext.io.torchvision_operators import define_operators
from med3dinsight_ext.teachers.checkpoints import folder_fingerprint, hub_file
from med3dinsight_ext.teachers.towers import ImageTower, TextTower

declared_operators = cache(define_operators)  # in a cache, since they end with their library


def import_open_clip() -> Any:
    """open_clip, also beside a torchvision whose compiled part does not match torch."""
    try:
        return import_module("open_clip")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "open_clip", "timm")]:
        del sys.modules[name]  # half imported
    declared_operators()
    return import_module("open_clip")


class OpenClipModel:
    """One open_clip checkpoint, ``hf-hub:org/name`` or ``local-dir:/folder`` (BiomedCLIP, …)."""

    def __init__(self, model: str) -> None:
        self.name = model
        kind, _, place = model.partition(":")
        if kind not in ("hf-hub", "local-dir"):
            raise ValueError(f"model must be 'hf-hub:ID' or 'local-dir:FOLDER', got {model!r}")
        if kind == "local-dir" and not Path(place).is_dir():
            raise ValueError(f"model must name a folder, got {model!r}; there is no {place}")
        local = folder_fingerprint(Path(place)) if kind == "local-dir" else ""
        config = Path(hub_file(place, "open_clip_config.json"))
        self.fingerprint = local or config.parent.name
        about = json.loads(config.read_text())
        self.preprocess = about.get("preprocess_cfg", {})
        vision = about.get("model_cfg", {}).get("vision_cfg", {})
        self.size = self.preprocess.get("size") or vision.get("image_size") or 224

    @property
    def library(self) -> Any:
        """The open_clip package; ValueError if it is not installed."""
        try:
            return import_open_clip()
        except ImportError as error:
            raise ValueError(
                f"open_clip must be installed for {self.name}; pip install "
                "'med3dinsight-ext[open-clip]' (it needs a torchvision that matches your torch)"
            ) from error

    @cached_property
    def network(self) -> Any:
        """The model with its weights."""
        return self.library.create_model_from_pretrained(self.name, return_transform=False)


class OpenClipImages(ImageTower):
    """The image side of an open_clip checkpoint."""

    def __init__(self, source: OpenClipModel) -> None:
        self.source, self.fingerprint = source, source.fingerprint
        self.size = source.size if isinstance(source.size, int) else max(source.size)
        # open_clip's own constants where a checkpoint sets none
        self.mean = source.preprocess.get("mean", (0.48145466, 0.4578275, 0.40821073))
        self.std = source.preprocess.get("std", (0.26862954, 0.26130258, 0.27577711))

    def load(self) -> nn.Module:
        return self.source.network

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)


class OpenClipTexts(TextTower):
    """The text side of an open_clip checkpoint."""

    def __init__(self, source: OpenClipModel) -> None:
        self.source, self.fingerprint = source, source.fingerprint

    def load(self) -> nn.Module:
        return self.source.network

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.source.library.get_tokenizer(self.source.name)

    def fits(self, text: str) -> bool:
        # The tokenizer cuts to its context: a row filled to the last place may have been cut.
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is not None:
            return len(inner(text)["input_ids"]) <= self.tokenizer.context_length
        return bool(self.tokenizer([text])[0, -1] == 0)

    def embed(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))
