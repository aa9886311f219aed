"""Count what one micro-batch costs a GPU, without one: the real code runs on meta tensors, which
have shapes and no numbers, and every operation of torch is recorded.

    python benchmarks/count.py                       Llama 3.2 3B → 1B, one sample of 4,096 tokens
    python benchmarks/count.py --length 8192 --temperature 2 --divergence jsd
    python benchmarks/count.py --samples 24         the same tokens, as a pack of so many samples

A pass is one reading or writing of `[tokens, vocabulary]` in fp32; matrix products are counted by
their operations instead. Launches are operations that are not views: a kernel each, about.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
_ONLY_WRITTEN = ("aten::copy_", "aten::zero_", "aten::fill_")
#: Operations that touch few numbers of their first argument, or none.
_TOUCH_FEW = ("aten::gather", "aten::scatter_add_", "aten::new_full", "aten::new_zeros")
#: How often a kernel of our own reads its arguments, by name; it writes over the first once.
_READS = {
    "ds_kd::distil_rows": {"student": 2, "teacher": 2},
    "ds_kd::distil_rows_by": {"student": 3, "teacher": 3},
}


class Cost(TorchDispatchMode):
    """Records what the operations inside it cost.

    Args:
        vocab: the last dimension of tensors whose readings and writings count as passes.
        tokens: rows of `[tokens, vocab]`.
    """

    def __init__(self, vocab: int, tokens: int):
        super().__init__()
        self.vocab, self._of_pass = vocab, 4 * tokens * vocab
        self.bytes = self.launches = self.waits = 0
        self.by_operation: Counter[str] = Counter()

    @property
    def passes(self) -> float:
        """Readings and writings of `[tokens, vocab]` in fp32, but by matrix products."""
        return sum(self.by_operation.values()) / self._of_pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.name == "aten::_local_scalar_dense":  # the host waits for a number
            self.waits += 1
        returned = [part.alias_info for part in schema.returns]
        is_view = all(info is not None and not info.is_write for info in returned)
        if (returned and is_view) or "empty" in schema.name:
            return out  # nothing is read or written
        self.launches += 1
        given = dict(zip([part.name for part in schema.arguments], args, strict=False))
        given |= kwargs or {}
        moved = [
            (value, self._times(schema, part, value))
            for part in schema.arguments
            if isinstance(value := given.get(part.name), Tensor)
            and not (part.name == "self" and schema.name in _TOUCH_FEW)
        ]
        moved += [(part, 1) for part, info in zip(_flat(out), returned, strict=False) if not info]
        self.bytes += sum(times * part.numel() * part.element_size() for part, times in moved)
        if schema.name not in _PRODUCTS:
            wide = sum(
                times * part.numel() * part.element_size()
                for part, times in moved
                if part.ndim > 1 and part.shape[-1] == self.vocab
            )
            if wide:
                self.by_operation[schema.name] += wide
        return out

    @staticmethod
    def _times(schema: Any, argument: Any, value: Tensor) -> int:
        """Return how often an operation reads and writes an argument."""
        own = _READS.get(schema.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if own is not None:
            return own.get(argument.name, 1) + is_written
        is_read = not (argument.is_out or (is_written and schema.name in _ONLY_WRITTEN))
        return is_read + is_written


def _flat(out: Any) -> list[Tensor]:
    parts = out if isinstance(out, (tuple, list)) else [out]
    return [part for part in parts if isinstance(part, Tensor)]


def make_step(
    student: dict[str, Any],
    teacher: dict[str, Any],
    loss: Any,
    lengths: list[int],
    dtype: torch.dtype,
    parents: list[int] | None = None,
) -> Callable[[], None]:
    """Return one micro-batch of a step without engines, on meta tensors: the teacher's forward, the
    student's, and backward.

    Args:
        student, teacher: arguments of `LlamaConfig`.
        loss: the `DistillationLoss`.
        lengths: tokens of the samples of a pack, all of them supervised; of one, without packing.
        parents: of the nodes, where samples share their beginnings (`ds_kd.models.tree`).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from ds_kd.models import causal_lm
    from ds_kd.models.attention import attend_by_sample

    models = []
    for shape in (student, teacher):
        with torch.device("meta"):
            models.append(LlamaForCausalLM(LlamaConfig(**shape)).to(dtype))
        attend_by_sample(models[-1])
    learner, guide = causal_lm.Student(models[0], loss), causal_lm.FrozenModel(models[1])
    whole = torch.zeros(1, sum(lengths), dtype=torch.int64, device="meta")
    batch: dict[str, Any] = {
        "input_ids": whole,
        "supervised": whole[0],
        "supervised_labels": whole[0],
    }
    if len(lengths) > 1:
        batch |= {"position_ids": whole, "segment_lengths": lengths, "segment_parents": parents}

    def step() -> None:
        from ds_kd.losses.head import States

        value, _ = learner(batch, States(guide(batch), guide.head()))
        value.backward()

    return step


def _count_addmm(_: Any, a: Any, b: Any, *others: Any, **named: Any) -> int:
    """Return the operations of one `addmm` from its shapes; torch's own function does not take the
    form that has a dtype for its result."""
    return 2 * a[0] * a[1] * b[1]


def count(step: Callable[[], None], vocab: int, tokens: int) -> tuple[Cost, float]:
    """Return what a step costs, and the operations of its matrix products in TFLOP."""
    own = {torch.ops.aten.addmm: _count_addmm}
    with FlopCounterMode(display=False, custom_mapping=own) as flops, Cost(vocab, tokens) as cost:
        step()
    return cost, flops.get_total_flops() / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=1, help="of a pack of so many tokens")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--divergence", default="forward_kl", help="as kd_loss_fn.name")
    args = parser.parse_args()
    from gpu import HEADS, SHAPES, VOCABULARY

    from ds_kd.config.names import home_of
    from ds_kd.config.signatures import divergences_by_name
    from ds_kd.losses.chunked import DistillationLoss
    from ds_kd.losses.cross_entropy import MaskedCrossEntropy

    module, _, name = home_of(divergences_by_name()[args.divergence]).rpartition(".")
    divergence = getattr(importlib.import_module(module), name)(temperature=args.temperature)
    loss = DistillationLoss(MaskedCrossEntropy(), divergence, 0.5)
    common = {"vocab_size": VOCABULARY, "num_key_value_heads": 8, "tie_word_embeddings": True}
    student, teacher = (
        {**common, "num_attention_heads": HEADS[name], **SHAPES[name]}
        for name in ("student", "teacher")
    )
    each, more = divmod(args.length, args.samples)
    lengths = [each + (k < more) for k in range(args.samples)]
    step = make_step(student, teacher, loss, lengths, torch.bfloat16)
    cost, tflop = count(step, VOCABULARY, args.length)
    print(f"passes over [tokens, vocabulary]  {cost.passes:.1f}")
    for operation, moved in cost.by_operation.most_common():
        print(f"    {operation:30} {moved / cost._of_pass:.2f}")
    print(f"launches                          {cost.launches}")
    print(f"host waits                        {cost.waits}")
    print(f"GB read and written               {cost.bytes / 1e9:.0f}")
    print(f"TFLOP of matrix products          {tflop:.1f}")


if __name__ == "__main__":
    main()
