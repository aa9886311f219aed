"""The divergences that `kd_loss_fn.name` chooses, each against its definition in fp64."""

from __future__ import annotations

import importlib
import inspect
import math
from pathlib import Path

import pytest
import torch

from ds_kd.config.signatures import divergences_by_name, signature_of
from ds_kd.losses import pair
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.contract import check_divergence
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import Divergence, KDLoss
from ds_kd.losses.head import Head, States
from ds_kd.losses.named.alpha_beta import AlphaBeta
from ds_kd.losses.named.kl import AdaptiveKL, ReverseKL
from ds_kd.losses.named.mixed import JSD, SkewForward, SkewReverse
from ds_kd.losses.named.overlap import TVD, Acceptance
from ds_kd.losses.named.top_k import TopK
from ds_kd.losses.weighted import Weighted
from tests.plain import PlainLoss
from tests.unit.test_distillation import by_name, case, evaluate, peak_bytes

VOCAB = 150  # more than the 64 ids among which adaptive_kl looks for the head first


def kl(a, b):
    return (a * (a.log() - b.log())).sum(-1)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha_beta(p, q, a, b):
    s = a + b
    return -(p**a * q**b - a / s * p**s - b / s * q**s).sum(-1) / (a * b)


def adaptive(p, q, head):
    """Sorted as the paper's authors do it: the likeliest id is always in the head."""
    order = p.argsort(-1, descending=True)
    is_head = p.gather(-1, order).cumsum(-1) <= head
    is_head[:, 0] = True
    gap = (p - q).abs().gather(-1, order).detach()
    w = (gap * is_head).sum(-1) / gap.sum(-1)
    return w * kl(p, q) + (1 - w) * kl(q, p)


def top_k(p, q, k):
    ids = p.argsort(-1, descending=True)
    head, tail = ids[:, :k], ids[:, k:]
    binned = [torch.cat([x.gather(1, head), x.gather(1, tail).sum(1, True)], 1) for x in (p, q)]
    return kl(*binned)


#: (class, its arguments, its definition from the probabilities of teacher and student)
KINDS = [
    (KDLoss, {}, kl),
    (ReverseKL, {}, lambda p, q: kl(q, p)),
    (JSD, {"beta": 0.3}, lambda p, q: jsd(p, q, 0.3)),
    (SkewForward, {"skew": 0.2}, lambda p, q: kl(p, 0.2 * p + 0.8 * q)),
    (SkewReverse, {"skew": 0.2}, lambda p, q: kl(q, 0.8 * p + 0.2 * q)),
    (TVD, {}, lambda p, q: 0.5 * (p - q).abs().sum(-1)),
    (Acceptance, {}, lambda p, q: -torch.minimum(p, q).sum(-1).log()),
    (AlphaBeta, {}, lambda p, q: alpha_beta(p, q, 0.2, 0.7)),
    (AlphaBeta, {"alpha": 1.5, "beta": 0.6}, lambda p, q: alpha_beta(p, q, 1.5, 0.6)),
    (AdaptiveKL, {}, lambda p, q: adaptive(p, q, 0.5)),
    (AdaptiveKL, {"head": 0.97}, lambda p, q: adaptive(p, q, 0.97)),
    (TopK, {"k": 7}, lambda p, q: top_k(p, q, 7)),
]
every_kind = pytest.mark.parametrize(
    ("kind", "arguments", "definition"), KINDS, ids=[f"{k.name} {a}" for k, a, _ in KINDS]
)


def measure(loss, inputs, definition=None, temperature=1.0, kd_ratio=0.7):
    """(kd value, gradients of hidden states and head) of a loss, or of its definition in fp64."""
    hidden, weight, bias, labels, teacher, teacher_weight = inputs
    leaves = [part.clone().requires_grad_() for part in (hidden, weight, bias)]
    if definition is None:
        whole = DistillationLoss(MaskedCrossEntropy(), loss, kd_ratio)
        student = States(leaves[0], Head(*leaves[1:]))
        total, sums = whole(student, labels, States(teacher, Head(teacher_weight)))
        kd = sums["kd_loss"]
    else:
        valid = labels != -100
        z_s = leaves[0].double() @ leaves[1].double().T + leaves[2].double()
        z_t = teacher.double() @ teacher_weight.double().T
        p, q = (torch.softmax(z[valid] / temperature, -1) for z in (z_t, z_s))
        kd = temperature**2 * definition(p, q).sum()
        ce = torch.nn.functional.cross_entropy(z_s, labels, reduction="sum")
        total = (1 - kd_ratio) * ce + kd_ratio * kd
    total.backward()
    return kd.item(), [leaf.grad for leaf in leaves]


