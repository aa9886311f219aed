"""The groups of ranks: who sees which samples, which part of a sample, and which part of a model.

Ranks form a box of data × sequence × tensor, numbered with `tensor` fastest: the ranks that share a
model's matrices exchange the most, so they are neighbours on one machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """A group of ranks, and this rank's place in it.

    Args:
        rank: 0 to `size` - 1.
        size: number of ranks.
        host_group: a gloo group for small CPU tensors (counts, decisions). An NCCL collective
            followed by `.item()` would make the host wait for the GPU's queue.
        device_group: the group for tensors on the device; None for all ranks of the job.
    """

    rank: int
    size: int
    host_group: dist.ProcessGroup | None = None
    device_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Layout:
    """This rank's groups.

    Args:
        data: the ranks that see different samples.
        tokens: the ranks that see different tokens: other samples, or other parts of the same.
            Sums over tokens are sums over this group.
        sequence: the ranks that see the parts of the same samples.
        tensor: the ranks that see the same tokens, and hold the parts of the same matrices.
    """

    data: Group
    tokens: Group
    sequence: Group
    tensor: Group


def list_ranks(size: int, tensor: int, sequence: int) -> dict[str, list[list[int]]]:
    """Return the ranks of every group of each kind, by the names of `Layout`."""
    box = torch.arange(size).view(-1, sequence, tensor)
    return {
        "data": box.permute(1, 2, 0).flatten(0, 1).tolist(),
        "tokens": box.permute(2, 0, 1).flatten(1).tolist(),
        "sequence": box.permute(0, 2, 1).flatten(0, 1).tolist(),
        "tensor": box.flatten(0, 1).tolist(),
    }


def lay_out(
    rank: int,
    size: int,
    tensor: int,
    sequence: int,
    everyone: Group,
    new_group: Callable[[list[int], bool], dist.ProcessGroup],
) -> Layout:
    """Return this rank's groups (a collective).

    Args:
        tensor, sequence: sizes of these groups; their product divides `size`.
        everyone: the group of all ranks, which takes the place of a group that is as large.
        new_group: makes a group of ranks, on the host (True) or the device (False).
    """
    kinds = list_ranks(size, tensor, sequence)
    groups = dict.fromkeys(kinds, Group(0, 1))
    for name, parts in kinds.items():
        for ranks in parts:  # every rank takes part in making every group
            if len(ranks) == size:
                groups[name] = everyone
            elif len(ranks) > 1:
                made = new_group(ranks, True), new_group(ranks, False)
                if rank in ranks:
                    groups[name] = Group(ranks.index(rank), len(ranks), *made)
    return Layout(**groups)
