"""Losses from outside: what the contract lets through and what it says of the others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.contract import check_cross_entropy, check_divergence
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.losses.head import Head, States

DOCS = Path(__file__).parents[2] / "docs" / "losses.md"


def kl(student, teacher, reduction="sum", mask=True):
    def rows(labels):
        return labels != -100 if mask else slice(None)

    def loss(s, t, labels):
        s, t = student(s)[rows(labels)], teacher(t)[rows(labels)]
        return F.kl_div(s, t, reduction=reduction, log_target=True)

    return loss


def logs(z):
    return F.log_softmax(z, -1)


class Trained(torch.nn.Linear):
    def forward(self, student, teacher, labels):
        return super().forward(student).sum()


class Buffered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor(2.0))

    def forward(self, student, teacher, labels):
        return self.weight * kl(logs, logs)(student, teacher, labels)


def documented():
    """Return the losses that the examples of docs/losses.md define."""
    space: dict = {"__name__": "my_losses"}
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S):
        exec(code, space)
    reverse, fast = (space[n](temperature=2.0) for n in ("ReverseKL", "FastReverseKL"))
    return [
        reverse,
        space["SkewKL"](skew=0.2, temperature=2.0),
        fast,
        space["make_total_variation"](),
    ]


class Overridden(KDLoss):
    def __call__(self, student_logits, teacher_logits, labels):
        return 2.0 * super().__call__(student_logits, teacher_logits, labels)


class WrongSign(KDLoss):
    def of_chunk(self, pair):
        values, gradient = super().of_chunk(pair)
        return values, -gradient


class WrongJoin(KDLoss):
    def of_chunk_with_softmax(self, pair, alpha):
        return super().of_chunk_with_softmax(pair, 1.0 - alpha / 2)


class WrongValue(KDLoss):
    def of_chunk_with_softmax(self, pair, alpha):
        values, gradient = super().of_chunk_with_softmax(pair, alpha)
        return 3.0 * values, gradient


class Unannounced(KDLoss):
    """A reverse KL that does not say that it reads the teacher's logits."""

    def value(self, log_p, log_q):
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def of_chunk(self, pair):
        r = pair.log_q - pair.log_p
        value = (pair.q * r).sum(-1, keepdim=True)
        return value, pair.q * (r - value)

    of_chunk_with_softmax = None


class Smoothed(MaskedCrossEntropy):
    def __call__(self, logits, labels):
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.5)


def of_the_likeliest(student, teacher, labels):
    """The KL over the teacher's 50 likeliest ids."""
    valid = labels != -100
    ids = teacher[valid].topk(50).indices
    return kl(logs, logs)(
        student[valid].gather(1, ids), teacher[valid].gather(1, ids), labels[valid]
    )


def test_a_loss_is_tried_with_the_vocabulary_of_the_models():
    check_divergence(of_the_likeliest, 96)
    with pytest.raises(ValueError, match="fails on a small example"):
        check_divergence(of_the_likeliest, 11)


@pytest.mark.parametrize(
    "loss",
    [*documented(), Buffered(), KDLoss(temperature=3.0), KDLoss(temperature=1e4), kl(logs, logs)],
)
def test_a_loss_that_meets_the_contract_is_taken_and_trains(loss):
    check_divergence(loss)
    hidden, weight, teacher = torch.randn(5, 4), torch.randn(9, 4), torch.randn(5, 6)
    head = Head(weight.requires_grad_())
    whole = DistillationLoss(MaskedCrossEntropy(), loss, 0.5)
    value, sums = whole(
        States(hidden, head), torch.arange(5), States(teacher, Head(torch.randn(9, 6)))
    )
    value.backward()
    assert weight.grad.abs().max() > 0 and sums["kd_loss"] > 0 and sums["teacher_entropy"] > 0


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (kl(logs, logs, "batchmean"), r"twice give 1 times the value, expected 2; return the sum"),
        (kl(logs, logs, "none"), r"returns a tensor of shape \[6, 11\], expected a scalar"),
        (kl(logs, logs, mask=False), "labelled -100 change the value"),
        (kl(lambda z: logs(z.detach()), logs), "has no gradient"),
        (lambda s, t, y: 1.0, r"returns 1\.0, expected a scalar tensor"),
        (lambda s, t: s.sum(), r"fails on a small example \(6 tokens\): TypeError"),
        (lambda s, t, y: (s * float("nan")).sum(), "is nan for 6 tokens"),
        (
            lambda s, t, y: F.cross_entropy(
                s[y != -100], logs(t)[y != -100].exp(), reduction="sum"
            ),
            "equal logits of both models give .*, expected 0",
        ),
        (
            lambda s, t, y: kl(logs, logs)(s, t, y) * (1 + s[y != -100].var(0, correction=0).sum()),
            "share must not depend on the others",
        ),
        (Overridden(), "its of_chunk gives .* and its call .*; override `value`"),
        (WrongSign(), "the gradient of its of_chunk differs"),
        (WrongJoin(), "the gradient of its of_chunk differs"),
        (WrongValue(), r"its of_chunk gives .* \(of the kd_loss\)"),
        (Unannounced(), "reads the teacher's logits after they were given up"),
        (Trained(11, 2), r"has parameters \(weight, bias\)"),
        (3, "cannot be called"),
    ],
)
def test_a_loss_that_breaks_the_contract_is_told_which_clause(loss, words):
    with pytest.raises(ValueError, match=words):
        check_divergence(loss)


def test_a_cross_entropy_need_not_be_zero_but_must_be_a_sum():
    check_cross_entropy(MaskedCrossEntropy())
    check_cross_entropy(torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1))
    with pytest.raises(ValueError, match="return the sum over tokens, not a mean"):
        check_cross_entropy(torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"its of_chunk gives .* \(of the ce_loss\)"):
        check_cross_entropy(Smoothed())
