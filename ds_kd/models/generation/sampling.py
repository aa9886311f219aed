"""Sample texts of a Hugging Face model so that the same texts come again.

Every token is drawn by one number that depends on (seed, epoch, sample, draw, position) alone, by
inversion of the distribution's sum over ids, in integers. The number of ranks, the batch that a
prompt is in, its place there and the state of torch's generators have no influence on the draw.

A batch's composition still changes a model's logits in their last bits, and a number that falls so
near to the border between two tokens would choose the other: of a pruned SmolLM2-135M, alone and
in a batch of eight, 6 tokens in 100,000 in fp32, and 1 in 100 in bf16. Prompts are therefore
written in batches that depend on the prompts alone (`group`), so that the logits too are the same
bit for bit on any number of ranks, as long as weights, device and libraries are. The sum goes by
ids, not by falling probability, where two tokens that change places would exchange their shares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Weights are integers below this, so that the sum over a vocabulary of 2²³ ids fits into 64 bits.
_ONE = 2**40
_ROWS = 32  # prompts of a batch at the most
_TOKENS = 65_536  # of a batch at the most, padding and new ones included: the cache of their keys
#: Batches into which prompts are divided for ranks to share, if each has `count_rows` of them.
_LEAST_BATCHES = 4
_LEAST_ROWS = 8


@dataclass(frozen=True)
class Sampling:
    """The way in which texts are drawn.

    Args:
        max_new_tokens: the limit of new tokens.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_p: draws among the likeliest tokens that have this share of the probability together.
        vocab: ids from this one on are never drawn, as they stand for no token; None has no such.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    vocab: int | None = None


class Draw(NamedTuple):
    """The name of a text to draw, from which its random numbers follow."""

    seed: int
    epoch: int
    sample: str
    number: int = 0


@dataclass(frozen=True)
class Written:
    """A text that a model wrote.

    Args:
        tokens: the new tokens, the one that ends it included.
        is_whole: such a token ended it; otherwise the limit did.
        entropy: of the model's distribution at T = 1, summed over these tokens, in nats.
    """

    tokens: list[int]
    is_whole: bool
    entropy: float = field(default=0.0, compare=False)


