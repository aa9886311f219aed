"""Data sets for common forms of rows: prompts and completions, plain text, ShareGPT."""

from __future__ import annotations

from typing import Any

from ds_kd.data.chat import (
    ChatDataset,
    conversation_of,
    cut_answer,
    cut_length,
    tokenize_chat,
    tokenize_open_turn,
    tokenize_prompt,
    tokenize_prompt_answer,
    with_template,
)
from ds_kd.data.labels import IGNORE_INDEX, IS_PROMPT, shift
from ds_kd.data.rows.declaration import ColumnsError, data_set
from ds_kd.data.rows.source import make_samples, text_of

_ROLES = {"context": "system", "question": "user", "answer": "assistant"}
_PROMPT_COMPLETION = {"question": "prompt", "answer": "completion"}


def _read_texts(row: dict[str, Any], arguments: dict[str, Any]) -> dict[str, str]:
    """Return a row's texts by their part in the conversation, in the order of reading.

    Raises:
        ValueError: one is not text, or the mapping lacks an answer or anything before it.
    """
    mapping = arguments.get("column_mapping") or _PROMPT_COMPLETION
    is_mapping = isinstance(mapping, dict) and all(isinstance(n, str) for n in mapping.values())
    if not is_mapping or not {"answer"} < set(mapping) <= set(_ROLES):
        raise ColumnsError(
            "a column_mapping {question: …, answer: …} of names; give answer, and context or "
            "question or both"
        )
    # A context may be missing from some rows.
    return {
        part: text_of(row, mapping[part])
        for part in _ROLES
        if part in mapping and not (part == "context" and row[mapping[part]] is None)
    }


@data_set(
    "path_or_dataset_id", ("prompt", "completion"), _read_texts, columns_from="column_mapping"
)
def make_instruction_dataset(
    path_or_dataset_id: str | list,
    tokenizer: Any,
    column_mapping: dict[str, str] | None = None,
    split: str | None = "train",
    answer_only_loss_mask: bool = True,
    seq_length: int | None = None,
    padding: bool | str | None = None,
    truncation: bool | str | None = None,
    start_of_turn_token: str | None = None,
    limit_dataset_samples: int | None = None,
    chat_template: str | None = None,
) -> Any:
    """Return samples of rows with a question, perhaps a context, and an answer to learn.

    With a chat template the context is the system turn and the question the user's. Without one
    they are running text, with a space between two of them if neither has one there.

    Args:
        path_or_dataset_id, split: see `load_rows`.
        tokenizer: the student's.
        column_mapping: `context`, `question`, `answer` → their columns; by default `prompt` is the
            question and `completion` the answer.
        answer_only_loss_mask: False supervises every token.
        seq_length: with `truncation`, cuts samples to this many positions.
        padding: accepted without effect; the collater pads, which changes no result.
        start_of_turn_token: accepted without effect; turns are found by the template.
        limit_dataset_samples: keep only the first rows, this many.
        chat_template: Jinja text or file in place of the tokenizer's own.

    Raises:
        ValueError: the data cannot be read, or lack a column or its text; the mapping lacks an
            answer or anything before it.
    """
    arguments = {"column_mapping": column_mapping}
    columns = tuple((column_mapping or _PROMPT_COMPLETION).values())
    _read_texts(dict.fromkeys(columns, ""), arguments)
    tokenizer = with_template(tokenizer, chat_template)
    length = _find_cut_length(seq_length, truncation)

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        texts = _read_texts(row, arguments)
        if tokenizer.chat_template is not None:
            turns = [{"role": _ROLES[part], "content": text} for part, text in texts.items()]
            ids, mask = tokenize_chat(tokenizer, turns)
        else:
            ids, mask = _tokenize_running_text(tokenizer, texts)
        return shift(ids, mask if answer_only_loss_mask else [True] * len(ids), length)

    return make_samples(path_or_dataset_id, split, columns, limit_dataset_samples, sample)


def _tokenize_running_text(tokenizer: Any, texts: dict[str, str]) -> tuple[list[int], list[bool]]:
    """Tokenise parts that end in an answer, with a space before it if neither side has one."""
    prompt = " ".join(text for part, text in texts.items() if part != "answer")
    gap = "" if prompt[-1:].isspace() or texts["answer"][:1].isspace() else " "
    return tokenize_prompt_answer(tokenizer, prompt + gap, texts["answer"])


