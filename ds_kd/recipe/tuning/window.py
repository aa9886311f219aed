"""Choose how many micro-batches one pass of the teacher takes."""

from __future__ import annotations

from typing import Any

from ds_kd.config.components import ConfigError
from ds_kd.models import probes
from ds_kd.models.attention import attend_by_sample, is_by_sample
from ds_kd.parallel.world import World, sum_over
from ds_kd.recipe.tuning.machine import Machine
from ds_kd.teachers.window import Window, agrees, divide_layers

#: Share of a rank's memory that the hidden states of a window may take.
SHARE = 1 / 32


def build_window(
    wanted: str | int,
    engine: Any,
    zero: dict[str, Any],
    by_sample: bool,
    world: World,
) -> Window | None:
    """Return the window of a teacher, with its layers made ready for it, or None for one
    micro-batch at a time (a collective).

    Args:
        wanted: `teacher.window`.
        engine: of the teacher, its layers compiled if they are to be.
        zero: its ZeRO configuration.
        by_sample: whether its attention keeps samples of a pack apart already.

    Raises:
        ConfigError: a number is given, and this model cannot take several at a time.
    """
    part = zero["zero_optimization"]
    is_far = (part.get("offload_param") or {}).get("device", "none") != "none" or world.size > 1
    is_split = world.tensor.size > 1 or world.sequence.size > 1  # with an attention of its own
    if wanted == 1 or is_split or (wanted == "auto" and not (is_far and part["stage"])):
        return None
    model = engine.module.model
    if not _make_ready(engine, by_sample, world):
        if wanted == "auto":
            return None
        raise ConfigError([
            f"teacher.window: got {wanted}, and {type(model).__name__} takes one micro-batch at a "
            f"time, as its attention is not plain SDPA; remove the key"
        ])  # fmt: skip
    width = model.config.get_text_config().hidden_size * model.dtype.itemsize
    room = int(SHARE * Machine.of(world).memory)
    return Window(None if wanted == "auto" else int(wanted), room, width)


def _make_ready(engine: Any, by_sample: bool, world: World) -> bool:
    """Divide a teacher's layers, and return whether it then computes what it does without; if not,
    its attention is what it was before (a collective)."""
    model = engine.module.model
    if by_sample and not is_by_sample(model):
        return False
    try:
        is_ready = divide_layers(model)
        if is_ready and not by_sample:  # attention by sample may be wrong for this model
            probes.check_packing(engine, world.device, "teacher_model")
        is_ready = is_ready and is_by_sample(model) and agrees(engine, world.device)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        is_ready = False
    # Numbers close to the tolerance may fall on both sides of it, and windows have to be equal.
    is_ready = bool(sum_over([float(not is_ready)], world.everyone)[0] == 0)
    if not is_ready:
        attend_by_sample(model, by_sample)
    return is_ready
