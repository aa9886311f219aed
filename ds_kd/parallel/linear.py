"""Linear maps under ZeRO-3, without the host's work that DeepSpeed's own take.

ZeRO-3 empties a parameter after it was used and fills it again before backward, so that the graph
of a linear map must keep the parameter and not the whole weight. DeepSpeed replaces
`torch.nn.functional.linear` by an `autograd.Function` that does so. In the form in which it is
written PyTorch inspects its signature at every call, also where there is no graph: a quarter of the
host's time of a step, which a GPU waits for. This one computes the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def replace_linear() -> None:
    """Put `linear` in the place of DeepSpeed's, where that was put into PyTorch's."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    if F.linear is zero3_linear_wrap:
        F.linear = linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x·Wᵀ + b, as `torch.nn.functional.linear`.

    Args:
        input: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`.
    """
    if not torch.is_grad_enabled():
        return _multiply(input, weight, bias)
    return _Linear.apply(input, weight, bias)


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and input.dim() == 2:
        return torch.addmm(bias, input, weight.t())
    out = input.matmul(weight.t())
    return out if bias is None else out.add_(bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        return _multiply(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        of_input = of_weight = of_bias = None
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            of_input = gradient.matmul(weight)
        if ctx.needs_input_grad[1]:
            of_weight = rows.t().matmul(input.reshape(-1, input.shape[-1]))
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_input, of_weight, of_bias
