"""A short soak; `python benchmarks/soak.py` is the long one."""

from __future__ import annotations

from benchmarks.soak import soak


def test_killed_again_and_again_a_run_loses_nothing_and_ends_bitwise_equal(tmp_path):
    lines: list[str] = []
    figures = soak(kills=3, ranks=2, seed=1, root=tmp_path, say=lines.append)
    assert figures["kills"] == 3, lines
