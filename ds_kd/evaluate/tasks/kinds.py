"""The kinds of tasks: how a row becomes an item of tokens, and a batch of items becomes records.

A record holds plain numbers of one sample, from which its task's metrics are summed. Items and
records are JSON, so that they can be fingerprinted and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import regex

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.errors import UserError
from ds_kd.evaluate.statistics import Metric
from ds_kd.evaluate.subject import Sequence, Subject, branch, continue_text
from ds_kd.evaluate.tasks.encoding import Encoder
from ds_kd.evaluate.tasks.scores import score_best
from ds_kd.losses.scores import DISTANCES

Item = dict[str, Any]
Record = dict[str, Any]
Row = dict[str, Any]

_SECONDS = 5.0  # that a task's expression is looked for in one answer


class SearchError(UserError):
    """A task's regular expression takes no bounded time."""

    exit_code = 2


class Task(Protocol):
    """A kind of task.

    `name` is its name in the results, `columns` are those of the rows that it reads (none for one
    that takes tokenised samples), `needs_teacher` says whether it compares with a teacher, and
    `metrics` are computed from its records.
    """

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def needs_teacher(self) -> bool: ...

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def rules(self) -> list[Any]:
        """Return what decides a record beside its item, as JSON."""

    def prepare(self, row: Row, encoder: Encoder) -> list[Item]:
        """Return the tokens of a row, or of a sample: one item, or several whose records add up.
        A row with nothing to score makes none.

        Raises:
            ValueError: the row lacks something.
        """

    def measure(self, item: Item) -> int:
        """Return the tokens that an item takes in a batch."""

    def run(self, subject: Subject, items: list[Item]) -> list[Record]:
        """Return the record of each item of a batch; collective, if the model is sharded."""


@dataclass(frozen=True)
class MultipleChoice:
    """Choose the likeliest of several endings of a context.

    Args:
        read: returns a row's context, its endings and the number of the right one.
        gap: stands between context and ending.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], tuple[str, list[str], int]]
    gap: str = " "
    needs_teacher = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("acc", "acc"), Metric("acc_norm", "acc_norm"))

    @property
    def rules(self) -> list[Any]:
        return ["multiple choice"]

    def prepare(self, row: Row, encoder: Encoder) -> list[Item]:
        prompt, choices, right = self.read(row)
        pairs = [encoder.encode_pair(prompt, self.gap + choice) for choice in choices]
        if not all(ending and choice for choice, (_, ending) in zip(choices, pairs, strict=True)):
            raise ValueError(f"an ending is empty: {choices!r:.80}")
        contexts = [encoder.cut(context, ending) for context, ending in pairs]
        item = {
            "contexts": contexts[:1] if all(c == contexts[0] for c in contexts) else contexts,
            "endings": [ending for _, ending in pairs],
            "characters": [len(choice) for choice in choices],
            "right": right,
        }
        return [item]

    def measure(self, item: Item) -> int:
        return len(item["contexts"][0]) + sum(len(ending) - 1 for ending in item["endings"])

    def run(self, subject: Subject, items: list[Item]) -> list[Record]:
        # All endings of an item are one sequence, in which its context is computed once.
        most = max(map(self.measure, items))
        shares = subject.can_share(most) and all(len(item["contexts"]) == 1 for item in items)
        if shares:
            sequences = [branch(item["contexts"][0], item["endings"]) for item in items]
            sums = subject.score(sequences, max(len(item["endings"]) for item in items))
            return [self._judge(item, row) for item, row in zip(items, sums, strict=True)]
        sequences = [each for item in items for each in _separate(item)]
        scores = iter(subject.score(sequences, 1))
        return [self._judge(item, [next(scores)[0] for _ in item["endings"]]) for item in items]

    def _judge(self, item: Item, sums: list[float]) -> Record:
        likelihoods = np.array(sums[: len(item["endings"])])
        best = int(likelihoods.argmax())
        best_by_length = int((likelihoods / np.array(item["characters"], dtype=float)).argmax())
        return {
            "log_likelihoods": likelihoods.tolist(),
            "right": item["right"],
            "acc": float(best == item["right"]),
            "acc_norm": float(best_by_length == item["right"]),
        }


def _separate(item: Item) -> list[Sequence]:
    endings = item["endings"]
    contexts = item["contexts"] * (len(endings) if len(item["contexts"]) == 1 else 1)
    return [continue_text(c, ending) for c, ending in zip(contexts, endings, strict=True)]


@dataclass(frozen=True)
class Generation:
    """Answer a prompt, greedily, and compare the text with its references.

    Args:
        read: returns a row's prompt and its references.
        scores: names of `SCORES` in `scores.py`.
        stop: texts that end the answer, where it is no turn of a chat.
        new_tokens: the most tokens of an answer.
        uses_chat: whether the prompt is a user's turn, if the tokenizer has a chat template.
        pattern: a regular expression; what it finds first in an answer is compared, or its group.
        asks_for_none: whether a row without a reference asks for an empty answer, as in SQuAD 2.0;
            otherwise nothing can be said of it.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], tuple[str, list[str]]]
    scores: tuple[str, ...] = ("exact_match", "f1")
    stop: tuple[str, ...] = ("\n",)
    new_tokens: int = 64
    uses_chat: bool = True
    pattern: str | None = None
    asks_for_none: bool = False
    needs_teacher = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(Metric(name, name) for name in self.scores)

    @property
    def rules(self) -> list[Any]:
        return ["generation", self.scores, self.new_tokens, self.pattern]

    def prepare(self, row: Row, encoder: Encoder) -> list[Item]:
        prompt, references = self.read(row)
        if not (references or self.asks_for_none):
            return []
        is_chat = self.uses_chat and encoder.tokenizer.chat_template is not None
        ids = encoder.encode_prompt(prompt, is_chat)
        room = [0] * self.new_tokens
        item = {
            "prompt": encoder.cut(ids, room),
            "references": references,
            "stop": [] if is_chat else list(self.stop),
        }
        return [item]

    def measure(self, item: Item) -> int:
        return len(item["prompt"]) + self.new_tokens

    def run(self, subject: Subject, items: list[Item]) -> list[Record]:
        prompts = [item["prompt"] for item in items]
        answers = subject.generate(prompts, self.new_tokens, items[0]["stop"])
        return [self._judge(item, text) for item, text in zip(items, answers, strict=True)]

    def _judge(self, item: Item, text: str) -> Record:
        right = item["references"] or [""]
        try:
            answer = text if self.pattern is None else _find(self.pattern, text)
        except TimeoutError:
            raise SearchError(
                f"regex of {self.name}: {self.pattern!r:.200} was looked for {_SECONDS:.0f} s in "
                f"an answer without an end of that (reference {right[0]!r:.60}, answer "
                f"{text!r:.120}); write it without nested repeats, such as (a+)+ or (a|aa)*"
            ) from None
        scored = {name: score_best(name, answer, right) for name in self.scores}
        return {"text": text, **scored}


