"""What can be proved of the path on CUDA without a GPU: shapes, strides, and operations counted on
meta tensors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.count import Cost, count, make_step
from ds_kd.losses import chunked
from ds_kd.losses.buffers import Buffers
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.losses.head import Gradients, Head, States
from ds_kd.models import attention, varlen


class Calls(TorchDispatchMode):
    """Records each operation of torch with its arguments, by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, dict[Any, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.made.append((str(func), {**dict(enumerate(args)), **kwargs}))
        return func(*args, **kwargs)

    def of(self, name: str) -> list[dict[Any, Any]]:
        """Return the arguments of each call of an operation."""
        return [arguments for made, arguments in self.made if made == name]


@pytest.mark.parametrize("vocab", [151_665, 151_936])  # Qwen2.5: shared ids, and a whole head
def test_rows_of_a_gpus_products_are_aligned_whatever_the_vocabulary_is(vocab):
    """Off a CPU; meta tensors have the strides of a GPU's."""
    meta = torch.device("meta")
    states = States(
        torch.empty(5, 8, dtype=torch.bfloat16, device=meta),
        Head(torch.empty(vocab, 8, dtype=torch.bfloat16, device=meta)),
    )
    buffers = Buffers(5, torch.float32, meta)
    with Calls() as calls:
        logits = states.logits(slice(0, 5), vocab, "student", buffers)
        Gradients(states, torch.float32, [True, False, False]).add(
            slice(0, 5), torch.empty_like(logits), logits, torch.ones(5, device=meta), buffers
        )
    assert logits.shape == (5, vocab)
    first, second = calls.of("aten.mm.out")
    assert first["out"].stride(0) * 2 % 16 == 0 and second[0].stride(0) * 2 % 16 == 0


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton (pip install --no-deps -r tests/requirements-triton.txt)",
)


@needs_triton
@pytest.mark.parametrize("options", [(True, False), (False, True)])
def test_the_kernel_compiles_for_an_h100_and_reads_16_bytes_at_a_time(
    options, tmp_path, monkeypatch
):
    """Triton's compiler and its assembler need no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ds_kd.losses.fused import forward_kl
    from ds_kd.losses.fused.kernel import distil_row

    kinds = ["*bf16", "*bf16", "*i64", "*fp32", "i32", "i32", "i32", "i32", "fp32", "fp32", "fp32"]
    kinds += ["constexpr"] * (len(distil_row.arg_names) - len(kinds))
    fixed = [*options, len(forward_kl.COLUMNS), forward_kl._BLOCK]
    source = ASTSource(
        distil_row,
        dict(zip(distil_row.arg_names, kinds, strict=True)),
        dict(zip(distil_row.arg_names[-4:], fixed, strict=True)),
        {(k,): [["tt.divisibility", 16]] for k in range(8)},  # aligned rows, and a whole vocabulary
    )
    made = compile(source, GPUTarget("cuda", 90, 32), {"num_warps": forward_kl._WARPS})
    assert made.asm["cubin"] and made.asm["ptx"].count("ld.global.v4") >= 4


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernel itself")
def test_the_kernel_equals_the_plain_loss_in_tritons_interpreter():
    file = Path(__file__).with_name("test_fused.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


VOCAB = 32_000
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


def count_step(temperature: float) -> Cost:
    """The cost of a step of 4,096 tokens of two small models in bf16."""
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(temperature=temperature), 0.5)
    step = make_step(SHAPE, {**SHAPE, "hidden_size": 96}, loss, [4096], torch.bfloat16)
    return count(step, VOCAB, 4096)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
def test_the_loss_of_a_gpu_makes_two_and_a_half_passes_over_the_logits(temperature):
    """Both models' bf16 logits read twice, 4·1/2, and one bf16 gradient written, 1/2."""
    cost = count_step(temperature)
    assert cost.passes == 2.5 and cost.waits == 0
    assert {*cost.by_operation} == {"ds_kd::distil_rows"}


