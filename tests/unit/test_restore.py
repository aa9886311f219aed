"""The saved generators that a rank takes over, without ranks."""

from __future__ import annotations

import pytest
import torch

from ds_kd.checkpoint.restore import find_generators
from ds_kd.parallel.layout import lay_out
from ds_kd.parallel.world import World


def world_of(rank, size, tensor):
    alone = World(rank, size, torch.device("cpu"), "gloo")
    made = lay_out(rank, size, tensor, 1, alone.everyone, lambda ranks, on_host: None)
    return World(rank, size, torch.device("cpu"), "gloo", None, made)


@pytest.mark.parametrize(
    ("size", "tensor", "saved", "expected"),
    [
        (4, 2, 2, [0, 1, 2, 3]),  # the same layout: bit for bit
        (4, 2, 1, [0, 0, 1, 1]),  # ranks of a tensor group draw the same dropout masks
        (4, 1, 2, [0, 2, 4, 6]),  # the others draw different ones
        (2, 1, 1, [0, 1]),
    ],
)
def test_ranks_that_see_the_same_tokens_take_over_the_same_generators(
    size, tensor, saved, expected
):
    found = [find_generators(world_of(rank, size, tensor), saved) for rank in range(size)]
    assert found == expected
