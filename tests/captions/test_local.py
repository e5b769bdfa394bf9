from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_mllm
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, processors

from med3dinsight_ext.captions.cleaning import CUT, clean_caption
from med3dinsight_ext.captions.local import GumbelSampler, TransformersCaptions
from med3dinsight_ext.captions.multimodal import SliceRequest

KINDS = ("llava", "qwen")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    return {kind: getattr(tiny_mllm, kind)(tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def slice_request(row: int) -> SliceRequest:
    """Pictures and prompts of several lengths; every third picture is in colour."""
    pixels = torch.rand(30 + 12 * row, 45, 3, generator=torch.Generator().manual_seed(row))
    picture = Image.fromarray(pixels.mul(255).byte().numpy()).convert("L" if row % 3 else "RGB")
    return SliceRequest(row // 2, row, "Name what it shows." + " Why?" * (row % 3), picture)


def captions(folder: Path, **changes: Any) -> TransformersCaptions:
    return TransformersCaptions(**{"model": str(folder), "max_tokens": 12} | changes)


def texts(folder: Path, rows: int = 7, **changes: Any) -> list[str]:
    return [
        text for _, text in captions(folder, **changes).answers(map(slice_request, range(rows)))
    ]


def reference(folder: Path, request: SliceRequest) -> tuple[str, int]:
    """Answer and count of tokens by hand: no processor, no chat template, no batch, no padding."""
    picture = request.image.convert("RGB")
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
    if "image_grid_thw" in pixels:
        pads = "<|image_pad|>" * (int(pixels["image_grid_thw"].prod()) // 4)
        shown = f"<|vision_start|>{pads}<|vision_end|>"
    else:
        shown = "<image>" * 4
    text = f"<|im_start|>user\n{shown}{request.prompt}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if "image_grid_thw" in pixels:
        pixels["mm_token_type_ids"] = (ids == tiny_mllm.IMAGE_PAD).int()
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    output = model.generate(input_ids=ids, **pixels, max_new_tokens=12, do_sample=False)[0]
    text = tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)
    ended = output[-1] == tokenizer.eos_token_id
    return text if ended else text + CUT, len(output)


def test_answers_equal_the_models_own(folder: Path) -> None:
    captioner = captions(folder, batch_size=3)
    answered = list(captioner.answers(map(slice_request, range(4))))
    expected = [reference(folder, slice_request(row)) for row in range(4)]
    assert [(request.row, text) for request, text in answered] == [
        (row, text) for row, (text, _) in enumerate(expected)
    ]
    assert len({text for _, text in answered}) > 2  # else any answer would be as good
    assert captioner.tokens == sum(count for _, count in expected)


def test_a_freed_model_is_loaded_again(folder: Path) -> None:
    captioner = captions(folder)
    first = list(captioner.answers([slice_request(0)]))
    captioner.free()
    assert "network" not in vars(captioner)
    assert list(captioner.answers([slice_request(0)]))[0][1] == first[0][1]


def test_the_batch_does_not_change_greedy_answers(folder: Path) -> None:
    assert texts(folder, batch_size=1) == texts(folder, batch_size=4)


def test_a_sampled_answer_depends_on_seed_and_request_alone(folder: Path) -> None:
    drawn = texts(folder, temperature=1.0, batch_size=1)
    assert drawn == texts(folder, temperature=1.0, batch_size=4)
    assert drawn != texts(folder, temperature=1.0, batch_size=4, seed=1)
    assert drawn != texts(folder)


def test_samples_follow_the_softmax() -> None:
    picture, scores = Image.new("L", (2, 2)), torch.tensor([1.0, 0.0, -1.0, 2.0])
    batch = [SliceRequest(0, n, f"Prompt {n}", picture) for n in range(4000)]
    sampler = GumbelSampler(batch, 0.7, seed=0, device=torch.device("cpu"))
    drawn = sampler(torch.empty(4000, 0), scores.expand(4000, 4)).argmax(1)
    share = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(share, (scores / 0.7).softmax(0), atol=0.03)


def test_requests_are_taken_one_batch_at_a_time(folder: Path) -> None:
    taken: list[int] = []

    def requests() -> Iterator[SliceRequest]:
        for row in range(7):
            taken.append(row)
            yield slice_request(row)

    ahead = [
        len(taken) - done
        for done, _ in enumerate(captions(folder, batch_size=3).answers(requests()))
    ]
    assert ahead == [3, 2, 1, 3, 2, 1, 1]


def test_pictures_are_freed_after_their_batch(folder: Path) -> None:
    pictures: list[weakref.ref] = []

    def requests() -> Iterator[SliceRequest]:
        for row in range(6):
            request = slice_request(row)
            pictures.append(weakref.ref(request.image))
            yield request
            del request

    captioner = captions(folder, batch_size=2)
    alive = []
    for request, _ in captioner.answers(requests()):
        del request
        alive.append(sum(picture() is not None for picture in pictures))
    assert max(alive) <= 4  # a batch and the one before it, not all six


def test_weights_have_the_requested_dtype(folder: Path) -> None:
    captioner = captions(folder, dtype="bfloat16")
    assert len([text for _, text in captioner.answers([slice_request(0), slice_request(1)])]) == 2
    assert captioner.network.dtype == torch.bfloat16
    assert captions(folder).network.dtype == torch.float32  # as it was saved


def test_a_video_processor_that_refuses_pils_resizing_is_left_out(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders["qwen"]
    load = transformers.AutoProcessor.from_pretrained

    def refuse(*names: Any, **how: Any) -> Any:  # as transformers 5.17 does with torchvision
        if "backend" in how:
            raise AttributeError("property 'backend' of 'Qwen2VLVideoProcessor' has no setter")
        return load(*names, **how)

    expected = texts(folder)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    assert texts(folder) == expected


@pytest.mark.gpu
def test_the_batch_does_not_change_greedy_answers_on_a_gpu(folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    alone = texts(folder, batch_size=1, device="cuda")
    assert alone == texts(folder, batch_size=4, device="cuda")
    drawn = texts(folder, temperature=1.0, batch_size=1, device="cuda")
    assert drawn == texts(folder, temperature=1.0, batch_size=4, device="cuda")


def test_the_fingerprint_reads_no_weights_into_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    expected = captions(folder).fingerprint({})
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", refuse)
    assert captions(folder).fingerprint({}) == expected
    with pytest.raises(AssertionError, match="weights were loaded"):
        next(captions(folder).answers([slice_request(0)]))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"prompt": "What is it?"}, True),
        ({"dtype": "bfloat16"}, True),
        ({"temperature": 0.5}, True),
        ({"max_tokens": 13}, True),
        ({"batch_size": 2}, False),
        ({"seed": 1}, False),  # greedy answers have none
    ],
)
def test_the_fingerprint_names_what_changes_an_answer(
    folder: Path, change: dict, differs: bool
) -> None:
    same, other = (captions(folder, **c).fingerprint({}) for c in ({}, change))
    assert (same != other) == differs


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja", "tokenizer.json"])
def test_another_file_of_the_model_changes_the_fingerprint(copy: Path, name: str) -> None:
    before = captions(copy).fingerprint({})
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    assert captions(copy).fingerprint({}) != before


def test_a_hybrid_model_generates_without_reasoning(copy: Path) -> None:
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text() + "{% if enable_thinking | default(true) %}<think>{% endif %}")
    captioner = captions(copy)
    ids = captioner.inputs([slice_request(0)])["input_ids"][0]
    assert captioner.processor.tokenizer.decode(ids).endswith("assistant\n")


