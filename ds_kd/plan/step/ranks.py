"""Find the fewest ranks whose memory is enough for a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ds_kd.plan.memory import Machine, Shape, Work, estimate_bytes

#: Settles what a run decides by itself on so many ranks.
Tune = Callable[[Work, int], Work]


def smallest_fit(
    student: Shape,
    teacher: Shape | None,
    work: Work,
    machine: Machine,
    tune: Tune = lambda work, _: work,
) -> tuple[int, Work] | None:
    """Return (ranks, work) of the smallest number of ranks that fits, or None.

    The work is tried as it is, then with the teacher, the optimizer and the weights moved to the
    host's memory, one after the other.
    """
    offers = [work, replace(work, offload_teacher=True)] if teacher is not None else [work]
    offers.append(replace(offers[-1], offload_optimizer=True))
    offers.append(replace(offers[-1], offload_weights=True))
    for offer in offers:
        for world in offer.worlds:
            tuned = tune(offer, world)
            if not machine.lacks(estimate_bytes(student, teacher, tuned, world), world):
                return world, tuned
    return None
