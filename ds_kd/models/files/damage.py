"""Tell damaged or hostile files of a model in a sentence, whatever a library raises for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ds_kd.errors import UserError, explain, first_line
from ds_kd.files import find_wrong_size


@contextmanager
def name_damage(name: str = "") -> Iterator[None]:
    """Turn what libraries raise in this block for the content of a model's files into a ValueError;
    errors that tell of the machine stay as they are.

    Args:
        name: the model; sizes in its config.json with which loading would never end are refused.

    Raises:
        ValueError: says what was found.
    """
    if name and (wrong := find_wrong_size(name)):
        raise ValueError(wrong)
    try:
        yield
    except (UserError, ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # TypeError, KeyError, AssertionError, and plain ones of tokenizers
        if explain(error) is not None:
            raise
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"its files are damaged, or of no language model ({told})") from error