@every_kind
@pytest.mark.parametrize("chunk", [1, 7, 0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_are_those_of_the_definition(
    kind, arguments, definition, temperature, chunk, monkeypatch
):
    monkeypatch.setattr(pair, "OF_BLOCK", 3 * VOCAB)  # seven rows are two blocks and a rest
    inputs = case(13, 30, VOCAB, torch.float64)
    loss = kind(temperature=temperature, chunk_size=chunk, **arguments)
    value, grads = measure(loss, inputs)
    expected, expected_grads = measure(None, inputs, definition, temperature)
    assert value == pytest.approx(expected, rel=1e-6)  # sums are logged in fp32
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).abs().max().item() <= 1e-12


@pytest.mark.parametrize(("kind", "softmaxes"), [(KDLoss, 2), (ReverseKL, 3), (JSD, 3), (TVD, 3)])
def test_measuring_at_temperature_1_takes_no_softmax_of_its_own(kind, softmaxes, monkeypatch):
    """One of each model, and of the student for CE where the divergence writes over its own."""
    made, softmax = [], torch.softmax
    count = lambda *given, **named: made.append(0) or softmax(*given, **named)  # noqa: E731
    monkeypatch.setattr(torch, "softmax", count)
    measure(kind(temperature=1.0, chunk_size=0), case(15, 30, VOCAB))
    assert len(made) == softmaxes


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 3.0, 100.0])
def test_models_that_are_the_same_give_exactly_0_and_a_zero_gradient(
    kind, arguments, definition, temperature
):
    hidden, weight, bias, labels, *_ = case(14, 30, VOCAB)
    leaf = hidden.clone().requires_grad_()
    loss = DistillationLoss(
        MaskedCrossEntropy(), kind(temperature=temperature, chunk_size=7, **arguments), 1.0
    )
    head = Head(weight, bias)
    value, sums = loss(States(leaf, head), labels, States(hidden, head))
    value.backward()
    assert value.item() == 0.0 and sums["kd_loss"].item() == 0.0
    assert leaf.grad.abs().max().item() == 0.0
    with torch.no_grad():
        _, sums = loss(States(hidden, head), labels, States(hidden, head))
    assert sums["reverse_kl_at_t1"] == 0.0 and sums["kl_at_t1"] == 0.0
    assert sums["acceptance_at_t1"] == (labels != -100).sum()


# Values of p = (3/4, 1/4) for the teacher and q = (1/2, 1/2) for the student, written out. Each
# changes when the two are exchanged, but for those whose definition is symmetric.
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (KDLoss(), 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)),
        (ReverseKL(), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
        (  # m = (0.6, 0.4)
            JSD(beta=0.4),
            0.4 * (0.75 * math.log(0.75 / 0.6) + 0.25 * math.log(0.25 / 0.4))
            + 0.6 * (0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4)),
        ),
        (  # m = (0.55, 0.45)
            SkewForward(skew=0.2),
            0.75 * math.log(0.75 / 0.55) + 0.25 * math.log(0.25 / 0.45),
        ),
        (  # m = (0.7, 0.3)
            SkewReverse(skew=0.2),
            0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3),
        ),
        (TVD(), 0.25),
        (Acceptance(), -math.log(0.75)),
        (  # s = 2, αβ = 3/4
            AlphaBeta(alpha=1.5, beta=0.5),
            -(
                (0.75**1.5 + 0.25**1.5) * 0.5**0.5
                - 0.75 * (0.75**2 + 0.25**2)
                - 0.25 * (0.5**2 + 0.5**2)
            )
            / 0.75,
        ),
        # Both gaps are 1/4 and the head is one id, so that w = 1/2.
        (
            AdaptiveKL(),
            0.5 * (0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2))
            + 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
        ),
        (TopK(k=1), 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)),
    ],
    ids=lambda loss: getattr(loss, "name", ""),
)
def test_directions_by_hand(loss, expected):
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert loss(student, teacher, torch.tensor([0])).item() == pytest.approx(expected, abs=2e-7)


def test_more_ids_than_there_are_leave_no_tail():
    inputs = case(15, 9, 20)
    assert measure(TopK(k=64), inputs)[0] == pytest.approx(measure(KDLoss(), inputs)[0], rel=1e-5)


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
def test_extreme_logits_give_finite_values_and_gradients(kind, arguments, definition, temperature):
    # One row per pairing of distributions that put all on one id, spread it evenly, or bar ids.
    rows = torch.zeros(4, VOCAB)
    rows[0, 0] = rows[1, 1] = 1e4
    rows[2] = torch.linspace(-1e4, 1e4, VOCAB)
    barred = torch.zeros(2, VOCAB)
    barred[1, :3] = -math.inf
    loss = kind(temperature=temperature, chunk_size=5, **arguments)
    for bias_s in barred:
        for bias_t in barred:
            student = torch.eye(4).repeat_interleave(4, 0).requires_grad_()
            head = Head(rows.T.clone().requires_grad_(), bias_s.clone().requires_grad_())
            teacher = States(torch.eye(4).repeat(4, 1), Head(rows.T, bias_t))
            whole = DistillationLoss(MaskedCrossEntropy(), loss, 0.5)
            value, sums = whole(States(student, head), torch.full((16,), 5), teacher)
            value.backward()
            assert all(torch.isfinite(part) for part in (value, *sums.values()))
            for leaf in (student, head.weight, head.bias):
                assert torch.isfinite(leaf.grad).all()
            with torch.no_grad():
                _, sums = whole(States(student, head), torch.full((16,), 5), teacher)
            assert all(torch.isfinite(part) for part in sums.values())


def test_acceptance_teaches_where_the_models_hardly_overlap():
    # p = (1 - e⁻²⁰⁰, e⁻²⁰⁰) and q the reverse: A = 2e⁻²⁰⁰, below what fp32 holds. Both ids have
    # half of the overlap: u = (1/2, 0), so that the gradient is q/2 - u = (-1/2, 1/2).
    student, teacher = torch.tensor([[0.0, 200.0]]), torch.tensor([[200.0, 0.0]])
    inputs = torch.eye(1), student.T, torch.zeros(2), torch.tensor([0]), torch.eye(1), teacher.T
    value, grads = measure(Acceptance(), inputs, kd_ratio=1.0)
    assert value == pytest.approx(200 - math.log(2), rel=1e-6)
    assert grads[2].tolist() == pytest.approx([-0.5, 0.5], abs=1e-6)


@every_kind
@pytest.mark.parametrize("temperature", [9.0, 1e2, 1e4])
def test_every_divergence_is_right_to_a_thousandth_at_a_high_temperature(
    kind, arguments, definition, temperature
):
    inputs = case(16, 30, VOCAB)
    loss = kind(temperature=temperature, chunk_size=7, **arguments)
    value, grads = measure(loss, inputs, kd_ratio=1.0)
    expected, expected_grads = measure(None, inputs, definition, temperature, kd_ratio=1.0)
    assert value == pytest.approx(expected, rel=1e-3)
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).norm() <= 2e-3 * want.norm()


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 3.0, 1e4])
def test_every_divergence_meets_the_contract_of_losses_from_outside(
    kind, arguments, definition, temperature
):
    check_divergence(kind(temperature=temperature, **arguments))
    check_divergence(kind(temperature=temperature, **arguments), VOCAB)


@pytest.mark.parametrize("kd_ratio", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_forward_kl_is_bit_for_bit_these_operations(temperature, kd_ratio):
    hidden, weight, _, labels, teacher, teacher_weight = case(17, 1, 1003, masked=0.0)
    hidden.requires_grad_()
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(temperature=temperature), kd_ratio)
    value, sums = loss(States(hidden, Head(weight)), labels, States(teacher, Head(teacher_weight)))
    value.backward()

    z_s, z_t = hidden.detach() @ weight.T, teacher @ teacher_weight.T
    soft, t = torch.softmax(z_s, -1), temperature
    lse = z_s.amax(-1) - soft.amax(-1).log()
    z_s, z_t, label_logit = z_s / t, z_t / t, z_s[0, labels]
    q, p = torch.softmax(z_s, -1), torch.softmax(z_t, -1)
    lse_s, lse_t = (z.amax(-1) - x.amax(-1).log() for z, x in ((z_s, q), (z_t, p)))
    means = [(p * z).sum(-1) for z in (z_t, z_s)]
    assert sums["ce_loss"] == lse - label_logit
    assert sums["teacher_entropy"] == lse_t - means[0]
    assert sums["kd_loss"] == (means[0] - means[1] - lse_t + lse_s) * t**2
    if t == 1.0:
        slope = torch.sub(q, p, alpha=kd_ratio)
    else:
        slope = (q - p).mul(kd_ratio * t).add(soft, alpha=1.0 - kd_ratio)
    slope[0, labels] += kd_ratio - 1.0
    assert torch.equal(hidden.grad, slope @ weight)


