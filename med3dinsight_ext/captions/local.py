"""Captions by a multimodal transformers checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from med3dinsight_ext.captions.cleaning import CUT, OPENED_REASONING
from med3dinsight_ext.captions.multimodal import MllmCaptions, SliceRequest, check_least
from med3dinsight_ext.io.errors import first_line
from med3dinsight_ext.teachers.checkpoints import model_fingerprint

DOWNLOAD = "hf download ID --local-dir FOLDER"


class TransformersCaptions(MllmCaptions):
    """Any ``AutoModelForImageTextToText`` checkpoint, such as Qwen-VL, LLaVA or MedGemma.

    An answer depends on its request, and on ``seed`` where ``temperature`` is above 0, but not on
    the other requests of its batch, except for rounding where two tokens are about equally likely
    (more so in bf16). Sampling draws from the whole distribution (no top-k, no top-p) with one
    random stream a request, which differs between kinds of device.

    Code in a checkpoint is never run, and torchvision is not needed.

    Args:
        model: hub id or local folder.
        revision: branch, tag or commit of a hub id.
        batch_size: slices a forward pass, >= 1.
        dtype: of the weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        device_map: distribution of the weights by accelerate, such as "auto"; overrides ``device``.
        device: where the model computes.
        **options: arguments of ``MllmCaptions``: prompt, max_tokens, temperature, size and so on.

    Raises:
        ValueError: an argument is out of range, the folder holds no model, or accelerate is
            missing.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        batch_size: int = 8,
        dtype: str = "auto",
        device_map: str | dict | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.model, self.revision, self.batch_size = str(model), revision, batch_size
        self.dtype, self.device_map, self.device = dtype, device_map, torch.device(device)
        check_least(batch_size=(batch_size, 1))
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}; auto takes the "
                "checkpoint's own"
            )
        if Path(model).is_dir() and not (Path(model) / "config.json").exists():
            raise ValueError(
                f"model must be a folder with a config.json, got {model}; copy the whole "
                f"repository into it ({DOWNLOAD})"
            )
        if device_map is not None:
            from transformers.utils import is_accelerate_available

            if not is_accelerate_available():
                raise ValueError(
                    f"device_map must have accelerate, got {device_map!r} without; pip install "
                    "accelerate, or leave device_map out"
                )

    @cached_property
    def model_fingerprint(self) -> str:
        """Hash or commit of the weights, and their dtype."""
        self.config  # noqa: B018  an unfit model is found before anything long begins
        return json.dumps([model_fingerprint(self.model, self.revision), self.dtype])

    @cached_property
    def config(self) -> Any:
        """The configuration; ValueError if it is of no supported image-text-to-text model."""
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        if not Path(self.model).is_dir():
            model_fingerprint(self.model, self.revision)  # its error has the download command
        try:
            config = transformers.AutoConfig.from_pretrained(
                self.model, revision=self.revision, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model must be of a kind that transformers {transformers.__version__} supports, "
                f"got {self.model}: {_first_line(error)} Use a checkpoint in transformers' own "
                "format (often named -hf), or a newer transformers"
            ) from error
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                f"model must take an image and generate text, got {self.model} of the kind "
                f"{config.model_type}; name an image-text-to-text model"
            )
        return config

    @cached_property
    def processor(self) -> Any:
        """Image processor and tokenizer with a chat template; ValueError if one is missing."""
        try:
            processor = _processor(self.model, self.revision, self.config)
            tokenizer, _ = processor.tokenizer, processor.image_processor
        except ImportError as error:
            raise ValueError(
                f"model must have the packages of its processor, got {self.model}: "
                f"{_first_line(error)} Install it, or use another model"
            ) from error
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"model must come with an image processor and a tokenizer, got {self.model}: "
                f"{_first_line(error)} Fetch the whole repository: {DOWNLOAD}"
            ) from error
        if not processor.chat_template:
            processor.chat_template = tokenizer.chat_template
        if not processor.chat_template:
            raise ValueError(
                f"model must have a chat template, got none in {self.model}; use its variant that "
                "follows instructions (often named -it, -Instruct or -chat)"
            )
        tokenizer.padding_side = "left"  # new tokens must follow the prompt at once
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return processor

    @cached_property
    def network(self) -> Any:
        """The frozen model; ValueError if weights are missing."""
        from transformers import AutoModelForImageTextToText

        placed = {} if self.device_map is None else {"device_map": self.device_map}
        try:
            network, loaded = AutoModelForImageTextToText.from_pretrained(
                self.model,
                config=self.config,
                revision=self.revision,
                dtype=self.dtype,
                output_loading_info=True,
                trust_remote_code=False,
                **placed,
            )
        except OSError as error:
            raise ValueError(
                f"model must have its weights, got {self.model}: {_first_line(error)} "
                f"Fetch the whole repository: {DOWNLOAD}"
            ) from error
        if loaded["missing_keys"]:
            raise ValueError(
                f"model must have all its weights, got {self.model} without "
                f"{', '.join(sorted(loaded['missing_keys'])[:3])} ({len(loaded['missing_keys'])} "
                f"in all); fetch the whole repository: {DOWNLOAD}"
            )
        if self.device_map is None:
            network.to(self.device)
        return network.eval().requires_grad_(False)

    def free(self) -> None:
        self.__dict__.pop("network", None)

    def answers(self, requests: Iterable[SliceRequest]) -> Iterator[tuple[SliceRequest, str]]:
        """Each request with the model's raw answer, in order; one batch is taken at a time."""
        waiting = iter(requests)
        while batch := list(islice(waiting, self.batch_size)):
            yield from zip(batch, self._generate(batch), strict=True)

    def prompts(self, batch: Sequence[SliceRequest]) -> list[str]:
        """The requests in the words of the model's chat template."""
        template = str(self.processor.chat_template)
        # A hybrid model would spend the whole answer on its reasoning.
        direct = {"enable_thinking": False} if "enable_thinking" in template else {}
        texts = []
        for request in batch:
            content = [{"type": "image"}, {"type": "text", "text": request.prompt}]
            chat = [{"role": "user", "content": content}]
            texts.append(
                self.processor.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=False, **direct
                )
            )
        return texts

    def inputs(self, batch: Sequence[SliceRequest]) -> Any:
        """The network's input for these requests, padded on the left."""
        processor, texts = self.processor, self.prompts(batch)
        start = processor.tokenizer.bos_token
        return processor(
            text=texts,
            images=[[request.image.convert("RGB")] for request in batch],
            padding=True,
            return_tensors="pt",
            add_special_tokens=start is None or not texts[0].startswith(start),  # never two
        ).to(self.network.device, dtype=self.network.dtype)

    @torch.no_grad()
    def _generate(self, batch: Sequence[SliceRequest]) -> list[str]:
        tokenizer, inputs = self.processor.tokenizer, self.inputs(batch)
        sampler = []
        if self.temperature:
            sampler.append(GumbelSampler(batch, self.temperature, self.seed, self.network.device))
        output = self.network.generate(
            **inputs,
            max_new_tokens=self.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=sampler,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        self.tokens += int(inputs["attention_mask"].sum() + (new != tokenizer.pad_token_id).sum())
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        ends = self.network.generation_config.eos_token_id
        ends = {tokenizer.pad_token_id, *(ends if isinstance(ends, list) else [ends])}
        full = new.shape[1] == self.max_tokens
        cut = [full and last not in ends for last in new[:, -1].tolist()]
        # An answer that was cut while it reasoned shows this by the tag that the prompt ended with.
        if tag := OPENED_REASONING.search(self.prompts(batch[:1])[0]):  # one template for all
            texts = [tag[0] + text for text in texts]
        return [text + CUT if c else text for text, c in zip(texts, cut, strict=True)]


class GumbelSampler:
    """Logits processor that adds Gumbel noise, so that the argmax samples the softmax.

    Unlike ``generate``'s own sampling, each row of a batch has its own random stream.

    Args:
        batch: requests; each seeds its stream with its prompt and picture.
        temperature: > 0, divides the logits.
        seed: part of each stream's seed.
        device: of the streams.
    """

    def __init__(
        self, batch: Sequence[SliceRequest], temperature: float, seed: int, device: torch.device
    ) -> None:
        self.temperature = temperature
        self.streams = []
        for request in batch:
            picture = request.image.convert("RGB")
            content = f"{seed} {picture.size} {request.prompt}".encode() + picture.tobytes()
            number = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
            self.streams.append(torch.Generator(device).manual_seed(number))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        waits = [
            torch.empty(scores.shape[1], device=stream.device).exponential_(generator=stream)
            for stream in self.streams
        ]
        return scores.float() / self.temperature - torch.stack(waits).to(scores.device).log()


def _processor(model: str, revision: str | None, config: Any) -> Any:
    """The checkpoint's processor with PIL's resizing, which is the same on every machine.

    A video processor would import torchvision, or has no such choice (transformers up to 5.17 with
    torchvision); it is left out where that is possible.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    how = {"revision": revision, "trust_remote_code": False}
    try:
        return AutoProcessor.from_pretrained(model, backend="pil", **how)
    except (ImportError, ValueError, AttributeError):
        kind = PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None
        if kind is None or kind.get_attributes()[-1] != "video_processor":
            return AutoProcessor.from_pretrained(model, **how)
    parts = kind.get_attributes()[:-1]
    stills: Any = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})
    return stills.from_pretrained(model, backend="pil", **how)


def _first_line(error: Exception) -> str:
    return f"{first_line(error).removesuffix('.')}."
