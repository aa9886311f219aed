"""Look at the first samples of a run's data: their lengths, and what they have in common."""

from __future__ import annotations

import os
from typing import Any

from ds_kd.config.components import Component, ConfigError, config_error
from ds_kd.config.schema import RunConfig
from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.data.mixture import draw_first, list_sources
from ds_kd.data.own import SHIFTED, OwnSamples
from ds_kd.data.packing import pack
from ds_kd.data.prefixes import SharedDataset
from ds_kd.data.rows.source import load_rows
from ds_kd.errors import first_line
from ds_kd.recipe.models import tokenizer_of

_SAMPLES = 64  # number of samples that are tokenised to measure their lengths
_GUESS = 1024  # tokens of a sample if the data cannot be read
_FOR_SHARING = 512  # samples whose common beginnings are looked for
_WORTH_TELLING = 1.25  # tokens of samples for one that would be computed
_PACK = 2048  # tokens of a pack where samples are not packed yet


def load_first(cfg: RunConfig, most: int) -> tuple[int | None, list[dict[str, Any]] | None]:
    """Return the number of all samples, and the first ones of the training data.

    A value is None if the data or the tokenizer are not at hand, and the number for a mixture.

    Args:
        most: how many samples are made.

    Raises:
        ConfigError: a local file is wrong.
    """
    import torch

    from ds_kd.parallel.world import World

    component = cfg.dataset
    data, kwargs = component.declaration, component.kwargs
    if data is None:
        return None, None
    if data.has_parts:
        return None, _load_mixture(cfg, most)
    argument, limit = data.source, data.limit
    columns = data.columns_wanted(kwargs)
    source, split = data.source_of(kwargs), kwargs.get("split") or "train"

    # Without a network a plan is still possible, but a local file that is wrong is a problem.
    total = None
    try:
        total = len(load_rows(source, split, columns, kwargs.get(limit)))
        few = {**kwargs, limit: min(total, most)} if data.takes_limit else {**kwargs}
        labels = few.pop("labels", SHIFTED)
        alone = World(0, 1, torch.device("cpu"), "gloo")
        tokenizer = tokenizer_of(cfg.model, alone)
        rows = data.build(tokenizer=tokenizer, **few)
        if not component.name.startswith("ds_kd.data."):
            rows = OwnSamples(rows, len(tokenizer), labels)
        some = [rows[k] for k in range(min(len(rows), most))]
        _check_tokens(some)
    except (ConfigError, ValueError, OSError) as error:
        if isinstance(error, ConfigError) or not _is_local(source):
            return total, None
        raise ConfigError([f"{component.key}.{argument}: {first_line(error)}"]) from error
    return total, some


def _load_mixture(cfg: RunConfig, most: int) -> list[dict[str, Any]] | None:
    """Return the first samples that a run draws from a mixture of data sets, or None if the data or
    the tokenizer are not at hand.

    Raises:
        ConfigError: a local source is wrong.
    """
    import torch

    from ds_kd.parallel.world import World

    component = cfg.dataset
    try:
        tokenizer = tokenizer_of(cfg.model, World(0, 1, torch.device("cpu"), "gloo"))
        some = [*draw_first(tokenizer, most, **component.kwargs)]
        _check_tokens(some)
        return some
    except (ConfigError, ValueError, OSError) as error:
        named = list_sources(component.kwargs["sources"])
        if isinstance(error, ConfigError) or not any(map(_is_local, named)):
            return None
        raise ConfigError([f"{component.key}: {first_line(error)}"]) from error


def _check_tokens(some: list[dict[str, Any]]) -> None:
    if not any(len(row["input_ids"]) for row in some):
        raise ValueError("there is no token in its first samples")


def _is_local(source: Any) -> bool:
    # Unlike Path.exists, this takes a text that is too long for a name.
    return source is not None and os.path.exists(str(source))


def describe_sharing(cfg: RunConfig) -> list[str]:
    """Return a line on what shared beginnings save on the training data, or would save; none where
    that is little, or the samples are not at hand.

    Raises:
        ConfigError: a sample is too long for a pack, or a local file is wrong.
    """
    _, some = load_first(cfg, _FOR_SHARING)
    if not some:
        return []
    packing, key = cfg.packed_sequence, "packed_sequence"
    longest = max(len(sample["input_ids"]) for sample in some)
    size = packing.packed_sequence_size or max(_PACK, longest)
    if size < longest and not packing.share_prefixes:
        return []
    with config_error(
        f"{key}.packed_sequence_size", size, f"room for every sample of {cfg.dataset.key}"
    ):
        packs = SharedDataset(some, size, cfg.rng.seed)

    # The packs are those of a run on these samples alone.
    computed = sum(len(packs[k]["input_ids"]) for k in range(len(packs)))
    saved = sum(packs.lengths) / max(1, computed)
    told = f"1 token for {saved:.2f} of {_name_samples(cfg, len(some))}"
    if packing.share_prefixes:
        held = len(some) / len(packs)
        return [f"  shared beginnings: computes {told}; a pack holds {held:.1f} samples"]
    if saved < _WORTH_TELLING:
        return []
    return [f"  shared beginnings: {key}.share_prefixes: true would compute {told}"]


def _name_samples(cfg: RunConfig, count: int) -> str:
    data = cfg.dataset.declaration
    if data is not None and data.has_parts:
        return f"{count:,} samples mixed as in the run"
    return f"its first {count:,} samples"


def data_of(cfg: RunConfig, length: int | None = None) -> tuple[int | None, int, float, str]:
    """Return (samples, tokens of a micro-batch, share supervised, the source of the lengths).

    Args:
        length: tokens of a sample; None measures the data.
    """
    local, component = cfg.step_scheduler.local_batch_size, cfg.dataset
    total, supervised, longest, count = _measure(cfg)
    cut = _find_cut_length(component)
    if length is not None:
        return total, local * length, supervised, "--length"
    if longest is not None:
        told = f"nine tenths of {_name_samples(cfg, count)} have at most {longest}"
        return total, local * longest, supervised, told
    if cut is not None:
        return total, local * cut, supervised, f"{component.key}.seq_length"
    told = (
        f"guessed, {_GUESS} a sample: data or tokenizer are not at hand; launch/plan.py --length "
        f"sets it"
    )
    return total, local * _GUESS, supervised, told


def _find_cut_length(component: Component) -> int | None:
    """Return the `seq_length` that samples are cut or padded to, or None."""
    length, kwargs = component.kwargs.get("seq_length"), component.kwargs
    cuts = kwargs.get("truncation") not in (None, False, "do_not_truncate")
    return length if length and (cuts or kwargs.get("padding") == "max_length") else None


def _measure(cfg: RunConfig) -> tuple[int | None, float, int | None, int]:
    """Return (samples, share supervised, 90th percentile of lengths, how many lengths) of the first
    samples.

    A value is None if the data or the tokenizer are not at hand, and the first one for a mixture.

    Raises:
        ConfigError: a local file is wrong.
    """
    total, some = load_first(cfg, _SAMPLES)
    if some is None:
        return total, 1.0, None, 0
    lengths = [len(row["input_ids"]) for row in some]
    if size := cfg.packed_sequence.packed_sequence_size:
        expected = f"room for every sample of {cfg.dataset.key}"
        with config_error("packed_sequence.packed_sequence_size", size, expected):
            pack(lengths, size, cfg.rng.seed)
    lengths.sort()
    taught = sum(label != IGNORE_INDEX for row in some for label in row["labels"])
    return total, taught / sum(lengths), lengths[9 * (len(lengths) - 1) // 10], len(lengths)
