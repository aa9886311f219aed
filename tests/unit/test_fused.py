"""The fused kernel against the plain loss, in Triton's interpreter on a CPU.

Triton decides when it is imported whether it interprets, so these tests run in a process of their
own, which `test_cuda_path.py` starts: TRITON_INTERPRET=1 python -m pytest tests/unit/test_fused.py
"""

from __future__ import annotations

import os

import pytest
import torch

from ds_kd.losses import chunked
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.losses.fused import forward_kl
from ds_kd.losses.head import Head, States
from ds_kd.losses.named.kl import ReverseKL
from tests.unit.test_distillation import case, evaluate, losses

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_cuda_path.py runs it"
)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """The dtypes of the student's logits that the kernel was called with."""
    calls = []
    run = forward_kl.distil_rows
    monkeypatch.setattr(
        forward_kl, "distil_rows", lambda *args: calls.append(args[0].dtype) or run(*args)
    )
    assert forward_kl.can_run(torch.device("cpu"), torch.float32)
    calls.clear()
    return calls


@pytest.mark.parametrize("extra", [(0, 0), (7, 3)])
@pytest.mark.parametrize("kd_ratio", [0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
def test_it_equals_the_plain_loss(temperature, kd_ratio, extra, interpreter, monkeypatch):
    """Over more than one block of columns, and with a student's head wider than the teacher's."""
    inputs = case(0, 9, 4200, extra=extra)
    loss, plain = losses(kd_ratio, temperature, 6, 4200 if any(extra) else None)
    value, sums, grads = evaluate(loss, *inputs)
    assert interpreter == [torch.float32] * 2
    exact = [part.double() if part.is_floating_point() else part for part in inputs]
    truth, _, true_grads = evaluate(plain, *exact)
    monkeypatch.setattr(chunked, "can_run", lambda *_: False)
    expected, expected_sums, _ = evaluate(loss, *inputs)
    assert len(interpreter) == 2
    # KL and entropy are differences of numbers of some tens: fp32 leaves a millionth of them.
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(sums, expected_sums, rtol=1e-6, atol=2e-5)
    # At T = 20 both use the series that is exact to 1e-5 where the models are near.
    assert value.item() == pytest.approx(truth.item(), rel=1e-6 if temperature < 8 else 2e-5)
    for got, want in zip(grads, true_grads, strict=True):
        assert (got - want).abs().max() <= 2e-6 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_16_bit_logits_are_read_as_they_are_and_the_gradient_is_rounded_once(
    temperature, interpreter
):
    hidden, weight, bias, labels, teacher, teacher_weight = case(1, 5, 300, torch.bfloat16)
    fused, plain = losses(0.4, temperature, 0)
    value, _, grads = evaluate(fused, hidden, weight, bias, labels, teacher, teacher_weight)
    assert interpreter == [torch.bfloat16]
    expected, _, expected_grads = evaluate(
        plain, hidden, weight, bias, labels, teacher, teacher_weight
    )
    assert value.item() == pytest.approx(expected.item(), rel=3e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).float().norm() <= 2**-7 * want.float().norm()


@pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
def test_equal_models_give_exactly_zero_and_no_gradient(temperature, interpreter):
    hidden, weight, bias, labels, *_ = case(2, 5, 300)
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(temperature=temperature), 1.0)
    leaf = hidden.requires_grad_()
    value, sums = loss(States(leaf, Head(weight, bias)), labels, States(hidden, Head(weight, bias)))
    value.backward()
    assert interpreter and value.item() == 0.0 == sums["kd_loss"].item()
    assert leaf.grad.abs().max().item() == 0.0


def test_a_scaled_head_is_fused_and_a_soft_cap_or_another_divergence_is_not(interpreter):
    inputs = case(3, 5, 40)
    fused, plain = losses(0.4, 2.0, 0)
    for scale, softcap, calls in ((0.25, None, 1), (1.0, 5.0, 0)):
        value, *_ = evaluate(fused, *inputs, scale=scale, softcap=softcap)
        expected, *_ = evaluate(plain, *inputs, scale=scale, softcap=softcap)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert len(interpreter) == calls
        interpreter.clear()

    class Own(KDLoss):
        """A user's variant, which the kernel does not know."""

    for divergence in (ReverseKL(), Own()):
        evaluate(DistillationLoss(MaskedCrossEntropy(), divergence, 0.4), *inputs)
    with torch.no_grad():  # validation wants more than the kernel finds
        fused(States(inputs[0], Head(inputs[1])), inputs[3], States(inputs[4], Head(inputs[5])))
    assert not interpreter


def test_a_kernel_that_fails_is_told_of_and_the_plain_code_runs(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(forward_kl, "distil_rows", fail)
    forward_kl._works.cache_clear()
    inputs = case(4, 5, 40)
    fused, plain = losses(0.4, 2.0, 0)
    assert evaluate(fused, *inputs)[0].item() == pytest.approx(evaluate(plain, *inputs)[0].item())
    assert "not fused, as the kernel fails here: no compiler\n" in capsys.readouterr().err
    forward_kl._works.cache_clear()
