"""Work that ranks do together."""

from __future__ import annotations

import time

from ds_kd.parallel.layout import list_ranks
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


def sums_of_groups(world, directory):
    import torch

    from ds_kd.parallel.world import sum_over

    groups = [world.data, world.tokens, world.sequence, world.tensor, world.everyone]
    on_host = [int(sum_over([2.0**world.rank], group)[0]) for group in groups]
    on_device = [int(sum_over(torch.tensor(2.0**world.rank), group)) for group in groups]
    assert on_host == on_device
    return [[group.rank, bin(ranks)[:1:-1]] for group, ranks in zip(groups, on_host, strict=True)]


def test_groups_cross_each_other_and_sums_stay_inside_one(tmp_path):
    # A text such as "0101" names ranks 1 and 3.
    assert run_ranks(sums_of_groups, 4, tmp_path, tensor=2) == [
        [[0, "101"], [0, "101"], [0, "1"], [0, "11"], [0, "1111"]],
        [[0, "0101"], [0, "0101"], [0, "01"], [1, "11"], [1, "1111"]],
        [[1, "101"], [1, "101"], [0, "001"], [0, "0011"], [2, "1111"]],
        [[1, "0101"], [1, "0101"], [0, "0001"], [1, "0011"], [3, "1111"]],
    ]


def test_ranks_that_exchange_the_most_are_neighbours():
    assert list_ranks(8, 2, 2) == {
        "data": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "tokens": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "sequence": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
    }
