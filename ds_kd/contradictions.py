"""What is wrong with a config though each of its keys is right: keys that contradict each other,
and bounds of what a `_target_` is given."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from ds_kd.schema import RunConfig
from ds_kd.targets import problem
from ds_kd.zero_config import load_zero_config

_LARGEST = 1e30


def is_number(value: Any) -> TypeGuard[int | float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < _LARGEST and math.isfinite(value)


def find_contradictions(cfg: RunConfig, data: dict, problems: list[str]) -> None:
    """Add what no key alone can tell to `problems`."""
    steps = cfg.step_scheduler
    if cfg.dataloader is not None and "batch_size" in cfg.dataloader.kwargs:
        problems.append("dataloader.batch_size: set step_scheduler.local_batch_size instead")
    if steps.global_batch_size % steps.local_batch_size:
        up = -(-steps.global_batch_size // steps.local_batch_size) * steps.local_batch_size
        problems.append(problem(
            "step_scheduler.global_batch_size", steps.global_batch_size,
            f"a multiple of local_batch_size {steps.local_batch_size}", f"write {up}",
        ))  # fmt: skip
    if cfg.teacher_model is None and cfg.kd_ratio > 0 and data.get("teacher_model") is None:
        problems.append(
            "teacher_model: missing; name a teacher, or set kd_ratio: 0 for plain fine-tuning"
        )
    given = (data.get("rng") or {}).get("seed") if isinstance(data.get("rng"), dict) else None
    if cfg.seed is not None and given not in (None, cfg.seed):
        problems.append(f"seed: {cfg.seed} and rng.seed: {given} contradict each other; keep one")
    peft = cfg.peft
    if peft is not None:
        given = [n for n in ("match_all_linear", "target_modules", "exclude_modules")
                 if getattr(peft, n)]  # fmt: skip
        if len(given) > 1:
            problems.append(f"peft: {' and '.join(given)} are both given; keep one")
    _losses(cfg, problems)
    _optimizer(cfg, problems)
    for name, stages in (("student", (3,)), ("teacher", (0, 3))):
        try:
            load_zero_config(getattr(cfg.deepspeed, name), f"deepspeed.{name}", stages)
        except ValueError as error:
            problems.append(str(error))
    schedule = cfg.lr_scheduler
    if schedule is not None and schedule.num_warmup_steps and schedule.warmup_ratio is not None:
        problems.append("lr_scheduler: num_warmup_steps and warmup_ratio are both given; keep one")


def _losses(cfg: RunConfig, problems: list[str]) -> None:
    """Bounds that a loss's annotations do not tell."""
    if cfg.kd_loss_fn is None or cfg.loss_fn is None:
        return
    kwargs = cfg.kd_loss_fn.kwargs
    temperature, chunk = kwargs.get("temperature"), kwargs.get("chunk_size")
    if is_number(temperature) and temperature <= 0:
        problems.append(problem("kd_loss_fn.temperature", temperature, "a number > 0"))
    if isinstance(chunk, int) and chunk < 0:
        problems.append(problem("kd_loss_fn.chunk_size", chunk, "an integer ≥ 0"))
    ignored = [part.kwargs.get("ignore_index", -100) for part in (cfg.loss_fn, cfg.kd_loss_fn)]
    if ignored[0] != ignored[1]:
        problems.append(
            f"kd_loss_fn.ignore_index: {ignored[1]} and loss_fn.ignore_index: {ignored[0]} "
            f"contradict each other; write the same"
        )


def _optimizer(cfg: RunConfig, problems: list[str]) -> None:
    """Bounds that all optimizers share."""
    for name, value in (cfg.optimizer.kwargs if cfg.optimizer is not None else {}).items():
        if name == "betas":
            is_pair = isinstance(value, list) and len(value) == 2
            good = is_pair and all(is_number(beta) and 0 <= beta < 1 for beta in value)
            expected = "two numbers, from 0 to below 1"
        elif name in ("lr", "eps", "weight_decay", "momentum", "lr_decay", "alpha"):
            good, expected = is_number(value) and value >= 0, "a number ≥ 0"
        else:
            continue
        if not good:
            problems.append(problem(f"optimizer.{name}", value, expected))
