"""Build samples and their loaders from the data sections of a config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Subset

from ds_kd.config.components import Component, config_error, instantiate, resolve
from ds_kd.config.losses import is_of_layers
from ds_kd.config.names import COLLATER, LOADER_FLAGS
from ds_kd.config.permissions import Permitted
from ds_kd.config.schema import RunConfig
from ds_kd.data.chat import with_template
from ds_kd.data.labels import describe_unsupervised
from ds_kd.data.own import SHIFTED, OwnCollater, OwnSamples, explain_failure
from ds_kd.data.packing import PackedDataset, lengths_of, refuse_longest
from ds_kd.data.prefixes import SharedDataset
from ds_kd.data.rows.declaration import declaration_of
from ds_kd.data.sampler import GlobalBatchSampler, WithFiller
from ds_kd.evaluate.show import render
from ds_kd.parallel.signals import end_workers_at_exit, prepare_worker
from ds_kd.parallel.world import World, rank0_first
from ds_kd.recipe.models import tokenizer_of
from ds_kd.teachers.cache.keys import AddKeys
from ds_kd.train.parts import TakePart

NO_LIMIT = 10**9  # tokens; a tokenizer without a limit has a larger model_max_length

#: Worker processes of a training loader on a GPU, unless its section says how many.
_WORKERS_ON_GPU = 2


def packs(cfg: RunConfig) -> bool:
    return cfg.packed_sequence.packed_sequence_size > 0


def attends_by_sample(cfg: RunConfig, world: World) -> bool:
    """Return whether the attention of a run's models is `attention.sdpa_by_sample`: on accelerators
    always, as transformers' own asks the device in every pass whether a row is a pack."""
    return packs(cfg) or world.sequence.size > 1 or world.device.type != "cpu"


def build_samples(cfg: RunConfig, tokenizer: Any, world: World) -> tuple[Any, dict[str, Any]]:
    """Return the samples to train on, and those to validate with by the name of their set, which is
    empty if there is only one.

    A chat template that the training data names becomes the tokenizer's: data to validate with that
    name no other, the evaluation and the exported student have it.

    Raises:
        ConfigError: see `samples_of`; there are too few samples to split, one is too long for a
            pack, or one is a pack and the student writes.
    """
    training = samples_of(cfg.dataset, tokenizer, world)
    if cfg.rolls_out and isinstance(training, OwnSamples):
        with config_error(cfg.dataset.key, cfg.dataset.name, "texts one by one"):
            training.refuse_packs(
                "with rollouts the student writes the end of one text: return its texts one by "
                "one (packed_sequence packs them), or remove rollouts"
            )
    tokenizer.chat_template = with_template(tokenizer, _find_template(cfg.dataset)).chat_template
    held_out: dict[str, Any] = {}
    if cfg.validation_share is not None:
        share, seed = cfg.validation_share, cfg.rng.seed
        with config_error("validation_share", share, "a share of two samples or more"):
            training, chosen = hold_out(training, share, seed)
        held_out[""] = _pack(cfg, cfg.dataset.key, chosen)
    for name, dataset in cfg.validation_dataset.items():
        held_out[name] = _pack(cfg, dataset.key, samples_of(dataset, tokenizer, world))
    return _pack(cfg, cfg.dataset.key, training, later=cfg.rolls_out), held_out


def _find_template(dataset: Component) -> str | None:
    """Return the chat template that a data set names, or the first one among its parts."""
    data, parts = dataset.declaration, [dataset.kwargs]
    if data is not None and data.has_parts:
        parts += dataset.kwargs[data.source]
    return next((p["chat_template"] for p in parts if p.get("chat_template") is not None), None)