def _read_talk(row: dict[str, Any], arguments: dict[str, Any]) -> tuple[list[dict], Any]:
    return conversation_of(row, arguments.get("chat_template") is not None, "conversations")


@data_set("dataset_name", ("conversations",), _read_talk)
def make_sharegpt_dataset(
    dataset_name: str | list,
    tokenizer: Any,
    split: str | None = "train",
    seq_length: int | None = None,
    truncation: bool | str = False,
    limit_dataset_samples: int | None = None,
    chat_template: str | None = None,
) -> Any:
    """Return samples of rows with a column `conversations`, a list of `{from, value}`; see
    `ChatDataset`."""
    return ChatDataset(
        dataset_name,
        tokenizer,
        split,
        _find_cut_length(seq_length, truncation),
        truncation,
        limit_dataset_samples,
        chat_template,
        column="conversations",
    )


@data_set(
    "dataset_name",
    ("text",),
    lambda row, arguments: text_of(row, arguments.get("column", "text")),
    columns_from="column",
)
def make_text_dataset(
    dataset_name: str | list,
    tokenizer: Any,
    column: str = "text",
    split: str | None = "train",
    seq_length: int | None = None,
    truncation: bool | str | None = None,
    limit_dataset_samples: int | None = None,
) -> Any:
    """Return samples of rows of plain text; every token is supervised, and EOS after the last.

    Args:
        dataset_name, split: see `load_rows`.
        tokenizer: the student's.
        column: the column of the text.
        seq_length: with `truncation`, cuts samples to this many positions.
        limit_dataset_samples: keep only the first rows, this many.

    Raises:
        ValueError: the data cannot be read, or lack the column or its text.
    """
    length = _find_cut_length(seq_length, truncation)

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        ids, _ = tokenize_prompt_answer(tokenizer, "", text_of(row, column))
        return shift(ids, [True] * len(ids), length)

    return make_samples(dataset_name, split, (column,), limit_dataset_samples, sample)


def _read_prompt(row: dict[str, Any], arguments: dict[str, Any]) -> tuple[list[dict], Any]:
    """Return a row's messages and its tools; a text is one message of the user.

    Raises:
        ValueError: it is neither a text nor a conversation, or is empty.
    """
    column = arguments.get("column", "prompt")
    if isinstance(row[column], str) and not row[column].lstrip().startswith("["):
        if not row[column].strip():
            raise ValueError(f"{column} is empty")
        return [{"role": "user", "content": row[column]}], None
    any_role = arguments.get("chat_template") is not None
    return conversation_of(row, any_role, column, needs_answer=False)


@data_set("path_or_dataset_id", ("prompt",), _read_prompt, columns_from="column", has_answers=False)
def make_prompt_dataset(
    path_or_dataset_id: str | list,
    tokenizer: Any,
    column: str = "prompt",
    split: str | None = "train",
    limit_dataset_samples: int | None = None,
    chat_template: str | None = None,
) -> Any:
    """Return prompts alone, for a student that writes all answers itself (`rollouts.ratio: 1`).

    A text is the user's turn if the tokenizer has a chat template, else running text. Messages go
    through the template without the assistant's turn at their end, if there is one.

    Args:
        path_or_dataset_id, split: see `load_rows`.
        tokenizer: the student's.
        column: the column of the prompt: a text, or messages.
        limit_dataset_samples: keep only the first rows, this many.
        chat_template: Jinja text or file in place of the tokenizer's own.

    Raises:
        ValueError: the data cannot be read, or lack the column; messages without a chat template.
    """
    tokenizer = with_template(tokenizer, chat_template)
    arguments = {"column": column, "chat_template": chat_template}

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        talk, tools = _read_prompt(row, arguments)
        if tokenizer.chat_template is not None:
            ids = tokenize_open_turn(tokenizer, cut_answer(talk), tools)
        elif isinstance(row[column], str):
            ids = tokenize_prompt(tokenizer, row[column].rstrip())
        else:
            raise ValueError(f"{tokenizer.name_or_path} has no chat template for messages")
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids), IS_PROMPT: True}

    return make_samples(path_or_dataset_id, split, (column,), limit_dataset_samples, sample)


def _find_cut_length(seq_length: int | None, truncation: bool | str | None) -> int | None:
    if seq_length is None and cut_length(1, truncation):
        raise ValueError("truncation needs seq_length: an integer")
    return cut_length(seq_length, truncation)
