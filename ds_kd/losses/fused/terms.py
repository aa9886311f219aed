"""CE and a divergence other than the forward KL of a chunk in one Triton kernel, for GPUs.

It reads the logits of both models three times and writes the gradient once, over the student's: 3.5
passes of fp32 size for models in bf16, and 4.5 if T is not 1. The forward KL has a kernel of its
own, which needs one less (`forward_kl.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ds_kd.losses.fused.forward_kl import VALUES
from ds_kd.losses.fused.programs import run_programs, try_out

#: Found by the kernel for each token.
COLUMNS = VALUES


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

    assert len(arguments) <= 2
    # The kernel takes two, so that another value needs no other kernel.
    own = [*arguments, 0.0, 0.0][:2]
    given = (student, teacher, labels, temperature, alpha)
    return run_programs(distil_row_by, *given, len(COLUMNS), *own, TERMS=TERMS_BY_NAME[name])


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
