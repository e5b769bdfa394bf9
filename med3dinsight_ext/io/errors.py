"""Root causes of errors."""

from __future__ import annotations


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain; MONAI wraps it in "Failed to evaluate"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
