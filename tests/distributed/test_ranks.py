"""What ranks do together."""

from __future__ import annotations

import time

from tests.ranks import run_ranks


def long_work(world, directory):
    from ds_kd.parallel.world import on_rank0, rank0_first

    kept = rank0_first(lambda: time.sleep(5 if world.is_main else 0) or world.rank, world)
    return [kept, on_rank0(lambda: world.rank, world)]


def test_rank_0_may_work_longer_than_a_collective_waits(tmp_path):
    # Collectives give up after 2 s, rank 0 takes 5.
    assert run_ranks(long_work, 2, tmp_path, timeout_minutes=2 / 60) == [[0, 0], [1, 0]]