@dataclass(frozen=True)
class Perplexity:
    """Predict every token of a text, or of the supervised part of a sample. A text that is longer
    than the model reads at once makes several items.

    Args:
        read: returns a row's context, which is not scored, and its text; None takes samples of a
            data set, whose supervised tokens are scored.
    """

    name: str
    columns: tuple[str, ...] = ()
    read: Callable[[Row], tuple[str, str]] | None = None
    needs_teacher = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        def to_bits(mean: Any) -> Any:
            return mean / math.log(2)

        return (
            Metric("perplexity", "loss", "tokens", np.exp, is_lower_better=True),
            Metric("byte_perplexity", "loss", "bytes", np.exp, is_lower_better=True),
            Metric("bits_per_byte", "loss", "bytes", to_bits, is_lower_better=True),
        )

    @property
    def rules(self) -> list[Any]:
        return ["perplexity"]

    def prepare(self, row: Row, encoder: Encoder) -> list[Item]:
        windows, text = self._cut(row, encoder)
        scored = [(tokens, labels) for tokens, labels in windows if _count_labels(labels)]
        sizes = [len(text.encode("utf-8")), *[0] * len(scored)]
        return [
            {"tokens": tokens, "labels": labels, "bytes": size}
            for (tokens, labels), size in zip(scored, sizes, strict=False)
        ]

    def _cut(self, row: Row, encoder: Encoder) -> tuple[list[tuple[list[int], list[int]]], str]:
        """Return (tokens, labels) of a row's windows, and the text that is scored in them."""
        if self.read is None:
            ids = [label for label in row["labels"] if label != IGNORE_INDEX]
            text = encoder.tokenizer.decode(ids, skip_special_tokens=True)
            return encoder.cut_windows(row["input_ids"], row["labels"]), text
        context, text = self.read(row)
        if not context:
            return encoder.make_windows(encoder.encode(text)), text
        before, following = encoder.encode_pair(context, text)
        if encoder.longest is None or len(following) <= encoder.longest:
            before = encoder.cut(before, following)
        tokens = [*before, *following]
        labels = [IGNORE_INDEX] * len(before) + following
        return encoder.cut_windows(tokens[:-1], labels[1:]), text

    def measure(self, item: Item) -> int:
        return len(item["tokens"])

    def run(self, subject: Subject, items: list[Item]) -> list[Record]:
        sequences = [
            Sequence(
                item["tokens"],
                [(k, y, 0) for k, y in enumerate(item["labels"]) if y != IGNORE_INDEX],
            )
            for item in items
        ]
        scores = subject.score(sequences, 1)
        return [
            {"loss": -score, "tokens": _count_labels(item["labels"]), "bytes": item["bytes"]}
            for item, (score,) in zip(items, scores, strict=True)
        ]


@dataclass(frozen=True)
class Distances:
    """Compare with a teacher, at every supervised token of a sample. One that is longer than the
    models read at once makes several items."""

    name: str = "kl"
    columns: tuple[str, ...] = ()
    needs_teacher = True

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(
            Metric(name, name, "tokens", is_lower_better=name.endswith("_kl")) for name in DISTANCES
        )

    @property
    def rules(self) -> list[Any]:
        return ["distances"]

    def prepare(self, row: Row, encoder: Encoder) -> list[Item]:
        windows = encoder.cut_windows(row["input_ids"], row["labels"])
        return [
            {"input_ids": tokens, "labels": labels}
            for tokens, labels in windows
            if _count_labels(labels)
        ]

    def measure(self, item: Item) -> int:
        return len(item["input_ids"])

    def run(self, subject: Subject, items: list[Item]) -> list[Record]:
        sums = subject.measure_distances(items)
        return [
            dict(zip(DISTANCES, row, strict=True)) | {"tokens": _count_labels(item["labels"])}
            for item, row in zip(items, sums, strict=True)
        ]


def _find(pattern: str, text: str) -> str:
    """Return what a regular expression finds first: its group if it has one, or nothing.

    Raises:
        TimeoutError: it is not done after `_SECONDS`, as some expressions take time that doubles
            with each letter.
    """
    found = regex.search(pattern, text, timeout=_SECONDS)
    if found is None:
        return ""
    return str(found.group(1 if found.re.groups else 0) or "")


def _count_labels(labels: list[int]) -> int:
    return sum(label != IGNORE_INDEX for label in labels)
