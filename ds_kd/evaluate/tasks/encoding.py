"""Prompts and answers as tokens, in the way of lm-evaluation-harness, so that numbers compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    def read_no_more(self, other: Encoder) -> Encoder:
        """Return this encoder for a model that is compared with another one: neither reads more at
        once than it can."""
        lengths = [each.longest for each in (self, other) if each.longest is not None]
        return replace(self, longest=min(lengths, default=None))

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
        is never read.

        Raises:
            ValueError: what follows is longer than the model reads at once.
        """
        if self.longest is None:
            return context
        if len(following) > self.longest:
            raise ValueError(
                f"{len(following)} tokens are to follow the prompt, and the model reads at most "
                f"{self.longest} at once"
            )
        return context[-(self.longest + 1 - len(following)) :]

    def cut_windows(
        self, tokens: list[int], labels: list[int]
    ) -> list[tuple[list[int], list[int]]]:
        """Return (tokens, labels) of the parts of a text that the model reads one at a time, so
        that each label is there once: those of the last part after as much as there is room for.

        Args:
            labels: the token that follows each token, or `IGNORE_INDEX`.
        """
        size = self.longest or max(1, len(tokens))
        windows = []
        for start in range(0, len(tokens), size):
            end = min(start + size, len(tokens))
            first = max(0, end - size)
            seen = [IGNORE_INDEX] * (start - first)
            windows.append((tokens[first:end], seen + labels[start:end]))
        return windows

    def make_windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return (tokens, labels) of the parts of a long text without a context. Its first token is
        predicted after `first_token`, which is not predicted itself if the tokenizer has put it in
        front."""
        ids = ids[1:] if ids[:1] == [self.first_token] else ids
        return self.cut_windows([self.first_token, *ids][: len(ids)], ids)
