"""A model that is evaluated: what it scores and generates, a batch at a time.

The model is seen through the same door as in training, `engine(batch, probe=…)` of a body and a
head (`ds_kd.models.causal_lm`), so that a plain model and a sharded one give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_kd.data.collate import default_collater
from ds_kd.models import attention

_PROBE = 8  # tokens
_EXACT = 1e-5  # of a log-likelihood; rounding in float32 is ten times smaller
_SHARE_OF_EFFECT = 0.3
_LONGEST_MASK = 4096  # tokens; a mask takes the square of it
_ALL, _PADDING = 0, -1  # groups of tokens: seen by all later ones, and seen by none


@dataclass
class Sequence:
    """Tokens to run through a model, and those whose probability is asked for.

    Args:
        tokens: what the model reads.
        targets: (position, token that follows it, the part to whose sum its score is added).
        branches: (first position, end, first position's place in the text) of parts that share
            what stands before the first branch, and do not see each other.
    """

    tokens: list[int]
    targets: list[tuple[int, int, int]] = field(default_factory=list)
    branches: list[tuple[int, int, int]] = field(default_factory=list)


def branch(context: list[int], endings: list[list[int]]) -> Sequence:
    """Return a sequence that scores several endings of a context, which is read once."""
    made = Sequence(list(context))
    for part, ending in enumerate(endings):
        start = len(made.tokens)
        made.tokens += ending[:-1]
        made.branches.append((start, len(made.tokens), len(context)))
        places = [len(context) - 1, *range(start, len(made.tokens))]
        made.targets += [(at, token, part) for at, token in zip(places, ending, strict=True)]
    return made


def continue_text(context: list[int], ending: list[int]) -> Sequence:
    """Return a sequence that scores one ending of a context."""
    tokens = [*context, *ending[:-1]]
    places = range(len(context) - 1, len(tokens))
    return Sequence(tokens, [(at, token, 0) for at, token in zip(places, ending, strict=True)])


def can_branch(subject: Subject) -> bool:
    """Return whether the model computes branches of a text as it does each alone, by a probe;
    recurrent models, and those whose attention has a form of its own, do not.

    In bfloat16 the two differ by rounding too: there the difference must be far smaller than what
    one branch would do to the other if it saw it.
    """
    draw = torch.Generator().manual_seed(0)
    size = subject.model.config.get_text_config().vocab_size
    context, first, second = (
        torch.randint(size, (n,), generator=draw).tolist() for n in (_PROBE, _PROBE // 2, _PROBE)
    )
    try:
        ((_, got),) = subject.score([branch(context, [first, second])], 2)
        ((alone,),) = subject.score([continue_text(context, second)], 1)
        ((joined,),) = subject.score([continue_text(context + first, second)], 1)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False
    is_exact = subject.dtype == torch.float32
    limit = _EXACT * abs(alone) if is_exact else _SHARE_OF_EFFECT * abs(joined - alone)
    return abs(got - alone) <= limit


@dataclass
class Subject:
    """A model under evaluation.

    Args:
        engine: calls its module, a `FrozenModel` or `Student`, with (batch, probe); collective,
            if the model is sharded.
        tokenizer: the model's.
        device: where batches go.
        shares_prefix: whether the model computes branches of a text as it does each alone.
        teacher: the model to which it is compared, `teacher(batch) → output`.
        vocab: number of ids that both share.
        is_sharded: whether its weights are shared out over ranks, which then all generate until
            the last of them is done.
    """

    engine: Any
    tokenizer: Any
    device: torch.device
    shares_prefix: bool = False
    teacher: Any | None = None
    vocab: int = 0
    is_sharded: bool = False

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self.engine.module.model

    def can_share(self, tokens: int) -> bool:
        """Return whether branches in a sequence of so many tokens are computed right: a window of
        attention counts places, not positions."""
        windows = [window for window in attention.windows_of(self.model) if window]
        return self.shares_prefix and tokens <= min([*windows, _LONGEST_MASK])

    @torch.no_grad()
    def score(self, sequences: list[Sequence], parts: int) -> list[list[float]]:
        """Return the log-probability of each part of each sequence, nats, summed in fp64."""
        batch, places = self._make_batch(sequences)
        scores = self.engine(batch, probe="label_scores").double().cpu()
        sums = torch.zeros((len(sequences), parts), dtype=torch.float64)
        owners, part, rows, columns = (torch.tensor(each) for each in zip(*places, strict=True))
        sums.index_put_((owners, part), scores[rows, columns], accumulate=True)
        return [[float(value) for value in row] for row in sums]

    def _make_batch(
        self, sequences: list[Sequence]
    ) -> tuple[dict[str, Tensor], list[tuple[int, int, int, int]]]:
        """Return a batch for `label_scores`, and (sequence, part, row, column) of each score."""
        length = max(len(sequence.tokens) for sequence in sequences)
        labels: dict[int, list[int]] = {}
        asked = []
        for number, sequence in enumerate(sequences):
            for at, token, part in sequence.targets:
                # The last token of a context is followed by the first one of each ending.
                following = labels.setdefault(number * length + at, [])
                asked.append((number, part, number * length + at, len(following)))
                following.append(token)

        supervised = sorted(labels)
        rows = {at: row for row, at in enumerate(supervised)}
        widest = max(len(following) for following in labels.values())
        filled = [labels[at] + [-1] * (widest - len(labels[at])) for at in supervised]
        tokens = [each.tokens + [0] * (length - len(each.tokens)) for each in sequences]
        batch = {
            "input_ids": torch.tensor(tokens, device=self.device),
            "supervised": torch.tensor(supervised, device=self.device),
            "label_ids": torch.tensor(filled, device=self.device),
        }
        if any(each.branches for each in sequences):
            batch |= _lay_out(sequences, length, self.dtype, self.device)
        return batch, [(number, part, rows[at], column) for number, part, at, column in asked]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.get_output_embeddings().weight.dtype
        return dtype

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], new_tokens: int, stop: list[str]) -> list[str]:
        """Return the greedy continuation of each prompt, up to EOS or one of the texts `stop`."""
        from transformers import GenerationConfig, StoppingCriteriaList

        from ds_kd.models.generate import find_ends

        length = max(map(len, prompts))
        ends = find_ends(self.model, self.tokenizer)
        padding = ends[0] if ends else 0
        left = [length - len(prompt) for prompt in prompts]
        ids = [[padding] * n + prompt for n, prompt in zip(left, prompts, strict=True)]
        mask = [[0] * n + [1] * (length - n) for n in left]

        # The model's own generation config may ask for sampling or a penalty on repetition.
        plain = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=padding,
        )
        arguments = {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
            "generation_config": plain,
            "stopping_criteria": StoppingCriteriaList(
                [self._stop_at(stop, length)] if stop else []
            ),
            "synced_gpus": self.is_sharded,
        }
        out = self.engine({"arguments": arguments}, probe="generate")
        return [self._read_answer(row[length:], ends, stop) for row in out.tolist()]

    def _stop_at(self, stop: list[str], length: int) -> Any:
        """Return a criterion of transformers: the rows in which one of the texts has appeared."""

        def has_stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            texts = self.tokenizer.batch_decode(ids[:, length:])
            told = [any(mark in text for mark in stop) for text in texts]
            return torch.tensor(told, device=ids.device)

        return has_stopped

    def _read_answer(self, ids: list[int], ends: list[int], stop: list[str]) -> str:
        end = next((k for k, token in enumerate(ids) if token in ends), len(ids))
        text = str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
        for mark in stop:
            text = text.partition(mark)[0]
        return text

    @torch.no_grad()
    def measure_distances(self, samples: list[dict[str, Any]]) -> list[list[float]]:
        """Return the sums of `DISTANCES` over each sample's supervised tokens, in fp64.

        Args:
            samples: with `input_ids` and shifted `labels`; all have a supervised token.
        """
        assert self.teacher is not None
        made = default_collater(samples)
        length = made["input_ids"].shape[1]
        owners = made["supervised"] // length
        batch = {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in made.items()}
        batch |= {"teacher_output": self.teacher(batch), "vocab": self.vocab}
        found = self.engine(batch, probe="distances").double().cpu()
        sums = torch.zeros((len(samples), found.shape[1]), dtype=torch.float64)
        return [[float(value) for value in row] for row in sums.index_add_(0, owners, found)]


def _lay_out(
    sequences: list[Sequence], length: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return the `position_ids` `[sequences, length]` of branches, and the `attention_mask`
    `[sequences, 1, length, length]` by which they do not see each other."""
    positions = torch.arange(length).repeat(len(sequences), 1)
    groups = torch.full((len(sequences), length), _PADDING)
    for number, sequence in enumerate(sequences):
        groups[number, : len(sequence.tokens)] = _ALL
        for group, (start, end, place) in enumerate(sequence.branches, 1):
            positions[number, start:end] = torch.arange(place, place + end - start)
            groups[number, start:end] = group

    # Padding sees itself, as a row of a softmax needs something.
    seen, sees = groups[:, None, :], groups[:, :, None]
    allowed = (seen == _ALL) | (seen == sees)
    allowed &= torch.ones((length, length), dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype)
    mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    return {"position_ids": positions.to(device), "attention_mask": mask[:, None].to(device)}
