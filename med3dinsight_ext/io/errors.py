"""Causes and messages of errors."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable, Iterator

WRONG_INPUT = (ValueError, OSError, ImportError)  # shown without a traceback
TRACEBACK = "MED3D_TRACEBACK"  # environment variable that shows it


def told(value: object) -> str:
    """A value for a message: its ``repr``, which is cut where it is long.

    Examples:
        >>> len(told("a" * 100000))
        80
    """
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 80
    return shown.repr(value)


def wrong_input(error: BaseException) -> BaseException | None:
    """The error in a chain that wrong input causes, unless tracebacks are asked for."""
    if os.environ.get(TRACEBACK):
        return None
    return next((cause for cause in causes(error) if isinstance(cause, WRONG_INPUT)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, then what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain; MONAI wraps it in "Failed to evaluate"."""
    *_, last = causes(error)
    return last


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def advice(word: object, known: Iterable[str], otherwise: str) -> str:
    """The nearest known word as a question, or ``otherwise``."""
    near = difflib.get_close_matches(str(word), list(known), 1)
    return f"did you mean {near[0]}?" if near else otherwise


def summary(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no text'}"
