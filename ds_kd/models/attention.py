"""Attention that stays inside the samples of a pack, without wasted products.

For packs under SDPA, transformers builds a `[length, length]` block mask and discards most of the
products. Here SDPA is called once for each sample with its causal flag. On a pack of n samples this
does 1/n of the work, gives the same result, and can use the flash kernels of GPUs, which do not
take an explicit mask. On a GPU one launch takes all samples (`varlen`).

Where samples share their beginnings (`ds_kd.data.prefixes`), a call has the queries of one or more
neighbouring subtrees, the keys of these and of all nodes above, and a mask of that size.

Where the tokens of samples are split over ranks (`ds_kd.parallel.sequence`), the same is computed
of all tokens and of this rank's heads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_kd.errors import TrainingError
from ds_kd.models.packs import varlen
from ds_kd.models.packs.tree import Tree
from ds_kd.parallel.sequence import Exchange

NAME = "sdpa_by_sample"


class Segments:
    """The number of tokens of each sample of a pack.

    They are wrapped in an object because torch.compile would specialise on the length of a list.

    Args:
        lengths: of each sample, or of each node of the tree of shared beginnings.
        parents: of the nodes; None where samples share nothing.
        device: of the tokens. On one that may take them in one launch their runs are made here,
            and not in a layer, in whose compiled code they would be constants.
    """

    def __init__(
        self,
        lengths: list[int],
        parents: list[int] | None = None,
        device: torch.device | None = None,
    ):
        self.lengths, self.parents = lengths, parents
        self._runs: varlen.Runs | None = None
        if device is not None and device.type in varlen.DEVICES:
            self.runs(device)

    @functools.cached_property
    def tree(self) -> Tree | None:
        """The calls that shared beginnings take, one by one."""
        return None if self.parents is None else Tree(self.lengths, self.parents)

    def runs(self, device: torch.device) -> varlen.Runs:
        """Return the runs of one launch; made once for all layers of a model."""
        if self._runs is None:
            self._runs = varlen.make_runs(self.lengths, self.parents, device)
        return self._runs

    @property
    def has_runs(self) -> bool:
        """True once the runs are made."""
        return self._runs is not None


#: Kinds of layer that `sdpa_by_sample` computes correctly; others keep transformers' attention.
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


#: The attribute that holds why a model is given no packs, and the number of samples named then.
_REFUSAL, _NAMED = "_ds_kd_no_packs", 8

#: Arguments that the one launch for all samples does not take.
_ONE_BY_ONE = ("dropout", "softcap")

#: The sliding window of each call, inside `record_windows`.
_recorded: list[int | None] | None = None


@dataclass(frozen=True)
class _Heads:
    """The part of an attention module that transformers' SDPA reads.

    Args:
        num_key_value_groups: heads of queries for each of keys and values.
    """

    num_key_value_groups: int


def sdpa_by_sample(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    exchange: Exchange | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention inside each sample of a pack, with the interface of transformers.

    A compiled layer takes in attention of one launch; the rest stays apart from it.

    Args:
        query, key, value: `[1, heads, tokens, head size]`.
        attention_mask: must be None.
        segments: what the tokens belong to; None means one right-padded sample in each row.
        sliding_window: the number of tokens that a token attends to, itself included.
        exchange: the ranks over which the tokens are split; `segments` are those of all tokens.

    Returns:
        `[1, tokens, heads, head size]`, and None for the weights.
    """
    is_alone = attention_mask is None and exchange is None and _recorded is None
    is_alone = is_alone and query.shape[2] == key.shape[2]  # keys kept from before are not taken
    if is_alone and segments is None and sliding_window is None:
        return _attend_causally(module, query, key, value, kwargs), None
    is_launched = is_alone and segments is not None and segments.has_runs
    if is_launched and _takes_one_launch(query, value, kwargs):
        return _attend_at_once(query, key, value, segments, sliding_window, kwargs), None
    return _sdpa_apart(
        module, query, key, value, attention_mask, segments, sliding_window, exchange, kwargs
    )


