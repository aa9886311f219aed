"""The files a config names, looked at before anything starts and without a heavy import."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_kd.config.components import problem
from ds_kd.data.chat import conversation_of
from ds_kd.data.source import CHAT, FORMATS, HELLASWAG, SQUAD, hellaswag_texts, squad_texts
from ds_kd.errors import first_line

_FIRST_BYTES = 1 << 22  # of a data file; its first row is in there
_FIRST_ROWS = 16  # of which the content is looked at
#: Data set → (the key that names its rows, the columns it needs, the key that limits them).
DATA = {
    "ds_kd.data.squad.make_squad_dataset": ("dataset_name", SQUAD, "limit_dataset_samples"),
    "ds_kd.data.hellaswag.HellaSwag": ("path_or_dataset", HELLASWAG, "num_samples_limit"),
    "ds_kd.data.chat.ChatDataset": ("path_or_dataset_id", CHAT, "limit_dataset_samples"),
    "ds_kd.data.text.make_sharegpt_dataset": (
        "dataset_name", ("conversations",), "limit_dataset_samples",
    ),
    "ds_kd.data.text.make_instruction_dataset": (
        "path_or_dataset_id", ("prompt", "completion"), "limit_dataset_samples",
    ),
    "ds_kd.data.text.make_text_dataset": ("dataset_name", ("text",), "limit_dataset_samples"),
}  # fmt: skip

#: Data set → what reads its row, and so tells what is wrong with it.
_READERS = {
    "ds_kd.data.squad.make_squad_dataset": squad_texts,
    "ds_kd.data.hellaswag.HellaSwag": hellaswag_texts,
    "ds_kd.data.chat.ChatDataset": conversation_of,
    "ds_kd.data.text.make_sharegpt_dataset": conversation_of,
}


def check_model(key: str, kwargs: dict[str, Any], config_only: bool = False) -> str | None:
    """What is wrong with the model that `from_pretrained` arguments name; a hub id is believed.

    Args:
        key: of the section.
        config_only: a config.json is enough; neither tokenizer nor weights are looked for.
    """
    key, name = f"{key}.pretrained_model_name_or_path", kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or not name:
        return problem(key, name, "a directory or a hub id")
    if _is_dir(name):
        lacking = _lacking(Path(name) / str(kwargs.get("subfolder", "")), kwargs, config_only)
        hint = "save the model and its tokenizer there with save_pretrained"
        return problem(key, name, f"a directory with {lacking}", hint) if lacking else None
    if _looks_local(name):
        return problem(key, name, "a directory that exists, or a hub id")
    return None


def _is_dir(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # longer than a path may be, or a NUL
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _lacking(directory: Path, kwargs: dict[str, Any], config_only: bool) -> str | None:
    """What a model's directory must hold and does not."""
    if kwargs.get("gguf_file") is not None:
        return None if _is_file(directory / str(kwargs["gguf_file"])) else "that gguf_file"
    if not _is_file(directory / "config.json"):
        return "a config.json"
    if config_only:
        return None
    tokenizers = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return None if any(_is_file(directory / name) for name in tokenizers) else "a tokenizer"


#: Of a hub id; a path may hold more.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
#: First parts that name a directory of somebody's, and nobody's on the hub.
_DIRECTORIES = ("checkpoint", "checkpoints", "ckpt", "models", "output", "outputs")


def _looks_local(name: str) -> bool:
    """Whether no hub id is meant: no such id can be, or a directory of this machine is near."""
    if not _HUB_ID.fullmatch(name):
        return True
    first, slash, second = name.partition("/")
    if not slash:
        return _is_misspelt(first, Path())
    if first in _DIRECTORIES or _is_misspelt(second, Path(first)):
        return True
    near = [] if Path(first).is_dir() else _near(first, Path())
    return any(_is_dir(str(Path(found, second))) for found in near)


def note_on_model(key: str, kwargs: dict[str, Any]) -> str | None:
    """Return what to say of a name that will be asked of the hub though a path may be meant."""
    name = kwargs.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or "/" not in name or _is_dir(name):
        return None
    first, _, second = name.partition("/")
    if not _is_dir(first):
        return None
    return (
        f"{key}.pretrained_model_name_or_path: the directory {first} holds no {second}; the hub is "
        f"asked for {name}"
    )


#: Attention by the package that it needs, and one that can stand in for it.
_PACKAGES = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
}


def missing_packages(key: str, kwargs: dict[str, Any]) -> str | None:
    """Return which package a model's `attn_implementation` needs and this machine lacks."""
    name = kwargs.get("attn_implementation")
    packages = _PACKAGES.get(name, ()) if isinstance(name, str) else ()
    if not packages or any(importlib.util.find_spec(package) for package in packages):
        return None
    return (
        f"{key}.attn_implementation: {name} needs the package {packages[0]}, which is not "
        f"installed here; install it, or write sdpa"
    )


