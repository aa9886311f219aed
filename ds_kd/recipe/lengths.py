"""Refuse samples that are longer than the models take, before a run meets one of them."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from ds_kd.config.components import Component, config_error
from ds_kd.config.schema import RunConfig
from ds_kd.data.own import OwnCollater
from ds_kd.data.packing import lengths_of, text_lengths_of
from ds_kd.models.files.weight_files import empty_model
from ds_kd.recipe.models import (
    config_of,
    find_longrope_length,
    has_rope,
    name_of,
    select_trust,
)
from ds_kd.teachers.cache.keys import AddKeys
from ds_kd.train.parts import TakePart

#: Parts of the name of a table of positions: wpe, embed_positions, position_embeddings.
_IN_NAME = re.compile(r"(^|[._])(pos|wpe)")


def check_lengths(cfg: RunConfig, loaders: list[Any], training: Any = None) -> None:
    """Refuse samples that are too long for a model with a table of positions, or for the table of a
    `longrope` model.

    Args:
        loaders: of all samples of a run.
        training: the one whose samples the run trains on. Where the student writes all answers,
            only their prompts are used, and one that leaves no room gets none.

    Raises:
        ConfigError: names the model.
    """
    whole = cfg.rollouts is None or not cfg.rolls_out or cfg.rollouts.ratio < 1
    sets = [each.dataset.dataset for each in loaders]  # without the filler
    # A user's own collater may cut them.
    fixed = [k for k, each in enumerate(loaders) if not _is_own(each.collate_fn)]
    fixed = [k for k in fixed if whole or loaders[k] is not training]
    measure = cache(lambda k: text_lengths_of(sets[k]))

    for component in [cfg.model, *([cfg.teacher_model] if cfg.loads_teacher else [])]:
        if component is None:
            continue
        config = config_of(component)
        with config_error(component.key, name_of(component), "a model that treats samples alike"):
            for samples in sets:
                check_longrope(config, samples)
        if (table := find_table(component, config)) is not None:
            lengths = [measure(k) for k in fixed]  # an error of the data is not about the model
            with config_error(component.key, name_of(component), "a model with room for a sample"):
                for each in lengths:
                    check_table(table, each)


def check_longrope(config: Any, samples: Any) -> None:
    """Refuse samples for which transformers would use the other table of `longrope`, so that the
    trained model would not be the one that runs later.

    Args:
        config: the model's configuration.
        samples: the loader's samples, packed or not; read for models of that type only.

    Raises:
        ValueError: names the longest sample's tokens and the model's.
    """
    if (length := find_longrope_length(config)) is None:
        return
    longest = max(getattr(samples, "lengths", None) or lengths_of(samples), default=0)
    if longest > length:
        raise ValueError(
            f"its rotary positions are of type longrope, with one table up to {length} tokens and "
            f"another beyond, and a sample has {longest}: set seq_length: {length} and "
            f"truncation: true on the data set"
        )


def check_table(positions: int, lengths: list[int]) -> None:
    """Refuse samples that are longer than a model's table of positions.

    Args:
        lengths: of each sample; see `text_lengths_of`.

    Raises:
        ValueError: names the longest sample.
    """
    number = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if number is not None and lengths[number] > positions:
        raise ValueError(
            f"it has a table of {positions:,} positions, and sample {number} has "
            f"{lengths[number]:,} tokens: set seq_length: {positions} and truncation: true on the "
            f"data set"
        )


def find_table(component: Component, config: Any) -> int | None:
    """Return for how many positions a model has a table, learned (GPT-2, OPT) or fixed (GPT-J), or
    None for one that computes positions as far as they go (rotary ones, ALiBi).

    Args:
        config: the model's configuration.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or has_rope(config):
        return None
    try:
        model = empty_model(config, **select_trust(component))
    except Exception:  # code of the model's may raise anything, and loading it tells
        return None

    # Some tables have entries before that of the first position, and some grow.
    for name, module in model.named_modules():
        offset = getattr(module, "offset", 0)
        rows = most + (offset if isinstance(offset, int) else 0)
        tensors = [*module.named_parameters(name, False), *module.named_buffers(name, False)]
        for own, tensor in tensors if not hasattr(module, "make_weights") else ():
            if tensor.ndim == 2 and len(tensor) == rows and _IN_NAME.search(own):
                return most
    return None


def _is_own(collate: Any) -> bool:
    """Return whether micro-batches are made by a user's own collater."""
    while isinstance(collate, (AddKeys, TakePart)):
        collate = collate.collate
    return isinstance(collate, OwnCollater)
