"""CE and forward KL of a chunk in one Triton kernel, for GPUs.

The plain code makes some thirty passes over `[tokens, vocab]` in fp32 between the matrix products:
casts, softmaxes, sums of products. This kernel reads the logits of both models twice, as the heads'
products have rounded them, and writes the gradient once, over the student's: 2.5 passes of fp32
size for models in bf16. For what is logged at T = 1 it reads them once more if T is another one
(`tests/unit/test_cuda_path.py` counts the passes).

On a CPU the plain code runs. On a meta tensor, which has no numbers, the operation is recorded as
it would run on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ds_kd.losses.fused.programs import run_programs, try_out
from ds_kd.losses.pair import HIGH_TEMPERATURE, NEAR

#: Found by both kernels for each token: CE, the divergence at T, the teacher's entropy at T (nats),
#: whether both models name the same token first, and at T = 1 the KL and both entropies.
VALUES = (
    "ce_loss", "kd_loss", "teacher_entropy", "top1_agreement",
    "kl_at_t1", "teacher_entropy_at_t1", "student_entropy_at_t1",
)  # fmt: skip
#: And two sums for high temperatures (`near_kl`).
COLUMNS = (*VALUES, "series", "farthest")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel runs on logits of this dtype on this device."""
    if dtype not in _DTYPES or device.type == "meta":
        return dtype in _DTYPES
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # tests, on a CPU
    return (device.type == "cuda" or is_interpreted) and _works(device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Return whether the kernel finds the right numbers on this device."""
    if importlib.util.find_spec("triton") is None:
        return False
    # p = softmax(2, 1, 0), q = softmax(0, 1, 2): KL = 2·p₀ - 2·p₂, as both normalise alike.
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    p = torch.softmax(teacher, -1)
    expected = torch.stack([student.logsumexp(-1) - student[:, 1], 2 * p[:, 0] - 2 * p[:, 2]], 1)
    logits, labels = student.to(device, copy=True), torch.ones(1, dtype=torch.int64, device=device)

    def check() -> bool:
        found = distil_rows(logits, teacher.to(device), labels, 1.0, 1.0)
        is_right = torch.allclose(found[:, :2].cpu(), expected, atol=1e-5)
        return is_right and torch.allclose(logits.cpu(), student.softmax(-1) - p, atol=1e-5)

    return try_out(check)


@torch.library.custom_op("ds_kd::distil_rows", mutates_args=("student",))
def distil_rows(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Compute CE and forward KL of each token, and overwrite the student's logits by the gradient
    of (1 - α)·CE + α·T²·KL with respect to them.

    Args:
        student: logits `[tokens, student vocab]`, rows without gaps between their numbers.
        teacher: logits `[tokens, shared vocab]`, likewise; not changed.
        labels: `[tokens]`; the values and gradients of tokens labelled -100 mean nothing.

    Returns:
        `[tokens, columns]` in fp32, the `COLUMNS`.
    """
    from ds_kd.losses.fused.kernel import distil_row

    return run_programs(
        distil_row,
        student,
        teacher,
        labels,
        temperature,
        alpha,
        len(COLUMNS),
        IS_HIGH=temperature > HIGH_TEMPERATURE,
    )


@distil_rows.register_fake
def _(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    return student.new_empty(student.shape[0], len(COLUMNS), dtype=torch.float32)


def distil(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Return values by name, each `[tokens, 1]`, and the gradient, which lies where the student's
    logits were; see `distil_rows`. KL is multiplied by T²."""
    found = distil_rows(student, teacher, labels, temperature, alpha)
    values = dict(zip(COLUMNS, found.split(1, dim=1), strict=True))
    series, farthest = values.pop("series"), values.pop("farthest")
    if temperature > HIGH_TEMPERATURE:
        kl = values["kd_loss"]
        values["kd_loss"] = torch.where(farthest <= NEAR, torch.log1p(series), kl)
    values["kd_loss"] = values["kd_loss"] * temperature**2
    return values, student
