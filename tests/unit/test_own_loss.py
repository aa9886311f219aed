"""A loss of the user's own: the example of docs/losses.md, and what the contract refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_kd.losses.contract import check_cross_entropy, check_divergence
from ds_kd.losses.divergences import KDLoss, MaskedCrossEntropy

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def test_the_pages_example_meets_the_contract_and_is_the_reverse_kl():
    code = re.search(r"```python\n# my_losses.py\n(.*?)```", PAGE.read_text(), re.S).group(1)
    room: dict = {}
    exec(code, room)
    loss = room["ReverseKL"](temperature=2.0)
    check_divergence(loss)
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    # By hand at T = 2: q = softmax(.5, 0), p = softmax(0, 1); 4·Σ q·log(q/p).
    q, p = torch.softmax(student / 2, -1), torch.softmax(teacher / 2, -1)
    expected = 4 * (q * (q / p).log()).sum()
    assert torch.allclose(loss(student, teacher, torch.tensor([0])), expected)


def test_our_own_losses_meet_the_contract():
    check_divergence(KDLoss(temperature=3.0))
    check_cross_entropy(MaskedCrossEntropy())


def kl(student, teacher, labels, reduction="sum"):
    valid = labels != -100
    student, teacher = (F.log_softmax(z[valid], -1) for z in (student, teacher))
    return F.kl_div(student, teacher, reduction=reduction, log_target=True)


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, labels):
        return self.scale * kl(student, teacher, labels)


class Plain(nn.Module):
    def forward(self, student, teacher, labels):
        return kl(student, teacher, labels)


def soft_cross_entropy(student, teacher, labels):
    valid = labels != -100
    return -(teacher[valid].softmax(-1) * student[valid].log_softmax(-1)).sum()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda s, t, y: kl(s, t, y, "batchmean"), "return the sum over tokens, not a mean"),
        (lambda s, t, y: kl(s, t, torch.zeros_like(y)), "labelled -100 change the value"),
        (lambda s, t, y: kl(s.detach(), t, y), "has no gradient"),
        (lambda s, t, y: kl(s, t, y).item(), "expected a scalar tensor"),
        (soft_cross_entropy, "expected 0; return a divergence"),
        (lambda s, t: kl(s, t, torch.zeros(len(s))), "fails on a small example"),
        (Trained(), "has parameters (scale)"),
        ("no loss", "cannot be called"),
    ],
)
def test_a_loss_out_of_the_contract_is_told_which_clause_it_breaks(loss, says):
    with pytest.raises(ValueError) as raised:
        check_divergence(loss)
    assert says in str(raised.value)


def test_a_module_without_parameters_is_a_loss():
    check_divergence(Plain())
