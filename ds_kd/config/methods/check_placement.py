"""Check where a teacher that runs is to lie, against the other keys that place models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_kd.config.checks.files import check_directory
from ds_kd.config.checks.zero_file import place_teacher
from ds_kd.config.components import problem
from ds_kd.config.names import AUTO, CPU, INT8, NVME
from ds_kd.config.schema import RunConfig


def check_placement(cfg: RunConfig, student: dict[str, Any] | None, problems: list[str]) -> None:
    """Add a line to `problems` for each key that contradicts the teacher's place.

    Args:
        student: the student's ZeRO configuration, None if it is wrong.
    """
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
    if placement == NVME:
        problems += filter(None, [_find_wrong_path(cfg.teacher.nvme_path)])
    if (twice := _find_shared_path(cfg, student)) is not None:
        problems.append(
            f"deepspeed.student: offload_param.nvme_path is {twice}, and the teacher's is too; "
            "DeepSpeed empties that directory for each model, so name another one for the teacher"
        )


def _find_wrong_path(path: str | None) -> str | None:
    """Return the problem of `teacher.nvme_path`, or None."""
    key, expected = "teacher.nvme_path", "a directory on an NVMe disk"
    if path is None:
        return f"{key}: missing; name {expected}"
    if not Path(path).is_dir():
        return problem(key, path, expected)
    return check_directory(key, path)


def _find_shared_path(cfg: RunConfig, student: dict[str, Any] | None) -> str | None:
    """Return the directory into which both models' weights would be written, or None."""
    try:
        teacher = place_teacher(
            cfg.deepspeed.teacher, cfg.teacher.placement, False, cfg.teacher.nvme_path
        )
    except ValueError:  # it has its problem already
        return None
    paths = [
        (config or {}).get("zero_optimization", {}).get("offload_param") or {}
        for config in (student, teacher)
    ]
    own, other = (str(part.get("nvme_path")) for part in paths)
    both = all(part.get("device") == NVME for part in paths)
    return own if both and Path(own).resolve() == Path(other).resolve() else None


def note_on_placement(cfg: RunConfig) -> list[str]:
    """Return a note on a place that only the machine of the run tells."""
    if cfg.teacher.placement != AUTO or not cfg.loads_teacher:
        return []
    return [
        "teacher.placement: auto is chosen when the run starts, by the memory there; python "
        "launch/plan.py --gpu-memory SIZE tells it before"
    ]
