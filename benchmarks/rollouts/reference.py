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
    student: Path, teacher: Path, told: dict[str, Any], gradient: Path, dtype: torch.dtype
) -> dict[str, float]:
    """Return the relative differences of a first step's loss, and of its gradient by the norm.

    Args:
        told: what the contender's `Gate` told of the step.
        gradient: the file with the contender's.
        dtype: of the computation.
    """
    from transformers import AutoModelForCausalLM

    device = measure.device()
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device, dtype).eval()
        for path in (student, teacher)
    ]
    loss = _add_up(models[0], models[1], told["prompts"], told["texts"])
    found, apart, whole = load_file(gradient), 0.0, 0.0
    for name, weight in models[0].named_parameters():
        own = torch.zeros_like(weight) if weight.grad is None else weight.grad
        other = found[name].view_as(own).to(device, dtype)
        apart += float((other - own).double().square().sum())
        whole += float(own.double().square().sum())
    del models
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"loss": abs(told["loss"] - loss) / abs(loss), "gradient": (apart / whole) ** 0.5}


def _add_up(student: Any, teacher: Any, prompts: list[list[int]], texts: list[list[int]]) -> float:
    """Return the step's loss, and leave its gradient at the student's weights."""
    count, total = sum(map(len, texts)), 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        if not text:
            continue
        ids = torch.tensor([prompt + text], device=student.device)
        rows = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            log_p = teacher(input_ids=ids, use_cache=False).logits[0, rows].log_softmax(-1)
        log_q = student(input_ids=ids, use_cache=False).logits[0, rows].log_softmax(-1)
        loss = (log_q.exp() * (log_q - log_p)).sum() / count
        loss.backward()
        total += float(loss)
    return total
