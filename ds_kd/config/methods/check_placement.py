"""Check where a teacher that runs is to lie, against the other keys that place models."""

from __future__ import annotations

from ds_kd.config.names import AUTO, CPU, INT8
from ds_kd.config.schema import RunConfig


def check_placement(cfg: RunConfig, problems: list[str]) -> None:
    """Add a line to `problems` for each key that contradicts the teacher's place."""
    placement = cfg.teacher.placement
    if placement is not None and cfg.deepspeed.teacher is not None:
        problems.append(
            f"teacher.placement: got {placement}, and deepspeed.teacher places it too; keep one"
        )

    # What places a model twice, and what DeepSpeed would not do.
    if placement not in (None, CPU) and cfg.offload_teacher_model:
        problems.append(
            f"offload_teacher_model: teacher.placement is {placement}; write cpu, or remove one"
        )
    if placement == INT8 and cfg.compile.enabled == "true":
        problems.append(
            "teacher.placement: got int8, whose weights torch.compile does not read; write zero3, "
            "or compile.enabled: auto, which leaves this teacher out"
        )


def note_on_placement(cfg: RunConfig) -> list[str]:
    """Return a note on a place that only the machine of the run tells."""
    if cfg.teacher.placement != AUTO or not cfg.loads_teacher:
        return []
    return [
        "teacher.placement: auto is chosen when the run starts, by the memory there; python "
        "launch/plan.py --gpu-memory SIZE tells it before"
    ]
