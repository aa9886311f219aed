"""CE and a divergence other than the forward KL of a chunk in one Triton kernel, for GPUs.

It reads the logits of both models four times and writes the gradient once, over the student's:
4.5 passes of fp32 size for models in bf16. The forward KL has a kernel of its own, which reads them
three times (`forward_kl.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.fused.forward_kl import VALUES, try_out

#: What the kernel finds of each token.
COLUMNS = VALUES
# With these, 40 to 64 registers a thread on an H100 (`ptxas -v`, Triton 3.9; 3.6 takes up to 114).
_BLOCK, _WARPS = 4096, 16


def arguments_of(divergence: Any) -> list[float]:
    """Return a divergence's own arguments in the order of its `limits`."""
    return [float(getattr(divergence, argument)) for argument, *_ in divergence.limits]


@functools.cache
def works(kind: Any, device: torch.device) -> bool:
    """Return whether the kernel finds the right numbers on this device.

    Args:
        kind: class of a divergence.
    """
    divergence = kind()
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    labels = torch.ones(1, dtype=torch.int64)
    with torch.enable_grad():
        leaf = student.clone().requires_grad_()
        expected = divergence(leaf, teacher, labels)
        (slope,) = torch.autograd.grad(expected, leaf)

    def check() -> bool:
        logits = student.to(device, copy=True)
        given = (logits, teacher.to(device), labels.to(device), 1.0, 1.0)
        found = distil_rows_by(*given, divergence.name, arguments_of(divergence))
        is_right = torch.allclose(found[0, 1].cpu(), expected.detach(), atol=1e-5)
        return is_right and torch.allclose(logits.cpu(), slope, atol=1e-5)

    return try_out(check)


@torch.library.custom_op("ds_kd::distil_rows_by", mutates_args=("student",))
def distil_rows_by(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    name: str,
    arguments: list[float],
) -> Tensor:
    """Compute CE and a divergence of each token, and overwrite the student's logits by the gradient
    of (1 - α)·CE + α·T²·D with respect to them.

    Args:
        student, teacher, labels: as for `forward_kl.distil_rows`.
        name: of the divergence, one of `terms_kernel.TERMS_BY_NAME`.
        arguments: its own, at most two.

    Returns:
        `[tokens, columns]` in fp32, the `COLUMNS`.
    """
    from ds_kd.losses.fused.terms_kernel import TERMS_BY_NAME, distil_row_by

    tokens, vocab = student.shape
    assert student.stride(1) == 1 == teacher.stride(1) and len(arguments) <= 2
    found = student.new_empty(tokens, len(COLUMNS), dtype=torch.float32)
    if not tokens:
        return found

    # The kernel takes two, so that another value needs no other kernel.
    own = [*arguments, 0.0, 0.0][:2]
    factors = (1.0 / temperature, 1.0 - alpha, alpha * temperature)
    distil_row_by[(tokens,)](
        student,
        teacher,
        labels,
        found,
        teacher.shape[1],
        vocab,
        student.stride(0),
        teacher.stride(0),
        *factors,
        *own,
        TERMS=TERMS_BY_NAME[name],
        HAS_CE=alpha < 1.0,
        COLUMNS=len(COLUMNS),
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return found


@distil_rows_by.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    name: str,
    arguments: list[float],
) -> Tensor:
    return student.new_empty(student.shape[0], len(COLUMNS), dtype=torch.float32)
