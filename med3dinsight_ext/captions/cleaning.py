"""Cleaning of a multimodal model's raw answers into captions."""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_WORDS, MAX_LETTERS = 200, 2000  # the latter for scripts without spaces
CUT = "…"  # ends a raw answer that reached the limit of its tokens

# The answer follows the last reasoning block; some chat templates open the first one themselves.
REASONING_END = re.compile(r"</think(?:ing)?>|◁/think▷", re.I)
REASONING_START = re.compile(r"<think(?:ing)?>|◁think▷", re.I)
OPENED_REASONING = re.compile(f"(?:{REASONING_START.pattern})\\s*$", re.I)
# <|im_end|>, </s>, <end_of_turn>, <br>, [/INST]; "<5 mm" is none of them.
TAG = re.compile(r"<[|｜/]*[a-z][^<>\s]*>|\[/?INST\]", re.I)
FENCE_OR_RULE = re.compile(r"```\w*|^[\s|:*_=-]{3,}$", re.M)
LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*\)")
HEADING = re.compile(r"^\s*#{1,6}\s+(.*?)[\s#:]*$")
BULLET = re.compile(r"^(?:\s*(?:[-*+•·]|#{1,6}|\d{1,2}[.)])\s+)+")
# A star behind a letter may belong to it, as in T2*.
EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|~~)(?=\S)(.{1,300}?)(?<=\S)\1(?!\w)")
TIMES = re.compile(r"(?<=\d)\s?\*\s?(?=\d)")
STRAY = re.compile(r"\*{2,}|(?<!\w)\*|`|(?<!\w)_{2,}|_{2,}(?!\w)")
CHATTER = re.compile(
    r"^(?:(?:sure(?: thing)?|certainly|of course|absolutely|ok(?:ay)?)\s*[,.!:]+\s*"
    r"|here(?:'s| is| are)\b(?=[^.:]{0,80}\b(?:description|caption|summary|answer|report|what|"
    r"response|interpretation|analysis|overview|sentences?|it)\b)[^.:]{0,80}:\s*"
    r"|(?:answer|caption|description|response|assistant)\s*:\s*)+",
    re.I,
)
CLOSING = re.compile(
    r"^(?:let me know|i hope|feel free|if you (?:have|need|would)|please (?:consult|note|let))\b",
    re.I,
)
# First person only: "cannot exclude a fracture" is a report, "I cannot interpret images" is none.
# Not the Roman numeral of "segment I".
REFUSAL = re.compile(
    r"^(?:i'm|i am|we are)?\s*(?:very |so |truly )?sorry\b|^(?:i |my )?apolog|"
    r"\b(?:as|i'm|i am) an? (?:ai|artificial intelligence|(?:large |visual )?language model)\b|"
    r"(?<!segment )(?<!type )(?<!grade )(?<!stage )\bi(?:'m| am)? (?:cannot|can't|"
    r"can not|won't|unable to|not able to|not qualified to|do not|don't) (?:\w+ )?(?:provide|help|"
    r"assist|interpret|analy[sz]e|diagnose|offer|give|view|comply|fulfil|process|have the ability|"
    r"(?:see|have access to) (?:the|this|your|an|any) ?(?:image|picture|attachment)|"
    r"determine what|(?:describe|assess|evaluate|make|examine)\b[^.]{0,40}"
    r"\b(?:image|picture|scan|photo|diagnos))|\bnot possible for me to\b|"
    r"^(?:there is )?no image (?:is |was |has been )?(?:provided|attached|uploaded)|"
    r"^please (?:provide|upload|share|attach)\b|"
    r"^(?:es )?tut mir leid\b|^leider kann ich\b|^lo siento\b|^(?:je suis )?désolée?\b|"
    r"^je ne peux pas\b|^mi dispiace\b|^(?:sinto muito|desculpe)\b|申し訳|죄송|"
    r"抱歉|对不起|對不起|(?:无法|不能|無法)(?:提供|协助|協助|回答|查看|分析|诊断|診斷)|作为(?:一个|一名)?(?:AI|人工智能|语言模型)",
    re.I,
)
# The next sentence begins with a capital (or a script without them): "approx. 3 cm" goes on.
BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[^\W\d_a-z]|[\"“(])|(?<=[。！？])\s*")
FINISHED = re.compile(r"[.!?。！？][\"”’')\]]*$")
LOOP = re.compile(r"(.{1,80}?)\1{2,}")


class Reply(NamedTuple):
    """A cleaned answer."""

    text: str | None  # the caption, one line of plain text; None if the answer is not usable
    status: str  # "ok", "empty", "refused", "repeats" or "too long"
    raw: str | None = None  # the answer before cleaning, where it is kept


def clean_caption(raw: str) -> Reply:
    """Remove reasoning, markup, chatter, repeated sentences and an unfinished last one.

    Args:
        raw: the whole answer of a model; its last sentence is unfinished if it ends with ``CUT``.

    Returns:
        The caption with status "ok", or None with the reason. Refusals, loops and answers of more
        than 200 words are not captions.
    """
    text = REASONING_START.split(REASONING_END.split(raw)[-1])[0]
    text = "".join(c for c in text if c.isprintable() or c.isspace()).replace("�", "")
    if len(text) > 10 * MAX_LETTERS:  # cleaning it may take minutes
        return Reply(None, "too long")
    before, cut = None, raw.rstrip().endswith(CUT)
    while text != before:  # one removal may expose another
        before, text = text, _sentences(_plain(text), cut)
    if not any(c.isalpha() for c in text):
        return Reply(None, "empty")
    if REFUSAL.search(BETWEEN_SENTENCES.split(text)[0]):
        return Reply(None, "refused")
    start = text[:MAX_LETTERS].lower() + " "  # so that the last word is like the others
    if max((len(loop[0]) for loop in LOOP.finditer(start)), default=0) > len(start) / 2:
        return Reply(None, "repeats")
    if len(text.split()) > MAX_WORDS or len(text) > MAX_LETTERS:
        return Reply(None, "too long")
    return Reply(text, "ok")


def _plain(text: str) -> str:
    """One line without markup or opening chatter."""
    text = FENCE_OR_RULE.sub("", TAG.sub(" ", text.replace("’", "'")))
    lines = [line for line in text.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if (heading := HEADING.match(line)) and i + 1 < len(lines):
            lines[i] = f"{heading[1]}:"
        elif BULLET.match(line):
            lines[i] = item = BULLET.sub("", line).rstrip()
            listed = i + 1 < len(lines) and BULLET.match(lines[i + 1])
            if listed and item and item[-1] not in ".,;:!?。！？":
                lines[i] += "."
    text = LINK.sub(r"\1", " ".join(lines))
    text = STRAY.sub("", EMPHASIS.sub(r"\2", TIMES.sub(" × ", text)))
    text = CHATTER.sub("", " ".join(text.split()))
    whole_quote = re.fullmatch(r"[\"“]([^\"“”]*)[\"”]", text)
    return whole_quote[1].strip() if whole_quote else text


def _sentences(text: str, cut: bool) -> str:
    """Each sentence once, no cut last one, and after the first no refusal or closing phrase."""
    first, *rest = BETWEEN_SENTENCES.split(text)
    kept = {first.lower(): first}
    for sentence in rest:
        if not (REFUSAL.search(sentence) or CLOSING.search(sentence)):
            kept.setdefault(sentence.lower(), sentence)
    sentences = [sentence for sentence in kept.values() if sentence]
    if cut and len(sentences) > 1 and not FINISHED.search(sentences[-1]):
        sentences.pop()
    return " ".join(sentences)
