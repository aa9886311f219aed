"""Count the bytes that ranks hand over to each other, for benchmarks and for tests."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_COLLECTIVES = {
    "all_gather_into_tensor": "gathered",
    "all_gather_coalesced": "gathered",
    "reduce_scatter_tensor": "reduced",
}


@contextmanager
def count_bytes() -> Iterator[defaultdict[str, Counter[tuple[int, ...]]]]:
    """Count the bytes of DeepSpeed's collectives inside this block: by kind, `gathered` or
    `reduced`, and by the ranks that take part."""
    import torch
    import torch.distributed as dist
    from deepspeed.comm import comm

    counts: defaultdict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    plain = {name: getattr(comm.cdb, name) for name in _COLLECTIVES}

    def watch(name: str) -> Any:
        def count(*args: Any, group: Any = None, **named: Any) -> Any:
            members = dist.get_process_group_ranks(group or dist.group.WORLD)
            given = [*args, *named.values()]
            lists = [each if isinstance(each, list) else [each] for each in given]
            # The largest of the arguments is what all ranks have together.
            sizes = [sum(t.nbytes for t in e if isinstance(t, torch.Tensor)) for e in lists]
            counts[_COLLECTIVES[name]][tuple(members)] += max(sizes)
            return plain[name](*args, group=group, **named)

        return count

    for name in plain:
        setattr(comm.cdb, name, watch(name))
    try:
        yield counts
    finally:
        for name in plain:
            delattr(comm.cdb, name)
