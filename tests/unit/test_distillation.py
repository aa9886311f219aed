"""The chunked loss against the plain one: values, gradients, memory."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import Divergence, KDLoss
from ds_kd.losses.head import Gradients, Head, States
from ds_kd.losses.named.kl import ReverseKL
from ds_kd.losses.pair import find_top
from ds_kd.losses.scores import average
from tests.plain import PlainLoss


def case(seed, tokens, vocab, dtype=torch.float32, extra=(0, 0), masked=0.3):
    """(student hidden, weight, bias, labels, teacher hidden, teacher weight) at random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < masked] = -100
    hidden, teacher = 6, 10
    return (
        normal(tokens, hidden),
        normal(vocab + extra[0], hidden),
        normal(vocab + extra[0]),
        labels,
        normal(tokens, teacher),
        normal(vocab + extra[1], teacher),
    )


def evaluate(loss, hidden, weight, bias, labels, teacher, teacher_weight, scale=1.0, softcap=None):
    """(value, sums, gradients) of the loss times 3."""
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    if teacher is not None:
        teacher = States(teacher, Head(teacher_weight, None, 1.0 / scale, softcap))
    student = States(leaves[0], Head(leaves[1], leaves[2], scale, softcap))
    value, sums = loss(student, labels, teacher)
    (3.0 * value).backward()
    assert all(not part.requires_grad for part in sums.values())
    return value.detach(), by_name(sums), [leaf.grad for leaf in leaves]


def by_name(sums):
    """The sums as one tensor, in the order of their names."""
    return torch.stack([sums[name] for name in sorted(sums)])


def losses(kd_ratio, temperature, chunk, vocab_size=None):
    """The chunked loss and the plain one."""
    divergence = KDLoss(temperature=temperature, chunk_size=chunk)
    return (
        kind(MaskedCrossEntropy(), divergence, kd_ratio, vocab_size)
        for kind in (DistillationLoss, PlainLoss)
    )


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(0, 23),
    vocab=st.integers(2, 40),
    chunk=st.integers(1, 30),
    kd_ratio=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 5.0]),
    extra=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    with_teacher=st.booleans(),
)
def test_chunked_equals_plain(
    seed, tokens, vocab, chunk, kd_ratio, temperature, scale, softcap, extra, with_teacher
):
    inputs = list(case(seed, tokens, vocab, extra=extra))
    size = vocab if any(extra) else None
    if not with_teacher:
        inputs[4], kd_ratio = None, 0.0
    chunked, plain = losses(kd_ratio, temperature, chunk, size)
    value, sums, grads = evaluate(chunked, *inputs, scale=scale, softcap=softcap)
    expected, expected_sums, expected_grads = evaluate(plain, *inputs, scale=scale, softcap=softcap)
    top = max(1.0, expected_sums.abs().max().item())
    # KL is a difference of numbers of about 1, times T².
    assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6 * max(top, temperature**2))
    # At equal logits "the" best token is a matter of order. Entropies and KL are differences of
    # numbers as large as the logits, some tens: fp32 leaves a few millionths of them a token.
    assert torch.allclose(sums, expected_sums, rtol=1e-5, atol=1e-5 * top)
    for got, want in zip(grads, expected_grads, strict=True):
        want = torch.zeros_like(got) if want is None else want
        largest = want.abs().max().item() if want.numel() else 0.0
        assert torch.allclose(got, want, rtol=0, atol=2e-6 * max(1.0, largest))


def test_in_double_precision_they_agree_to_rounding():
    inputs = case(0, 50, 33, torch.float64)
    chunked, plain = losses(0.4, 2.0, 7)
    value, _, grads = evaluate(chunked, *inputs, softcap=4.0)
    expected, _, expected_grads = evaluate(plain, *inputs, softcap=4.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-13)
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).abs().max().item() < 1e-12


