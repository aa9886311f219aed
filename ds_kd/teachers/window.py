"""One pass of a teacher over several micro-batches, so that its sharded layers are gathered once.

The micro-batches are laid end to end in one row. Every layer is entered once, when ZeRO-3 gathers
it, and then computes the micro-batches one after the other, each in its own shape and with its own
attention: the result is that of separate passes. Only the row of hidden states between two layers
grows with the number of micro-batches; the large tensors inside a layer do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_kd.models.attention import Segments, attend_by_sample, is_by_sample

#: Hidden states of a token that exist at one time: before and after a layer, and those kept.
_COPIES = 3
#: Largest difference of a probe's hidden states, as a share of their norm: a GPU may sum the row of
#: several micro-batches in another order than that of one.
_TOLERANCE = {torch.float32: 1e-6}
_ROUGH_TOLERANCE = 2**-9


@dataclass(frozen=True)
class Window:
    """The number of micro-batches that one pass takes.

    Args:
        most: this many, or None for as many as `room` holds.
        room: bytes that their hidden states may take.
        width: bytes of a token's hidden state.
    """

    most: int | None
    room: int
    width: int

    def count(self, tokens: float) -> int:
        """Return the number of micro-batches of so many tokens each; the same on all ranks if
        `tokens` is."""
        if self.most is not None:
            return self.most
        return max(1, int(self.room / (_COPIES * self.width * max(1.0, tokens))))


@dataclass(frozen=True)
class Part:
    """A micro-batch in a row of several.

    Args:
        start: the place of its first token.
        rows, length: its own shape.
        total: tokens of the whole row.
        segments: the samples of a pack, or None.
    """

    start: int
    rows: int
    length: int
    total: int
    segments: Segments | None

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.rows * self.length)

    def cut(self, value: Any) -> Any:
        """Return this part of a layer's arguments, in the micro-batch's own shape. Values that do
        not belong to tokens, `[1, total, …]`, stay as they are."""
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.cut, value))
        if isinstance(value, dict):
            return {name: self.cut(each) for name, each in value.items()}
        if isinstance(value, Tensor) and value.shape[:2] == (1, self.total):
            return value[0, self.tokens].unflatten(0, (self.rows, self.length))
        return value


class Parts:
    """The micro-batches of a row, in the place of a pack's `Segments`."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts


def join(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return micro-batches as one row, `[1, tokens]`, which a model whose layers are divided
    (`divide_layers`) computes."""
    shapes = [batch["input_ids"].shape for batch in batches]
    total = sum(rows * length for rows, length in shapes)
    parts: list[Part] = []
    positions, all_rows, once = [], [], []
    start = 0
    for batch, (rows, length) in zip(batches, shapes, strict=True):
        segments, device = None, batch["input_ids"].device
        if "segment_lengths" in batch:
            segments = Segments(batch["segment_lengths"], batch.get("segment_parents"), device)
        parts.append(Part(start, rows, length, total, segments))
        here = batch.get("position_ids")
        if here is None:
            here = torch.arange(length, device=device).expand(rows, length)
        positions.append(here.reshape(1, -1))
        all_rows.append(batch["supervised"])
        once.append(batch.get("supervised_once", batch["supervised"]))
        start += rows * length

    # The last MLP is told the rows of each micro-batch, the rest those of the whole row.
    starts = [part.start for part in parts]
    joined = {
        "input_ids": torch.cat([batch["input_ids"].reshape(1, -1) for batch in batches], 1),
        "position_ids": torch.cat(positions, 1),
        "segments": Parts(parts),
        "supervised": torch.cat([r + s for r, s in zip(all_rows, starts, strict=True)]),
        "supervised_parts": once,
        "num_parts": batches[0].get("num_parts", 1),
    }
    if any("supervised_once" in batch for batch in batches):
        joined["supervised_once"] = torch.cat([r + s for r, s in zip(once, starts, strict=True)])
    return joined


def divide_layers(model: Any) -> bool:
    """Make every layer of an HF model compute the micro-batches of a row one after the other, and
    return whether it has layers and an attention for which that can be done."""
    attend_by_sample(model)
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [part for part in model.modules() if type(part).__name__ in names]
    if not layers or not is_by_sample(model):
        return False
    for layer in layers:
        layer.forward = functools.partial(_run_parts, layer.forward)
    return True


def _run_parts(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer on each micro-batch of a row, or as it is on anything else.

    Args:
        plain: the layer's forward, compiled or not.
    """
    joined = kwargs.get("segments")
    if not isinstance(joined, Parts):
        return plain(*args, **kwargs)
    del kwargs["segments"]
    out = rest = None
    for part in joined.parts:
        own = {} if part.segments is None else {"segments": part.segments}
        result = plain(*part.cut(args), **part.cut(kwargs), **own)
        states, *rest = result if isinstance(result, tuple) else (result,)
        if out is None:
            out = states.new_empty(1, part.total, *states.shape[2:])
        out[0, part.tokens] = states.flatten(0, 1)
    return (out, *rest) if rest else out


def agrees(engine: Any, device: torch.device) -> bool:
    """Return whether a pass over two micro-batches of a few tokens gives what two passes give, on
    this rank (a collective).

    Args:
        engine: DeepSpeed engine of a `FrozenModel` whose layers are divided.
    """
    vocab = engine.module.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows, length in ((2, 9), (1, 14)):
        ids = torch.randint(vocab, (rows, length), generator=generator)
        chosen = torch.arange(1, rows * length, 2)
        batches.append({"input_ids": ids.to(device), "supervised": chosen.to(device)})
    alone = torch.cat([engine(batch) for batch in batches]).float()
    joined = engine(join(batches)).float()
    limit = _TOLERANCE.get(engine.module.model.dtype, _ROUGH_TOLERANCE)
    return bool((joined - alone).norm() <= limit * alone.norm())