def uniforms(draw: Draw, count: int) -> np.ndarray:
    """Return the first numbers of a draw, `[count]` fp64 from 0 to below 1, one for each position.

    They are those of Philox, a counter-based generator, under a key that is a hash of the draw.
    """
    key = hashlib.blake2b(repr(tuple(draw)).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def share_of(draw: Draw) -> float:
    """Return a number from 0 to below 1 that is independent of the draw's tokens."""
    return float(uniforms(draw._replace(number=-1 - draw.number), 1)[0])


def choose(logits: Tensor, numbers: Tensor, how: Sampling) -> Tensor:
    """Return the token of each row, `[rows]`, by inversion of the distribution's sum over ids.

    Args:
        logits: `[rows, vocab]`.
        numbers: `[rows]`, fp64, from 0 to below 1.
        how: temperature, `top_p` and `vocab` are used.
    """
    logits = logits[:, : how.vocab].double()
    if how.temperature == 0:
        return logits.argmax(-1)
    # Sums of integers are exact, so that no kernel's order of adding can change them.
    most = logits.amax(-1, keepdim=True)
    weights = (((logits - most) / how.temperature).exp() * _ONE).long()
    if how.top_p < 1:
        weights = _keep_likeliest(weights, how.top_p)
    sums = weights.cumsum(-1)
    total = sums[:, -1]
    wanted = torch.minimum((numbers * total).long(), total - 1)
    return torch.searchsorted(sums, wanted[:, None], right=True)[:, 0]


def _keep_likeliest(weights: Tensor, top_p: float) -> Tensor:
    """Return weights without those of the tokens beyond `top_p`; equal ones stay together."""
    ordered = weights.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    kept = (before < top_p * weights.sum(-1, keepdim=True).double()).sum(-1, keepdim=True)
    least = ordered.gather(-1, kept.clamp(min=1) - 1)
    return weights * (weights >= least)


def count_rows(device_type: str) -> int:
    """Return how many prompts share a batch before there is another one for the next rank.

    A token of a batch takes the time in which the weights are read, whatever the number of its
    rows, up to some eight on a CPU and far more on a GPU: smaller batches take as long each.
    """
    return _LEAST_ROWS if device_type == "cpu" else _ROWS


def group(
    prompts: Sequence[list[int]], new_tokens: int, least: int = _LEAST_ROWS
) -> list[list[int]]:
    """Return the batches in which prompts are written, as lists of their numbers.

    Prompts of similar length share a batch, the longest first. Batches depend on the prompts alone;
    ranks share whole batches.

    Args:
        new_tokens: the limit of each.
        least: from `count_rows`.
    """
    order = sorted(range(len(prompts)), key=lambda k: (-len(prompts[k]), prompts[k], k))
    most = min(_ROWS, max(least, -(-len(prompts) // _LEAST_BATCHES)))
    batches: list[list[int]] = []
    while order:
        rows = _TOKENS // (len(prompts[order[0]]) + new_tokens)
        rows = max(1, min(most, rows))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


@torch.no_grad()
def write(
    model: Any,
    prompts: Sequence[list[int]],
    draws: Sequence[Draw],
    how: Sampling,
    ends: Sequence[int],
    engine: Any | None = None,
) -> list[Written]:
    """Return what a model writes after each prompt of one batch.

    Args:
        model: a Hugging Face causal language model in eval mode.
        prompts: tokens, at least one each; they are padded on the left.
        draws: the name of each text.
        how: how tokens are drawn.
        ends: tokens that end a text.
        engine: ZeRO-3's engine of a `models.causal_lm.Student` that holds the model; all ranks then
            write at the same time.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    device = model.device
    length, padding = max(map(len, prompts)), next(iter(ends), 0)
    left = [length - len(prompt) for prompt in prompts]
    ids = [[padding] * n + prompt for n, prompt in zip(left, prompts, strict=True)]
    mask = [[0] * n + [1] * (length - n) for n in left]

    chooser = _Chooser(draws, how, length, device)
    # The likeliest token is taken of scores that allow only the drawn one.
    arguments = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "max_new_tokens": how.max_new_tokens,
        "do_sample": False,
        "eos_token_id": [*ends] or None,
        "pad_token_id": padding,
        "logits_processor": LogitsProcessorList([chooser]),
        "synced_gpus": engine is not None,
    }
    # Settings in the model's own file, such as a penalty on repetition, would change its
    # distribution.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        if engine is None:
            out = model.generate(**arguments)
        else:
            out = engine({"arguments": arguments}, probe="generate")
    finally:
        model.generation_config = own
    return chooser.cut(out[:, length:].tolist(), ends)


class _Chooser:
    """Leaves the drawn token of each row alone possible, as a processor of transformers' scores,
    and keeps the entropy of each row's distribution, `[rows]` a step."""

    def __init__(self, draws: Sequence[Draw], how: Sampling, length: int, device: torch.device):
        self._how, self._length = how, length
        self._entropies: list[Tensor] = []
        rows = np.stack([uniforms(draw, how.max_new_tokens) for draw in draws])
        self._numbers = torch.from_numpy(rows).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # With `synced_gpus` a rank whose texts have ended goes on beside the others.
        at = min(input_ids.shape[1] - self._length, self._numbers.shape[1] - 1)
        self._entropies.append(_measure_entropy(scores[:, : self._how.vocab].float()))
        chosen = choose(scores, self._numbers[:, at], self._how)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def cut(self, rows: list[list[int]], ends: Sequence[int]) -> list[Written]:
        """Return the texts that rows of new tokens begin with."""
        entropies = torch.stack(self._entropies, 1).tolist()
        pairs = [(_cut(row, ends), each) for row, each in zip(rows, entropies, strict=True)]
        return [replace(text, entropy=sum(each[: len(text.tokens)])) for text, each in pairs]


def _measure_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row's softmax, `[rows]`, in nats."""
    log_q = logits.log_softmax(-1)
    return -(log_q.exp() * log_q.clamp(min=torch.finfo(log_q.dtype).min)).sum(-1)


def _cut(tokens: list[int], ends: Sequence[int]) -> Written:
    """Return the tokens up to the first that ends a text; padding follows it."""
    for place, token in enumerate(tokens):
        if token in ends:
            return Written(tokens[: place + 1], True)
    return Written(tokens, False)
