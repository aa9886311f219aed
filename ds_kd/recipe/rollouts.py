"""Build the micro-batches of a run whose student writes some of its samples itself."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from ds_kd.config.schema import RunConfig
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.models.generate import find_ends
from ds_kd.models.generation.replica import Replica
from ds_kd.models.generation.sampling import Sampling
from ds_kd.models.generation.writer import Writer
from ds_kd.parallel.tensor import count_numbers
from ds_kd.parallel.world import World, sum_over
from ds_kd.recipe.data import make_packs, packs
from ds_kd.recipe.models import config_of, find_longrope_length, fix_rope
from ds_kd.teachers.base import Teacher
from ds_kd.train.batches import Batches, LoaderBatches
from ds_kd.train.prompts import find_opening
from ds_kd.train.rollouts import Policy, RolloutBatches

_NO_LIMIT = 1 << 40  # tokens that a model without a limit takes
_MOST = 1 / 3  # of the free memory that a copy may take; keys and values need some too


def steps_per_epoch(cfg: RunConfig, loader: Any) -> int:
    """Return the optimizer steps in one pass over the data."""
    used = cfg.rollouts.reuse if cfg.rollouts is not None and cfg.rolls_out else 1
    return int(loader.batch_sampler.steps_per_epoch) * used


def build_batches(
    cfg: RunConfig,
    loader: Any,
    tokenizer: Any,
    student: Any,
    teacher: Teacher | None,
    loss: DistillationLoss,
    world: World,
) -> Batches:
    """Return the source of a run's micro-batches.

    Args:
        loader: of the training samples, which are not packed if there are rollouts.
        student: its engine.
    """
    wanted = cfg.rollouts
    if wanted is None or not cfg.rolls_out:
        return LoaderBatches(loader)
    if world.is_main and (engine := getattr(teacher, "engine", None)) is not None:
        warn_of_ends(student.module.model, engine.module.model, tokenizer)

    # Packs are made of each step's own samples; without them those of similar length come together.
    def lay_out(made: list[dict[str, Any]]) -> Any:
        if packs(cfg):
            return make_packs(cfg, made)
        return sorted(made, key=lambda sample: -len(sample["input_ids"]))

    opening = find_opening(tokenizer)
    policy = Policy(wanted.ratio, wanted.samples_per_prompt, wanted.reuse, cfg.rng.seed, opening)
    return RolloutBatches(
        loader.dataset.dataset,  # without the filler
        loader.batch_sampler,
        loader.collate_fn,
        lay_out,
        _build_writer(cfg, tokenizer, student, loss, world),
        lambda tokens: str(tokenizer.decode(tokens)),
        policy,
        world,
    )


def _build_writer(
    cfg: RunConfig, tokenizer: Any, student: Any, loss: DistillationLoss, world: World
) -> Writer:
    """Return what writes with the student."""
    wanted = cfg.rollouts
    assert wanted is not None
    model = student.module.model
    replica, copies = None, wanted.generate == "replica" or cfg.compile.enabled == "true"
    if copies or (wanted.generate == "auto" and _has_room(model, world)):
        replica = Replica(model, world.device)
        fix_rope(replica.model)
    elif wanted.generate == "auto" and world.is_main:
        print(
            "rollouts: there is no memory for a copy of the student; it writes sharded", flush=True
        )

    # An id that the tokenizer or the teacher does not know must not be written.
    vocab = loss.vocab_size or max(tokenizer.get_vocab().values()) + 1
    how = Sampling(wanted.max_new_tokens, wanted.temperature, wanted.top_p, vocab)
    longest, size = _find_longest(cfg), cfg.packed_sequence.packed_sequence_size

    def count_room(prompt: int) -> int:
        # The last token of a text is a label, and takes no place.
        return min(longest - prompt, size - prompt + 1 if size else _NO_LIMIT)

    return Writer(student, replica, how, find_ends(model, tokenizer), count_room, world)


def _find_longest(cfg: RunConfig) -> int:
    """Return the number of tokens that both models take."""
    limits = [_NO_LIMIT]
    for component in filter(None, (cfg.model, cfg.teacher_model)):
        config = config_of(component)
        limits.append(getattr(config.get_text_config(), "max_position_embeddings", None) or 0)
        limits.append(find_longrope_length(config) or 0)
    return min(filter(None, limits))


def _has_room(model: Any, world: World) -> bool:
    """Return whether every rank has the memory for a copy of the student (a collective)."""
    needed = sum(count_numbers(p) * p.element_size() for p in model.parameters())
    if world.device.type == "cuda":
        free = float(torch.cuda.mem_get_info(world.device)[0])
    else:
        free = psutil.virtual_memory().available / world.size
    lacking = sum_over([float(needed > _MOST * free)], world.everyone)
    return float(lacking[0]) == 0


def warn_of_ends(student: Any, teacher: Any, tokenizer: Any) -> None:
    """Warn if one Hugging Face model, the teacher, ends its texts with a token that does not end
    the other's."""
    own, others = (find_ends(model, tokenizer) for model in (student, teacher))
    if not (lacking := {*others} - {*own}):
        return
    names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(lacking))))
    print(
        f"warning: rollouts: the teacher ends its answers with {names}, and the student's "
        f"generation_config.json does not name it: a student that was not made for answers goes on "
        f"to max_new_tokens. Write it into eos_token_id there, and distil without rollouts first.",
        flush=True,
    )
