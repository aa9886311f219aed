"""The order of samples, and their distribution over ranks and micro-batches.

The order of global batches depends on (seed, epoch) alone, not on the number of ranks nor on the
size of a micro-batch. The position in the data is therefore one number, from which a run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

FILLER = -1
# Global batches among which samples of similar length are grouped: enough for little padding, few
# enough for each epoch to mix them differently.
_GROUPED_BATCHES = 16


class GlobalBatchSampler(Sampler[list[int]]):
    """Micro-batches (lists of indices) of one rank.

    Global batch `k` is `order[k·G : (k+1)·G]`; its micro-batch `m` on rank `r` is the `r`-th run of
    `L` samples in its `m`-th run of `L·W`. The last, partial global batch is kept. Every rank gets
    the same number of micro-batches, and a rank without a sample left gets `[FILLER]`, because
    ZeRO-3's collectives need every rank in every forward.

    Args:
        num_samples: samples in the data set.
        global_batch_size: G, samples per optimizer step over all ranks.
        local_batch_size: L, samples per micro-batch and rank.
        rank, world_size: r and W.
        shuffle: permute the samples anew in each epoch; otherwise keep the data set's order.
        seed: seed of the permutations.
        drop_last: leave out the last, partial global batch.
        lengths: tokens of each sample; if given, samples of similar length share a micro-batch.

    Raises:
        ValueError: no samples, or G is not a multiple of L·W.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        local_batch_size: int,
        rank: int,
        world_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
    ):
        if min(global_batch_size, local_batch_size, world_size) < 1:
            raise ValueError(
                f"global_batch_size {global_batch_size}, local_batch_size {local_batch_size} and "
                f"the number of ranks {world_size} must be at least 1"
            )
        if global_batch_size % (local_batch_size * world_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of "
                f"local_batch_size {local_batch_size} × {world_size} ranks"
            )
        usable = num_samples - num_samples % global_batch_size if drop_last else num_samples
        if usable < 1:
            raise ValueError(f"{num_samples} samples make no global batch of {global_batch_size}")
        self.num_samples, self.usable = num_samples, usable
        self.global_batch_size, self.local_batch_size = global_batch_size, local_batch_size
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed, self.lengths = shuffle, seed, lengths
        self._epoch, self._step = 0, 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.usable // self.global_batch_size)

    def seek(self, epoch: int, step_in_epoch: int) -> None:
        """Set the position at which the next `iter()` starts."""
        self._epoch, self._step = epoch, step_in_epoch

    def micro_batches(self, step_in_epoch: int) -> int:
        """Return the number of micro-batches of a step, the same on every rank."""
        left = min(self.usable - step_in_epoch * self.global_batch_size, self.global_batch_size)
        return -(-left // (self.local_batch_size * self.world_size))

    def order(self, epoch: int) -> list[int]:
        """Return the indices of an epoch in order, of all ranks."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if self.shuffle:
            order = torch.randperm(self.num_samples, generator=generator).tolist()[: self.usable]
        else:
            order = list(range(self.usable))
        return (
            order if self.lengths is None else self._group_by_length(order, self.lengths, generator)
        )

    def _group_by_length(
        self, order: list[int], lengths: Sequence[int], generator: torch.Generator
    ) -> list[int]:
        """Return `order` with similar lengths together: sorted within each global batch or, if
        samples are shuffled, within a window of several batches, which are then shuffled."""
        size = self.global_batch_size
        window = size * (_GROUPED_BATCHES if self.shuffle else 1)
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda i: -lengths[i])
            batches += [near[k : k + size] for k in range(0, len(near), size)]
        if self.shuffle:
            # A partial global batch stays where the arithmetic of steps expects it: at the end.
            whole = len(order) // size
            moved = torch.randperm(whole, generator=generator).tolist()
            batches = [batches[k] for k in moved] + batches[whole:]
        return [index for batch in batches for index in batch]

    def __iter__(self) -> Iterator[list[int]]:
        # The position is read here, as a generator's body runs only at its first `next`, which may
        # come after a later `seek`.
        return self._iterate_from(self._epoch, self._step)

    def _iterate_from(self, epoch: int, first: int) -> Iterator[list[int]]:
        order = self.order(epoch)
        width = self.local_batch_size * self.world_size
        for step in range(first, self.steps_per_epoch):
            batch = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
            for start in range(0, len(batch), width):
                mine = start + self.rank * self.local_batch_size
                yield batch[mine : mine + self.local_batch_size] or [FILLER]

    def __len__(self) -> int:
        return sum(self.micro_batches(step) for step in range(self.steps_per_epoch))


class WithFiller(Dataset):
    """A data set that also has a sample for `FILLER`: one token without a label or sample id.

    It adds exactly zero to the loss.
    """

    def __init__(self, dataset: Sequence[dict[str, Any]] | Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == FILLER:
            return {"input_ids": [0], "labels": [-100], "is_filler": True}
        return self.dataset[index]