def hold_out(samples: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Split samples into those to train on and a share to validate with, in their order.

    Args:
        share: the share held out; at least one sample, and never all.
        seed: seed of the choice.

    Raises:
        ValueError: there are fewer than two samples.
    """
    count = len(samples)
    if count < 2:
        raise ValueError(f"there is {count} sample, and none would be left to train on")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    most = min(max(1, round(share * count)), count - 1)
    chosen, others = sorted(order[:most]), sorted(order[most:])
    if hasattr(samples, "select"):
        return samples.select(others), samples.select(chosen)
    return Subset(samples, others), Subset(samples, chosen)


def _pack(cfg: RunConfig, key: str, samples: Any, later: bool = False) -> Any:
    """Return the samples in packs, if `packed_sequence` is on, else the samples.

    Args:
        later: each step packs its samples with what the student writes; they only have to fit.
    """
    if not packs(cfg):
        return samples
    size = cfg.packed_sequence.packed_sequence_size
    expected = f"room for every sample of {key}"
    with config_error("packed_sequence.packed_sequence_size", size, expected):
        if later:
            refuse_longest(lengths_of(samples), size)
            return samples
        return make_packs(cfg, samples)


def make_packs(cfg: RunConfig, samples: Any) -> Any:
    """Return samples in packs of the size that the config names.

    Raises:
        ValueError: a sample is longer than a pack.
    """
    size = cfg.packed_sequence.packed_sequence_size
    if not cfg.packed_sequence.share_prefixes:
        return PackedDataset(samples, size, cfg.rng.seed)
    # A user's own loss of whole logits has no value for each token to count several times.
    of_logits = [part for part in cfg.kd_losses if not is_of_layers(part)]
    losses = [resolve(part.name) for part in (cfg.loss_fn, *of_logits)]
    counts = all(hasattr(loss, "of_chunk") for loss in losses)
    return SharedDataset(samples, size, cfg.rng.seed, counts)


def samples_of(dataset: Component, tokenizer: Any, world: World) -> Any:
    """Build a data set and check its samples.

    Raises:
        ConfigError: it cannot be built, its samples break the contract of `ds_kd.data.own`, or none
            of them has a supervised token.
    """
    rows = _build(dataset, tokenizer, world)
    key, given = _name_source(dataset)
    with config_error(key, given, "samples that teach"):
        told = "" if dataset.is_without_answers else describe_unsupervised(rows)
    for line in filter(None, (told, _warn_of_longest(rows, tokenizer)) if world.is_main else ()):
        print(f"{dataset.key}: {line}", flush=True)
    return rows


def _warn_of_longest(samples: Any, tokenizer: Any) -> str:
    """Return a warning if a sample is longer than the tokenizer's `model_max_length`, or an empty
    text."""
    most = tokenizer.model_max_length
    if not hasattr(samples, "column_names") or most > NO_LIMIT:
        return ""
    longest = max(lengths_of(samples))
    if longest <= most:
        return ""
    return (
        f"warning: its longest sample has {longest:,} tokens, and the tokenizer's "
        f"model_max_length is {most:,}; cut samples with seq_length: {most} and truncation: true"
    )


def show_samples(cfg: RunConfig, count: int, colour: bool) -> list[str]:
    """Render the first training samples. The tokenizer and the data are loaded, but no model.

    Args:
        count: number of samples.
        colour: mark supervised tokens by colour instead of by brackets.

    Raises:
        ConfigError: the tokenizer or the data set cannot be loaded.
    """
    alone = World(0, 1, torch.device("cpu"), "gloo")
    tokenizer = tokenizer_of(cfg.model, alone)
    rows = _build(cfg.dataset, tokenizer, alone)
    return [render(rows[k], tokenizer, colour) for k in range(min(count, len(rows)))]


def _name_source(dataset: Component) -> tuple[str, Any]:
    """Return the key that names a data set's rows, and its value, for messages."""
    declared = declaration_of(resolve(dataset.name))
    if declared is None or declared.source not in dataset.kwargs:
        return dataset.key, dataset.name
    return f"{dataset.key}.{declared.source}", dataset.kwargs[declared.source]


def _build(dataset: Component, tokenizer: Any, world: World) -> Any:
    """Return the samples of a data set; those of a user's own are checked as they are read."""
    kwargs = dict(dataset.kwargs)
    labels = kwargs.pop("labels", SHIFTED)
    wanted = replace(dataset, kwargs=kwargs)
    key, given = _name_source(dataset)
    with config_error(key, given, "a data set"):
        rows = rank0_first(lambda: _call(wanted, tokenizer), world)
    if not dataset.name.startswith("ds_kd.data."):
        with config_error(dataset.key, dataset.name, "a data set as docs/data.md says"):
            rows = OwnSamples(rows, len(tokenizer), labels)
    return rows


def _call(dataset: Component, tokenizer: Any) -> Any:
    """Call a data set's function; an error of a user's own names the lines of that code."""
    if dataset.name.startswith("ds_kd.data."):
        return instantiate(dataset, tokenizer=tokenizer)
    with explain_failure():
        return instantiate(dataset, tokenizer=tokenizer)


def build_loader(
    cfg: RunConfig,
    samples: Any,
    loader: Component,
    world: World,
    training: bool,
) -> tuple[Any, GlobalBatchSampler]:
    """Return the loader of this rank's micro-batches, and its sampler.

    Args:
        samples: from `build_samples`.
        training: use the batch sizes of `step_scheduler`; otherwise those of the loader's section.

    Raises:
        ConfigError: the loader cannot be built; names the key.
    """
    steps, kwargs = cfg.step_scheduler, dict(loader.kwargs)
    local = steps.local_batch_size
    if not training:
        local = kwargs.pop("batch_size", None) or local
    shuffle, drop_last, grouped = (bool(kwargs.pop(name, False)) for name in LOADER_FLAGS)
    if training and world.device.type == "cuda":
        kwargs = fill_for_gpu(kwargs, -(-steps.global_batch_size // (local * world.data.size)))
    kwargs |= _defaults_of(kwargs, cfg.dist_env.timeout_minutes * 60)

    with config_error(loader.key, loader.kwargs, "arguments that fit the data"):
        sampler = GlobalBatchSampler(
            len(samples),
            steps.global_batch_size if training else local * world.data.size,
            local,
            world.data.rank,
            world.data.size,
            shuffle=shuffle,
            seed=cfg.rng.seed,
            drop_last=drop_last,
            lengths=lengths_of(samples) if grouped and not packs(cfg) else None,
        )
        built = instantiate(
            replace(loader, kwargs=kwargs),
            LOADER_FLAGS,
            dataset=WithFiller(samples),
            batch_sampler=sampler,
            # An iterator draws a number when it is created, which must not change dropout.
            generator=torch.Generator().manual_seed(cfg.rng.seed),
        )
    if isinstance(kwargs.get("collate_fn"), Permitted):
        built.collate_fn = OwnCollater(built.collate_fn)
    built.collate_fn = _complete(cfg, built.collate_fn, world)
    return built, sampler


def _complete(cfg: RunConfig, collate: Any, world: World) -> Any:
    """Return a function that collates samples to this rank's micro-batch, given one that makes the
    whole micro-batch."""
    if cfg.reads_cache:
        collate = AddKeys(collate)
    if world.sequence.size > 1:
        collate = TakePart(collate, world.sequence.rank, world.sequence.size)
    return collate


def fill_for_gpu(kwargs: dict[str, Any], micro_batches: int) -> dict[str, Any]:
    """Return a training loader's arguments with those that keep a GPU from waiting for data: worker
    processes, which hold the micro-batches of the next step while this one runs, in pinned memory.
    Those that its section sets stay.

    Args:
        micro_batches: of one step.
    """
    kept = {name: value for name, value in kwargs.items() if value is not None}
    filled = {"num_workers": _WORKERS_ON_GPU, "pin_memory": True, **kept}
    if filled["num_workers"]:
        filled.setdefault("prefetch_factor", max(2, -(-micro_batches // filled["num_workers"])))
    return filled


def _defaults_of(kwargs: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the loader's arguments that its section leaves open.

    Args:
        seconds: the time that a worker without an answer is waited for, as long as a rank is.
    """
    found: dict[str, Any] = {}
    if kwargs.get("collate_fn") is None:
        found["collate_fn"] = COLLATER
    if kwargs.get("num_workers"):
        end_workers_at_exit()
        found["timeout"] = kwargs.get("timeout") or seconds
        found["worker_init_fn"] = kwargs.get("worker_init_fn") or prepare_worker
    return found
