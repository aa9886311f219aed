"""Errors that a user reads."""

from __future__ import annotations


class UserError(Exception):
    """An error whose message is for the user: scripts print it without a traceback.

    Everything else that reaches the top of a script is a bug and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of its text, or its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
