"""Prompts and answers as tokens, in the way of lm-evaluation-harness, so that numbers compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_kd.data.chat import tokenize_open_turn
from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.errors import UserError


class TemplateError(UserError):
    """A chat template cannot render a prompt; the message says why."""

    exit_code = 2


@dataclass(frozen=True)
class Encoder:
    """A model's tokenizer, and what tokenising for it needs to know of the model.

    Args:
        tokenizer: the model's.
        longest: the most tokens that the model reads at once; None if its config names no limit.
    """

    tokenizer: Any
    longest: int | None = None

    @property
    def first_token(self) -> int:
        """Return the token that stands before a text without a context: BOS, or else EOS.

        Raises:
            ValueError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError(
            f"{self.tokenizer.name_or_path} has no BOS and no EOS token, so nothing can stand "
            "before the first token of a text; give a prompt"
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with what the tokenizer puts in front, without an EOS that
        it puts at the end."""
        tokenizer = self.tokenizer
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = list(tokenizer(text, add_special_tokens=not begins)["input_ids"])
        eos = tokenizer.eos_token_id
        if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
            ids.pop()
        return ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of what follows it.

        Both are tokenised as one text, and white space at the end of the context goes to what
        follows, as tokens begin with their space.
        """
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        if not context:
            following = list(self.tokenizer(continuation, add_special_tokens=False)["input_ids"])
            return [self.first_token], following
        before = self.encode(context)
        return before, self.encode(context + continuation)[len(before) :]

    def encode_prompt(self, prompt: str, as_chat: bool) -> list[int]:
        """Return the tokens after which the model is to answer.

        Args:
            as_chat: whether the prompt is the user's turn in the tokenizer's chat template, or
                running text, of which white space at the end is left to the answer's first token.

        Raises:
            TemplateError: the chat template cannot render it.
        """
        if as_chat:
            try:
                return tokenize_open_turn(self.tokenizer, [{"role": "user", "content": prompt}])
            except ValueError as error:
                raise TemplateError(f"{self.tokenizer.name_or_path}: {error}") from error
        return self.encode(prompt.rstrip()) or [self.first_token]

    def cut(self, context: list[int], following: list[int]) -> list[int]:
        """Return the end of a context that leaves the model room for what follows; its last token
        is never read."""
        if self.longest is None:
            return context
        return context[-max(1, self.longest + 1 - len(following)) :]

    def make_windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return (tokens, labels) of the parts of a long text, so that each token is predicted
        once: the first after `first_token`, which is not predicted itself if the tokenizer has put
        it in front, and those of the last part after as much as there is room for."""
        ids = ids[1:] if ids[:1] == [self.first_token] else ids
        size = self.longest or max(1, len(ids))
        before = [self.first_token, *ids]
        windows = []
        for start in range(0, len(ids), size):
            end = min(start + size, len(ids))
            first = max(0, end - size)
            seen = [IGNORE_INDEX] * (start - first)
            windows.append((before[first:end], seen + ids[start:end]))
        return windows