@pytest.mark.parametrize("chunk", [7, 0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("extra", [(5, 0), (5, 3), (0, 3)])
def test_ce_covers_the_students_whole_head_and_kd_the_shared_rows(extra, temperature, chunk):
    hidden, weight, bias, labels, teacher, teacher_weight = case(9, 50, 33, torch.float64, extra)
    (loss, _) = losses(0.4, temperature, chunk, 33)
    inputs = hidden, weight, bias, labels, teacher, teacher_weight
    value, _, grads = evaluate(loss, *inputs, softcap=4.0)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    z_s = 4.0 * torch.tanh((leaves[0] @ leaves[1].T + leaves[2]) / 4.0)
    z_t = 4.0 * torch.tanh(teacher @ teacher_weight.T / 4.0)
    valid = labels != -100
    log_q, log_p = (torch.log_softmax(z[valid, :33] / temperature, -1) for z in (z_s, z_t))
    ce = torch.nn.functional.cross_entropy(z_s, labels, reduction="sum")
    kd = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    expected = 0.6 * ce + 0.4 * kd
    (3.0 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-13)
    for got, leaf in zip(grads, leaves, strict=True):
        assert (got - leaf.grad).abs().max().item() <= 1e-12
    # The padding rows of the student learn to be improbable.
    assert extra[0] == 0 or grads[1][33:].abs().max().item() > 0.0


def top_five(log_p):
    """1 for the five largest of each row, 0 for the others."""
    return torch.zeros_like(log_p).scatter_(1, log_p.topk(5).indices, 1.0)


@pytest.mark.parametrize("extra", [(0, 0), (3, 1)])
@pytest.mark.parametrize("chunk", [7, 0])
def test_every_step_and_validation_measure_at_temperature_1_whatever_the_runs_is(chunk, extra):
    hidden, weight, bias, labels, teacher, teacher_weight = case(10, 50, 33, extra=extra)
    student = States(hidden, Head(weight, bias))
    rest = labels, States(teacher, Head(teacher_weight))
    names = (
        "kl_at_t1", "reverse_kl_at_t1", "acceptance_at_t1", "teacher_entropy_at_t1",
        "student_entropy_at_t1", "top5_agreement",
    )  # fmt: skip
    z_s, z_t = (hidden @ weight.T + bias).double()[:, :33], (teacher @ teacher_weight.T).double()
    valid = labels != -100
    log_q, log_p = (torch.log_softmax(z[valid, :33], -1) for z in (z_s, z_t))
    expected = (
        (log_p.exp() * (log_p - log_q)).sum(),
        (log_q.exp() * (log_q - log_p)).sum(),
        torch.minimum(log_p, log_q).exp().sum(),
        -(log_p.exp() * log_p).sum(),
        -(log_q.exp() * log_q).sum(),
        (top_five(log_p) * top_five(log_q)).sum() / 5,
    )
    cases = [(KDLoss, 0.5, 1.0), (KDLoss, 0.5, 4.0), (KDLoss, 0.0, 4.0)]
    cases += [(ReverseKL, 0.5, 4.0), (ReverseKL, 0.5, 1.0)]
    for kind, kd_ratio, temperature in cases:
        divergence = kind(temperature=temperature, chunk_size=chunk)
        loss = DistillationLoss(MaskedCrossEntropy(), divergence, kd_ratio, 33)
        with torch.no_grad():
            _, sums = loss(student, *rest)
        for name, want in zip(names, expected, strict=True):
            assert sums[name].item() == pytest.approx(want.item(), rel=1e-5), name
        if temperature == 1.0:
            assert kind is ReverseKL or sums["kl_at_t1"] == sums["kd_loss"]
        else:
            assert sums["teacher_entropy"] > 1.2 * sums["teacher_entropy_at_t1"]
        in_training = loss(student, *rest)[1]
        always = {"kl_at_t1", "teacher_entropy_at_t1", "student_entropy_at_t1"}
        assert set(names) & set(in_training) == always
        for name in always:
            assert in_training[name].item() == pytest.approx(sums[name].item(), rel=1e-5), name


def test_validation_splits_the_kl_by_the_position_in_the_text():
    hidden, weight, bias, labels, teacher, teacher_weight = case(12, 50, 33)
    (loss, _) = losses(0.5, 2.0, 7)
    student, output = States(hidden, Head(weight, bias)), States(teacher, Head(teacher_weight))
    positions = 30 * torch.arange(50) % 300  # 0, 30, …, 270, and again
    counts = torch.arange(50) % 3

    def measure(rows):
        part = (States(s.hidden[rows], s.head) for s in (student, output))
        extra = {"counts": counts[rows], "positions": positions[rows]}
        with torch.no_grad():
            return loss(next(part), labels[rows], next(part), **extra)[1]

    tokens = lambda rows: int((counts * (labels != -100))[rows].sum())  # noqa: E731
    whole = slice(None)
    means = average({n: v.item() for n, v in measure(whole).items()}, tokens(whole))
    for first, end in ((0, 64), (64, 256), (256, 1024)):
        rows = ((first <= positions) & (positions < end)).nonzero()[:, 0]
        expected = measure(rows)["kl_at_t1"].item() / tokens(rows)
        assert means[f"kl_at_t1_from_{first}"] == pytest.approx(expected, rel=1e-5)
    assert {n for n in means if "from" in n} == {f"kl_at_t1_from_{n}" for n in (0, 64, 256)}


@pytest.mark.parametrize("vocab", [3, 50, 320, 640])
def test_the_largest_logits_are_found_in_any_number_of_blocks(vocab):
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))
    expected = logits.topk(min(5, vocab)).indices
    assert torch.equal(find_top(logits, 5).sort().values, expected.sort().values)


