"""From a config's data sections to samples and the loaders that serve them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ds_kd.config.components import Component, config_error, instantiate
from ds_kd.config.names import LOADER_FLAGS
from ds_kd.config.schema import RunConfig
from ds_kd.data.labels import tell_unsupervised
from ds_kd.data.own import SHIFTED, OwnSamples
from ds_kd.data.packing import PackedDataset, lengths_of
from ds_kd.data.sampler import GlobalBatchSampler, WithFiller
from ds_kd.evaluate.show import render
from ds_kd.parallel.signals import ignore_requests
from ds_kd.parallel.world import World, rank0_first
from ds_kd.recipe.models import tokenizer_of


def packs(cfg: RunConfig) -> bool:
    return cfg.packed_sequence.packed_sequence_size > 0


def _samples(cfg: RunConfig, dataset: Component, tokenizer: Any, world: World) -> Any:
    """The data set, its samples checked; packs where the YAML wants them."""
    rows = samples_of(dataset, tokenizer, world)
    if not packs(cfg):
        return rows
    size = cfg.packed_sequence.packed_sequence_size
    expected = f"room for every sample of {dataset.key}"
    with config_error("packed_sequence.packed_sequence_size", size, expected):
        return PackedDataset(rows, size, cfg.rng.seed)


def samples_of(dataset: Component, tokenizer: Any, world: World) -> Any:
    """Build a data set and check what it gives.

    Raises:
        ConfigError: it cannot be had, its samples break the contract of `ds_kd.data.own`, or none
            of them is supervised.
    """
    rows = _built(dataset, tokenizer, world)
    key, given = _source(dataset)
    with config_error(key, given, "samples that teach"):
        told = tell_unsupervised(rows)
    if told and world.is_main:
        print(f"{dataset.key}: {told}", flush=True)
    return rows


def show_samples(cfg: RunConfig, count: int, colour: bool) -> list[str]:
    """Render the first training samples; loads the tokenizer and the data, no model.

    Args:
        count: how many.
        colour: mark supervised tokens by colour, else by brackets.

    Raises:
        ConfigError: the tokenizer or the data set cannot be had.
    """
    alone = World(0, 1, 0, torch.device("cpu"), "gloo")
    tokenizer = tokenizer_of(cfg.model, alone)
    rows = _built(cfg.dataset, tokenizer, alone)
    return [render(rows[k], tokenizer, colour) for k in range(min(count, len(rows)))]


def _source(dataset: Component) -> tuple[str, Any]:
    """The key that names a data set's rows and what it holds, for messages."""
    names = ("dataset_name", "path_or_dataset", "path_or_dataset_id")
    name = next((name for name in names if name in dataset.kwargs), None)
    if name is None:
        return dataset.key, dataset.name
    return f"{dataset.key}.{name}", dataset.kwargs[name]


def _built(dataset: Component, tokenizer: Any, world: World) -> Any:
    """The data set, what comes out of it checked where it is not ours."""
    kwargs = dict(dataset.kwargs)
    labels = kwargs.pop("labels", SHIFTED)
    wanted = replace(dataset, kwargs=kwargs)
    key, given = _source(dataset)
    with config_error(key, given, "a data set"):
        rows = rank0_first(lambda: instantiate(wanted, tokenizer=tokenizer), world)
    if not dataset.name.startswith("ds_kd.data."):
        with config_error(dataset.key, dataset.name, "a data set as docs/data.md says"):
            rows = OwnSamples(rows, len(tokenizer), labels)
    return rows


def build_loader(
    cfg: RunConfig,
    dataset: Component,
    loader: Component,
    tokenizer: Any,
    world: World,
    training: bool,
) -> tuple[Any, GlobalBatchSampler]:
    """Build the loader of a data set, which gives this rank's micro-batches, and their sampler.

    Args:
        training: whether a batch is cut as a step of training, else as the loader's section says.

    Raises:
        ConfigError: the data set or the loader cannot be built; names the key.
    """
    rows = _samples(cfg, dataset, tokenizer, world)
    steps, kwargs = cfg.step_scheduler, dict(loader.kwargs)
    local = steps.local_batch_size
    if not training:
        local = kwargs.pop("batch_size", None) or local
    shuffle, drop_last, grouped = (bool(kwargs.pop(name, False)) for name in LOADER_FLAGS)
    if kwargs.get("collate_fn") is None:
        kwargs["collate_fn"] = "ds_kd.data.collate.default_collater"
    init = {} if kwargs.get("worker_init_fn") else {"worker_init_fn": ignore_requests}
    if init:
        kwargs.pop("worker_init_fn", None)

    with config_error(loader.key, loader.kwargs, "arguments that fit the data"):
        sampler = GlobalBatchSampler(
            len(rows),
            steps.global_batch_size if training else local * world.data.size,
            local,
            world.data.rank,
            world.data.size,
            shuffle=shuffle,
            seed=cfg.rng.seed,
            drop_last=drop_last,
            lengths=lengths_of(rows) if grouped and not packs(cfg) else None,
        )
        built = instantiate(
            replace(loader, kwargs=kwargs),
            LOADER_FLAGS,
            dataset=WithFiller(rows),
            batch_sampler=sampler,
            # Of its own: an iterator draws from it when made, and dropout must not notice.
            generator=torch.Generator().manual_seed(cfg.rng.seed),
            **init,
        )
    return built, sampler
