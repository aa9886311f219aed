"""The calls of attention that a tree of shared beginnings takes.

Nodes are laid out parents first and subtree after subtree, so a subtree is one run of tokens, and
a token sees just the tokens before it whose own subtree has not ended:

    key j is seen by query i   if   j <= i < end of the subtree of j's node

One call for the whole pack would mostly compute what the mask throws away, and one for every node
would mostly be overhead. The calls are chosen from the leaves upwards by an estimate of their cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Costs in products of a query with a key, measured on a CPU (9 heads of 64, forward and backward):
# what a call takes besides them, and what fetching a key for it takes.
_CALL, _KEY = 2048, 8


@dataclass(frozen=True)
class Call:
    """One call of attention.

    Args:
        start, end: its queries, a run of tokens.
        keys: runs of tokens, rising; the last one is that of the queries.
        is_causal: no mask is needed beyond the causal one.
    """

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]
    is_causal: bool


class Tree:
    """A tree of runs of tokens.

    Args:
        lengths: tokens of each node, at least one, in the order of the tokens.
        parents: the parent of each node, which comes before it; -1 for a root.
    """

    def __init__(self, lengths: list[int], parents: list[int]):
        self.lengths, self.parents = lengths, parents
        self.starts = [0, *itertools.accumulate(lengths)]
        self.depths = [0] * len(lengths)  # tokens above each node
        self.ends = self.starts[1:]  # of each node's subtree
        for node, parent in enumerate(parents):
            if parent >= 0:
                self.depths[node] = self.depths[parent] + lengths[parent]
        for node in reversed(range(len(parents))):
            if parents[node] >= 0:
                self.ends[parents[node]] = max(self.ends[parents[node]], self.ends[node])
        self.calls = self._choose_calls()
        self._cuts = sorted({0, *(at for call in self.calls for run in call.keys for at in run)})
        self._masks: dict[tuple[int, int | None, torch.device], Tensor] = {}

    def split(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Yield query, key, value and mask of each call, whose results follow one another.

        Args:
            query, key, value: `[1, heads, tokens, head size]`.
            window: how many tokens back a token may look, itself included; None for all.
        """
        queries = query.split([call.end - call.start for call in self.calls], dim=2)
        # Keys are cut once and joined for each call: the gradient of a slice would have the size
        # of the whole.
        sizes = [end - start for start, end in itertools.pairwise(self._cuts)]
        parts = [each.split(sizes, dim=2) for each in (key, value)]
        place = {at: number for number, at in enumerate(self._cuts)}
        for number, call in enumerate(self.calls):
            chosen = [k for start, end in call.keys for k in range(place[start], place[end])]
            k, v = (_join([part[i] for i in chosen]) for part in parts)
            yield queries[number], k, v, self._mask(number, window, query.device)

    def _mask(self, number: int, window: int | None, device: torch.device) -> Tensor | None:
        """Return the mask of a call, `[1, 1, queries, keys]`, True where a query sees a key, or
        None where the causal one is enough; made once for all layers."""
        call = self.calls[number]
        seen = sum(end - start for start, end in call.keys)
        if call.is_causal and (window is None or seen <= window):
            return None
        name = (number, window, device)
        if name not in self._masks:
            self._masks[name] = self._make_mask(call, window).to(device)
        return self._masks[name]

    def _make_mask(self, call: Call, window: int | None) -> Tensor:
        runs = [torch.arange(start, end) for start, end in call.keys]
        keys, queries = torch.cat(runs), runs[-1][:, None]
        lengths = torch.tensor(self.lengths)
        ends = torch.tensor(self.ends).repeat_interleave(lengths)
        mask = (keys <= queries) & (queries < ends[keys])
        if window is not None:
            moved = torch.tensor(self.depths) - torch.tensor(self.starts[:-1])
            at = torch.arange(len(ends)) + moved.repeat_interleave(lengths)  # places in the sample
            mask &= at[queries] - at[keys] < window
        return mask[None, None]

    def _choose_calls(self) -> list[Call]:
        """Return the calls, in the order of their queries."""
        below: list[list[_Plan]] = [[] for _ in range(len(self.lengths) + 1)]  # the last: of roots
        for node in reversed(range(len(self.lengths))):
            # Its own tokens by themselves and then what hangs below, or the whole subtree at once.
            depth, start = self.depths[node], self.starts[node]
            inside = _join_neighbours(below[node][::-1], depth + self.lengths[node])
            own = _plan_one(node, start, start + self.lengths[node], depth)
            apart = _Plan(
                own.cost + sum(plan.cost for plan in inside),
                [*own.runs, *(run for plan in inside for run in plan.runs)],
            )
            whole = _plan_one(node, start, self.ends[node], depth)
            best = min(whole, apart, key=lambda plan: plan.cost)
            below[self.parents[node]].append(best)
        plans = _join_neighbours(below[-1][::-1], 0)
        return [self._make_call(*run) for plan in plans for run in plan.runs]

    def _make_call(self, node: int, start: int, end: int) -> Call:
        above, runs = self.parents[node], [(start, end)]
        while above >= 0:
            at = self.starts[above]
            run = (at, at + self.lengths[above])
            if run[1] == runs[0][0]:
                runs[0] = (at, runs[0][1])
            else:
                runs.insert(0, run)
            above = self.parents[above]
        is_alone = end == start + self.lengths[node]
        is_causal = is_alone and (self.depths[node] == 0 or end == start + 1)
        # A run of keys that reaches into the queries is cut where they begin.
        if runs[-1][0] < start:
            runs[-1:] = [(runs[-1][0], start), (start, end)]
        return Call(start, end, tuple(runs), is_causal)


@dataclass(frozen=True)
class _Plan:
    """Calls, as (first node, first token, end) of each, and what they cost together."""

    cost: int
    runs: list[tuple[int, int, int]]


def _plan_one(node: int, start: int, end: int, depth: int) -> _Plan:
    """Plan one call for a run of tokens below a node that is `depth` tokens deep."""
    queries, keys = end - start, depth + end - start
    return _Plan(queries * keys + _KEY * keys + _CALL, [(node, start, end)])


def _join_neighbours(plans: list[_Plan], depth: int) -> list[_Plan]:
    """Return the plans of siblings, neighbours in one call where that is cheaper."""
    joined: list[_Plan] = []
    for plan in plans:
        if joined:
            node, start, _ = joined[-1].runs[0]
            both = _plan_one(node, start, plan.runs[-1][2], depth)
            if both.cost < joined[-1].cost + plan.cost:
                joined[-1] = both
                continue
        joined.append(plan)
    return joined


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
