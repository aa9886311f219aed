"""Micro-batches of which the student wrote some samples itself, just before it trains on them.

In each window of samples a share λ is on-policy: only their prompts are used, and the student
writes what follows (Agarwal et al. 2024, arXiv:2306.13649). It writes once for the whole window,
before its first step; the window's samples are then cut into micro-batches as a loader's are. The
choice of samples that are on-policy, and each of their tokens, follow from (seed, epoch, sample,
draw, position) alone. A sample counts by its place in the data, as several may have one id.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ds_kd.data.sampler import FILLER, GlobalBatchSampler, WithFiller
from ds_kd.models.generation.sampling import Draw, Written, share_of
from ds_kd.parallel.world import World
from ds_kd.train.batches import Batch
from ds_kd.train.prompts import join_rollout, prompt_of

#: The door for other engines of generation: it returns the texts of all prompts on every rank.
Write = Callable[[Sequence[list[int]], Sequence[Draw]], list[Written]]

_SHOWN = 2  # texts that are logged of a window
_SHOWN_EVERY = 10  # windows


@dataclass(frozen=True)
class Policy:
    """The samples that are on-policy, and how often they are used.

    Args:
        ratio: λ, the share of samples whose answers the student writes.
        samples_per_prompt: answers that it writes to each.
        reuse: optimizer steps that train on the same window.
        seed: of the choice of samples and of all tokens.
        opening: tokens with which the assistant's turn opens; see `data.prompts.prompt_of`.
    """

    ratio: float
    samples_per_prompt: int
    reuse: int
    seed: int
    opening: list[int]


@dataclass(frozen=True)
class _Window:
    """The samples that `reuse` steps train on, and the texts among them."""

    number: int
    samples: list[dict[str, Any]]
    prompts: list[list[int]]
    texts: list[Written]
    seconds: float


class RolloutBatches:
    """Micro-batches of a window of samples, some of them written by the student.

    Args:
        samples: the training samples, not packed.
        sampler: its order of samples and its batch sizes are used.
        collate: makes a micro-batch of samples or packs.
        lay_out: returns samples as packs, or in an order by which those of similar length share a
            micro-batch.
        write: see `Write`; a collective.
        decode: returns the text of tokens, for the log.
        policy: which samples are on-policy.
        world: the ranks that share a step's micro-batches.
    """

    def __init__(
        self,
        samples: Any,
        sampler: GlobalBatchSampler,
        collate: Callable[[list[dict[str, Any]]], Batch],
        lay_out: Callable[[list[dict[str, Any]]], Any],
        write: Write,
        decode: Callable[[list[int]], str],
        policy: Policy,
        world: World,
    ):
        self._samples, self._sampler, self._collate = samples, sampler, collate
        self._lay_out, self._write, self._decode = lay_out, write, decode
        self._policy, self._world = policy, world
        self._window: _Window | None = None
        self._restored: dict[str, Any] = {}
        self._is_new = False

    @property
    def steps_per_epoch(self) -> int:
        return self._sampler.steps_per_epoch * self._policy.reuse

    def after(self, step: int) -> Iterator[list[Batch]]:
        """Return the micro-batches of each step from `step` + 1 on; the student writes when the
        first step of a window is asked for."""
        number, used = divmod(step, self._policy.reuse)
        while True:
            if self._window is None or self._window.number != number:
                self._window = self._make_window(number)
            self._is_new = used == 0
            batches = self._cut(self._window.samples)
            for _ in range(used, self._policy.reuse):
                yield batches
            number, used = number + 1, 0

    def describe(self) -> dict[str, Any]:
        """Return what is logged of the texts of a window with its first step, by tag."""
        window, is_new, self._is_new = self._window, self._is_new, False
        if window is None or not is_new or not window.texts:
            return {}
        lengths = [len(text.tokens) for text in window.texts]
        found: dict[str, Any] = {
            "time/rollouts": window.seconds,
            "rollouts/count": len(lengths),
            "rollouts/length": sum(lengths) / len(lengths),
            "rollouts/truncated": sum(not t.is_whole for t in window.texts) / len(lengths),
            "rollouts/entropy": sum(t.entropy for t in window.texts) / max(1, sum(lengths)),
        }
        if window.number % _SHOWN_EVERY == 0:
            pairs = zip(window.prompts[:_SHOWN], window.texts, strict=False)
            found["rollouts/texts"] = [
                {"prompt": self._decode(prompt), "student": self._decode(text.tokens)}
                for prompt, text in pairs
            ]
        return found

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """Return the texts that steps after `step` still train on, or None if there are none."""
        number, used = divmod(step, self._policy.reuse)
        if not used or self._window is None or self._window.number != number:
            return None
        texts = self._window.texts
        return {
            "window": number,
            "prompts": _hash_prompts(self._window.prompts),
            "tokens": [text.tokens for text in texts],
            "whole": [text.is_whole for text in texts],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over the texts of a window that a saved run was in."""
        self._restored = saved

    def _make_window(self, number: int) -> _Window:
        """Return the samples of a window; a collective if the student has to write."""
        epoch, place = divmod(number, self._sampler.steps_per_epoch)
        size = self._sampler.global_batch_size
        indices = self._sampler.order(epoch)[place * size : (place + 1) * size]
        samples = [(index, self._samples[index]) for index in indices]

        # A sample without an answer has no place where one begins, and stays as it is.
        made: list[dict[str, Any]] = []
        draws, prompts, names = list[Draw](), list[list[int]](), list[str]()
        for index, sample in samples:
            draw, name = Draw(self._policy.seed, epoch, str(index)), sample.get("sample_id", index)
            prompt = None
            if share_of(draw) < self._policy.ratio:
                prompt = prompt_of(sample, self._policy.opening)
            if prompt is None:
                made.append({"sample_id": str(name), **sample})
                continue
            for k in range(self._policy.samples_per_prompt):
                draws.append(draw._replace(number=k))
                prompts.append(prompt)
                names.append(f"{name}#{k}" if k else str(name))
        started = time.perf_counter()
        texts = self._restore(number, prompts) or self._write(prompts, draws)
        for prompt, text, name in zip(prompts, texts, names, strict=True):
            made.append(join_rollout(prompt, text.tokens, name))
        return _Window(number, made, prompts, texts, time.perf_counter() - started)

    def _restore(self, number: int, prompts: list[list[int]]) -> list[Written]:
        """Return the saved texts of a window, none if there are none to these prompts."""
        saved, self._restored = self._restored, {}
        if saved.get("window") != number or saved.get("prompts") != _hash_prompts(prompts):
            return []
        pairs = zip(saved["tokens"], saved["whole"], strict=True)
        return [Written(tokens, is_whole) for tokens, is_whole in pairs]

    def _cut(self, samples: list[dict[str, Any]]) -> list[Batch]:
        """Return this rank's micro-batches of a window, as many as every other rank's."""
        laid = self._lay_out(samples)
        units, local = WithFiller(laid), self._sampler.local_batch_size
        mine = self._world.data.rank * local
        batches = []
        for start in range(mine, mine + len(laid), local * self._world.data.size):
            numbers = range(start, min(start + local, len(laid)))
            batches.append(self._collate([units[k] for k in numbers or [FILLER]]))
        return batches


def _hash_prompts(prompts: list[list[int]]) -> str:
    """Return a hash by which saved texts know the prompts that they answer."""
    return hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]
