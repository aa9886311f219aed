"""A mixture of data sets: all of their samples, or samples drawn by weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ds_kd.data.rows.declaration import DataSet, data_set
from ds_kd.data.rows.detect import columns_known, known_data_sets, recognise
from ds_kd.data.rows.files import columns_of, files_of
from ds_kd.data.rows.source import load_rows


def data_set_of(part: dict[str, Any]) -> DataSet:
    """Return the data set that a part of a mixture names, or the one with its file's columns.

    Raises:
        ValueError: there is none.
    """
    name = part.get("_target_")
    if name is not None:
        found = next((each for each in known_data_sets() if each.name == name), None)
        if found is None or found.has_parts:
            known = ", ".join(each.name for each in known_data_sets() if not each.has_parts)
            raise ValueError(f"a mixture is made of {known}; got {name}")
        return found
    source = part.get("dataset_name")
    files = files_of(source) if source is not None else None
    if not files:
        raise ValueError("give _target_, or dataset_name: a local file whose columns tell it")
    columns = columns_of(files[0])
    found = recognise(columns)
    if found is None:
        raise ValueError(f"{files[0]} has the columns {', '.join(columns)}, not {columns_known()}")
    return found


def check_weights(parts: list[dict[str, Any]]) -> None:
    """Refuse weights that are not positive numbers, or that only some parts have.

    Raises:
        ValueError: names the weight, or says that all parts need one.
    """
    weights = [part.get("weight") for part in parts]
    for weight in weights:
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is not None and not (is_number and 0 < weight < float("inf")):
            raise ValueError(f"weight is {weight!r}, expected a number > 0")
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError("give every source a weight, or none")


@data_set("sources")
def make_mixture(
    tokenizer: Any,
    sources: list,
    seed: int = 0,
    stopping_strategy: str = "first_exhausted",
    limit_dataset_samples: int | None = None,
) -> Any:
    """Return the samples of several data sets, each once, or drawn by weight.

    Args:
        tokenizer: the student's.
        sources: each data set's arguments, as in a section of its own, and perhaps `weight`;
            `_target_` may be left out if local files have the columns of a known data set.
        seed: seed of the draws.
        stopping_strategy: with weights, `first_exhausted` ends when one source is used up, so that
            none repeats; `all_exhausted` goes on and repeats the shorter ones.
        limit_dataset_samples: keep only the first samples of the mixture, this many.

    Raises:
        ValueError: a source cannot be read; names its number.
    """
    import datasets

    if stopping_strategy not in ("first_exhausted", "all_exhausted"):
        raise ValueError(
            f"stopping_strategy is {stopping_strategy!r}, expected first_exhausted or all_exhausted"
        )
    check_weights(sources)
    parts = [_build_part(tokenizer, number, part) for number, part in enumerate(sources)]
    if any("num_tokens" in part.column_names for part in parts):
        parts = [_add_num_tokens(part) for part in parts]

    # `datasets` draws by shares of one.
    weights = [part.get("weight") for part in sources]
    if None in weights:
        mixed = datasets.concatenate_datasets(parts)
    else:
        shares = [weight / sum(weights) for weight in weights]
        mixed = datasets.interleave_datasets(
            parts, shares, seed, stopping_strategy=stopping_strategy
        )
    limit = limit_dataset_samples
    return mixed if limit is None else mixed.select(range(min(limit, len(mixed))))


def draw_first(
    tokenizer: Any,
    most: int,
    sources: list,
    seed: int = 0,
    stopping_strategy: str = "first_exhausted",
    limit_dataset_samples: int | None = None,
) -> Any:
    """Return samples of a mixture without making all: with weights the first ones, and without the
    first ones of each source, as many as are its share of the rows.

    Args:
        most: how many, about.
        sources, seed, stopping_strategy, limit_dataset_samples: as in `make_mixture`.

    Raises:
        ValueError: a source cannot be read; names its number.
    """
    limit = limit_dataset_samples
    check_weights(sources)
    # So many draws need so many rows of any source at the most.
    counts = [most] * len(sources)
    if sources[0].get("weight") is None:
        counts = _count_rows(sources, limit)
        total = max(1, sum(counts))
        counts = [min(n, -(-n * most // total)) for n in counts]
        limit = None
    few = [_limit(part, count) for part, count in zip(sources, counts, strict=True) if count]
    mixed = make_mixture(tokenizer, few, seed, stopping_strategy, limit)
    return mixed.select(range(min(len(mixed), max(most, len(few)))))


def list_sources(sources: list) -> list[Any]:
    """Return what each part of a mixture names as its rows, also of a part that cannot be read."""
    named = []
    for part in sources:
        try:
            found, arguments = _read_part(part)
            named.append(found.source_of(arguments))
        except (ValueError, OSError):
            named.append(part.get("dataset_name"))
    return named


def _count_rows(sources: list, limit: int | None) -> list[int]:
    """Return how many rows each source gives to a mixture that is cut behind `limit` samples."""
    counts, left = [], limit
    for number, part in enumerate(sources):
        with _name_source(number):
            found, arguments = _read_part(part)
            rows = load_rows(
                found.source_of(arguments),
                arguments.get("split") or "train",
                found.columns_wanted(arguments),
                arguments.get(found.limit),
            )
        counts.append(len(rows) if left is None else min(len(rows), left))
        left = None if left is None else left - counts[-1]
    return counts


def _limit(part: dict[str, Any], most: int) -> dict[str, Any]:
    """Return a source that gives so many of its rows at the most."""
    found, _ = _read_part(part)
    given = part.get(found.limit)
    return {**part, found.limit: most if given is None else min(given, most)}


def _read_part(part: dict[str, Any]) -> tuple[DataSet, dict[str, Any]]:
    """Return the data set of a source, and the arguments that it is called with."""
    found = data_set_of(part)
    arguments = {name: part[name] for name in part if name not in ("_target_", "weight")}
    if "dataset_name" in arguments:
        arguments.setdefault(found.source, arguments["dataset_name"])
        if found.source != "dataset_name":
            del arguments["dataset_name"]
    return found, arguments


@contextmanager
def _name_source(number: int) -> Iterator[None]:
    """Have the errors of a source begin with its number."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"sources[{number}]: {error}") from error


def _build_part(tokenizer: Any, number: int, part: dict[str, Any]) -> Any:
    """Return the samples of one source, with its number before each sample id."""
    with _name_source(number):
        found, arguments = _read_part(part)
        samples = found.build(tokenizer=tokenizer, **arguments)
    return samples.map(lambda name: {"sample_id": f"{number}:{name}"}, input_columns=["sample_id"])


def _add_num_tokens(samples: Any) -> Any:
    if "num_tokens" in samples.column_names:
        return samples
    return samples.map(lambda ids: {"num_tokens": len(ids)}, input_columns=["input_ids"])
