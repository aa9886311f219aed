"""The loss and gradient of an on-policy step by their definition, to compare a contender's with.

The loss is KL(student ‖ teacher) at T = 1, summed over every token that the student wrote, the one
that ends a text included, and divided by their number. Each text is computed by itself, without
padding, with the weights as they were loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import measure


def compare(
    student: Path,
    teacher: Path,
    told: dict[str, Any],
    gradient: Path,
    dtype: torch.dtype,
    plain: torch.dtype,
) -> dict[str, float]:
    """Return the relative differences of a first step's loss, and of its gradient by the norm, and
    those that the same computation has in another dtype: what rounding alone makes.

    Args:
        told: what the contender's `Gate` told of the step.
        gradient: the file with the contender's.
        dtype: of the definition.
        plain: the other dtype.
    """
    asked = student, teacher, told["prompts"], told["texts"]
    loss, own = _compute(*asked, dtype)
    rounded, other = _compute(*asked, plain)
    return {
        "loss": abs(told["loss"] - loss) / abs(loss),
        "gradient": _distance(load_file(gradient), own),
        "rounded loss": abs(rounded - loss) / abs(loss),
        "rounded gradient": _distance(other, own),
    }


def _distance(other: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference from `own` over that of `own`."""
    apart = sum(float((other[n].view_as(p) - p).double().square().sum()) for n, p in own.items())
    whole = sum(float(part.double().square().sum()) for part in own.values())
    return float((apart / whole) ** 0.5)


def _compute(
    student: Path,
    teacher: Path,
    prompts: list[list[int]],
    texts: list[list[int]],
    dtype: torch.dtype,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the step's loss, and its gradient by the weights' names, on the CPU."""
    from transformers import AutoModelForCausalLM

    device = measure.device()
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device, dtype).eval()
        for path in (student, teacher)
    ]
    loss = _add_up(models[0], models[1], prompts, texts)
    found = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).cpu()
        for name, p in models[0].named_parameters()
    }
    del models
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return loss, found


def _add_up(student: Any, teacher: Any, prompts: list[list[int]], texts: list[list[int]]) -> float:
    """Return the step's loss, and leave its gradient at the student's weights."""
    count, total = sum(map(len, texts)), 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        if not text:
            continue
        ids = torch.tensor([prompt + text], device=student.device)
        rows, whole = slice(len(prompt) - 1, -1), torch.promote_types(student.dtype, torch.float32)
        with torch.no_grad():
            p = teacher(input_ids=ids, use_cache=False).logits[0, rows]
        q = student(input_ids=ids, use_cache=False).logits[0, rows]
        log_p, log_q = (logits.to(whole).log_softmax(-1) for logits in (p, q))
        loss = (log_q.exp() * (log_q - log_p)).sum() / count
        loss.backward()
        total += loss.item()
    return total
