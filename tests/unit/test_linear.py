"""Linear maps under ZeRO-3 against DeepSpeed's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ds_kd.parallel.linear import linear, replace_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_numbers_and_gradients_are_deepspeeds_bit_for_bit(shape, has_bias, dtype):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=generator) for size in (shape, (6, 8), (6,))]
    found = []
    for function in (linear, zero3_linear_wrap):
        leaves = [part.to(dtype).requires_grad_() for part in parts[: 2 + has_bias]]
        out = function(*leaves)
        (out.float() * torch.arange(6.0)).sum().backward()
        with torch.no_grad():
            found.append([out, function(*leaves), *(leaf.grad for leaf in leaves)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_the_graph_keeps_the_parameter_and_not_its_weight():
    """ZeRO-3 empties it after forward, and fills it again before backward."""
    weight = torch.nn.Parameter(torch.randn(6, 8, generator=torch.manual_seed(0)))
    whole, hidden = weight.data, torch.ones(2, 8, requires_grad=True)
    out = linear(hidden, weight)
    weight.data = torch.empty(0)
    held = whole.clone()
    whole.zero_()  # a graph that held the weight would read this
    weight.data = held
    out.sum().backward()
    assert torch.allclose(hidden.grad, held.sum(0).expand(2, 8))


def test_a_frozen_weight_gets_no_gradient():
    weight, hidden = torch.ones(6, 8), torch.ones(2, 8, requires_grad=True)
    linear(hidden, weight).sum().backward()
    assert weight.grad is None and torch.equal(hidden.grad, torch.full((2, 8), 6.0))


def test_it_takes_the_place_of_deepspeeds_and_of_no_other(monkeypatch):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    other = F.linear
    monkeypatch.setattr(F, "linear", other)
    replace_linear()
    assert F.linear is other or other is zero3_linear_wrap
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    replace_linear()
    assert F.linear is linear
