"""Count the floating-point operations of a step, to say how much of the hardware it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ds_kd.parallel import engines
from ds_kd.parallel.tensor import count_numbers

#: A part of a GPU's name → its peak in bf16, dense, operations per second, from the vendor's data
#: sheets; the first that fits counts.
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)
#: Keys of the configuration of a mixture of experts, of which a token uses a few.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Operations:
    """The operations of a step of both models, without those of attention between tokens and
    without what activation checkpointing repeats: the model's, and a lower bound of the hardware's.

    Args:
        per_token: in the layers.
        per_label: in the heads, which see supervised tokens alone.
        peak: of this rank's accelerator, per second; None if it is not known.
    """

    per_token: float
    per_label: float
    peak: float | None = None

    def count(self, tokens: int, labels: int) -> float:
        """Return the operations for so many tokens, some of them supervised."""
        return self.per_token * tokens + self.per_label * labels


def count_operations(student: Any, teacher: Any | None, device: torch.device) -> Operations | None:
    """Return the operations of two Hugging Face models, whose weights may be sharded.

    Forward takes two for each weight and token, backward twice as many, or as many as forward if
    the weights are frozen (LoRA).

    Returns:
        None for a mixture of experts, of whose weights a token uses some.
    """
    models = [student] if teacher is None else [student, teacher]
    if any(getattr(m.config.get_text_config(), key, None) for m in models for key in _EXPERTS):
        return None
    trained = sum(_size(p) for p in student.parameters() if p.requires_grad)
    factor = 6.0 if 2 * trained > sum(map(_size, student.parameters())) else 4.0
    body, head = _count_weights(student)
    per_token, per_label = factor * body, factor * head
    if teacher is not None:
        body, head = _count_weights(teacher)
        per_token, per_label = per_token + 2.0 * body, per_label + 2.0 * head
    return Operations(per_token, per_label, _find_peak(student, device))


def _count_weights(model: Any) -> tuple[int, int]:
    """Return the weights of the layers and of the head; an embedding is looked up."""
    head = _size(model.get_output_embeddings().weight)
    tables = {id(m.weight): _size(m.weight) for m in _list_tables(model)}
    return sum(map(_size, model.parameters())) - sum(tables.values()), head


def _list_tables(model: Any) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _size(parameter: Any) -> int:
    """Return the numbers of a weight, which DeepSpeed counts in units of its dtype where it keeps
    them in 8 bits, with two more for each group."""
    kept = count_numbers(parameter)
    if not engines.is_quantized(parameter):
        return kept
    group = parameter.quantizer.config["group_size"]
    return round(kept / (1 / parameter.element_size() + 2 / group))


def _find_peak(model: Any, device: torch.device) -> float | None:
    """Return the peak of a rank's GPU for a model in bf16, if both are known."""
    if device.type != "cuda" or model.get_output_embeddings().weight.dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if part in name), None)
