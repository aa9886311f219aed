"""What ranks do together."""

from __future__ import annotations

import time

from tests.ranks import run_ranks


class TwoWords(ValueError):
    """Pickle restores it with the one argument that its base was given, which is a TypeError."""

    def __init__(self, key: str, given: str):
        super().__init__(f"{key} is {given}")


def long_work(world, directory):
    from ds_kd.parallel.world import on_rank0, rank0_first

    def fail(rank: int, error: Exception) -> str:
        if world.rank == rank:
            raise error
        return "nothing"

    def meet(together, *given) -> str:
        try:
            return together(lambda: fail(*given), world)
        except Exception as error:
            return f"{'ValueError' if isinstance(error, ValueError) else type(error)}: {error}"

    locked = ValueError("held")
    locked.lock = (each for each in ())  # which pickle refuses
    kept = rank0_first(lambda: time.sleep(5 if world.is_main else 0) or world.rank, world)
    later = rank0_first(lambda: time.sleep(0 if world.is_main else 5) or world.rank, world)
    errors = [
        meet(on_rank0, 0, TwoWords("lr", "high")),
        meet(rank0_first, 1, TwoWords("lr", "low")),
        meet(on_rank0, 0, locked),
    ]
    return [kept, later, errors, on_rank0(lambda: world.rank, world)]


def test_a_rank_may_work_longer_than_a_collective_waits_and_its_error_reaches_all(tmp_path):
    # Collectives give up after 2 s; rank 0 takes 5 at first, then rank 1 does.
    told = ["ValueError: lr is high", "ValueError: lr is low", "ValueError: held"]
    expected = [[0, 0, told, 0], [1, 1, told, 0]]
    assert run_ranks(long_work, 2, tmp_path, timeout_minutes=2 / 60) == expected
