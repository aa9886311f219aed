"""Write a teacher's answers to the prompts of a file as a data set: sequence-level distillation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_kd import __version__
from ds_kd.data.chat import conversation_of, cut_answer, tokenize_open_turn
from ds_kd.data.rows.source import (
    load_rows,
    name_bad_row,
    name_bad_text,
    refuse_to_replace,
    text_of,
)
from ds_kd.data.squad import answers_of, prompt_of
from ds_kd.errors import UserError, first_line
from ds_kd.evaluate.journal import Journal, fingerprint
from ds_kd.evaluate.run import run_task
from ds_kd.evaluate.subject import Subject
from ds_kd.evaluate.tasks.encoding import Encoder
from ds_kd.files import check_replaceable, parse_json, read_plain_file
from ds_kd.models.generate import find_ends
from ds_kd.models.generation.sampling import Draw, Sampling, group, write
from ds_kd.parallel.world import World, on_rank0, rank0_first
from ds_kd.recipe.tasks.evaluation import Loaded
from ds_kd.writing import write_text

Row = dict[str, Any]
#: Columns of a file, the first that are all there → how its prompts are read.
_FORMS = (("messages",), ("conversations",), ("context", "question", "answers"), ("prompt",))


_MOST_SETTINGS = 1 << 16  # bytes of the note on what decides an output's answers


class AnswersError(UserError):
    """A file, model or option of which no answers can be made."""

    exit_code = 2


@dataclass(frozen=True)
class Options:
    """The options of `launch/generate_data.py` that decide the answers or their place.

    Args:
        data: rows; see `load_rows`.
        output: JSON lines to write; its folder of records is beside it.
        samples: answers to each prompt.
        how: how tokens are drawn.
        seed: of the draws.
        limit: take only the first rows, this many.
        dtype: of the teacher: `auto`, `bf16` or `fp32`.
        is_plain: leave the chat template out.
    """

    data: str
    output: Path
    samples: int
    how: Sampling
    seed: int = 0
    limit: int | None = None
    dtype: str = "auto"
    is_plain: bool = False


@dataclass(frozen=True)
class Prompt:
    """The prompt of a row.

    Args:
        tokens: up to where the answer begins.
        finish: returns the row with an answer in it.
    """

    tokens: list[int]
    finish: Callable[[str], Row]


@dataclass(frozen=True)
class Answers:
    """Has a model answer; the part of a task that `run_task` asks for.

    Args:
        how: how tokens are drawn.
        seed: of the draws.
    """

    how: Sampling
    seed: int

    def run(self, subject: Subject, items: list[Any]) -> list[dict[str, Any]]:
        """Return the tokens of each answer, and whether the model ended it."""
        ends = find_ends(subject.model, subject.tokenizer)
        draws = [Draw(self.seed, 0, str(item["row"]), item["number"]) for item in items]
        written = write(subject.model, [i["prompt"] for i in items], draws, self.how, ends)
        return [{"tokens": each.tokens, "is_whole": each.is_whole} for each in written]


def generate_data(teacher: str, options: Options, world: World) -> list[str]:
    """Write the answers of a teacher, and return lines on what came of it.

    Args:
        teacher: directory or hub id.

    Raises:
        AnswersError: rows cannot be read, have no prompt, or are too long for the teacher; or the
            output is there already, of other settings.
        EvaluationError: the teacher cannot be loaded.
    """
    on_rank0(lambda: _check_output(options), world)
    loaded = Loaded("--teacher", teacher, options.dtype, world)
    prompts = rank0_first(lambda: read_prompts(options, loaded.encoder), world)
    room, most = loaded.encoder.longest, options.how.max_new_tokens
    fits = [k for k, p in enumerate(prompts) if room is None or len(p.tokens) + most <= room]
    if not fits:
        raise AnswersError(
            f"--data: no prompt of {options.data!r} leaves room for --max-new-tokens {most}: "
            f"{teacher} reads {room} tokens at once; give a smaller number"
        )

    # One answer is one item, which a killed run does not make again.
    items: list[dict[str, Any]] = [
        {"row": row, "number": number, "prompt": prompts[row].tokens}
        for row in fits
        for number in range(options.samples)
    ]
    how, folder = options.how, _folder_of(options.output)
    made = describe_settings(teacher, options, loaded, [prompts[row].tokens for row in fits])
    on_rank0(lambda: claim_output(options.output, made), world)
    rules = [how.max_new_tokens, how.temperature, how.top_p, options.seed]
    key = fingerprint(__version__, loaded.identity, str(loaded.dtype), rules, items)
    title = {"teacher": teacher, "data": options.data, "temperature": how.temperature}
    journal = Journal(folder, key, title, [item["row"] for item in items], world.rank)
    records = run_task(
        Answers(_bar_padding(how, loaded.tokenizer), options.seed),
        lambda: loaded.load(None, 0),
        items,
        group([item["prompt"] for item in items], most),
        world,
        journal,
        f"answers of {teacher}",
    )
    told, lines = _make_lines(items, prompts, records, loaded.tokenizer)
    on_rank0(lambda: _write_lines(options.output, made, lines), world)
    written = f"{options.output}: {len(lines):,} answers to {len(prompts):,} prompts"
    left = len(prompts) - len(fits)
    note = f"{left} of {len(prompts)} prompts left out, too long for {room} tokens with an answer"
    return [written, *told, *([note] if left else [])]


def _write_lines(output: Path, settings: dict[str, Any], lines: list[str]) -> None:
    """Write the answers, unless another run has written there meanwhile."""
    claim_output(output, settings)
    write_text(output, "".join(lines))


def _folder_of(output: Path) -> Path:
    """Return the folder of an output's records."""
    return output.with_name(f"{output.stem}.samples")


