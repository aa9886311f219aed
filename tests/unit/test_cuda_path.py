"""Properties of the path on CUDA that can be proved without a GPU: shapes, strides, and operations
counted on meta tensors."""

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

from benchmarks.plans.cost import Cost, count, make_step
from ds_kd.config.load import load
from ds_kd.data.collate import default_collater
from ds_kd.losses import chunked
from ds_kd.losses.buffers import Buffers
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import Divergence, KDLoss
from ds_kd.losses.head import Gradients, Head, States
from ds_kd.losses.named.mixed import JSD
from ds_kd.losses.named.top_k import TopK
from ds_kd.models import attention
from ds_kd.models.causal_lm import FrozenModel
from ds_kd.models.packs import varlen
from ds_kd.parallel.world import World
from ds_kd.recipe.data import attends_by_sample, build_loader, fill_for_gpu
from ds_kd.recipe.models import check_model
from tests import tiny
from tests.unit.test_packing import Engine, architecture


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


def compile_for_h100(kernel, kinds: list[str], fixed: list[Any], warps: int) -> Any:
    """Return a kernel compiled by Triton, which needs no GPU for that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        dict(zip(names, [*kinds, *["constexpr"] * len(fixed)], strict=True)),
        dict(zip(names[-len(fixed) :], fixed, strict=True)),
        {(k,): [["tt.divisibility", 16]] for k in range(8)},  # aligned rows, and a whole vocabulary
    )
    return compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps})


#: Two models' logits, labels and results; numbers of ids and strides.
GIVEN = ["*bf16", "*bf16", "*i64", "*fp32", "i32", "i32", "i32", "i32"]


@needs_triton
@pytest.mark.parametrize("options", [(True, True, False), (False, False, True)])
def test_the_kernel_compiles_for_an_h100_and_reads_16_bytes_at_a_time(
    options, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ds_kd.losses.fused import forward_kl, programs
    from ds_kd.losses.fused.kernel import distil_row

    fixed = [*options, len(forward_kl.COLUMNS), programs.BLOCK]
    made = compile_for_h100(distil_row, [*GIVEN, *["fp32"] * 3], fixed, programs.WARPS)
    assert made.asm["cubin"] and made.asm["ptx"].count("ld.global.v4") >= 4


@needs_triton
@pytest.mark.parametrize("name", ["tvd", "alpha_beta"])  # the shortest and the longest
def test_the_template_compiles_for_an_h100_and_reads_16_bytes_at_a_time(
    name, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ds_kd.losses.fused import programs, terms
    from ds_kd.losses.fused.terms_kernel import TERMS_BY_NAME, distil_row_by

    fixed = [TERMS_BY_NAME[name], True, name == "tvd", len(terms.COLUMNS), programs.BLOCK]
    made = compile_for_h100(distil_row_by, [*GIVEN, *["fp32"] * 5], fixed, programs.WARPS)
    assert made.asm["cubin"] and made.asm["ptx"].count("ld.global.v4") >= 6


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


def count_step(divergence: Divergence) -> Cost:
    """The cost of a step of 4,096 tokens of two small models in bf16."""
    loss = DistillationLoss(MaskedCrossEntropy(), divergence, 0.5)
    step = make_step(SHAPE, {**SHAPE, "hidden_size": 96}, loss, [4096], torch.bfloat16)
    return count(step, VOCAB, [4096])


@pytest.mark.parametrize(("temperature", "passes"), [(1.0, 2.5), (2.0, 3.5), (20.0, 3.5)])
def test_the_loss_of_a_gpu_makes_few_passes_over_the_logits(temperature, passes):
    """At T = 1 both models' bf16 logits are read twice, 4·1/2, and one bf16 gradient is written,
    1/2; at another T they are read once more, for what is logged at T = 1."""
    cost = count_step(KDLoss(temperature=temperature))
    assert cost.passes == passes and cost.waits == 0
    assert {*cost.by_operation} == {"ds_kd::distil_rows"}


def test_other_divergences_of_a_gpu_make_one_pass_more_or_are_plain():
    for temperature, passes in ((1.0, 3.5), (2.0, 4.5)):
        cost = count_step(JSD(temperature=temperature))
        assert cost.passes == passes and {*cost.by_operation} == {"ds_kd::distil_rows_by"}
    assert count_step(JSD(temperature=9.0)).passes > 20 < count_step(TopK()).passes


@pytest.mark.parametrize(("temperature", "at_least"), [(1.0, 20), (2.0, 30)])
def test_the_plain_code_makes_many_passes(temperature, at_least, monkeypatch):
    """The count above would see them."""
    monkeypatch.setattr(chunked, "can_fuse", lambda *_: False)
    assert at_least < count_step(KDLoss(temperature=temperature)).passes < 2 * at_least


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
    """Compute what `varlen_attn` says that it does: causal attention of each run of queries, whose
    last one is at the end of its run of keys."""
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
    """Counted in a real step on meta tensors, and the host waits for none."""
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(), 0.5)
    counted = []
    for samples in (2, 24):
        lengths = [4096 - 100 * (samples - 1), *[100] * (samples - 1)]
        tree = None if parents is None else [-1, *[0] * (samples - 1)]
        step = make_step(SHAPE, SHAPE, loss, lengths, torch.bfloat16, tree)
        with Calls() as calls:
            cost = count(step, VOCAB, lengths)
        assert len(calls.of("torch_attn._varlen_attn.default")) == 2 * SHAPE["num_hidden_layers"]
        counted.append((cost.launches, cost.waits))
    assert counted[0] == counted[1] and counted[0][1] == 0


@pytest.mark.parametrize("name", ["llama", "mistral"])  # the latter with a window
def test_a_padded_batch_on_a_gpu_asks_the_device_nothing(name):
    """transformers' attention asks whether a row is a pack; results are the same."""
    guide = load(Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml", [])
    kinds = [World(0, 1, torch.device(kind), "gloo") for kind in ("cpu", "cuda")]
    assert [attends_by_sample(guide, world) for world in kinds] == [False, True]
    model, batch = architecture(name), default_collater(tiny.samples(4))
    found, waits = [], []
    for by_sample in (False, True):
        attention.attend_by_sample(model, by_sample)
        with Calls() as calls:
            found.append(FrozenModel(model)(batch))
        waits.append(len(calls.of("aten._local_scalar_dense.default")))
    assert waits[1] == 0 < waits[0] and torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "extra", "stays"), [("llama", {}, True), ("phimoe", {"sliding_window": 4}, False)]
)
def test_a_model_that_our_attention_would_compute_wrongly_keeps_its_own(name, extra, stays):
    """Phi-MoE's window lives in the mask alone; nothing is packed, and nothing refused."""
    guide = load(Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml", [])
    model = architecture(name, **extra)
    attention.attend_by_sample(model)
    check_model(guide, guide.model, Engine(model), World(0, 1, torch.device("cpu"), "gloo"))
    assert attention.is_by_sample(model) == stays


def test_a_gpus_loader_has_the_next_step_ready_in_pinned_memory():
    """The order stays that of a CPU's loader; what the section sets stays too."""
    rows = [
        {"input_ids": [k, k + 1], "labels": [k + 1, -100], "sample_id": str(k)} for k in range(48)
    ]
    guide = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
    cfg = load(guide, ["step_scheduler.global_batch_size=8", "step_scheduler.local_batch_size=1"])
    found = {}
    for kind in ("cpu", "cuda"):
        world = World(0, 1, torch.device(kind), "gloo")
        found[kind], _ = build_loader(cfg, rows, cfg.dataloader, world, True)
    cpu, cuda = found.values()
    assert (cpu.num_workers, cpu.pin_memory) == (0, False)
    assert cuda.pin_memory and cuda.num_workers * cuda.prefetch_factor >= 8
    cuda.pin_memory = False  # it cannot be done here
    ids = [[batch["sample_ids"] for batch in loader] for loader in (cpu, cuda)]
    assert ids[0] == ids[1] and len(ids[0]) == 48

    assert fill_for_gpu({"num_workers": 0, "pin_memory": False}, 8) == {
        "num_workers": 0, "pin_memory": False,
    }  # fmt: skip
    assert fill_for_gpu({"num_workers": 3, "prefetch_factor": None}, 8)["prefetch_factor"] == 3


def test_flash_attention_is_told_where_the_samples_of_a_pack_are(tmp_path):
    """A stand-in takes its place, as it needs a GPU; it finds the samples by what it is told."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    tiny.llama(tmp_path, seed=1)
    lengths, told = [5, 1, 9], []
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    batch = {
        "input_ids": torch.arange(15)[None] % 7, "position_ids": positions,
        "segment_lengths": lengths, "supervised": torch.arange(15),
    }  # fmt: skip

    def flash(module, query, key, value, mask, *, cu_seq_lens_q, scaling, **kwargs):
        told.append((kwargs["max_length_q"], kwargs["max_length_k"], mask))
        runs = varlen.Runs(cu_seq_lens_q, kwargs["cu_seq_lens_k"], 0, 0, None)
        parts = (part[0].transpose(0, 1) for part in (query, key, value))
        return launch_by_runs(*parts, runs, -1, scaling)[None], None

    known = dict(AttentionInterface._global_mapping)
    found = []
    try:
        AttentionInterface.register("flash_attention_2", flash)
        for kind in ("by sample", "flash"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path)
            if kind == "flash":
                model.config._attn_implementation = "flash_attention_2"
            else:
                attention.attend_by_sample(model)
            found.append(FrozenModel(model)(batch))
    finally:
        AttentionInterface._global_mapping.clear()
        AttentionInterface._global_mapping.update(known)
    assert {(a, b) for a, b, _ in told} == {(9, 9)} and all(mask is None for *_, mask in told)
    assert torch.allclose(*found, atol=1e-5)
