"""The section `teacher_distributed`: how the teacher lies on the ranks, where the student lies
otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from ds_kd.config.keys import key


@dataclass
class TeacherDistributed:
    tp_size: int | None = key(
        None,
        "Cuts the teacher's matrices over this many ranks: as many as the student's "
        "(distributed.tp_size, the default), or 1, with which each of these ranks computes the "
        "whole teacher, for a teacher that cannot be cut.",
        "ranks",
        low=1,
    )
