"""Rows of any data set of the schema, recognised by their columns."""

from __future__ import annotations

from typing import Any

from ds_kd.data.chat import ChatDataset
from ds_kd.data.hellaswag import HellaSwag
from ds_kd.data.source import CHAT, HELLASWAG, SQUAD, load_rows
from ds_kd.data.squad import make_squad_dataset


def samples_of(source: str, tokenizer: Any, limit: int, split: str = "train") -> Any:
    """Return the first rows of a file as tokenised samples.

    Args:
        source, split: see `load_rows`.
        tokenizer: of the model that reads them.
        limit: how many rows.

    Raises:
        ValueError: the rows cannot be read, or no data set has their columns.
    """
    columns = set(load_rows(source, split, (), limit).column_names)
    if columns >= set(SQUAD):
        return make_squad_dataset(
            tokenizer, limit_dataset_samples=limit, split=split, dataset_name=source
        )
    if columns >= set(HELLASWAG):
        return HellaSwag(source, tokenizer, split, limit)
    if columns >= set(CHAT):
        return ChatDataset(source, tokenizer, split, limit_dataset_samples=limit)
    known = " or ".join(", ".join(names) for names in (SQUAD, HELLASWAG, CHAT))
    raise ValueError(f"{source!r} has the columns {', '.join(sorted(columns))}, expected {known}")
