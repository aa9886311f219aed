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
from ds_kd.losses.fused import chunk, forward_kl, terms
from ds_kd.losses.head import Head, States
from ds_kd.losses.named.alpha_beta import AlphaBeta
from ds_kd.losses.named.kl import AdaptiveKL, ReverseKL
from ds_kd.losses.named.mixed import JSD, SkewForward, SkewReverse
from ds_kd.losses.named.overlap import TVD, Acceptance
from ds_kd.losses.named.top_k import TopK
from ds_kd.losses.weighted import Weighted
from tests.plain import PlainLoss
from tests.unit.test_distillation import case, evaluate, losses

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="test_cuda_path.py runs it"
)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """The dtypes of the student's logits that the kernels were called with."""
    calls = []

    def record(run):
        return lambda *args: calls.append(args[0].dtype) or run(*args)

    for place, name in ((forward_kl, "distil_rows"), (terms, "distil_rows_by")):
        monkeypatch.setattr(place, name, record(getattr(place, name)))
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
    monkeypatch.setattr(chunked, "can_fuse", lambda *_: False)
    expected, expected_sums, _ = evaluate(loss, *inputs)
    assert len(interpreter) == 2
    # KL and entropy are differences of numbers of some tens: fp32 leaves a millionth of them.
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(sums, expected_sums, rtol=1e-6, atol=2e-5)
    # At T = 20 both use the series that is exact to 1e-5 where the models are near.
    assert value.item() == pytest.approx(truth.item(), rel=1e-6 if temperature < 8 else 2e-5)
    for got, want in zip(grads, true_grads, strict=True):
        assert (got - want).abs().max() <= 2e-6 * max(1.0, want.abs().max().item())


OF_TEMPLATE = [
    (ReverseKL, {}),
    (TVD, {}),
    (JSD, {"beta": 0.3}),
    (SkewForward, {"skew": 0.2}),
    (SkewReverse, {"skew": 0.2}),
    (AlphaBeta, {}),
    (AlphaBeta, {"alpha": 1.5, "beta": 0.6}),
]
every_kind = pytest.mark.parametrize(("kind", "arguments"), OF_TEMPLATE)


@every_kind
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 0.4), (3.0, 1.0)])
def test_every_divergence_of_the_template_equals_its_definition(
    kind, arguments, temperature, kd_ratio
):
    """Values and the gradient of logits, in fp64 by autograd: over two blocks of columns, with a
    student's head that is wider than the teacher's."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(7, n, generator=generator) for n in (4203, 4200))
    labels = torch.randint(4203, (7,), generator=generator)
    divergence = kind(temperature=temperature, **arguments)
    leaf = student.double().requires_grad_()
    logs = [torch.log_softmax(z / temperature, -1) for z in (teacher.double(), leaf[:, :4200])]
    truth = temperature**2 * divergence.value(*logs)
    ce = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    ((1 - kd_ratio) * ce + kd_ratio * truth).sum().backward()

    assert terms.works(kind, torch.device("cpu"))
    values, gradient = chunk.distil(divergence, student, teacher, labels, kd_ratio)
    assert (values["kd_loss"][:, 0] / truth - 1).abs().max() < 1e-6
    assert torch.allclose(values["ce_loss"][:, 0].double(), ce, rtol=1e-6)
    assert (gradient - leaf.grad).abs().max() <= 2e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", [SkewReverse, AlphaBeta])
def test_a_divergence_of_the_template_has_the_sums_and_gradients_of_the_plain_code(
    kind, temperature, interpreter, monkeypatch
):
    """With heads of different width, in two chunks."""
    inputs = case(6, 9, 300, extra=(7, 3))
    loss = DistillationLoss(
        MaskedCrossEntropy(), kind(temperature=temperature, chunk_size=6), 0.4, vocab_size=300
    )
    assert terms.works(kind, torch.device("cpu"))
    interpreter.clear()
    value, sums, grads = evaluate(loss, *inputs)
    assert interpreter == [torch.float32] * 2
    monkeypatch.setattr(chunked, "can_fuse", lambda *_: False)
    expected, expected_sums, expected_grads = evaluate(loss, *inputs)
    assert len(interpreter) == 2
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(sums, expected_sums, rtol=1e-6, atol=2e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).abs().max() <= 4e-6 * max(1.0, want.abs().max().item())


@every_kind
def test_the_template_gives_exactly_zero_for_equal_models_and_is_finite_for_far_ones(
    kind, arguments, interpreter
):
    hidden, weight, bias, labels, *_ = case(6, 5, 300)
    bias[:9] = -torch.inf  # bars ids
    for scale in (1.0, -1e4):
        loss = DistillationLoss(MaskedCrossEntropy(), kind(temperature=3.0, **arguments), 1.0)
        leaf, head = hidden.clone().requires_grad_(), Head(weight, bias)
        interpreter.clear()
        value, _ = loss(States(leaf, head), labels, States(hidden * scale, head))
        value.backward()
        assert interpreter and torch.isfinite(leaf.grad).all()
        if scale == 1.0:
            assert value.item() == 0.0 == leaf.grad.abs().max().item()
        else:
            assert 0.0 < value.item() < torch.inf


def test_the_marks_of_the_classes_are_those_of_the_template():
    from ds_kd.losses.fused.terms_kernel import TERMS_BY_NAME

    assert {kind.name for kind, _ in OF_TEMPLATE} == {*TERMS_BY_NAME}
    assert all(vars(kind)["fuses"] for kind, _ in OF_TEMPLATE)


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


def test_a_scaled_head_is_fused_and_a_soft_cap_or_an_unknown_divergence_is_not(interpreter):
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

    several = Weighted([(0.5, KDLoss()), (0.5, ReverseKL())])
    sorting = [AdaptiveKL(), Acceptance(), TopK(k=5)]
    for divergence in (Own(), several, ReverseKL(temperature=9.0), *sorting):
        evaluate(DistillationLoss(MaskedCrossEntropy(), divergence, 0.4), *inputs)
    with torch.no_grad():  # validation wants more than the kernel finds
        fused(States(inputs[0], Head(inputs[1])), inputs[3], States(inputs[4], Head(inputs[5])))
    assert not interpreter


def test_a_kernel_that_fails_is_told_of_and_the_plain_code_runs(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no compiler\nmore")

    inputs = case(4, 5, 40)
    for place, name, check, divergence in (
        (terms, "distil_rows_by", terms.works, TVD(temperature=2.0)),
        (forward_kl, "distil_rows", forward_kl._works, KDLoss(temperature=2.0)),
    ):
        monkeypatch.setattr(place, name, fail)
        check.cache_clear()
        fused, plain = (
            kind(MaskedCrossEntropy(), divergence, 0.4) for kind in (DistillationLoss, PlainLoss)
        )
        expected = evaluate(plain, *inputs)[0].item()
        assert evaluate(fused, *inputs)[0].item() == pytest.approx(expected)
        assert "not fused, as the kernel fails here: no compiler\n" in capsys.readouterr().err
        check.cache_clear()
