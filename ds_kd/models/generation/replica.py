"""A whole copy of a sharded student, as a plain Hugging Face model that writes text.

ZeRO-3 gathers every layer for every new token. The copy is filled once before a generation, one
layer at a time and with adapters merged, and its memory is given back afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_kd.models import attention, lora
from ds_kd.parallel.engines import gather


class Replica:
    """The copy; outside of `fill` its weights take no memory.

    Args:
        student: the Hugging Face model in the student's engine.
        device: the rank's.
    """

    def __init__(self, student: Any, device: torch.device):
        self._student = student
        from transformers.initialization import no_init_weights

        config = copy.deepcopy(student.config)
        dtype = student.get_output_embeddings().weight.dtype
        if attention.is_by_sample(student):
            config.get_text_config()._attn_implementation = "sdpa"

        # A model's initialisation draws random numbers, which must not change dropout.
        with torch.random.fork_rng(), no_init_weights(), torch.device(device):
            self.model = type(student)._from_config(config, dtype=dtype)
        self.model.tie_weights()
        self.model.requires_grad_(False).eval()
        self._empty()

    @contextmanager
    def fill(self) -> Iterator[Any]:
        """Yield the model with the student's present weights (a collective)."""
        own, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        for name, parameters, value in lora.plain_weights(self._student):
            with gather(parameters):
                # DeepSpeed gathers into new memory and then lets go of it: the copy takes it over.
                # A weight that is not sharded is read where it is; nothing changes it meanwhile,
                # but for one from a disk, whose buffer the next one takes.
                is_lent = any(getattr(p, "nvme_swapper", None) is not None for p in parameters)
                own[name].data = value().to(self.model.device, copy=is_lent)
        for name, buffer in self._student.named_buffers():
            if name in buffers:
                buffers[name].copy_(buffer)
        try:
            yield self.model
        finally:
            self._empty()

    def _empty(self) -> None:
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()  # the keys and values of the texts too
