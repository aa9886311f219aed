"""Buffers for the logits of one chunk."""

from __future__ import annotations

import torch
from torch import Tensor

# A row of 16-bit numbers whose start is a multiple of 16 bytes is read in full width by the matrix
# products of GPUs; others take two to five times as long. Some products want 128 bytes.
_ALIGNED = 64


class Buffers:
    """Tensors for one chunk by name, allocated on first use and reused for later chunks.

    Args:
        chunk: rows of every buffer.
        dtype: default dtype of a buffer.
        device: device of every buffer.
        keeps_products: logits may stay as the heads' products have rounded them, in the models'
            dtype; their reader takes any.
    """

    def __init__(
        self, chunk: int, dtype: torch.dtype, device: torch.device, keeps_products: bool = False
    ):
        self.chunk, self.dtype, self.device = chunk, dtype, device
        self.keeps_products = keeps_products
        self._made: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._smaller: dict[tuple[int, torch.dtype], Buffers] = {}

    def get(self, name: str, rows: int, vocab: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer `name` as `[rows, vocab]`, uninitialised."""
        key = (name, vocab, dtype or self.dtype)
        if key not in self._made:
            self._made[key] = torch.empty((self.chunk, vocab), dtype=key[2], device=self.device)
        return self._made[key][:rows]

    def like(self, name: str, logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer `name` in the shape of `logits`, uninitialised."""
        rows, vocab = logits.shape
        return self.get(name, rows, vocab, dtype)

    def for_product(self, name: str, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
        """Return the buffer `name` as `[rows, vocab]`, uninitialised, for a matrix product to read
        or write: off a CPU every row begins at a multiple of 64 numbers, whatever `vocab` is."""
        odd = 0 if self.device.type == "cpu" else -vocab % _ALIGNED
        return self.get(name, rows, vocab + odd, dtype)[:, :vocab]

    def of_block(self, rows: int, dtype: torch.dtype) -> Buffers:
        """Return the buffers for blocks of so many rows, which one block leaves to the next."""
        key = (rows, dtype)
        if key not in self._smaller:
            self._smaller[key] = Buffers(rows, dtype, self.device)
        return self._smaller[key]