def describe_settings(
    teacher: str, options: Options, loaded: Loaded, prompts: list[list[int]]
) -> dict[str, Any]:
    """Return what decides the answers, by option; a file's or a model's value is a text and a hash
    of what is in it.

    Args:
        prompts: the tokens of each that is answered.
    """
    how = options.how
    return {
        "--teacher": [teacher, fingerprint(loaded.identity)],
        "--dtype": str(loaded.dtype).removeprefix("torch."),
        "--data": [options.data, fingerprint(prompts)],
        "--samples": options.samples,
        "--max-new-tokens": how.max_new_tokens,
        "--temperature": how.temperature,
        "--top-p": how.top_p,
        "--seed": options.seed,
        "--plain": options.is_plain,
        "--limit": options.limit,
    }


def claim_output(output: Path, settings: dict[str, Any]) -> None:
    """Note what decides the answers beside an output, on one rank.

    Raises:
        AnswersError: answers of other settings, or something else, are there already.
        OSError: the note cannot be written.
    """
    path = _folder_of(output) / f"{output.name}.settings.json"
    if output.exists():
        try:
            found = parse_json(read_plain_file(path, _MOST_SETTINGS))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            told = "nothing beside it tells which teacher wrote it, and it would be replaced"
        else:
            told = _tell_differences(found, settings)
            told = told and f"it holds answers of other settings: {told}"
        if told:
            hint = "give another --output, or remove this one"
            raise AnswersError(f"--output: {output}: {told}; {hint}")
    write_text(path, json.dumps(settings, indent=1) + "\n")


