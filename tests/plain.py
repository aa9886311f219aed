"""The loss by its definition, from whole logits: what the chunked form is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class PlainLoss:
    """(1 - α)·CE + α·T²·D in the interface of `DistillationLoss`, as one would write it down."""

    def __init__(self, ce, divergence, kd_ratio, vocab_size=None):
        self.ce, self.divergence = ce, divergence
        self.kd_ratio, self.vocab_size = kd_ratio, vocab_size

    def __call__(self, student, labels, teacher=None):
        logits = student.head.logits(student.hidden)
        ce = self.ce(logits, labels)
        if teacher is None:
            return ce, {"ce_loss": ce.detach().float()}
        z_t = teacher.head.logits(teacher.hidden)[:, : self.vocab_size]
        z_s = logits[:, : self.vocab_size]
        kd = self.divergence(z_s, z_t, labels)
        sums = {"ce_loss": ce, "kd_loss": kd, **self.measure(z_s, z_t, labels)}
        weighted = [(1 - self.kd_ratio, ce), (self.kd_ratio, kd)]
        total = sum(weight * part for weight, part in weighted if weight > 0)
        return total, {name: part.detach().float() for name, part in sums.items()}

    def measure(self, z_s, z_t, labels):
        valid, t = labels != -100, self.divergence.temperature
        dtype = torch.promote_types(z_s.dtype, torch.float32)
        z_s, z_t = z_s[valid].to(dtype), z_t[valid].to(dtype)
        measured = {
            "teacher_entropy": entropy(z_t / t),
            "top1_agreement": z_s.argmax(-1).eq(z_t.argmax(-1)).sum(),
        }
        log_q, log_p = F.log_softmax(z_s, -1), F.log_softmax(z_t, -1)
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        measured |= {"kl_at_t1": kl, "teacher_entropy_at_t1": entropy(z_t)}
        measured["student_entropy_at_t1"] = entropy(z_s)
        if not torch.is_grad_enabled():
            measured["reverse_kl_at_t1"] = (log_q.exp() * (log_q - log_p)).sum()
            measured["acceptance_at_t1"] = torch.minimum(log_p, log_q).exp().sum()
            theirs, ours = (z.topk(5).indices.tolist() for z in (z_t, z_s))
            common = [len({*a} & {*b}) / 5 for a, b in zip(theirs, ours, strict=True)]
            measured["top5_agreement"] = torch.tensor(sum(common))
        return measured


def entropy(logits):
    log_p = F.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum()
