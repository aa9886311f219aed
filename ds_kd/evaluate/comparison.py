"""Compare a run's models: the numbers of its log, and their answers to a held-out row."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.data.rows.detect import samples_of
from ds_kd.data.rows.source import find_held_out
from ds_kd.errors import UserError, first_line
from ds_kd.files import NotPlainFileError, parse_json, read_plain_file
from ds_kd.models.files.damage import name_damage

NEW_TOKENS = 40
_LARGEST_LOG = 1 << 30  # bytes
_PROMPT_SHOWN = 600  # characters of a long prompt's end
SHOWN = (
    ("val_ce_loss", "CE, nats per token"),
    ("val_kd_loss", "KD, nats per token"),
    ("val_kl_at_t1", "KL at T = 1, nats"),
    ("val_top1_agreement", "top-1 agreement"),
)
#: Tags of a log under which models' texts stand.
_TEXTS = ("val_samples", "rollouts/texts")


class CompareError(UserError):
    """A model, log or row to compare is missing."""

    exit_code = 2


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log of JSON lines. A last line without an end is left out: its run is
    writing it, or was killed meanwhile.

    Raises:
        CompareError: it cannot be read, or a line is no record of a run.
    """
    records = []
    text = _read_text(path)
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line) if line.strip() else {}
        except ValueError as error:
            is_cut = number == len(lines) and not text.endswith("\n")
            if is_cut and isinstance(error, json.JSONDecodeError):
                break
            what = getattr(error, "msg", first_line(error))
            raise CompareError(f"{path}, line {number}: not JSON: {what}") from error
        if not isinstance(record, dict):
            raise CompareError(f"{path}, line {number}: got {line:.80}, expected a mapping")
        if wrong := _find_wrong_value(record):
            raise CompareError(f"{path}, line {number}: {wrong}")
        records += [record] if record else []
    return records


def _read_text(path: Path) -> str:
    try:
        return read_plain_file(path, _LARGEST_LOG).decode("utf-8")
    except OSError as error:
        raise CompareError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CompareError(f"{path}: not text, expected lines of JSON") from error
    except NotPlainFileError as error:
        raise CompareError(f"{path}: {error}, expected lines of JSON") from error


def _find_wrong_value(record: dict[str, Any]) -> str:
    """Return which value of a record is of another type than a run writes, or an empty text."""
    for name, value in record.items():
        if name in _TEXTS:
            is_right = isinstance(value, list) and all(isinstance(each, dict) for each in value)
        else:
            is_right = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_right or (name == "step" and not 0 <= value < 1 << 53):
            return f"{name} is {value!r:.60}, expected what a run writes there"
    return ""


def shorten(names: list[str]) -> dict[str, str]:
    """Return for each path as many of its last parts as tell it from the others."""
    parts = {name: Path(name).parts for name in names}
    for count in range(1, max(map(len, parts.values())) + 1):
        short = {name: "/".join(part[-count:]) for name, part in parts.items()}
        if len({*short.values()}) == len(short):
            return short
    return {name: name for name in names}


def summarize(records: list[dict[str, Any]]) -> list[str]:
    """Return lines about the validation before and after a run, and its speed."""
    validations = [record for record in records if "val_loss" in record]
    if len(validations) < 2:
        return [
            "the log holds fewer than two validations, so there is no before and after; give the "
            "run a validation_dataset and step_scheduler.val_at_start: true"
        ]
    first, last = validations[0], validations[-1]
    lines = [f"validation                before  →  after (step {first['step']} → {last['step']})"]
    for key, label in SHOWN:
        if key in first and key in last:
            was, now = first[key], last[key]
            is_loss = key != "val_top1_agreement" and was
            fell = f"   {100 * (now / was - 1):+.0f} %" if is_loss else ""
            lines.append(f"  {label:<20} {was:9.4f}  → {now:8.4f}{fell}")
    speeds = [record["tokens_per_sec"] for record in records if "tokens_per_sec" in record]
    if speeds:
        median = statistics.median(speeds)
        lines.append(f"speed: {median:.0f} tokens/s (median of {len(speeds)} steps)")
    return lines


def question_of(sample: dict[str, list[int]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens before the last supervised span of a sample, and the tokens of that span.

    Args:
        sample: `input_ids` and shifted `labels`.
        tokenizer: its chat template may open the answer with a header, which is then part of the
            question.

    Raises:
        CompareError: nothing in the sample is supervised.
    """
    labels = sample["labels"]
    supervised = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    if not supervised:
        raise CompareError("that row has no supervised token, so there is nothing to ask for")
    start = supervised[-1]
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    prompt, answer = sample["input_ids"][: start + 1], labels[start : supervised[-1] + 1]
    header = _find_answer_header(tokenizer)
    if header and answer[: len(header)] == header:
        prompt, answer = prompt + header, answer[len(header) :]
    return prompt, answer


def _find_answer_header(tokenizer: Any) -> list[int]:
    """Return the tokens with which the chat template opens an assistant's turn."""
    if tokenizer.chat_template is None:
        return []
    turn = [{"role": "user", "content": "x"}]
    closed, opened = (
        list(
            tokenizer.apply_chat_template(turn, add_generation_prompt=opens, return_dict=True)[
                "input_ids"
            ]
        )
        for opens in (False, True)
    )
    return opened[len(closed) :] if opened[: len(closed)] == closed else []


def generate_answer(directory: Path, prompt: list[int]) -> str:
    """Return the greedy answer of a model to the prompt's tokens.

    Raises:
        UserError: the directory holds no whole model with its tokenizer, or the prompt is too long.
    """
    from ds_kd.models.generate import load_student

    return load_student(directory).write_after(prompt, NEW_TOKENS).text.strip()


def compare(
    models: dict[str, Path], data: Path | Sequence[dict[str, Any]], row: int
) -> list[tuple[str, str]]:
    """Return (label, text) of a held-out question, its expected answer and every model's.

    Args:
        models: directories by label; they share one tokenizer.
        data: a file of rows that a data set of ds_kd reads, or samples.
        row: the number of the row, from 0.

    Raises:
        CompareError: a model or that row is missing.
    """
    from transformers import AutoTokenizer

    for directory in models.values():
        if not (directory / "config.json").is_file():
            raise CompareError(f"{directory}: no Hugging Face model there")

    # Rows of a file are tokenised as a data set of ds_kd would; samples come as they are.
    named = next(iter(models.values()))
    try:
        with name_damage(str(named)):
            tokenizer = AutoTokenizer.from_pretrained(named)
    except (ValueError, OSError) as error:
        raise CompareError(f"{named}: cannot be loaded: {first_line(error)}") from error
    samples: Any = data
    name = "the held-out data"
    if isinstance(data, Path):
        name = str(data)
        try:
            samples = samples_of(name, tokenizer, row + 1, find_held_out(name))
        except ValueError as error:
            raise CompareError(f"--data: {first_line(error)}") from error
    if row >= len(samples):
        raise CompareError(f"--row {row}: {name} has {len(samples)} rows")

    prompt, expected = question_of(samples[row], tokenizer)
    question, wanted = (
        str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in (prompt, expected)
    )
    if len(question) > _PROMPT_SHOWN:
        question = "… " + question[-_PROMPT_SHOWN:]
    told = [("question", question), ("expected", wanted)]
    return told + [(label, generate_answer(path, prompt)) for label, path in models.items()]
