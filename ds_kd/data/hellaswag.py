"""HellaSwag as text to learn from: the context and its right ending."""

from __future__ import annotations

from typing import Any

from ds_kd.data.chat import tokenize_prompt_answer
from ds_kd.data.labels import shift
from ds_kd.data.source import HELLASWAG, hellaswag_texts, load_rows, tokenize

_CLOSE_UP = tuple(" ,.;:!?'")  # what an ending begins with that takes no space before it


def HellaSwag(  # a class in NeMo-AutoModel, hence the name
    path_or_dataset: str,
    tokenizer: Any,
    split: str = "train",
    num_samples_limit: int | None = None,
    pad_to_max_length: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Rows with `ctx`, `endings` and `label` → samples whose gold ending is supervised.

    Context and ending are one running text with a space between them, but before a comma and the
    like.

    Args:
        path_or_dataset, split: see `load_rows`.
        tokenizer: of the student.
        num_samples_limit: keep the first so many rows.
        pad_to_max_length: accepted; padding is the collater's work and changes no result.
        trust_remote_code: only False; `datasets` no longer runs a data set's own code.

    Raises:
        ValueError: the data cannot be had, has other columns, or a label names no ending;
            `trust_remote_code`.
    """
    if trust_remote_code:
        raise ValueError("trust_remote_code: true is not offered for data sets; remove it")
    rows = load_rows(path_or_dataset, split, HELLASWAG, num_samples_limit)

    def sample(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        try:
            context, ending = hellaswag_texts(row)
        except ValueError as error:
            raise ValueError(f"{path_or_dataset!r}, row {index}: {error}") from None
        gap = "" if ending.startswith(_CLOSE_UP) else " "
        return shift(*tokenize_prompt_answer(tokenizer, context + gap, ending))

    return tokenize(rows, sample)
