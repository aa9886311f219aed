"""Cross-entropy of the student against the labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_kd.data.labels import IGNORE_INDEX, check_ignore_index
from ds_kd.losses.buffers import Buffers
from ds_kd.losses.pair import log_sum_exp


class MaskedCrossEntropy:
    """Cross-entropy of the student against the labels, summed over valid tokens.

    Args:
        ignore_index: label value of positions that are not supervised; -100 is the only one, as
            data sets, token counts and losses must agree on it.
        fp32_upcast: accepted without effect; logits are always compared in fp32 or wider.

    Raises:
        ValueError: another ignore_index.
    """

    #: The gradient is a softmax less the label's one-hot. `of_chunk` returns the softmax, which a
    #: divergence may need too, and the caller subtracts the one-hot.
    leaves_one_hot_out = True

    def __init__(self, ignore_index: int = IGNORE_INDEX, fp32_upcast: bool = True):
        check_ignore_index(ignore_index)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss as a scalar, in nats, summed over valid tokens.

        Args:
            logits: `[tokens, vocab]`.
            labels: `[tokens]` int64.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def of_chunk(
        self, logits: Tensor, largest: Tensor, labels: Tensor, buffers: Buffers
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of every token, and its gradient without the one-hot.

        Args:
            logits: `[tokens, vocab]`, not changed.
            largest: the largest logit of each token, `[tokens, 1]`.
            labels: `[tokens]`; the caller drops the values of tokens labelled -100.
            buffers: memory for the gradient.

        Returns:
            Values `[tokens, 1]`, nats, and softmax(logits) `[tokens, vocab]`.
        """
        q = torch.softmax(logits, -1, out=buffers.like("q at T = 1", logits))
        return log_sum_exp(largest, q) - logits.gather(1, labels.clamp(min=0)[:, None]), q
