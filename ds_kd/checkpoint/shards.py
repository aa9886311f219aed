"""Write Hugging Face's safetensors shards, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ds_kd.files import give_usual_mode

_SHARD_BYTES = 5 * 10**9


class ShardWriter:
    """Writes tensors one at a time into Hugging Face safetensors shards, holding at most one shard.

    Args:
        directory: takes `model.safetensors`, or `model-0000i-of-0000n.safetensors` and the index.
        shard_bytes: largest size of a shard of several tensors.
    """

    def __init__(self, directory: Path, shard_bytes: int = _SHARD_BYTES):
        self.directory, self.shard_bytes = directory, shard_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.shard_bytes:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._held_bytes += size
        self._total += size

    def close(self) -> None:
        self._flush()
        if len(self._shards) == 1:
            self._part(0).replace(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            final = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(i).replace(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2), "utf-8"
        )

    def _part(self, i: int) -> Path:
        return self.directory / f"part-{i}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        part = self._part(len(self._shards))
        save_file(self._held, part, metadata={"format": "pt"})
        give_usual_mode(part)
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0
