"""Short soaks; the commands of `benchmarks/soaks/` are the long ones."""

from __future__ import annotations

import pytest

from benchmarks.soaks.kill_points import Points
from benchmarks.soaks.soak import soak


def test_killed_again_and_again_a_run_loses_nothing_and_ends_bitwise_equal(tmp_path):
    lines: list[str] = []
    figures = soak(kills=3, ranks=2, seed=1, root=tmp_path, say=lines.append)
    assert figures["kills"] == 3, lines


# test_kills.py kills in saves of ranks at each run of the suite; whole commands take minutes.
@pytest.mark.nightly
def test_a_rank_killed_in_its_last_save_is_named_and_the_run_ends_bitwise_equal(tmp_path):
    points = Points(tmp_path, "every")
    seen = []
    for rank, shares in ((0, (0.75, 0.95)), (1, (0.5,))):
        seen += [points.check(rank, int(share * points.counts[rank])) for share in shares]
    assert len({*seen}) == 3, seen  # in its export, while pruning, while it still writes
