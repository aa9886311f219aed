"""Attention over tokens that are split over ranks, for heads of any number. Ranks are threads here,
and what they send lies in the memory of the process."""

from __future__ import annotations

import threading
import types

import pytest
import torch

from ds_kd.models.attention import Segments, sdpa_by_sample
from ds_kd.parallel import sequence
from ds_kd.parallel.layout import Group
from ds_kd.parallel.sequence import Exchange

TOKENS, WIDTH = 12, 8


@pytest.fixture
def threads(monkeypatch):
    """Run a function of a rank on several of them."""
    box: dict[int, tuple] = {}

    def run(function, size: int) -> list:
        barrier, results = threading.Barrier(size, timeout=60), [None] * size

        def send(parts, sent, received, group):
            box[group.rank] = parts.detach().split(sent)
            barrier.wait()
            got = torch.cat([box[rank][group.rank] for rank in range(size)])
            barrier.wait()
            assert got.numel() == sum(received)
            return got

        def work(rank):
            results[rank] = function(rank)

        monkeypatch.setattr(sequence, "_send", send)
        ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
        return results

    return run


@pytest.mark.parametrize(
    ("heads", "shared", "size"), [(4, 2, 2), (9, 3, 2), (9, 3, 4), (4, 1, 4), (8, 2, 3), (14, 2, 4)]
)
@pytest.mark.parametrize("kind", ["rows", "pack", "tree", "window"])
def test_every_rank_gets_the_attention_of_its_tokens_whatever_the_heads(
    heads, shared, size, kind, threads
):
    torch.manual_seed(0)
    rows = 2 if kind in ("rows", "window") else 1
    segments = {"pack": Segments([5, 4, 3]), "tree": Segments([4, 3, 5], [-1, 0, 0])}.get(kind)
    window = 4 if kind == "window" else None
    sizes = (heads, shared, shared)
    parts = [torch.randn(rows, n, TOKENS, WIDTH, dtype=torch.float64) for n in sizes]
    slope = torch.randn(rows, TOKENS, heads, WIDTH, dtype=torch.float64)
    module = types.SimpleNamespace(num_key_value_groups=heads // shared)

    def attend(tensors, gradient, exchange=None):
        given = [tensor.clone().requires_grad_() for tensor in tensors]
        out, _ = sdpa_by_sample(module, *given, None, segments, window, exchange)
        out.backward(gradient)
        return out.detach(), *(tensor.grad for tensor in given)

    whole, *gradients = attend(parts, slope)
    found = threads(
        lambda rank: attend(
            [part[:, :, rank::size] for part in parts],
            slope[:, rank::size],
            Exchange(Group(rank, size)),
        ),
        size,
    )
    for rank, (out, *own) in enumerate(found):
        torch.testing.assert_close(out, whole[:, rank::size])
        for got, expected in zip(own, gradients, strict=True):
            torch.testing.assert_close(got, expected[:, :, rank::size])
