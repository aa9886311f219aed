"""Build a run's losses: the cross-entropy, the divergence, and losses that compare layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ds_kd.config.components import Component, ConfigError, config_error, instantiate
from ds_kd.config.losses import find_absent_layer, is_of_layers
from ds_kd.config.schema import RunConfig
from ds_kd.errors import describe_user_error, is_of_own_code
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.contract import check_cross_entropy, check_divergence
from ds_kd.losses.named.hidden_states import HiddenStates
from ds_kd.losses.weighted import Weighted
from ds_kd.models import causal_lm
from ds_kd.parallel.world import World
from ds_kd.recipe.models import config_of, name_of, tokenizer_of
from ds_kd.recipe.offline.record import share_vocabulary
from ds_kd.recipe.offline.teacher import open_record


def build_loss(cfg: RunConfig, tokenizer: Any, world: World) -> DistillationLoss:
    """Return the student's loss, over the ids that it shares with the teacher."""
    shared = None
    rows = [config_of(cfg.model).get_text_config().vocab_size]
    if cfg.loads_teacher:
        assert cfg.teacher_model is not None
        teacher_tokenizer = tokenizer_of(cfg.teacher_model, world)
        rows.append(config_of(cfg.teacher_model).get_text_config().vocab_size)
        expected = "a teacher with the student's tokenizer"
        if cfg.kd_ratio == 0:
            expected += ", or step_scheduler.validate_teacher: false"
        with config_error("teacher_model", name_of(cfg.teacher_model), expected):
            shared = causal_lm.common_vocab_size(tokenizer, teacher_tokenizer, *rows)
    elif cfg.reads_cache and (found := open_record(cfg, tokenizer, world)) is not None:
        shared = share_vocabulary(cfg, found, rows[0])
    return assemble_loss(cfg, rows[0], shared, world)


def assemble_loss(cfg: RunConfig, rows: int, shared: int | None, world: World) -> DistillationLoss:
    """Return the loss of the config's sections.

    Args:
        rows: ids of the student's head.
        shared: ids that both models share; None if these are the student's.
    """
    ce = _build_part_of_loss(cfg.loss_fn, check_cross_entropy, rows, world)
    divergence = _build_divergence(cfg, shared or rows, world)
    return DistillationLoss(ce, divergence, cfg.kd_ratio, shared)


def _build_divergence(cfg: RunConfig, vocab: int, world: World) -> Any:
    """Return the distillation loss over so many ids, or the weighted sum of several."""
    build = functools.partial(_build_part_of_loss, check=check_divergence, vocab=vocab, world=world)
    if not cfg.kd_loss_fn.parts:
        return build(cfg.kd_loss_fn)
    parts = [(w, build(part)) for w, part in cfg.kd_loss_fn.parts if not is_of_layers(part)]
    if [weight for weight, _ in parts] == [1.0]:
        return parts[0][1]
    try:
        return Weighted(parts)
    except ValueError as error:
        raise ConfigError([f"kd_loss_fn: {error}"]) from error


def _build_part_of_loss(
    component: Component, check: Callable[[Any, int], None], vocab: int, world: World
) -> Any:
    """Return the loss of a section on this rank's device, after checking its contract with logits
    of `vocab` ids."""
    try:
        loss = instantiate(component)
        check(loss, vocab)
    except ConfigError:
        raise
    except Exception as error:  # a user's loss may raise anything
        is_own = is_of_own_code(error)
        if not (is_own or isinstance(error, ValueError)):
            raise
        told = describe_user_error(error) if is_own else error
        raise ConfigError([f"{component.key}: {component.name}: {told}"]) from error
    return loss.to(world.device) if isinstance(loss, torch.nn.Module) else loss


def build_layer_losses(cfg: RunConfig) -> list[tuple[float, HiddenStates]]:
    """Return the losses that compare layers of both models, with their weights; none at kd_ratio 0.

    Raises:
        ConfigError: a model has no such layer.
    """
    if cfg.kd_ratio == 0:
        return []
    teacher = cfg.teacher_model or cfg.model  # a student with an adapter may learn from its base
    found = []
    for weight, part in cfg.kd_loss_fn.parts:
        if is_of_layers(part):
            loss: HiddenStates = instantiate(part)
            student, other = (config_of(c).get_text_config() for c in (cfg.model, teacher))
            counts = (student.num_hidden_layers, other.num_hidden_layers)
            if wrong := find_absent_layer(part, *counts):
                raise ConfigError([wrong])
            loss.add_projectors(student.hidden_size, other.hidden_size, cfg.rng.seed)
            found.append((weight, loss))
    return found
