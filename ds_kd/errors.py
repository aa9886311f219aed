"""What of an error a user reads."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of its text, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
