"""Record what one micro-batch costs a GPU, without one: the real code runs on meta tensors, which
have shapes and no numbers, and every operation of torch is counted.

A pass is one reading or writing of `[tokens, vocabulary]` in fp32; matrix products are counted by
their operations instead. Launches are operations that are not views: a kernel each, about. Between
products and other kernels of libraries a compiler can join operations: joined, each group reads
what it did not make itself once, and writes once what others read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
_ATTENTION = ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward")
#: Views whose schema does not say so.
_VIEWS = ("aten::_unsafe_view", "aten::_reshape_alias")
_ONLY_WRITTEN = ("aten::copy_", "aten::zero_", "aten::fill_")
#: Operations that touch few numbers of their first argument, or none.
_TOUCH_FEW = (
    "aten::gather", "aten::scatter_add_", "aten::new_full", "aten::new_zeros", "aten::embedding",
)  # fmt: skip
#: Number of times that a kernel of our own reads both models' logits at T = 1, by name; it reads
#: them once more at another T, and writes over the student's once.
_READS = {"ds_kd::distil_rows": 2, "ds_kd::distil_rows_by": 3}


@dataclass
class Totals:
    """Sums over the operations of a phase.

    Args:
        launches, waits: their number, and how often the host waits for a number.
        groups: launches, if all operations between two products are one.
        products: bytes that matrix products and attention read and write.
        rest: those of all other operations, one by one.
        joined: those of all other operations, joined between products.
        tflop, attention: 10¹² operations of products, and of attention.
    """

    launches: int = 0
    waits: int = 0
    groups: int = 0
    products: int = 0
    rest: int = 0
    joined: int = 0
    tflop: float = 0.0
    attention: float = 0.0


class Cost(TorchDispatchMode):
    """Records what the operations inside it cost.

    Args:
        vocab: the last dimension of tensors whose readings and writings count as passes.
        tokens: rows of `[tokens, vocab]`.
    """

    def __init__(self, vocab: int, tokens: int):
        super().__init__()
        self.vocab, self._of_pass = vocab, 4 * tokens * vocab
        self.phase = ""
        self.by_phase: defaultdict[str, Totals] = defaultdict(Totals)
        self.by_operation: Counter[str] = Counter()
        self._group, self._opened = 0, -1
        self._maker: dict[int, int] = {}  # group that made a memory, until others read it
        self._read: set[int] = set()  # memories that the group has read

    @property
    def passes(self) -> float:
        """Readings and writings of `[tokens, vocab]` in fp32, but by matrix products."""
        return sum(self.by_operation.values()) / self._of_pass

    @property
    def launches(self) -> int:
        return sum(part.launches for part in self.by_phase.values())

    @property
    def waits(self) -> int:
        return sum(part.waits for part in self.by_phase.values())

    @property
    def bytes(self) -> int:
        return sum(part.products + part.rest for part in self.by_phase.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema, totals = func._schema, self.by_phase[self.phase]
        if schema.name == "aten::_local_scalar_dense":  # the host waits for a number
            totals.waits += 1
        returned = [part.alias_info for part in schema.returns]
        is_view = all(info is not None and not info.is_write for info in returned)
        if (returned and is_view) or "empty" in schema.name or schema.name in _VIEWS:
            return out  # nothing is read or written
        totals.launches += 1

        given = dict(zip([part.name for part in schema.arguments], args, strict=False))
        given |= kwargs or {}
        moved = [
            (value, *self._times(schema, part, given))
            for part in schema.arguments
            if isinstance(value := given.get(part.name), Tensor)
            and not (part.name in ("self", "weight") and schema.name in _TOUCH_FEW)
        ]
        made = [part for part, info in zip(_flat(out), returned, strict=False) if not info]
        moved += [(part, 0, 1) for part in made]
        self._add(schema.name, totals, moved)
        return out

    def _add(self, name: str, totals: Totals, moved: list[tuple[Tensor, int, int]]) -> None:
        """Add an operation that has read and written tensors so many times."""
        size = sum((read + written) * _size(part) for part, read, written in moved)
        is_kernel = name in _PRODUCTS or name in _ATTENTION or name in _READS
        if is_kernel:
            self._group += 1
            self._read.clear()
        totals.groups += is_kernel or self._opened != self._group
        self._opened = self._opened if is_kernel else self._group
        if is_kernel and name not in _READS:
            totals.products += size
        else:
            totals.rest += size
            totals.joined += size if is_kernel else 0
        if name not in _PRODUCTS:
            wide = [each for each in moved if each[0].ndim > 1 and each[0].shape[-1] == self.vocab]
            count = sum((read + written) * _size(part) for part, read, written in wide)
            self.by_operation.update({name: count} if count else {})

        for part, read, written in moved:
            key = part.untyped_storage()._cdata
            if read and self._maker.get(key) != self._group:
                # Its group has written it for this one, once.
                totals.joined += _size(part) if self._maker.pop(key, None) is not None else 0
                totals.joined += 0 if is_kernel or key in self._read else _size(part)
                self._read.add(key)
            if written:
                self._maker.pop(key, None)
                self._maker.update({} if is_kernel else {key: self._group})

    @staticmethod
    def _times(schema: Any, argument: Any, given: dict[str, Any]) -> tuple[int, int]:
        """Return how often an operation reads and writes one of the arguments it was given."""
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if schema.name in _READS and argument.name in ("student", "teacher"):
            return _READS[schema.name] + (given["temperature"] != 1.0), int(is_written)
        is_read = not (argument.is_out or (is_written and schema.name in _ONLY_WRITTEN))
        return int(is_read), int(is_written)


def _size(part: Tensor) -> int:
    return part.numel() * part.element_size()


def _flat(out: Any) -> list[Tensor]:
    parts = out if isinstance(out, (tuple, list)) else [out]
    return [part for part in parts if isinstance(part, Tensor)]


Part = tuple[str, Callable[[], None]]


def make_step(
    student: dict[str, Any],
    teacher: dict[str, Any],
    loss: Any,
    lengths: list[int],
    dtype: torch.dtype,
    parents: list[int] | None = None,
) -> list[Part]:
    """Return one micro-batch of a step without engines, on meta tensors: the teacher's forward, the
    student's with the loss, and backward, by name.

    Args:
        student, teacher: arguments of `LlamaConfig`.
        loss: the `DistillationLoss`.
        lengths: tokens of the samples of a pack, all of them supervised. One sample is a pack too,
            as SDPA would go another way on meta tensors than it goes on a GPU.
        parents: of the nodes, where samples share their beginnings (`ds_kd.models.packs.tree`).
    """
    from ds_kd.losses.head import States
    from ds_kd.models import causal_lm

    learner = causal_lm.Student(make_model(student, dtype), loss)
    guide = causal_lm.FrozenModel(make_model(teacher, dtype))
    whole = torch.zeros(1, sum(lengths), dtype=torch.int64, device="meta")
    batch: dict[str, Any] = {
        "input_ids": whole, "supervised": whole[0], "supervised_labels": whole[0],
        "position_ids": whole, "segment_lengths": lengths, "segment_parents": parents,
    }  # fmt: skip
    found: list[Any] = []  # what a part leaves to the next

    def run_teacher() -> None:
        found.append(States(guide(batch), guide.head()))

    def run_student() -> None:
        found.append(learner(batch, found.pop())[0])

    return [
        ("teacher", run_teacher),
        ("student", run_student),
        ("backward", lambda: found.pop().backward()),
    ]


def make_model(shape: dict[str, Any], dtype: torch.dtype) -> Any:
    """Return a Llama on the meta device; `shape` are arguments of `LlamaConfig`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ds_kd.models.attention import attend_by_sample

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(dtype)
    attend_by_sample(model)
    return model