def test_an_answer_that_is_cut_while_it_reasons_is_no_caption(copy: Path) -> None:
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    for raw in texts(copy):
        assert raw.startswith("<think>\n") and clean_caption(raw).status == "empty"


def test_a_begin_token_is_not_written_twice(copy: Path) -> None:
    begin = "<|im_start|>"  # which the chat template writes as well
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": begin}))
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tiny_mllm.START)]
    )
    tokenizer.save(str(copy / "tokenizer.json"))
    captioner = captions(copy)
    ids = captioner.inputs([slice_request(0)])["input_ids"][0].tolist()
    assert ids.index(tiny_mllm.START) == 0 and ids[1] != tiny_mllm.START


def error(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        list(captions(folder).answers([slice_request(0)]))


def test_a_model_without_an_image_processor_is_named(copy: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (copy / name).unlink(missing_ok=True)
    error(copy, "model must come with an image processor .* hf download ID --local-dir FOLDER")


def test_a_missing_package_of_a_processor_is_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("\nIt requires the Abacus library.\nMore.")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    error(
        folders["llava"], "must have the packages of its processor, .*requires the Abacus library."
    )


def test_a_model_without_a_chat_template_is_named(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    error(copy, r"model must have a chat template, got none in .*model; use .*-Instruct")


def test_a_model_with_missing_weights_is_named(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    lost = next(name for name in weights if "mlp" in name)
    del weights[lost]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    error(copy, r"model must have all its weights, got .* without .*mlp.* \(1 in all\)")
    (copy / "model.safetensors").unlink()
    error(copy, "model must have its weights, got .*model: .* hf download")


@pytest.mark.parametrize(
    ("config", "kind"),
    [(transformers.LlamaConfig, "llama"), (transformers.ViTConfig, "vit")],
)
def test_a_model_of_texts_or_of_pictures_alone_is_named(
    tmp_path: Path, config: Any, kind: str
) -> None:
    config().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"must take an image and generate text, got .* of the kind {kind};"
    ):
        captions(tmp_path).fingerprint({})


@pytest.mark.parametrize("code", [{}, {"auto_map": {"AutoConfig": "code.Config"}}])
def test_a_model_that_brings_its_own_code_is_not_run(tmp_path: Path, code: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", **code}))
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="model must be of a kind that transformers .* supports"):
        captions(tmp_path).fingerprint({})


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder with a config.json, got .*hf download ID"):
        captions(tmp_path)


def test_a_model_that_cannot_be_fetched_names_the_download_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("transformers.utils.cached_file", offline)
    with pytest.raises(ValueError, match="org/model.*couldn't connect.*--local-dir .*gated"):
        TransformersCaptions("org/model").fingerprint({})


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="got ./nowhere; there is no such folder"):
        TransformersCaptions("./nowhere").fingerprint({})


def test_a_device_map_without_accelerate_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: False)
    with pytest.raises(ValueError, match="device_map must have accelerate, got 'auto' without"):
        captions(folder, device_map="auto")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_a_wrong_setting_is_named(folder: Path, change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        captions(folder, **change)
