"""Parts of a kernel's call that are the same for every kernel of this room."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_kd.errors import first_line

# With these, 40 to 64 registers a thread and nothing spilled on an H100 (`ptxas -v`, Triton 3.9;
# 3.6 takes up to 114 for the template's).
BLOCK, WARPS = 4096, 16


def run_programs(
    kernel: Any,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    columns: int,
    *own: float,
    **constants: Any,
) -> Tensor:
    """Run a program of a kernel for each token, and return what it finds, `[tokens, columns]` in
    fp32.

    Args:
        kernel: a Triton function with the arguments of `kernel.distil_row` up to `kd_weight`.
        student, teacher, labels: as for `forward_kl.distil_rows`.
        own: further arguments of this kernel.
        constants: its further constants, by name.
    """
    tokens, vocab = student.shape
    assert student.stride(1) == 1 == teacher.stride(1)
    found = student.new_empty(tokens, columns, dtype=torch.float32)
    if not tokens:
        return found

    # The strides are those of aligned rows (`Buffers.for_product`).
    kernel[(tokens,)](
        student,
        teacher,
        labels,
        found,
        teacher.shape[1],
        vocab,
        student.stride(0),
        teacher.stride(0),
        1.0 / temperature,
        1.0 - alpha,
        alpha * temperature,
        *own,
        HAS_CE=alpha < 1.0,
        AT_1=temperature == 1.0,
        COLUMNS=columns,
        BLOCK=BLOCK,
        num_warps=WARPS,
        **constants,
    )
    return found


def try_out(check: Callable[[], bool]) -> bool:
    """Return whether a kernel's numbers are right. If it fails, or they are not, it is said that
    the plain code, which takes longer, is used."""
    try:
        if check():
            return True
        reason = "its numbers are wrong"
    except Exception as error:  # of Triton, of the compiler that it calls, of a driver
        reason = first_line(error)
    print(f"the loss is not fused, as the kernel fails here: {reason}", file=sys.stderr, flush=True)
    return False