@pytest.mark.parametrize(("temperature", "at_least"), [(1.0, 20), (2.0, 30)])
def test_the_plain_code_makes_many_passes(temperature, at_least, monkeypatch):
    """The count above would see them."""
    monkeypatch.setattr(chunked, "can_run", lambda *_: False)
    assert at_least < count_step(temperature).passes < 2 * at_least


def test_the_heads_gradient_is_summed_in_fp32_by_the_products_themselves():
    hidden = torch.empty(5, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(300, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(chunk_size=2), 0.5)
    labels = torch.empty(5, dtype=torch.int64, device="meta")
    with Calls() as calls:
        value, _ = loss(States(hidden, Head(weight)), labels, States(hidden, Head(weight)))
        value.backward()
    sums = calls.of("aten.addmm.dtype_out")
    assert [each["out"].dtype for each in sums[-3:]] == [torch.float32] * 3
    # Beside them its numbers are read once more: times the outer gradient, rounded on the way.
    assert [each["out"].dtype for each in calls.of("aten.mul.out")] == [torch.bfloat16]


def launch_by_runs(query, key, value, runs, back, scale):
    """What `varlen_attn` says that it does: causal attention of each run of queries, whose last one
    is at the end of its run of keys."""
    out = []
    starts = [torch.as_tensor(each).tolist() for each in (runs.queries, runs.keys)]
    for q, end_q, k, end_k in zip(starts[0], starts[0][1:], starts[1], starts[1][1:], strict=False):
        at = torch.arange(end_k - k)[-(end_q - q) :, None]
        other = torch.arange(end_k - k)
        mask = (other <= at) & (other >= (at - back if back >= 0 else 0))
        parts = [query[q:end_q], key[k:end_k], value[k:end_k]]
        parts = [part.transpose(0, 1)[None] for part in parts]
        got = F.scaled_dot_product_attention(*parts, mask, scale=scale, enable_gqa=True)
        out.append(got[0].transpose(0, 1))
    return torch.cat(out)


TREES = {
    "samples": ([5, 1, 9, 3], None),
    "one beginning": ([6, 2, 3, 1], [-1, 0, 0, 0]),
    "nested, two trees": ([4, 3, 2, 2, 1, 5, 7], [-1, 0, 1, 1, 0, -1, 5]),
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", TREES)
def test_one_launch_for_a_pack_has_the_queries_and_keys_of_every_sample(name, window, monkeypatch):
    """Forward and backward, against the calls sample by sample that a CPU makes."""
    lengths, parents = TREES[name]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, heads, sum(lengths), 8, generator=generator) for heads in (4, 2, 2)]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    found = []
    for at_once in (False, True):
        monkeypatch.setattr(varlen, "can_run", lambda *_, at_once=at_once: at_once)
        monkeypatch.setattr(varlen, "_launch", launch_by_runs)
        parts = [leaf.clone().requires_grad_() for leaf in leaves]
        segments = attention.Segments(lengths, parents)
        out, _ = attention.sdpa_by_sample(
            module, *parts, None, segments, sliding_window=window, scaling=0.3
        )
        out.square().sum().backward()
        found.append([out, *(part.grad for part in parts)])
    for one_by_one, together in zip(*found, strict=True):
        assert one_by_one.shape == together.shape
        assert (one_by_one - together).abs().max() < 1e-5


@pytest.mark.parametrize("parents", [None, "shared"])
def test_launches_do_not_depend_on_the_number_of_samples(parents):
    """Of a real step on meta tensors, and the host waits for none."""
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(), 0.5)
    counted = []
    for samples in (2, 24):
        lengths = [4096 - 100 * (samples - 1), *[100] * (samples - 1)]
        tree = None if parents is None else [-1, *[0] * (samples - 1)]
        step = make_step(SHAPE, SHAPE, loss, lengths, torch.bfloat16, tree)
        with Calls() as calls:
            cost, _ = count(step, VOCAB, 4096)
        assert len(calls.of("torch_attn._varlen_attn.default")) == 2 * SHAPE["num_hidden_layers"]
        counted.append((cost.launches, cost.waits))
    assert counted[0] == counted[1] and counted[0][1] == 0
