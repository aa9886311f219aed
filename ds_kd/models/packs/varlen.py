"""Attention of a whole pack in one launch, on GPUs.

Flash attention takes runs of queries and of keys of any length (`torch.nn.attention.varlen`), and
aligns a run of queries with the end of its keys. So a sample of a pack is a run of both; and what
hangs below a shared beginning is a run of queries whose keys are those of all nodes above, and its
own. The number of launches does not depend on the number of samples.
"""

from __future__ import annotations

import functools
import itertools
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_kd.errors import first_line

#: Kinds of device on which one launch is tried; meta tensors stand for those of a GPU.
DEVICES = ("cuda", "meta")
DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256  # head size that flash attention takes


@dataclass(frozen=True)
class Runs:
    """Runs of queries and of keys, one of each for every sample or node.

    Args:
        queries, keys: where the runs begin and the last one ends, `[runs + 1]` int32.
        longest_query, longest_key: tokens of the longest run.
        chosen: the token of each key, `[keys]` int64; None where they are the tokens in order.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    chosen: Tensor | None


def make_runs(lengths: list[int], parents: list[int] | None, device: torch.device) -> Runs:
    """Return the runs of samples of these lengths, or of a tree's nodes
    (`ds_kd.models.packs.tree`)."""
    starts = [0, *itertools.accumulate(lengths)]
    if parents is None:
        ends, longest = _move(starts, torch.int32, device), max(lengths)
        return Runs(ends, ends, longest, longest, None)

    # The nodes from the root to each node, itself included.
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    sizes = [sum(lengths[node] for node in path) for path in paths]
    chosen = [at for path in paths for n in path for at in range(starts[n], starts[n + 1])]
    return Runs(
        _move(starts, torch.int32, device),
        _move([0, *itertools.accumulate(sizes)], torch.int32, device),
        max(lengths),
        max(sizes),
        _move(chosen, torch.int64, device),
    )


def _move(numbers: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers on a device, for which the host does not wait."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def can_run(query: Tensor, value: Tensor) -> bool:
    """Return whether one launch can compute the attention of tensors such as these, `[1, heads,
    tokens, head size]`. A meta tensor is treated as one of a GPU."""
    size = query.shape[-1]
    is_usual = size == value.shape[-1] <= _LARGEST_HEAD and size % 8 == 0
    if not is_usual or query.dtype not in DTYPES:
        return False
    is_there = query.device.type in DEVICES
    return is_there and (query.is_meta or works(query.device, query.dtype))


def attend(
    query: Tensor, key: Tensor, value: Tensor, runs: Runs, window: int | None, scale: float | None
) -> Tensor:
    """Compute causal attention inside each run.

    Args:
        query, key, value: `[1, heads, tokens, head size]`; keys may have fewer heads.
        window: the number of tokens that a token attends to, itself included; None for all.
        scale: of the products; None for 1/√(head size).

    Returns:
        `[1, tokens, heads, head size]`.
    """
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    if runs.chosen is not None:
        k, v = k.index_select(0, runs.chosen), v.index_select(0, runs.chosen)
    back = -1 if window is None else window - 1
    return _launch(q, k, v, runs, back, scale)[None]


def _launch(
    query: Tensor, key: Tensor, value: Tensor, runs: Runs, back: int, scale: float | None
) -> Tensor:
    """Call the kernel on `[tokens, heads, head size]`; `back` is how many tokens before itself a
    token sees, -1 for all."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        runs.queries,
        runs.keys,
        runs.longest_query,
        runs.longest_key,
        scale=scale,
        window_size=(back, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


@torch.compiler.assume_constant_result
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether one launch is right on a device, which compiled code takes for granted."""
    return _works(device, dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel computes on this device what plain attention does; if it does not,
    it is said that samples are computed one by one.

    The example has all that is used: a shared beginning of five tokens with two samples of three
    and two below it, a sample of four, fewer heads of keys, and a window of four tokens.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, 14, 64, generator=generator) for heads in (4, 2, 2)]
    parts = [part.to(device, dtype).requires_grad_() for part in parts]
    wide = [part.detach().float().requires_grad_() for part in parts]
    runs = make_runs([5, 3, 2, 4], [-1, 0, 0, -1], device)
    owner = torch.tensor([0] * 5 + [1] * 3 + [2] * 2 + [3] * 4)
    place = torch.tensor([*range(5), *range(5, 8), *range(5, 7), *range(4)])
    sees = (owner[:, None] == owner) | ((owner == 0) & (owner[:, None] < 3))
    back = place[:, None] - place
    mask = (sees & (back >= 0) & (back < 4)).to(device)

    # Forward and backward are compared with masked attention in fp32.
    query, key, value = wide
    try:
        with torch.enable_grad():
            got = attend(parts[0], parts[1], parts[2], runs, 4, None)
            want = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
            got.float().square().sum().backward()
            want.square().sum().backward()
        found = [got, *(part.grad for part in parts)]
        expected = [want.transpose(1, 2), *(part.grad for part in wide)]
        if all(map(_is_close, found, expected)):
            return True
        reason = "its numbers are wrong"
    except Exception as error:  # of a build of torch without the kernel, of a driver
        reason = first_line(error)
    print(f"attention goes sample by sample, as varlen_attn fails here: {reason}", file=sys.stderr)
    return False


def _is_close(got: Tensor | None, want: Tensor | None) -> bool:
    """Return whether a result of 16 bits is that of 32."""
    assert got is not None and want is not None
    return torch.allclose(got.float(), want, atol=5e-2, rtol=2e-2)