@torch.compiler.disable
def _sdpa_apart(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None,
    sliding_window: int | None,
    exchange: Exchange | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Compute what `sdpa_by_sample` does, of any samples, outside compiled code."""
    if _recorded is not None:
        _recorded.append(sliding_window)
    if attention_mask is not None:
        raise ValueError("its attention has a mask of its own; remove packed_sequence")
    if exchange is None:
        return _attend(module, query, key, value, segments, sliding_window, kwargs), None
    heads = query.shape[1]
    query, key, value = exchange.gather_tokens(query, key, value)
    own = _Heads(query.shape[1] // key.shape[1])
    out = _attend(own, query, key, value, segments, sliding_window, kwargs)
    return exchange.scatter_tokens(out, heads), None


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments | None,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Return the attention of all tokens of some heads, `[1, tokens, heads, head size]`; see
    `sdpa_by_sample`."""
    # A GPU takes all samples at once.
    if segments is not None and _takes_one_launch(query, value, kwargs):
        return _attend_at_once(query, key, value, segments, sliding_window, kwargs)

    # Shared beginnings make calls of their own; otherwise every sample is one.
    if segments and segments.tree is not None:
        calls = segments.tree.split(query, key, value, sliding_window)
        return torch.cat(
            [_attend_causally(module, *call[:3], kwargs, call[3]) for call in calls], 1
        )
    lengths, out = segments.lengths if segments else [query.shape[2]], []
    for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            at = torch.arange(q.shape[2], device=q.device)
            back = at[:, None] - at
            mask = ((back >= 0) & (back < sliding_window))[None, None]
        out.append(_attend_causally(module, q, k, v, kwargs, mask))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _attend_causally(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kwargs: dict[str, Any],
    mask: Tensor | None = None,
) -> Tensor:
    """Return the attention of one call of transformers' SDPA, causal unless it has a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kwargs = {**kwargs, "is_causal": True}
    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    return out


def _takes_one_launch(query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether one launch can compute the attention of all samples."""
    return not any(kwargs.get(name) for name in _ONE_BY_ONE) and varlen.can_run(query, value)


def _attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments | None,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Return the attention of all samples, computed in one launch."""
    assert segments is not None
    runs = segments.runs(query.device)
    return varlen.attend(query, key, value, runs, sliding_window, kwargs.get("scaling"))


def attend_by_sample(model: Any, wanted: bool = True) -> None:
    """Switch a model from SDPA to `sdpa_by_sample` if both compute the same, or back to SDPA.

    Args:
        model: a Hugging Face model; one with another attention is left as it is.
        wanted: False switches back.
    """
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not wanted and config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")
    elif wanted and config._attn_implementation == "sdpa" and kinds <= _KNOWN_LAYERS:
        AttentionInterface.register(NAME, sdpa_by_sample)
        model.set_attn_implementation(NAME)


def refuse_packs(model: Any, why: str) -> None:
    """Refuse packs that this model is given from now on.

    Args:
        why: the end of the message.
    """
    setattr(model, _REFUSAL, why)


def is_by_sample(model: Any) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def arguments(model: Any, batch: dict[str, Any], exchange: Exchange | None) -> dict[str, Any]:
    """Return the arguments that tell a model's attention what the tokens of a batch belong to.

    Args:
        model: a Hugging Face model.
        batch: as `causal_lm` takes it.
        exchange: the ranks over which batches with `num_parts` are split.

    Raises:
        ValueError: the model's attention cannot do this.
        TrainingError: the batch has packs, and the model was found not to keep them apart.
    """
    is_split, lengths = batch.get("num_parts", 1) > 1, batch.get("segment_lengths")
    if lengths is not None and (why := getattr(model, _REFUSAL, "")):
        names = ", ".join(batch.get("sample_ids", [])[:_NAMED])
        raise TrainingError(f"a pack of your own (segment_lengths, samples {names}): {why}")
    split = {"exchange": exchange} if is_split else {}
    if "segments" in batch:  # several micro-batches in a row (`ds_kd.teachers.window`)
        return {"segments": batch["segments"], **split}
    if "attention_mask" in batch:
        return {"attention_mask": batch["attention_mask"]}
    if is_by_sample(model):
        if lengths is None:
            return split
        device = batch["input_ids"].device if model.dtype in varlen.DTYPES else None
        return {"segments": Segments(lengths, batch.get("segment_parents"), device), **split}
    if is_split:
        raise ValueError("tokens that are split over ranks need the attention sdpa")
    if batch.get("segment_parents") is not None:
        raise ValueError("shared beginnings need the attention sdpa; remove share_prefixes")
    return {} if lengths is None else _flash_arguments(model, lengths, batch["input_ids"].device)


def _flash_arguments(model: Any, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Return the arguments that tell transformers' flash attention where the samples of a pack are.
    Without them it finds out from the positions in every layer, for which the host waits.

    Args:
        model: a Hugging Face model; nothing is returned for one with another attention.
        lengths: of the samples.
    """
    if not str(model.config.get_text_config()._attn_implementation).startswith("flash_attention"):
        return {}
    runs = varlen.make_runs(lengths, None, device)
    return {
        "cu_seq_lens_q": runs.queries,
        "cu_seq_lens_k": runs.keys,
        "max_length_q": runs.longest_query,
        "max_length_k": runs.longest_key,
    }


@contextmanager
def record_windows() -> Iterator[list[int | None]]:
    """Record the sliding window of every call of `sdpa_by_sample`, in the order of the layers."""
    global _recorded
    made: list[int | None] = []
    _recorded = made
    try:
        yield made
    finally:
        _recorded = None


def windows_of(model: Any) -> list[int | None]:
    """Return the sliding window of each layer according to the configuration; None for a layer
    without one."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
