from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from med3dinsight_ext.captions.cleaning import CUT, Reply, clean_caption

LIVER = "The liver and both kidneys are visible."
LESION = "A dark lesion lies in the right lobe."


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (f"  {LIVER}\n", LIVER),
        (f"{LIVER}\n\n{LESION}", f"{LIVER} {LESION}"),
        ("Axial CT of the liver", "Axial CT of the liver"),
        # thoughts
        (f"<think>Is it a liver? Maybe.</think>\n{LIVER}", LIVER),
        (f"<thinking>One.</thinking><think>Two.</think>{LIVER}", LIVER),
        (f"So it may be a liver.\n</think>\n\n{LIVER}", LIVER),
        (f"◁think▷Hm.◁/think▷{LIVER}", LIVER),
        (f"{LIVER} <think>Is that", LIVER),
        # special tokens and tags
        (f"{LIVER}<|im_end|>", LIVER),
        (f"<|im_start|>{LIVER}</s>", LIVER),
        (f"{LIVER}<end_of_turn>\n<eos>", LIVER),
        (f"{LIVER}<｜end▁of▁sentence｜>", LIVER),
        (f"[INST] [/INST] {LIVER}<br>{LESION}", f"{LIVER} {LESION}"),
        ("A cyst of <5 mm and a mass of >3 cm.", "A cyst of <5 mm and a mass of >3 cm."),
        # markdown
        (f"## Findings\n{LIVER}", f"Findings: {LIVER}"),
        (f"**Findings:** {LIVER}", f"Findings: {LIVER}"),
        ("- Liver: normal\n- Spleen: large.\n", "Liver: normal. Spleen: large."),
        ("1. Liver: normal.\n2) Spleen: large.", "Liver: normal. Spleen: large."),
        ("* The liver is\n  normal.", "The liver is normal."),
        (f"```text\n{LIVER}\n```", LIVER),
        (f"{LIVER}\n\n---\n\n{LESION}", f"{LIVER} {LESION}"),
        ("The [liver](https://a.org/l) is `normal`.", "The liver is normal."),
        ("The ***liver*** is _not_ ~~normal~~ large.", "The liver is not normal large."),
        ("**The liver is large.", "The liver is large."),
        ("A T2*-weighted *axial* slice, T2* short.", "A T2*-weighted axial slice, T2* short."),
        # chatter
        (f"Sure, here is a description of the slice:\n\n{LIVER}", LIVER),
        (f"Certainly! Here's what it shows: {LIVER}", LIVER),
        (f"Caption: {LIVER}", LIVER),
        (f'"{LIVER}"', LIVER),
        ("Certainly visible is the liver.", "Certainly visible is the liver."),
        (f"{LIVER} Let me know if you need more.", LIVER),
        (f"{LIVER} As an AI, I cannot provide medical advice.", LIVER),
        # repeats and loose ends
        (f"{LIVER} {LESION} {LIVER} {LIVER.upper()}", f"{LIVER} {LESION}"),
        (f"{LIVER} A dark lesion lies in the{CUT}", LIVER),
        (f"{LIVER} A dark lesion", f"{LIVER} A dark lesion"),
        ("- Liver: normal\n- Lesion in segment VI", "Liver: normal. Lesion in segment VI"),
        (f"- Liver: normal\n- Lesion in seg{CUT}", "Liver: normal."),
        (f"The image shows:\n\n1. Liver\n2. A mass{CUT}", "The image shows: Liver."),
        ("A mass of approx. 3 cm in the liver", "A mass of approx. 3 cm in the liver"),
        (f"肝脏可见。肝脏可见。右肾{CUT}", "肝脏可见。"),
        ("肝脏可见。右肾有3厘米囊肿", "肝脏可见。 右肾有3厘米囊肿"),
        ("A mass of 3 * 4 cm, 2*3 before.", "A mass of 3 × 4 cm, 2 × 3 before."),
        ("Here is the liver with a mass: dark.", "Here is the liver with a mass: dark."),
        ("Half a letter: liv�", "Half a letter: liv"),
    ],
)
def test_an_answer_is_cleaned(raw: str, text: str) -> None:
    assert clean_caption(raw) == Reply(text, "ok")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("<think>It shows a liver.", "empty"),
        ("<THINK>It shows a liver.</THINK>", "empty"),
        ("<|im_end|>", "empty"),
        ("!!!!!!!!!!!!", "empty"),
        ("1. 2. 3.", "empty"),
        ("I'm sorry, but I can't help with that.", "refused"),
        ("I’m sorry, but I can’t assist with medical images.", "refused"),
        ("Sorry, this is beyond me.", "refused"),
        ("I apologize, but I am unable to interpret scans.", "refused"),
        ("I cannot provide medical diagnoses. Please consult a doctor.", "refused"),
        ("Unfortunately, I am not able to analyze this picture.", "refused"),
        ("As an AI language model, I have no eyes.", "refused"),
        ("I can't see the image.", "refused"),
        ("No image was provided.", "refused"),
        ("I'm unable to describe this image.", "refused"),
        ("Unfortunately, I cannot describe this medical image.", "refused"),
        ("I'm not able to evaluate medical scans.", "refused"),
        ("I can't make a medical diagnosis.", "refused"),
        ("I am an AI assistant and cannot make medical diagnoses.", "refused"),
        ("I'm not able to determine what is in this picture.", "refused"),
        ("I don't have the ability to view images.", "refused"),
        ("It is not possible for me to interpret this image.", "refused"),
        ("Es tut mir leid, aber ich kann keine Bilder interpretieren.", "refused"),
        ("Lo siento, no puedo ayudar con eso.", "refused"),
        ("Je suis désolé, je ne peux pas interpréter cette image.", "refused"),
        ("申し訳ありませんが、画像を分析できません。", "refused"),
        ("Sure! I'm sorry, but I can't.", "refused"),
        ("抱歉，我无法分析这张图像。", "refused"),
        ("作为一个AI，我没有眼睛。", "refused"),
        ("the liver " * 40, "repeats"),
        ("A mass: " + "liver, kidney, spleen, " * 9, "repeats"),
        ("ab" * 300, "repeats"),
        ("肝" * 90, "repeats"),
        (" ".join(f"word{i}" for i in range(201)), "too long"),
        (" ".join(f"word{i}" for i in range(10_000)) + ".", "too long"),
    ],
)
def test_an_unusable_answer_has_its_reason(raw: str, status: str) -> None:
    assert clean_caption(raw) == Reply(None, status)


