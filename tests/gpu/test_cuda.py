"""Tests that only a GPU can decide: same numbers, no waiting for the host, the real command over
NCCL."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plans import predict
from ds_kd.losses import chunked
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.losses.fused import chunk, forward_kl
from ds_kd.losses.head import Head, States
from ds_kd.models import causal_lm
from ds_kd.models.attention import Segments, attend_by_sample
from ds_kd.models.packs import varlen
from ds_kd.recipe.tuning.kernels import use_liger_kernels
from tests import tiny
from tests.e2e.test_run import kd
from tests.unit.test_distillation import case, evaluate, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


TEMPLATE = ["reverse_kl", "tvd", "jsd", "skew_forward", "skew_reverse", "alpha_beta"]


def on_gpu(inputs):
    return [tensor.cuda() for tensor in inputs]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunked_equals_plain_on_cuda(temperature):
    inputs = on_gpu(case(0, 300, 1000))
    chunked, plain = losses(0.5, temperature, 64)
    value, sums, grads = evaluate(chunked, *inputs)
    expected, expected_sums, expected_grads = evaluate(plain, *inputs)
    assert torch.allclose(value, expected, rtol=1e-5) and torch.allclose(
        sums, expected_sums, rtol=1e-4
    )
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_bf16_on_cuda_stays_near_fp32():
    inputs = on_gpu(case(1, 512, 2000, torch.bfloat16))
    exact = [t.float() if t.is_floating_point() else t for t in inputs]
    chunked, plain = losses(0.5, 1.0, 128)
    truth, got = evaluate(plain, *exact), evaluate(chunked, *inputs)
    assert abs(got[0] / truth[0] - 1.0) < 0.02
    for mine, want in zip(got[2], truth[2], strict=True):
        assert (mine.float() - want).norm() < 0.02 * want.norm()


def test_the_loss_never_waits_for_the_gpu():
    hidden, weight, _, labels, teacher, teacher_weight = on_gpu(case(2, 300, 1000))
    leaf, head = hidden.requires_grad_(), weight.requires_grad_()
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(chunk_size=64), 0.5)
    # The kernel is tried once before its first use, and its numbers are looked at.
    assert forward_kl.can_run(leaf.device, leaf.dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(States(leaf, Head(head)), labels, States(teacher, Head(teacher_weight)))[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", TEMPLATE)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_templates_divergences_equal_the_plain_code_on_cuda(name, temperature, monkeypatch):
    """Over two blocks of columns and with heads of different width; one kernel, no waits."""
    divergence = predict.make_loss(name, temperature).divergence
    inputs = on_gpu(case(3, 70, 5003, extra=(7, 3)))
    loss = DistillationLoss(MaskedCrossEntropy(), divergence, 0.4, vocab_size=5003)
    assert chunk.can_fuse(divergence, inputs[0].device, torch.float32)
    value, sums, grads = evaluate(loss, *inputs)
    monkeypatch.setattr(chunked, "can_fuse", lambda *_: False)
    expected, expected_sums, expected_grads = evaluate(loss, *inputs)
    assert torch.allclose(value, expected, rtol=1e-5)
    assert torch.allclose(sums, expected_sums, rtol=1e-4, atol=1e-3)
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()

    head, other = Head(inputs[1], inputs[2]), Head(inputs[5])
    student = States(inputs[0].requires_grad_(), head)
    monkeypatch.undo()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(student, inputs[3], States(inputs[4], other))[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_are_used(dtype):
    """A GPU on which one is refused is slow, and says why on stderr."""
    here = torch.device("cuda", torch.cuda.current_device())
    assert forward_kl.can_run(here, dtype)
    assert varlen._works(here, dtype)


@pytest.mark.parametrize("parents", [None, [-1, 0, 0, -1]])
def test_one_launch_for_a_pack_equals_its_samples_in_fp32(parents, tmp_path):
    """Hidden states and gradients of a model of several layers; a sample of a shared beginning is
    the path from its root."""
    from transformers import AutoModelForCausalLM

    path, lengths = tiny.llama(tmp_path / "model", hidden=128), [6, 9, 3, 20]
    ids = torch.randint(3, tiny.VOCAB, (1, sum(lengths)), generator=torch.manual_seed(0)).cuda()
    paths = [[0], [1], [2], [3]] if parents is None else [[0, 1], [0, 2], [3]]
    parts = ids[0].split(lengths)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).cuda()
        attend_by_sample(model)
        if dtype == torch.bfloat16:  # the pack, in one launch a layer
            above = [0, 0, 0, 0] if parents is None else [0, 6, 6, 0]
            places = [
                at + n for at, length in zip(above, lengths, strict=True) for n in range(length)
            ]
            hidden = (
                model.model(
                    ids,
                    position_ids=torch.tensor([places], device="cuda"),
                    segments=Segments(lengths, parents),
                    use_cache=False,
                )
                .last_hidden_state[0]
                .split(lengths)
            )
            rows = [torch.cat([hidden[n] for n in each]) for each in paths]
        else:
            rows = [
                model.model(torch.cat([parts[n] for n in each])[None]).last_hidden_state[0]
                for each in paths
            ]
        weights = torch.randn(20, 128, generator=torch.manual_seed(1)).cuda()
        sum((row.float() * weights[: len(row)]).sum() for row in rows).backward()
        gradients = [each.grad.float() for each in model.model.layers.parameters()]
        found[dtype] = [row.float().detach() for row in rows] + gradients
    for got, want in zip(*found.values(), strict=True):
        assert (got - want).norm() < 0.15 * want.norm()  # 0.08 is rounding


def test_a_compiled_layer_takes_packs_of_any_lengths_in_one_launch_each(tmp_path):
    """Without a break, and with the numbers of plain layers."""
    from torch._dynamo.utils import counters
    from transformers import AutoModelForCausalLM

    path = tiny.llama(tmp_path / "model", hidden=128)
    models = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda()
        attend_by_sample(model)
        models.append(causal_lm.FrozenModel(model))
    torch._dynamo.reset()
    counters.clear()
    causal_lm.compile_layers(models[1].model)
    for lengths in ([6, 9, 3, 20], [30, 2], [11, 12, 13, 5, 4]):
        ids = torch.arange(sum(lengths), device="cuda")[None] % tiny.VOCAB
        places = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]
        batch = {
            "input_ids": ids, "position_ids": places, "segment_lengths": lengths,
            "supervised": torch.arange(sum(lengths), device="cuda"),
        }  # fmt: skip
        want, got = (model(batch).float() for model in models)
        assert (got - want).norm() < 0.05 * want.norm()
    assert not counters["graph_break"]


def test_ligers_kernels_compute_what_transformers_does(tmp_path):
    """In fp32, through a wrapped model as in a run: hidden states and gradients."""
    pytest.importorskip("liger_kernel")
    from transformers import AutoModelForCausalLM

    path, found = tiny.llama(tmp_path / "model", hidden=128), []
    ids = torch.randint(3, tiny.VOCAB, (2, 20), generator=torch.manual_seed(0)).cuda()
    batch = {"input_ids": ids, "supervised": torch.arange(3, 40, 2, device="cuda")}
    for is_replaced in (False, True):  # the rotary positions of the class are replaced last
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()
        if is_replaced:
            assert use_liger_kernels(model) == ""
        module = causal_lm.FrozenModel(model)
        model.requires_grad_(True)
        hidden = module.hidden(batch)
        weights = torch.randn(hidden.shape, generator=torch.manual_seed(1)).cuda()
        (hidden * weights).sum().backward()
        gradients = [each.grad for each in model.model.layers.parameters()]
        found.append([hidden.detach(), *gradients])
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("packs", [0, 64])
def test_the_real_command_on_one_gpu(tmp_path, packs):
    import json

    tiny.llama(tmp_path / "student", seed=1)
    tiny.llama(tmp_path / "teacher", layers=3, hidden=64, tie=False, seed=2)
    rows = [
        {"context": f"w{i} w5", "question": "w7", "answers": {"text": [f"w{i} w3"]}}
        for i in range(22)
    ]
    (tmp_path / "squad.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    result = kd(
        f"model.pretrained_model_name_or_path={tmp_path / 'student'}",
        f"teacher_model.pretrained_model_name_or_path={tmp_path / 'teacher'}",
        f"dataset.dataset_name={tmp_path / 'squad.jsonl'}",
        f"checkpoint.checkpoint_dir={tmp_path / 'run'}",
        "validation_dataset=null",
        "step_scheduler.global_batch_size=4",
        "step_scheduler.max_steps=3",
        "step_scheduler.num_epochs=5",
        f"packed_sequence.packed_sequence_size={packs}",
        ranks=1,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 rank(s) on cuda" in result.stdout and "step 3/3" in result.stdout


def test_the_clock_times_the_device_without_waiting_for_it():
    from ds_kd.train.clock import Clock

    clock, work = Clock(torch.device("cuda")), torch.ones(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with clock.part("teacher"):
            for _ in range(20):
                work = work @ work
        first = clock.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    # A time that had not passed when it was first read is told the second time.
    assert first.get("teacher", 0) + clock.read().get("teacher", 0) > 0
