"""SQuAD: extractive question answering, in the prompt of NeMo-AutoModel."""

from __future__ import annotations

from typing import Any

from ds_kd.data.chat import cut_length, tokenize_chat, tokenize_prompt_answer, with_template
from ds_kd.data.labels import IGNORE_INDEX, shift
from ds_kd.data.rows.declaration import data_set
from ds_kd.data.rows.source import make_samples, text_of

_COLUMNS = ("context", "question", "answers")


def _read_texts(row: dict[str, Any], _: Any = None) -> tuple[str, str, str]:
    """Return context, question and the first answer, stripped, empty where there is none.

    Raises:
        ValueError: one of them is not text.
    """
    texts = answers_of(row)
    return text_of(row, "context"), text_of(row, "question"), texts[0] if texts else ""


def answers_of(row: dict[str, Any]) -> list[str]:
    """Return all answers of a row, stripped; none for a question without one.

    Raises:
        ValueError: they are not a list of texts under `text`.
    """
    answers = row["answers"]
    try:
        texts = answers["text"]
        if isinstance(texts, str):  # its first item would be a letter
            raise TypeError
        return [str(text.strip()) for text in texts or ()]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"answers is {answers!r:.80}, expected {{'text': [text, …]}}") from None


def prompt_of(context: str, question: str) -> str:
    """Return the text that asks for an answer."""
    return f"Context: {context} Question: {question} Answer: "


@data_set("dataset_name", _COLUMNS, _read_texts)
def make_squad_dataset(
    tokenizer: Any,
    seq_length: int | None = None,
    limit_dataset_samples: int | None = None,
    fp8: bool = False,
    split: str = "train",
    dataset_name: str | list = "rajpurkar/squad",
    padding: bool | str = False,
    truncation: bool | str = False,
    chat_template: str | None = None,
) -> Any:
    """Return samples of rows with `context`, `question`, `answers.text`; the answer is supervised.

    With a chat template they are a user and an assistant turn, else running text. The answer is the
    first of `answers.text`, stripped, or empty.

    Args:
        tokenizer: the student's.
        seq_length: for `truncation` and `padding: max_length`, in positions.
        limit_dataset_samples: keep only the first rows, this many.
        fp8: only False.
        split, dataset_name: see `load_rows`.
        padding, truncation: `max_length` pads and true cuts samples to `seq_length`.
        chat_template: Jinja text or file in place of the tokenizer's own.

    Raises:
        ValueError: the data cannot be read or lack columns; `fp8`; no `seq_length` to cut or pad.
    """
    if fp8:
        raise ValueError("fp8: true is not offered; remove it and choose torch_dtype: bf16")
    if seq_length is None and (padding == "max_length" or cut_length(1, truncation)):
        raise ValueError("padding: max_length and truncation need seq_length: an integer")

    # The arguments are right; a bad template is refused too before rows are read.
    tokenizer = with_template(tokenizer, chat_template)
    length = cut_length(seq_length, truncation)

    def sample(row: dict[str, Any]) -> dict[str, Any]:
        context, question, answer = _read_texts(row)
        prompt = prompt_of(context, question)
        if tokenizer.chat_template is None:
            made: dict[str, Any] = shift(*tokenize_prompt_answer(tokenizer, prompt, answer), length)
        else:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            made = shift(*tokenize_chat(tokenizer, turns), length)
        if padding == "max_length" and seq_length is not None:
            made = _pad(made, seq_length, tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
        return made

    return make_samples(dataset_name, split, _COLUMNS, limit_dataset_samples, sample)


def _pad(sample: dict[str, Any], seq_length: int, pad_token_id: int) -> dict[str, Any]:
    """Return a sample padded to `seq_length` positions; `num_tokens` still counts tokens alone."""
    short = max(0, seq_length - len(sample["input_ids"]))
    return {
        "num_tokens": len(sample["input_ids"]),
        "input_ids": sample["input_ids"] + [pad_token_id] * short,
        "labels": sample["labels"] + [IGNORE_INDEX] * short,
    }
