"""Plan what a run with rollouts needs beside a step: the memory and time in which the student
writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ds_kd.config.schema import RunConfig
from ds_kd.models.generation.sampling import count_rows, group
from ds_kd.plan import memory
from ds_kd.plan.hardware import GPUS
from ds_kd.plan.shapes import format_size
from ds_kd.plan.step.cluster import Cluster
from ds_kd.plan.step.peak import count_bucket


@dataclass(frozen=True)
class Writing:
    """Texts that the student writes for one window of samples, at the most.

    Args:
        prompt: tokens of a prompt.
        answer: tokens of an answer.
        samples: samples of a window, written ones and others.
        batches: prompts in each batch.
        reuse: steps that train on the window.
    """

    prompt: int
    answer: int
    samples: int
    batches: tuple[int, ...]
    reuse: int


def plan_writing(cfg: RunConfig, length: int, supervised: float) -> Writing | None:
    """Return what the student writes, or None if it writes nothing.

    Args:
        length: tokens of a sample of the data.
        supervised: share of these that are supervised.
    """
    wanted = cfg.rollouts
    if wanted is None or not cfg.rolls_out:
        return None
    has_answers = cfg.dataset is not None and not cfg.dataset.is_without_answers
    prompt = max(1, round(length * (1 - supervised)) if has_answers else length)
    prompts = max(1, round(wanted.ratio * cfg.step_scheduler.global_batch_size))
    answers = prompts * wanted.samples_per_prompt
    least = count_rows("cpu" if cfg.dist_env.backend == "gloo" else "cuda")
    batches = group([[0] * prompt] * answers, wanted.max_new_tokens, least)
    samples = cfg.step_scheduler.global_batch_size - prompts + answers
    sizes = tuple(map(len, batches))
    return Writing(prompt, wanted.max_new_tokens, samples, sizes, wanted.reuse)


def add_answers(
    cfg: RunConfig, work: memory.Work, writing: Writing | None, world: int
) -> memory.Work:
    """Return the work of a step whose samples have answers as long as they may be."""
    if writing is None:
        return work
    local, packed = cfg.step_scheduler.local_batch_size, cfg.packed_sequence.packed_sequence_size
    written = writing.prompt + writing.answer
    length = max(written, 0 if cfg.rollouts is None or cfg.rollouts.ratio == 1 else work.length)
    supervised = min(1.0, writing.answer / written)
    if not packed:
        units = writing.samples
        work = replace(work, tokens=local * length, length=length)
    else:
        units = -(-writing.samples * length // packed)
    data_ranks = max(1, world // (work.tensor * work.sequence))
    return replace(work, supervised=supervised, micro_batches=-(-units // (local * data_ranks)))


def describe_writing(
    config: Any,
    student: memory.Shape,
    parts: dict[str, int],
    work: memory.Work,
    writing: Writing | None,
    machine: memory.Machine,
    world: int,
    cluster: Cluster | None = None,
) -> list[str]:
    """Return lines on the memory and the time of writing; none if the student writes nothing.

    Args:
        config: the student's Hugging Face configuration.
        parts: the memory of a step, from `memory.estimate_bytes`.
        work: the work of a step.
        machine: the memory of a rank.
        world: the ranks, which share the batches.
        cluster: named accelerators; None takes an H100's memory.
    """
    if writing is None:
        return []
    rows, turns = max(writing.batches), -(-len(writing.batches) // world)
    cache = rows * (writing.prompt + writing.answer) * _count_cache(config) * student.width
    copy = student.parameters * student.width

    # Nothing of a step's activations is there while the student writes; its bucket is.
    bucket = count_bucket(student, work) * student.width
    states = {name: size for name, size in parts.items() if memory.is_state(name)}
    needed = memory.on_device(states) + bucket + copy + cache
    fits = "" if machine.room is None else ", fits" if needed <= machine.room else ", too much"
    bandwidth = (GPUS["h100"] if cluster is None else cluster.gpu).bandwidth
    seconds = turns * writing.answer * copy / bandwidth
    every = "each step" if writing.reuse == 1 else f"every {writing.reuse} steps"
    return [
        f"  rollouts: {sum(writing.batches)} answers of up to {writing.answer} tokens to prompts "
        f"of about {writing.prompt}, in {len(writing.batches)} batch(es) of up to {rows}, {every}",
        f"    a copy of the student {format_size(copy)}, keys and values {format_size(cache)}; "
        f"with a step's states and bucket {format_size(needed)} on a rank{fits}",
        f"    {turns * writing.answer:,} forwards of one token after another on a rank: "
        f"{seconds:.3g} s or more at {bandwidth / 1e12:g} TB/s of memory",
    ]


def _count_cache(config: Any) -> int:
    """Return the numbers that a token's keys and values take in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv = getattr(text, "num_key_value_heads", None) or heads
    return 2 * int(text.num_hidden_layers) * int(kv) * int(size)