def _count_addmm(_: Any, a: Any, b: Any, *others: Any, **named: Any) -> int:
    """Return the operations of one `addmm` from its shapes; torch's own function does not take the
    form that has a dtype for its result."""
    return 2 * a[0] * a[1] * b[1]


def count(step: list[Part], vocab: int, lengths: list[int]) -> Cost:
    """Return what a step costs.

    Args:
        lengths: of its samples. Attention over half of each is counted, and twice as much in
            backward; not that of shared beginnings.
    """
    import torch.nn.attention.varlen

    cost = Cost(vocab, sum(lengths))
    pairs = sum(length**2 for length in lengths)

    def attend(query: Any, *_: Any, **named: Any) -> int:
        return 2 * query[1] * query[2] * pairs

    packets = torch.ops.torch_attn
    own = {
        torch.ops.aten.addmm: _count_addmm,
        packets._varlen_attn: attend,
        packets._varlen_attn_backward: lambda _, *rest, **named: 2 * attend(*rest, **named),
    }
    for name, part in step:
        cost.phase = name
        with FlopCounterMode(display=False, custom_mapping=own) as flops, cost:
            part()
        by_operation = flops.get_flop_counts()["Global"]
        attention = sum(n for key, n in by_operation.items() if "varlen" in str(key))
        cost.by_phase[name].tflop = (flops.get_total_flops() - attention) / 1e12
        cost.by_phase[name].attention = attention / 1e12
    return cost


def describe(cost: Cost) -> list[str]:
    """Return lines on one micro-batch."""
    lines = [f"passes over [tokens, vocabulary]  {cost.passes:.1f}"]
    for operation, moved in cost.by_operation.most_common():
        lines.append(f"    {operation:30} {moved / cost._of_pass:.2f}")
    parts = cost.by_phase.values()
    return [
        *lines,
        f"launches                          {cost.launches}",
        f"launches, joined                  {sum(p.groups for p in parts)}",
        f"host waits                        {cost.waits}",
        f"GB of products and attention      {sum(p.products for p in parts) / 1e9:.0f}",
        f"GB of all other operations        {sum(p.rest for p in parts) / 1e9:.0f}",
        f"GB of these, joined               {sum(p.joined for p in parts) / 1e9:.0f}",
        f"TFLOP of matrix products          {sum(p.tflop for p in parts):.1f}",
        f"TFLOP of attention                {sum(p.attention for p in parts):.1f}",
    ]
