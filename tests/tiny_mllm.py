"""Real image-text-to-text checkpoints, tiny and with random weights, as the hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["This is one axial slice of a CT scan: the liver and a kidney. Name what it shows."] * 9
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
PAD, START, END, IMAGE, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(8)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "initializer_range": 0.2}  # fmt: skip
WORDS = SIZES | {
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be written, and most random answers can be read."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=384, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<|im_end|>", padding_side="right"
    )  # right, as most checkpoints are saved


def llava(folder: Path) -> Path:
    """LLaVA: CLIP's tower, a fixed picture size, Llama."""
    vision = hf.CLIPVisionConfig(**SIZES, image_size=28, patch_size=14, projection_dim=32)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**WORDS), image_token_index=IMAGE
    )
    side = {"height": 28, "width": 28}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return save(folder, hf.LlavaForConditionalGeneration(config), processor)


def qwen(folder: Path) -> Path:
    """Qwen2.5-VL: as many patches as the picture is large."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = hf.Qwen2_5_VLConfig(
        text_config=WORDS | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    words = tokenizer()
    words.chat_template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    images = hf.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112)
    images._processor_class = words._processor_class = "Qwen2_5_VLProcessor"
    return save(folder, hf.Qwen2_5_VLForConditionalGeneration(config), images, words)


def save(folder: Path, model: Any, *parts: Any) -> Path:
    model.generation_config.suppress_tokens = [PAD]  # as trained models do of their own accord
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder
