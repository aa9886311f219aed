"""The mathematics of the loss, by hand and against torch's own double-precision arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.losses.head import Head, States


def test_kd_of_identical_logits_is_exactly_zero_with_a_zero_gradient():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    student = logits.clone().requires_grad_()
    loss = KDLoss(temperature=3.0)(student, logits, torch.zeros(7, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    # softmax(z) - softmax(z) computed twice: at most an fp32 rounding of a probability times T.
    assert student.grad.abs().max().item() <= 1e-6


def test_direction_is_teacher_to_student():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL(p‖q) = 3/4·log(3/2) + 1/4·log(1/2) = 0.130812; KL(q‖p) =
    # 0.143841.
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    loss = KDLoss()(student, teacher, torch.zeros(1, dtype=torch.int64))
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)


def test_t_squared_keeps_the_gradient_scale_over_temperature():
    generator = torch.Generator().manual_seed(1)
    z_s, z_t = (0.1 * torch.randn(32, 50, generator=generator) for _ in range(2))
    norms = []
    for temperature in (1.0, 2.0, 8.0, 32.0):
        student = z_s.clone().requires_grad_()
        KDLoss(temperature=temperature)(student, z_t, torch.zeros(32, dtype=torch.int64)).backward()
        norms.append(student.grad.norm().item())
    # For small logits the gradient tends to (z_s - z_t)/V whatever T is; without T² it would fall
    # 1024-fold.
    assert max(norms) / min(norms) < 1.1


def test_masked_positions_count_for_nothing():
    generator = torch.Generator().manual_seed(2)
    z_s, z_t = (torch.randn(6, 9, generator=generator) for _ in range(2))
    labels = torch.tensor([1, -100, 3, -100, -100, 8])
    keep = labels != -100
    for loss in (KDLoss(temperature=2.0), lambda s, t, y: MaskedCrossEntropy()(s, y)):
        assert loss(z_s, z_t, labels).item() == pytest.approx(
            loss(z_s[keep], z_t[keep], labels[keep]).item(), rel=1e-6
        )


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_no_supervised_token_gives_an_exact_zero_with_a_graph(kd_ratio):
    weight = torch.randn(9, 4, requires_grad=True)
    hidden = torch.randn(5, 4, requires_grad=True)
    rows = torch.zeros(0, dtype=torch.int64)
    loss, sums = DistillationLoss(MaskedCrossEntropy(), KDLoss(), kd_ratio)(
        States(hidden[rows], Head(weight)), rows, States(torch.zeros(0, 6), Head(torch.randn(9, 6)))
    )
    loss.backward()
    assert loss.item() == 0.0 and set(map(float, sums.values())) == {0.0}
    assert hidden.grad.abs().sum().item() == 0.0 and weight.grad.abs().sum().item() == 0.0


def test_kd_ratio_1_ignores_label_values_but_not_their_mask():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    teacher = States(torch.randn(3, 6), Head(torch.randn(9, 6)))
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(), 1.0)
    a, b, fewer = (
        loss(States(hidden, Head(weight)), torch.tensor(labels), teacher)[0]
        for labels in ([1, 2, 3], [4, 5, 6], [1, 2, -100])
    )
    assert a.item() == b.item() != fewer.item()


def test_padded_heads_equal_truncation_by_hand():
    # Heads of 12 and 14 rows over 10 real ids.
    generator = torch.Generator().manual_seed(3)
    h_s, h_t = torch.randn(5, 4, generator=generator), torch.randn(5, 6, generator=generator)
    w_s, w_t = torch.randn(12, 4, generator=generator), torch.randn(14, 6, generator=generator)
    labels = torch.tensor([0, 9, 3, 4, 5])
    got, _ = DistillationLoss(MaskedCrossEntropy(), KDLoss(), 0.5, vocab_size=10)(
        States(h_s, Head(w_s)), labels, States(h_t, Head(w_t))
    )
    z_s, z_t = h_s @ w_s.T, (h_t @ w_t.T)[:, :10]
    # CE as transformers computes it of the exported student, over all its rows.
    ce = torch.nn.functional.cross_entropy(z_s, labels, reduction="sum")
    assert got.item() == pytest.approx(
        (0.5 * ce + 0.5 * KDLoss()(z_s[:, :10], z_t, labels)).item(), rel=1e-6
    )


@pytest.mark.parametrize("chunk", [None, 0])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 8.0, 9.0, 30.0, 1e2, 1e3, 1e4])
def test_kd_is_right_to_a_thousandth_at_any_temperature(temperature, spread, chunk):
    generator = torch.Generator().manual_seed(4)
    weight, teacher = (torch.randn(64, 8, generator=generator) for _ in range(2))
    hidden = spread * torch.randn(33, 8, generator=generator) / 3
    labels = torch.zeros(33, dtype=torch.int64)
    loss = DistillationLoss(
        MaskedCrossEntropy(), KDLoss(temperature=temperature, chunk_size=chunk), 1.0
    )
    leaf = hidden.clone().requires_grad_()
    value, sums = loss(States(leaf, Head(weight)), labels, States(hidden, Head(teacher)))
    value.backward()
    exact = hidden.double().requires_grad_()
    z_s, z_t = exact @ weight.double().T, hidden.double() @ teacher.double().T
    log_q, log_p = (torch.log_softmax(z / temperature, -1) for z in (z_s, z_t))
    expected = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    expected.backward()
    assert sums["kd_loss"].item() == pytest.approx(expected.item(), rel=1e-3)
    assert (leaf.grad - exact.grad).norm() <= 2e-3 * exact.grad.norm()


@pytest.mark.parametrize("loss", [MaskedCrossEntropy, KDLoss])
def test_another_ignore_index_is_refused(loss):
    assert loss(ignore_index=-100)
    with pytest.raises(ValueError, match="ignore_index must be -100, got -1"):
        loss(ignore_index=-1)


def test_scale_and_softcap_of_a_head_are_honoured():
    hidden, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9)
    got = Head(weight, bias, scale=0.5, softcap=3.0).logits(hidden)
    assert torch.allclose(got, 3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(bad):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        KDLoss(temperature=bad)
