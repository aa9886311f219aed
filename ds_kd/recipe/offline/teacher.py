"""Build the teacher of a run that reads a cache, and check that the cache is that teacher's."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ds_kd.config.components import ConfigError, problem
from ds_kd.config.schema import RunConfig
from ds_kd.data.collate import default_collater
from ds_kd.data.packing import segments_of
from ds_kd.errors import first_line
from ds_kd.losses.head import Head
from ds_kd.models.files.model_files import identity_of
from ds_kd.parallel.engines import gather
from ds_kd.parallel.world import World, on_rank0
from ds_kd.recipe.models import name_of
from ds_kd.recipe.offline.record import (
    HIDDEN,
    SAMPLED,
    STORED,
    Record,
    hash_template,
    make_record,
    read_record,
    refuse_other,
    write_record,
)
from ds_kd.recipe.offline.rows import Absent, find_absent, single_samples
from ds_kd.teachers.cache.keys import KEYS, find_keys
from ds_kd.teachers.cache.kinds import Hidden, Kind, Sampled, TopK
from ds_kd.teachers.cache.store import Store, write_file
from ds_kd.teachers.cached import CachedTeacher, FillingTeacher
from ds_kd.teachers.resident import ResidentTeacher
from ds_kd.train.batches import move_batch

_HEAD, _VERIFIED = "head.safetensors", "verified.json"
#: Distance of live rows from the stored ones: rounding stays below, another model is at about 1.
_SAME = 0.05
_LOOKED_AT = 64  # samples among which one is sought that the cache has

Load = Callable[[], ResidentTeacher]
Made = CachedTeacher | FillingTeacher


def open_record(cfg: RunConfig, student: Any, world: World) -> Record | None:
    """Return the record of the config's cache, or None if there is none yet.

    Args:
        student: the student's tokenizer.

    Raises:
        ConfigError: the cache is of another teacher or tokenizer.
    """
    found = on_rank0(lambda: read_record(Path(cfg.teacher.directory or "")), world)
    if found is not None:
        refuse_other(cfg, found, student, world)
    return found


def build_cached(
    cfg: RunConfig, student: Any, sets: dict[str, Any], load: Load, world: World
) -> Made:
    """Return the teacher that reads a cache, and fills it if the config says so.

    Args:
        student: the student's tokenizer.
        sets: the samples that the run asks the teacher about, by the key of their data set.
        load: loads the teacher itself.

    Raises:
        ConfigError: the cache is of another teacher, or lacks rows and may not be filled.
    """
    directory = Path(cfg.teacher.directory or "")
    found, store = open_record(cfg, student, world), Store(directory)
    absent = find_absent(sets, store, world)
    if absent.rows and not cfg.teacher.fill:
        raise ConfigError([_describe_absent(cfg, absent, found, student)])

    # A teacher that nothing needs is not loaded, unless this software has not run it yet.
    is_new = not is_verified(cfg, directory, world)
    live = load() if absent.rows or found is None or is_new else None
    if live is not None and found is None:
        found = create_cache(cfg, live, student, world)
    assert found is not None
    cached = CachedTeacher(store, build_kind(directory, found, world))
    if live is not None:
        verify(live, cached, sets, directory, world)
    if not absent.rows:
        del live
        gc.collect()
        return cached
    assert live is not None

    # The teacher is an argument, so that it can be let go of.
    def is_full(teacher: ResidentTeacher) -> bool:
        lacks = find_absent(sets, store, world).rows > 0
        return not lacks and verify(teacher, cached, sets, directory, world)

    return FillingTeacher(cached, live, world, is_full)


def _describe_absent(cfg: RunConfig, absent: Absent, found: Record | None, student: Any) -> str:
    names = ", ".join(absent.names) + (", …" if absent.samples > len(absent.names) else "")
    cause = ""
    if found is not None and found.template != hash_template(student):
        cause = "; the cache was made with another chat template"
    return problem(
        "teacher.directory",
        cfg.teacher.directory,
        "a row for every supervised token",
        f"{absent.samples:,} of {absent.of:,} samples lack theirs ({names}){cause}; python "
        f"launch/cache_teacher.py --config YAML --output {cfg.teacher.directory} adds them, and so "
        f"does teacher.fill: true",
    )


def create_cache(cfg: RunConfig, live: ResidentTeacher, student: Any, world: World) -> Record:
    """Write the head and the record of a new cache, and return the record (a collective).

    Raises:
        ConfigError: another run has begun the cache of another teacher there meanwhile.
    """
    directory, module = Path(cfg.teacher.directory or ""), live.engine.module
    with gather([*module.model.get_output_embeddings().parameters()]):
        head = module.head()
        tensors = {"weight": head.weight.detach().cpu().clone()} if world.is_main else {}
        if world.is_main and head.bias is not None:
            tensors["bias"] = head.bias.detach().cpu().clone()
    record = make_record(cfg, head, student, world)

    on_rank0(lambda: begin_cache(directory, record, tensors), world)
    return record


def begin_cache(directory: Path, record: Record, head: dict[str, torch.Tensor]) -> None:
    """Write the head and the record of a new cache, on one rank.

    Raises:
        ConfigError: the directory has the record of another one by now: rows of two teachers have
            the same keys.
    """
    found = read_record(directory)
    if found is not None and replace(found, teacher=record.teacher) != record:
        hint = f"another run has begun the cache of {found.teacher} there; name another directory"
        raise ConfigError(
            [problem("teacher.directory", str(directory), f"that of {record.teacher}", hint)]
        )
    if record.keep == HIDDEN:
        write_file(directory / _HEAD, head)
    write_record(directory, record)  # last: a directory with a record has a head


def build_kind(directory: Path, record: Record, world: World) -> Kind:
    """Return what the rows of a cache hold.

    Raises:
        ConfigError: the file of the teacher's head is damaged.
    """
    if record.keep == HIDDEN:
        return Hidden(load_head(directory, record, world), STORED[record.stored])
    make = Sampled if record.keep == SAMPLED else TopK
    return make(record.k, record.temperature, record.shared, world.device)


def load_head(directory: Path, record: Record, world: World) -> Head:
    """Return the teacher's head, whole on every rank.

    Raises:
        ConfigError: its file is damaged.
    """
    try:
        tensors = load_file(directory / _HEAD)
        # A copy lies as torch aligns it, so that products are those of the teacher itself.
        bias = tensors.get("bias")
        return Head(
            tensors["weight"].clone().to(world.device),
            None if bias is None else bias.clone().to(world.device),
            record.scale,
            record.softcap,
        )
    except (OSError, SafetensorError, KeyError) as error:
        hint = f"{_HEAD} cannot be read ({first_line(error)}); write the cache again"
        raise ConfigError(
            [problem("teacher.directory", str(directory), "the teacher's head", hint)]
        ) from error


def verify(
    live: ResidentTeacher,
    cached: CachedTeacher,
    sets: dict[str, Any],
    directory: Path,
    world: World,
) -> bool:
    """Run the teacher on one sample that the cache has, and return whether there was one; a
    collective.

    Raises:
        ConfigError: the teacher gives something else than the cache.
    """
    # Another run may be writing. Rank 0 says what is there: all ranks run the teacher, or none.
    batch = on_rank0(lambda: _choose_batch(cached.store, sets), world)
    if batch is None:
        return False
    found = cached.kind.make(live(move_batch(batch, world.device)), batch[KEYS])

    def compare() -> None:
        distance = cached.kind.distance(found, cached.store.read(batch[KEYS]))
        if not distance <= _SAME:
            hint = (
                f"sample {batch['sample_ids'][0]} gives an output that is {distance:.0%} away from "
                f"the stored one; delete the directory and write it again"
            )
            raise ConfigError(
                [problem("teacher.directory", str(directory), "what the teacher gives now", hint)]
            )
        _note_verified(directory, world)

    on_rank0(compare, world)
    return True


def _choose_batch(store: Store, sets: dict[str, Any]) -> dict[str, Any] | None:
    """Return a micro-batch of one sample that the cache has, or None if there is none among the
    first ones."""
    for data in sets.values():
        for number, below, lengths in single_samples(data):
            if number == _LOOKED_AT:
                break
            sample = below[number]
            length = lengths[number] if lengths else len(sample["input_ids"])
            one = {name: sample[name][:length] for name in ("input_ids", "labels")}
            if "segment_lengths" in sample:
                one["segment_lengths"] = segments_of(sample, length)
            batch = default_collater([{**one, "sample_id": sample.get("sample_id", number)}])
            keys = find_keys(batch)
            if len(keys) and not store.lacks(keys).any():
                return {**batch, KEYS: keys}
    return None


def _describe_software(world: World) -> str:
    """Return what decides how a model computes: rows are compared anew where it changes."""
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return (
        f"{versions}, Python {sys.version_info.major}.{sys.version_info.minor}, {world.device.type}"
    )


def _read_verified(directory: Path) -> list[str]:
    try:
        found = json.loads((directory / _VERIFIED).read_text("utf-8"))
        return found if isinstance(found, list) else []
    except (OSError, ValueError):
        return []


def _note_verified(directory: Path, world: World) -> None:
    known = {*_read_verified(directory), _describe_software(world)}
    # Where the cache can only be read, each run compares anew.
    with contextlib.suppress(OSError):
        (directory / _VERIFIED).write_text(json.dumps(sorted(known), indent=1) + "\n", "utf-8")


def is_verified(cfg: RunConfig, directory: Path, world: World) -> bool:
    """Return whether the cache was compared with the teacher by this software, or cannot be, as the
    teacher is not at hand."""

    def look() -> bool:
        component = cfg.teacher_model
        if component is None or identity_of(name_of(component), component.kwargs) is None:
            return True
        return _describe_software(world) in _read_verified(directory)

    return on_rank0(look, world)
