"""HellaSwag as text to learn from: a context and its right ending."""

from __future__ import annotations

from typing import Any

from ds_kd.data.chat import tokenize_prompt_answer
from ds_kd.data.labels import shift
from ds_kd.data.rows.declaration import data_set
from ds_kd.data.rows.source import make_samples, text_of

_COLUMNS = ("ctx", "endings", "label")
_CLOSE_UP = tuple(" ,.;:!?'")  # an ending that begins so takes no space before it


def label_of(row: dict[str, Any]) -> int:
    """Return the number of the right ending.

    Raises:
        ValueError: the endings are no list, as a cell of CSV, whose items are letters; or the label
            names none of them.
    """
    if not isinstance(row["endings"], list):
        raise ValueError(f"endings is {row['endings']!r:.80}, expected a list of texts")
    try:
        label = int(row["label"])
        # A test split may carry -1, which Python would read as the last ending; 1.5 is none.
        if label < 0 or (isinstance(row["label"], float) and label != row["label"]):
            raise IndexError
        row["endings"][label]
    except (ValueError, TypeError, IndexError):
        raise ValueError(
            f"label {row['label']!r} names none of {len(row['endings'])} endings (a test split has "
            f"no labels)"
        ) from None
    return label


def _read_texts(row: dict[str, Any], _: Any = None) -> tuple[str, str]:
    """Return the context and the right ending.

    Raises:
        ValueError: one of them is not text, or the label names no ending.
    """
    ending = row["endings"][label_of(row)]
    return text_of(row, "ctx"), text_of({"ending": ending}, "ending")


@data_set("path_or_dataset", _COLUMNS, _read_texts, limit="num_samples_limit")
def HellaSwag(  # a class in NeMo-AutoModel, hence the name
    path_or_dataset: str | list,
    tokenizer: Any,
    split: str = "train",
    num_samples_limit: int | None = None,
    pad_to_max_length: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Return samples of rows with `ctx`, `endings` and `label`, whose right ending is supervised.

    Context and ending are one running text with a space between them, except before punctuation.

    Args:
        path_or_dataset, split: see `load_rows`.
        tokenizer: the student's.
        num_samples_limit: keep only the first rows, this many.
        pad_to_max_length: accepted without effect; the collater pads, which changes no result.
        trust_remote_code: only False; `datasets` no longer runs a data set's own code.

    Raises:
        ValueError: the data cannot be read, has other columns, or a label names no ending;
            `trust_remote_code` is set.
    """
    if trust_remote_code:
        raise ValueError("trust_remote_code: true is not offered for data sets; remove it")

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        context, ending = _read_texts(row)
        gap = "" if ending.startswith(_CLOSE_UP) else " "
        return shift(*tokenize_prompt_answer(tokenizer, context + gap, ending))

    return make_samples(path_or_dataset, split, _COLUMNS, num_samples_limit, sample)