def _tell_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return words for the options whose values differ, or an empty text."""
    told, changed = [], []
    for option, new in now.items():
        old = before.get(option)
        if isinstance(old, list) and isinstance(new, list):
            if old[1:] == new[1:]:  # the same files, whatever they are called
                continue
            (old, _), (new, _) = old, new
            if old == new:
                changed.append(f"{option} {new} held something else then")
        if old != new:
            old, new = ("not given" if each is None else each for each in (old, new))
            told.append(f"{option} was {old} and is {new}")

    # Prompts follow from other options too, which are then the reason.
    return ", ".join(told or changed)


def _bar_padding(how: Sampling, tokenizer: Any) -> Sampling:
    """Return how tokens are drawn, without the ids of a padded head that stand for no token."""
    most = max(tokenizer.get_vocab().values()) + 1
    return Sampling(how.max_new_tokens, how.temperature, how.top_p, most)


def read_prompts(options: Options, encoder: Encoder) -> list[Prompt]:
    """Return the prompt of every row of a file.

    Raises:
        AnswersError: the rows cannot be read, or have no prompt.
    """
    try:
        rows = load_rows(options.data, "train", (), options.limit)
        form = next((f for f in _FORMS if {*f} <= {*rows.column_names}), None)
        if form is None:
            known = " or ".join(", ".join(columns) for columns in _FORMS)
            raise ValueError(
                f"{options.data!r} has the columns {', '.join(rows.column_names)}, expected {known}"
            )
        uses_chat = encoder.tokenizer.chat_template is not None and not options.is_plain
        read = name_bad_row(
            options.data, None, lambda row: _read_prompt(row, form, encoder, uses_chat)
        )
        with name_bad_text(options.data):
            return [read(row, number) for number, row in enumerate(rows)]
    except ValueError as error:
        raise AnswersError(f"--data: {first_line(error)}") from error


def _read_prompt(row: Row, form: tuple[str, ...], encoder: Encoder, uses_chat: bool) -> Prompt:
    """Return a row's prompt.

    Raises:
        ValueError: it is empty, or no conversation that the template takes.
    """
    if form in (("messages",), ("conversations",)):
        if not uses_chat:
            name = encoder.tokenizer.name_or_path
            raise ValueError(f"{name} has no chat template for messages, or --plain leaves it out")
        talk, tools = conversation_of(row, column=form[0], needs_answer=False)
        before = cut_answer(talk)
        more = {} if tools is None else {"tools": tools}
        return Prompt(
            tokenize_open_turn(encoder.tokenizer, before, tools),
            lambda text: {"messages": [*before, {"role": "assistant", "content": text}], **more},
        )

    # The columns of the answer may be there already: its text is replaced.
    if form == ("prompt",):
        text = text_of(row, "prompt")
        if not uses_chat:  # the row holds the prompt as it is asked: the answer has its own space
            text = text.rstrip()
        made: Callable[[str], Row] = lambda answer: {"prompt": text, "completion": answer}  # noqa: E731
    else:
        answers_of(row)
        given = {name: text_of(row, name) for name in ("context", "question")}
        text = prompt_of(**given)
        made = lambda answer: {**given, "answers": {"text": [answer.strip()]}}  # noqa: E731
    if not text.strip():
        raise ValueError("the prompt is empty")
    return Prompt(encoder.encode_prompt(text, uses_chat), made)


def _make_lines(
    items: list[dict[str, Any]],
    prompts: list[Prompt],
    records: Iterable[dict[str, Any]],
    tokenizer: Any,
) -> tuple[list[str], list[str]]:
    """Return what is to be told, and the lines of the file.

    An answer that the limit cut has no end to learn, and an empty one nothing at all: both are left
    out.
    """
    lines, cut, empty = [], 0, 0
    for item, record in zip(items, records, strict=True):
        text = str(tokenizer.decode(record["tokens"], skip_special_tokens=True))
        if not record["is_whole"] or not text.strip():
            cut, empty = cut + (not record["is_whole"]), empty + bool(record["is_whole"])
            continue
        row = prompts[item["row"]].finish(text)
        lines.append(json.dumps({**row, "row": item["row"], "draw": item["number"]}) + "\n")

    told = []
    if cut:
        told.append(f"{cut:,} cut by --max-new-tokens left out; a larger limit keeps more")
    return told + ([f"{empty:,} empty ones left out"] if empty else []), lines


def _check_output(options: Options) -> None:
    """Make the folder of the output, before hours are spent on what cannot be written.

    Raises:
        AnswersError: it is no place to write a file.
    """
    output = options.output
    try:
        refuse_to_replace(options.data, output)
        check_replaceable(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        _folder_of(output).mkdir(exist_ok=True)
        if not os.access(output.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{output.parent} cannot be written")
    except OSError as error:
        told = error.strerror or first_line(error)
        raise AnswersError(f"--output: {output}: {told}") from error