@pytest.mark.parametrize("chunk", [7, 0])
def test_measuring_a_teacher_at_kd_ratio_0_leaves_the_loss_bit_for_bit(chunk):
    hidden, weight, bias, labels, teacher, teacher_weight = case(11, 50, 33)
    (loss, _) = losses(0.0, 2.0, chunk)
    alone, measured = (
        loss(States(hidden, Head(weight, bias)), labels, output)[0]
        for output in (None, States(teacher, Head(teacher_weight)))
    )
    assert torch.equal(alone, measured)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_bf16_stays_as_near_to_fp32_as_the_plain_loss_does(temperature):
    inputs = case(1, 64, 200, torch.bfloat16)
    exact = [t.float() if t.is_floating_point() else t for t in inputs]
    chunked, plain = losses(0.5, temperature, 10)
    truth = evaluate(plain, *exact)
    errors = []
    for loss in (chunked, plain):
        value, _, grads = evaluate(loss, *inputs)
        assert [g.dtype for g in grads] == [torch.bfloat16] * 3
        errors.append(
            [abs(value.item() / truth[0].item() - 1.0)]
            + [
                ((g.float() - t).norm() / t.norm()).item()
                for g, t in zip(grads, truth[2], strict=True)
            ]
        )
    assert max(errors[0]) < 0.02
    assert all(ours <= 1.5 * theirs + 1e-4 for ours, theirs in zip(*errors, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_identical_models_give_exactly_zero_and_no_gradient(temperature):
    hidden, weight, _, labels, _, _ = case(2, 31, 50, masked=0.0)
    (chunked, _) = losses(1.0, temperature, 8)
    leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value, sums = chunked(States(leaf, Head(head)), labels, States(hidden, Head(weight)))
    value.backward()
    assert value.item() == 0.0 and sums["kd_loss"].item() == 0.0
    assert sums["top1_agreement"].item() == 31.0
    assert leaf.grad.abs().max().item() == 0.0 and head.grad.abs().max().item() == 0.0


def test_a_part_that_is_not_optimised_cannot_spoil_the_one_that_is():
    hidden, weight, _, labels, teacher, teacher_weight = case(3, 9, 20, masked=0.0)
    teacher[4] = float("inf")
    (chunked, _) = losses(0.0, 1.0, 4)
    value, _ = chunked(States(hidden, Head(weight)), labels, States(teacher, Head(teacher_weight)))
    assert torch.isfinite(value)


def test_no_gradient_is_taken_where_none_is_wanted(monkeypatch):
    taken = []
    real = Gradients.add
    monkeypatch.setattr(Gradients, "add", lambda *a: taken.append(1) or real(*a))
    hidden, weight, _, labels, teacher, teacher_weight = case(4, 9, 20)
    (chunked, _) = losses(0.5, 1.0, 4)
    weight.requires_grad_()
    with torch.no_grad():
        chunked(States(hidden, Head(weight)), labels, States(teacher, Head(teacher_weight)))
    assert not taken
    value, _ = chunked(States(hidden, Head(weight)), labels, States(teacher, Head(teacher_weight)))
    assert len(taken) == 3  # chunks of 4 in 9
    value.backward()
    assert weight.grad is not None and hidden.grad is None


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, _, labels, teacher, teacher_weight = case(5, 9, 20)
    (chunked, plain) = losses(0.5, 1.0, 4)
    grads = []
    for loss in (chunked, plain):
        leaf = hidden.clone().requires_grad_()
        loss(States(leaf, Head(weight)), labels, States(teacher, Head(teacher_weight)))[
            0
        ].backward()
        grads.append(leaf.grad)
    assert torch.allclose(*grads, atol=1e-6) and weight.grad is None


def test_a_second_backward_is_refused_instead_of_wrong():
    hidden, weight, _, labels, teacher, teacher_weight = case(6, 9, 20)
    (chunked, _) = losses(0.5, 1.0, 4)
    value, _ = chunked(
        States(hidden.requires_grad_(), Head(weight)), labels, States(teacher, Head(teacher_weight))
    )
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        value.backward()


def own_kl(student_logits, teacher_logits, labels):
    """A user's own loss: twice the forward KL at T = 2, without the square."""
    valid = labels != -100
    log_q, log_p = (torch.log_softmax(z[valid] / 2.0, -1) for z in (student_logits, teacher_logits))
    return 2.0 * (log_p.exp() * (log_p - log_q)).sum()


def own_ce(logits, labels):
    valid = labels != -100
    return torch.nn.functional.cross_entropy(logits[valid], labels[valid], reduction="sum")


own_kl.temperature = 1.0


class ByDefinition(Divergence):
    """A divergence that says its value alone."""

    def value(self, log_p, log_q):
        return (log_q.exp() * (log_q - log_p)).sum(-1)


class ByGradient(ByDefinition):
    """The same with its gradient, q∘(r - ⟨q, r⟩) with r = log q - log p."""

    def of_chunk(self, pair):
        r = pair.log_q - pair.log_p
        value = (pair.q * r).sum(-1, keepdim=True)
        return value, pair.q * (r - value)


@pytest.mark.parametrize("extra", [(0, 0), (5, 3)])
@pytest.mark.parametrize("chunk", [7, 0])
@pytest.mark.parametrize(
    "divergence",
    [
        own_kl,
        ByDefinition(),
        ByDefinition(temperature=3.0),
        ByGradient(),
        ByGradient(temperature=3.0),
    ],
)
@pytest.mark.parametrize("ce", [MaskedCrossEntropy(), own_ce])
def test_any_divergence_is_computed_a_chunk_at_a_time(ce, divergence, chunk, extra):
    if isinstance(divergence, Divergence):
        divergence.chunk_size = chunk
    inputs = case(7, 30, 20, torch.float64, extra)
    chunked, plain = (kind(ce, divergence, 0.4, 20) for kind in (DistillationLoss, PlainLoss))
    value, sums, grads = evaluate(chunked, *inputs, softcap=4.0)
    expected, expected_sums, expected_grads = evaluate(plain, *inputs, softcap=4.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-13)
    assert torch.allclose(sums, expected_sums, rtol=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).abs().max().item() <= 1e-12


@pytest.mark.parametrize("extra", [(0, 0), (16, 8)])
@pytest.mark.parametrize("tokens", [64, 512])
def test_workspace_does_not_grow_with_the_tokens(tokens, extra):
    """Bytes alive at the peak beyond what goes in and comes out: counted, not timed."""
    vocab, chunk = 1000, 16
    inputs = case(8, tokens, vocab, masked=0.0, extra=extra)
    (chunked, _) = losses(0.5, 1.0, chunk, vocab)
    peak = peak_bytes(lambda: evaluate(chunked, *inputs))
    weights_gradient = inputs[1].nbytes + inputs[2].nbytes
    # Student, teacher and p of one chunk, with padding CE's softmax and the shared logits too;
    # leaves and gradients of head and hidden states.
    bound = (
        (5 if any(extra) else 3) * chunk * vocab * 4 + 3 * weights_gradient + 8 * inputs[0].nbytes
    )
    assert peak < 1.25 * bound
    assert peak < 0.6 * tokens * vocab * 4 * 4 or tokens == 64


def peak_bytes(function):
    """Peak of bytes that torch allocates on the CPU while `function` runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    alive = peak = 0
    for event in sorted(run.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("chunk", [-1, 1.5, True])
def test_a_negative_chunk_is_refused(chunk):
    with pytest.raises(ValueError, match="chunk_size must be an integer ≥ 0"):
        KDLoss(chunk_size=chunk)


@pytest.mark.parametrize("extra", [(0, 0), (5, 3)])
def test_a_part_of_weight_0_adds_nothing_to_a_gradient_even_where_it_is_infinite(extra):
    def endless(logits, labels):
        return (torch.sqrt(logits - logits.detach()) * float("1e30")).sum()

    hidden, weight, _, labels, teacher, teacher_weight = case(12, 9, 20, extra=extra)
    inputs = labels, States(teacher, Head(teacher_weight))
    grads = []
    for ce in (endless, MaskedCrossEntropy()):
        leaf = hidden.clone().requires_grad_()
        loss = DistillationLoss(ce, KDLoss(temperature=2.0, chunk_size=4), 1.0, 20)
        loss(States(leaf, Head(weight)), *inputs)[0].backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_a_reader_goes_from_the_loop_over_chunks_to_a_formula_in_three_calls():
    frames: list[traceback.FrameSummary] = []

    class Traced(KDLoss):
        def of_chunk(self, pair):
            frames[:] = traceback.extract_stack()
            return super().of_chunk(pair)

    loss = DistillationLoss(MaskedCrossEntropy(), Traced(temperature=2.0), 0.5)
    evaluate(loss, *case(0, 5, 40))
    loop = max(k for k, frame in enumerate(frames) if frame.name == "forward")
    path = frames[loop:]
    assert [frame.name for frame in path] == ["forward", "of_chunk", "_compute_losses", "of_chunk"]
    assert {Path(frame.filename).name for frame in path[:-1]} == {"chunked.py"}
