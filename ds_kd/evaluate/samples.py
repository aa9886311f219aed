"""Have the models of a run answer held-out questions while it trains, side by side.

Every rank asks the same questions, so that all have the same number of forwards of each engine, as
ZeRO-3 needs. The likeliest token is taken each time, so that no random number is drawn; validation
has put the engines into eval mode before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_kd.data.packing import PackedDataset
from ds_kd.data.prefixes import SharedDataset
from ds_kd.errors import UserError
from ds_kd.evaluate.comparison import question_of
from ds_kd.parallel.world import World, sum_over

NEW_TOKENS = 40

#: Returns the likeliest next token at the positions that a micro-batch names as supervised.
Next = Callable[[dict[str, Any]], torch.Tensor]


@dataclass
class Generations:
    """Questions for the models of a run.

    Args:
        models: asks a model for its next tokens, by the model's label; all are collectives.
        tokenizer: of the models.
        questions: tokens before the answer, and of the answer that was expected.
        world: the ranks; all of them ask.
    """

    models: dict[str, Next]
    tokenizer: Any
    questions: list[tuple[list[int], list[int]]]
    world: World
    _given: dict[str, list[list[int]]] = field(default_factory=dict)

    def write(self) -> list[dict[str, str]]:
        """Return `prompt`, `reference` and every model's answer for each question (a collective).
        The teacher is asked once, as it does not change."""
        answers = {
            label: self._given.get(label) or self._answer(model)
            for label, model in self.models.items()
        }
        self._given = {label: kept for label, kept in answers.items() if label == "teacher"}
        return [
            {"prompt": self._decode(prompt), "reference": self._decode(reference)}
            | {label: self._decode(all_[row]) for label, all_ in answers.items()}
            for row, (prompt, reference) in enumerate(self.questions)
        ]

    def _answer(self, model: Next) -> list[list[int]]:
        """Return a model's new tokens for every question, until all have ended."""
        texts = [[*prompt] for prompt, _ in self.questions]
        ends = {self.tokenizer.eos_token_id}
        for _ in range(NEW_TOKENS):
            found = model(self._make_batch(texts)).tolist()
            for text, token in zip(texts, found, strict=True):
                text.append(token)
            # Ranks could differ in rounding, and all must stop at the same token.
            new = [text[len(p) :] for text, (p, _) in zip(texts, self.questions, strict=True)]
            is_done = all(ends & {*tokens} for tokens in new)
            if sum_over([float(is_done)], self.world.everyone)[0] == self.world.everyone.size:
                break
        cut = [[*tokens, *ends].index(self.tokenizer.eos_token_id) for tokens in new]
        return [tokens[:end] for tokens, end in zip(new, cut, strict=True)]

    def _make_batch(self, texts: list[list[int]]) -> dict[str, Any]:
        """Return a micro-batch `[questions, length]` whose supervised positions are the last ones
        of the texts; padding on the right is seen by none of them."""
        length = max(map(len, texts))
        rows = [[*text, *[0] * (length - len(text))] for text in texts]
        last = [row * length + len(text) - 1 for row, text in enumerate(texts)]
        device = self.world.device
        return {
            "input_ids": torch.tensor(rows, device=device),
            "supervised": torch.tensor(last, device=device),
        }

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def choose_questions(
    samples: Any, tokenizer: Any, count: int, longest: int | None
) -> list[tuple[list[int], list[int]]]:
    """Return the first questions of validation samples that can be asked.

    Args:
        samples: with `input_ids` and shifted `labels`; packs give the samples that they are made
            of, as those of a tree (`data.prefixes`) do not stand one after the other.
        count: number of questions.
        longest: tokens that the models take; None if they know no limit.
    """
    rows = samples.dataset if isinstance(samples, (PackedDataset, SharedDataset)) else samples
    found: list[tuple[list[int], list[int]]] = []
    for k in range(len(rows)):
        if len(found) == count:
            break
        try:
            question = question_of(rows[k], tokenizer)
        except UserError:  # nothing of it is supervised
            continue
        if longest is None or len(question[0]) + NEW_TOKENS <= longest:
            found.append(question)
    return found