@every_kind
def test_the_workspace_is_at_most_15_percent_of_whole_logits(
    kind, arguments, definition, monkeypatch
):
    """As 4,096 tokens and 128k words in chunks of 512, scaled down; bytes are counted."""
    tokens, vocab, chunk = 512, 2000, 64
    monkeypatch.setattr(pair, "OF_BLOCK", chunk * vocab // 32)
    inputs = case(18, tokens, vocab, masked=0.0)
    chunked = DistillationLoss(
        MaskedCrossEntropy(), kind(temperature=2.0, chunk_size=chunk, **arguments), 0.5
    )
    plain = PlainLoss(MaskedCrossEntropy(), KDLoss(temperature=2.0), 0.5)
    kept = 2 * sum(inputs[i].nbytes for i in (0, 1, 2))  # leaves and their gradients
    ours, whole = (peak_bytes(lambda: evaluate(loss, *inputs)) - kept for loss in (chunked, plain))  # noqa: B023
    assert ours <= 0.15 * whole, ours / whole


def own(student_logits, teacher_logits, labels):
    """A user's own loss of whole logits: half the squared distance of probabilities."""
    valid = labels != -100
    q, p = (z[valid].softmax(-1) for z in (student_logits, teacher_logits))
    return 0.5 * (q - p).square().sum()


@pytest.mark.parametrize("extra", [(0, 0), (5, 3)])
@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 2.0), (1.0, 4.0), (0.5, 20.0)])
def test_a_weighted_list_is_the_sum_of_its_parts_each_at_its_temperature(
    temperatures, chunk, extra
):
    first, second = temperatures
    parts = [
        (0.25, KDLoss(temperature=first)),
        (2.0, ReverseKL(temperature=second, chunk_size=chunk)),
        (0.5, TopK(k=5, temperature=first)),
        (3.0, own),
    ]
    loss = Weighted(parts)
    assert loss.chunk_size == chunk and loss.temperature == max(*temperatures, 1.0)
    inputs = case(19, 30, 20, torch.float64, extra)
    whole, plain = (
        kind(MaskedCrossEntropy(), loss, 0.4, 20) for kind in (DistillationLoss, PlainLoss)
    )
    value, sums, grads = evaluate(whole, *inputs, softcap=4.0)
    expected, expected_sums, expected_grads = evaluate(plain, *inputs, softcap=4.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(sums, expected_sums, rtol=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        assert (got - want).abs().max().item() <= 1e-12
    check_divergence(loss)


def test_parts_of_a_list_share_one_chunk():
    with pytest.raises(ValueError, match=r"chunk_size must be the same everywhere, got \[4, 8\]"):
        Weighted([(1.0, KDLoss(chunk_size=4)), (1.0, ReverseKL(chunk_size=8))])


@every_kind
def test_a_rank_without_tokens_logs_the_names_that_others_log(kind, arguments, definition):
    hidden, weight, _, labels, teacher, teacher_weight = case(20, 9, VOCAB)
    loss = DistillationLoss(MaskedCrossEntropy(), kind(**arguments), 0.5)
    found = []
    for rows in (slice(0, 0), slice(None)):
        student = States(hidden[rows].clone().requires_grad_(), Head(weight))
        output = States(teacher[rows], Head(teacher_weight))
        value, sums = loss(student, labels[rows], output)
        value.backward()
        with torch.no_grad():
            found.append([*loss(student, labels[rows], output)[1]])
        assert rows.stop is None or set(by_name(sums).tolist()) == {0.0}
    assert found[0] == found[1]


def test_the_config_reads_every_divergence_and_its_arguments_from_the_source():
    found = {}
    for name, dotted in divergences_by_name().items():
        if name == "hidden_states":  # compares layers, not logits
            continue
        module, _, attribute = dotted.rpartition(".")
        module = "ds_kd.losses.divergences" if module == "ds_kd.losses" else module
        found[name] = getattr(importlib.import_module(module), attribute)
    known = {kind for kind, _, _ in KINDS}
    assert set(found.values()) == known and {kind.name for kind in known} == set(found)
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    assert {name for name in found if f"\n| `{name}` |" not in page} == set()
    common = inspect.signature(Divergence).parameters
    for name, kind in found.items():
        signature = signature_of(divergences_by_name()[name])
        own_arguments = [n for n in inspect.signature(kind).parameters if n != "common"]
        assert set(signature.annotations) == {*own_arguments, *common} and not signature.is_open
        assert signature.limits == kind.limits and not signature.required


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (kind, {argument: value})
        for kind, _, _ in KINDS
        for argument, low, high in kind.limits
        for value in (low, math.inf if high is None else high, math.nan)
    ],
)
def test_numbers_beyond_their_limits_are_refused(kind, arguments):
    (argument,) = arguments
    with pytest.raises(ValueError, match=rf"^{argument} must be "):
        kind(**arguments)