def _is_misspelt(name: str, directory: Path) -> bool:
    """Whether `directory` holds almost this name; with other digits it is another model."""
    near = _near(name, directory)
    return any(re.sub(r"\D", "", found) == re.sub(r"\D", "", name) for found in near)


def _near(name: str, directory: Path) -> list[str]:
    """The entries of `directory` that almost have this name."""
    try:
        return difflib.get_close_matches(name, os.listdir(directory), n=3, cutoff=0.8)
    except (OSError, ValueError):
        return []


def check_data(key: str, target: str, kwargs: dict[str, Any], written: str = "") -> str | None:
    """What is wrong with the local file that a data set names, by its first rows.

    Args:
        written: what the config calls the argument that names it, where that is a synonym.
    """
    if target not in DATA:
        return None
    argument, columns = DATA[target][0], columns_wanted(target, kwargs)
    name = kwargs.get(argument)
    if not isinstance(name, str):
        return None
    key = f"{key}.{written or argument}"
    if Path(name).suffix not in FORMATS:
        if _is_dir(name) or not _looks_local(name):
            return None
        return problem(key, name, "a .json, .jsonl or .parquet file, a directory, or a hub id")
    try:
        if not Path(name).is_file():
            return problem(key, name, "a file that exists")
        found = columns_of(Path(name))
    except (OSError, ValueError, RecursionError) as error:
        return problem(key, name, f"rows with {', '.join(columns)}", first_line(error))
    missing = [column for column in columns if column not in found]
    if not missing:
        wrong = _wrong_row(Path(name), target, kwargs)
        return problem(key, name, "rows that can be learnt from", wrong) if wrong else None
    hint = f"its first row has {', '.join(found)}"
    return problem(key, name, f"rows with {', '.join(columns)}", hint)


def columns_wanted(target: str, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The columns that a data set of `DATA` reads, some of which name them themselves."""
    mapping, column = kwargs.get("column_mapping"), kwargs.get("column")
    if isinstance(mapping, dict):
        return tuple(str(name) for name in mapping.values())
    return (column,) if isinstance(column, str) else DATA[target][1]


def _wrong_row(path: Path, target: str, kwargs: dict[str, Any]) -> str:
    """What is wrong with the content of the first rows; nothing is said where others are wanted."""
    if path.suffix == ".parquet" or "[" in str(kwargs.get("split")):
        return ""
    given = kwargs.get(DATA[target][2])
    limit = given if isinstance(given, int) and given > 0 else _FIRST_ROWS
    reader: Any = _READERS.get(target)
    if reader is None:
        return ""
    if reader is conversation_of:
        any_role, (column,) = (
            kwargs.get("chat_template") is not None,
            columns_wanted(target, kwargs),
        )
        reader = functools.partial(conversation_of, any_role=any_role, column=column)
    for index, row in enumerate(_first_rows(path, min(limit, _FIRST_ROWS))):
        try:
            reader(row)
        except KeyError as error:
            return f"row {index}: no column {error}"
        except ValueError as error:
            return f"row {index}: {error}"
    return ""


def check_directory(key: str, name: str) -> str | None:
    """What is in the way of a directory that a run will write; makes nothing."""
    path = Path(name).absolute()
    try:
        there = next(p for p in (path, *path.parents) if p.exists())
    except (OSError, ValueError):  # longer than a path may be, or a NUL
        return problem(key, name, "the path of a directory")
    if not there.is_dir():
        return problem(key, name, "a directory", f"{there} is a file")
    if there == Path(there.anchor):  # of another machine, perhaps; there the run will tell
        return None
    if not os.access(there, os.W_OK | os.X_OK):
        return problem(key, name, "a directory that can be written", f"{there} cannot")
    return None


def has_gpu() -> bool:
    """Whether this machine shows an accelerator of NVIDIA's or AMD's to its processes."""
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def columns_of(path: Path) -> list[str]:
    """Of the first row.

    Raises:
        ValueError: no rows, or not what the name says.
    """
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    text = _beginning(path)
    if not text:
        raise ValueError("the file is empty")
    try:
        row, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        if len(text) * 4 >= _FIRST_BYTES:  # a row, or a file of one, that goes on
            raise ValueError("its first row is not complete JSON within 4 MiB") from None
        raise
    if not isinstance(row, dict):
        raise ValueError(f"its first row is {type(row).__name__}, not a mapping of columns")
    return list(row)


def _beginning(path: Path) -> str:
    """The first rows of a JSON file, behind the bracket of an array."""
    with path.open("rb") as file:
        text = file.read(_FIRST_BYTES).decode("utf-8-sig", errors="ignore").lstrip()
    return text.removeprefix("[").lstrip()


def _first_rows(path: Path, most: int) -> Iterator[dict[str, Any]]:
    """Whole rows at the beginning of a JSON file; what cannot be read there, `datasets` tells."""
    text, at, decoder = _beginning(path), 0, json.JSONDecoder()
    for _ in range(most):
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict):
            return
        yield row
        while at < len(text) and text[at] in ", \t\r\n":
            at += 1