@pytest.mark.parametrize(
    "report",
    [
        "No abnormality can be seen.",
        "One cannot exclude a fracture.",
        "I cannot see any fracture.",
        "I cannot identify any abnormality in this image.",
        "Segment I cannot view the portal vein.",
        "I cannot identify any abnormality in this slice.",
        "The left kidney is not able to be seen.",
        "The mass does not give rise to calcification.",
        "无法排除骨折。",
        "Stage III disease of the aorta.",
    ],
)
def test_a_negative_finding_is_no_refusal(report: str) -> None:
    assert clean_caption(report) == Reply(report, "ok")


def test_two_hundred_words_are_not_too_long() -> None:
    assert clean_caption(" ".join(f"word{i}" for i in range(200))).status == "ok"


PIECES = [
    LIVER, LESION, "The spleen", "T2*", "<think>", "</think>", "◁think▷", "<|im_end|>", "</s>",
    "**", "*", "__", "_", "`", "```", "# ", "- ", "1. ", "[a](b)", "![", "](", "\n", " ", ":", ".",
    "Sure, ", "Here is it: ", "I'm sorry. ", "Caption:", '"', "抱歉", "肝。", "\ud800", "\x00",
    "~~",
]  # fmt: skip
ANSWERS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))


@given(ANSWERS)
def test_a_caption_is_one_line_without_markup_and_can_be_stored(raw: str) -> None:
    text, status, _ = clean_caption(raw)
    assert (text is None) == (status != "ok")
    if text is not None:
        assert text == text.strip() and len(text.splitlines()) == 1
        assert not re.search(r"```|\*\*|</?think|<\||</s>|◁think▷|^# |^- |\[a\]\(b\)", text, re.I)
        assert text.encode()


@given(ANSWERS)
def test_cleaning_a_caption_again_changes_nothing(raw: str) -> None:
    text = clean_caption(raw).text
    if text is not None:
        assert clean_caption(text) == Reply(text, "ok")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join))
def test_a_huge_answer_takes_no_time(piece: str) -> None:
    begin = time.perf_counter()
    clean_caption(piece * (60_000 // len(piece)))
    assert time.perf_counter() - begin < 5
