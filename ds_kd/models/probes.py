"""Probe a loaded model with a few tokens, and refuse one that a run would compute wrongly.

No list of architectures is needed: a probe shows whether body and linear head give transformers'
logits, whether attention is causal (so that right padding needs no mask), and whether the samples
of a pack stay apart. Each probe is a collective call through the engine. In bfloat16 the median row
is compared and not the worst one, as rounding may send a token to another expert.

The limits are measured, relative to hidden states or logits (16 architectures of 2 and 24 layers,
SmolLM2-135M; sound models at most, unsound ones at least):

    float32    any probe                            2e-6, 1e-3    limit 1e-4
    bfloat16   logits, their head's input scaled up    0, 0.7     limit 2e-2
    bfloat16   another token elsewhere is noticed      0, 4e-3    limit 2e-3, or 3 times the noise
    bfloat16   a sample alone and packed, as a share of its neighbour's possible effect
                                                    0.09, 1       limit 0.3
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from ds_kd.errors import first_line
from ds_kd.models import attention
from ds_kd.parallel.world import Group, sum_over

_TOKENS = 16
#: Sliding windows up to this length are probed with longer samples. For longer windows the probe
#: only checks that every layer passes its window to the attention function.
_LONGEST_WINDOW = 256
_TOLERANCE = {torch.float32: 1e-4}
_ROUGH_TOLERANCE = 2e-2
#: The relative rounding error between two batches of the same shape, whose sums have the same
#: order.
_ROUNDING = 2**-9
#: An expert's kernel may depend on its number of tokens; so the noise of another batch size is
#: measured.
_TIMES_NOISE = 3
#: The effect of a neighbour may be as small as bfloat16's rounding. A difference below this share
#: of the effect is no leak.
_SHARE_OF_EFFECT = 0.3


def check_head(engine: Any, device: torch.device, name: str) -> None:
    """Refuse a model whose head does more than `Head` computes, or which is not causal.

    The logits of body and `Head` are compared with transformers', once as they are and once with
    the head's input scaled up, so that soft caps take effect. Then the last tokens are changed,
    which under a causal mask changes no earlier hidden state.

    Args:
        engine: the engine of a `Student` or `FrozenModel` (a collective call).
        device: the device of the probe's tokens.
        name: the model's name in messages.

    Raises:
        ValueError: the two differ, or a later token changes an earlier one.
    """
    kind = type(engine.module.model).__name__
    ids = _random_tokens(engine, _TOKENS, device)
    batch = {"input_ids": ids, "supervised": torch.arange(1, _TOKENS, 2, device=device)}
    with (
        _evaluate_only(engine),
        _refuse_errors(f"{name}: {kind} cannot be run as a body and a linear head"),
    ):
        # Both probes are collectives, and all ranks raise the same errors.
        errors = [engine(batch, probe="logits_error"), engine(batch, probe="scaled_logits_error")]
    for error, scale in errors:
        if not error.item() <= _tolerance(engine) * scale.item():
            raise ValueError(
                f"{name}: {kind} computes its logits in a way this loss does not know (largest "
                f"difference {error.item():.3g} on a probe). Use a model with a linear head."
            )

    cut = _TOKENS - 4
    with _evaluate_only(engine):
        seen = {"input_ids": ids, "supervised": torch.arange(cut, device=device)}
        error = _influence(engine, seen, slice(cut, None))
    if error:
        raise ValueError(
            f"{name}: {kind} is not causal, a later token changes an earlier one (by {error:.3g} "
            f"on a probe). Use a decoder-only language model."
        )


def check_layers(engine: Any, device: torch.device, name: str) -> None:
    """Refuse a student that runs one of its layers several times in one pass.

    ZeRO-3 reduces a layer's gradients at the end of each of its backward passes, and stops at
    gradients that it has met before.

    Args:
        engine: the engine of a `Student` (a collective call).
        device: the device of the probe's tokens.
        name: the model's name in messages.

    Raises:
        ValueError: names the layer's class.
    """
    model = engine.module.model
    names = getattr(model, "_no_split_modules", None) or ()
    calls: Counter[torch.nn.Module] = Counter()
    watched = [
        part.register_forward_pre_hook(lambda part, _: calls.update([part]))
        for part in model.modules()
        if type(part).__name__ in names
    ]
    batch = {"input_ids": _random_tokens(engine, _TOKENS, device)}
    batch["supervised"] = torch.arange(1, _TOKENS, 2, device=device)

    # The hooks must not outlive a probe that fails.
    try:
        with _evaluate_only(engine):
            engine(batch, probe="hidden")
    finally:
        for hook in watched:
            hook.remove()

    for part, count in calls.items():
        if count > 1:
            raise ValueError(
                f"{name}: {type(model).__name__} runs {type(part).__name__} {count} times in one "
                f"pass, which ZeRO-3 cannot train. Use a model whose layers run once."
            )


def check_packing(
    engine: Any, device: torch.device, name: str, remedy: str = "Remove packed_sequence"
) -> None:
    """Refuse a model that computes a sample in a pack differently from the same sample alone.

    A model that does not pass its arguments on to the attention function is first switched back to
    transformers' block mask.

    Args:
        engine, device, name: as for `check_head`.
        remedy: the end of the message.

    Raises:
        ValueError: a sample's hidden states depend on the ones before it.
    """
    model = engine.module.model
    kind = type(model).__name__
    message = f"{name}: in {kind} the samples of a pack see each other"

    with _evaluate_only(engine), _refuse_errors(f"{message}. {remedy}"):
        probe = _PackingProbe(engine, device)
        if attention.is_by_sample(model):
            packed = None
            # Its attention may have a mask of its own.
            with (
                attention.record_windows() as windows,
                suppress(RuntimeError, ValueError, TypeError, IndexError),
            ):
                packed = probe.run()
            if (
                packed is not None
                and windows == attention.windows_of(model)
                and not probe.leak(packed)
            ):
                return
            attention.attend_by_sample(model, False)
        error = probe.leak(probe.run())
    if error:
        raise ValueError(f"{message} (hidden states differ by {error:.3g}). {remedy}.")


def check_sharing(engine: Any, device: torch.device, name: str) -> None:
    """Refuse a model in which a sample that shares its beginning is not what it is alone.

    Args:
        engine, device, name: as for `check_head`, after `check_packing`.

    Raises:
        ValueError: its attention is not plain SDPA, or hidden states depend on samples that share
            their beginning.
    """
    model = engine.module.model
    kind = type(model).__name__
    remedy = "Remove packed_sequence.share_prefixes"
    if not attention.is_by_sample(model):
        used = model.config.get_text_config()._attn_implementation
        raise ValueError(
            f"{name}: {kind} computes attention by {used}, or by a mask of its own, which shared "
            f"beginnings cannot use. {remedy}."
        )
    message = f"{name}: in {kind} samples that share a beginning see each other"
    with _evaluate_only(engine), _refuse_errors(f"{message}. {remedy}"):
        probe = _SharingProbe(engine, device)
        error = probe.leak(probe.run())
    if error:
        raise ValueError(f"{message} (hidden states differ by {error:.3g}). {remedy}.")


def check_parts(engine: Any, device: torch.device, name: str, everyone: Group) -> None:
    """Refuse a model that computes a sample that is split over ranks differently from the whole.

    Args:
        engine, device, name: as for `check_head`, after `check_packing`.
        everyone: all ranks, which refuse it together.

    Raises:
        ValueError: its attention is not plain SDPA, has fewer heads than there are ranks, or
            something else in it looks at other tokens.
    """
    module = engine.module
    group, kind = module.exchange.group, type(module.model).__name__
    remedy = "Remove distributed.cp_size"
    if not attention.is_by_sample(module.model):
        used = module.model.config.get_text_config()._attn_implementation
        raise ValueError(
            f"{name}: {kind} computes attention by {used}, or by a mask of its own, which cannot "
            f"be split over ranks. {remedy}."
        )

    # transformers' attention on the whole sample says what is right.
    ids = _random_tokens(engine, group.size * _TOKENS, device)
    rows = torch.arange(ids.shape[1], device=device)
    whole = {"input_ids": ids, "supervised": rows}
    part = {
        "input_ids": ids[:, group.rank :: group.size],
        "position_ids": rows[None, group.rank :: group.size],
        "supervised": rows[:_TOKENS],
        "num_parts": group.size,
    }
    message = f"{name}: in {kind} a token that is split off from its sample is another"
    with _evaluate_only(engine), _refuse_errors(f"{message}. {remedy}"):
        attention.attend_by_sample(module.model, False)
        expected = engine(whole, probe="hidden")[group.rank :: group.size]
        attention.attend_by_sample(module.model)
        error, scale = _difference(engine, engine(part, probe="hidden"), expected)
    is_wrong = not error <= _tolerance(engine) * scale
    if sum_over([float(is_wrong)], everyone)[0]:  # each rank has looked at other tokens
        raise ValueError(f"{message} (hidden states differ by {error:.3g}). {remedy}.")


class _PackingProbe:
    """Compares the second of two samples in a pack with transformers' result for it alone."""

    def __init__(self, engine: Any, device: torch.device):
        self.engine, model = engine, engine.module.model
        window = max((w for w in attention.windows_of(model) if w), default=0)
        size = 2 + (window if window <= _LONGEST_WINDOW else 0)
        self.lengths = [_TOKENS // 2, _TOKENS // 2 + size]
        #: Tokens that the second sample must not see; it is what follows them.
        self.hidden_from = slice(self.lengths[0])
        ids = _random_tokens(engine, sum(self.lengths), device)
        rows = torch.arange(ids.shape[1], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in self.lengths])[None]
        self.pack: dict[str, Any] = {
            "input_ids": ids,
            "supervised": rows,
            "position_ids": positions,
            "segment_lengths": self.lengths,
        }

        # The reference is transformers' attention on the second sample alone. `effect` is the
        # difference that the first sample makes if attention crosses between them.
        by_sample = attention.is_by_sample(model)
        attention.attend_by_sample(model, False)
        cut = self.lengths[0]
        alone = {"input_ids": ids[:, cut:], "supervised": rows[: self.lengths[1]]}
        self.expected = engine(alone, probe="hidden")
        joined = engine({"input_ids": ids, "supervised": rows}, probe="hidden")[cut:]
        self.effect, _ = _difference(engine, joined, self.expected)
        attention.attend_by_sample(model, by_sample)

    def run(self) -> Tensor:
        """Return the second sample's hidden states in the pack."""
        states: Tensor = self.engine(self.pack, probe="hidden")
        return states[self.hidden_from.stop :]

    def leak(self, packed: Tensor) -> float:
        """Return the difference between the states of `run` and the reference; 0 if it is
        rounding."""
        error, scale = _difference(self.engine, packed, self.expected)
        small = error <= _tolerance(self.engine) * scale
        if _dtype(self.engine) not in _TOLERANCE:
            small = error <= _SHARE_OF_EFFECT * self.effect or error <= _ROUNDING * scale
        rows = self.pack["supervised"][self.hidden_from.stop :]
        second = {**self.pack, "supervised": rows}
        return _influence(self.engine, second, self.hidden_from) if small else error


class _SharingProbe(_PackingProbe):
    """Two samples with a common beginning, of which the second is looked at: alone as transformers
    computes it, after the whole first one, and as the second branch of their tree."""

    def __init__(self, engine: Any, device: torch.device):
        super().__init__(engine, device)
        # The other probe's second sample is the beginning, its first one what follows in one
        # sample, and the same backwards in the other.
        cut, length = self.lengths
        one, begins = self.pack["input_ids"].split(self.lengths, dim=1)
        other = one.flip(1)
        ids = torch.cat([begins, one, other], dim=1)
        rows = torch.arange(ids.shape[1], device=device)
        positions = torch.cat([rows[: length + cut], rows[length : length + cut]])[None]
        self.hidden_from = slice(length, length + cut)
        self.pack = {
            "input_ids": ids,
            "supervised": rows,
            "position_ids": positions,
            "segment_lengths": [length, cut, cut],
            "segment_parents": [-1, 0, 0],
        }

        attention.attend_by_sample(engine.module.model, False)
        alone = {"input_ids": torch.cat([begins, other], dim=1), "supervised": rows[: length + cut]}
        self.expected = engine(alone, probe="hidden")[length:]
        joined = engine({"input_ids": ids, "supervised": rows}, probe="hidden")
        self.effect, _ = _difference(engine, joined[length + cut :], self.expected)
        attention.attend_by_sample(engine.module.model)


def _influence(engine: Any, batch: dict[str, Any], changed: slice) -> float:
    """Return the change of the hidden states of `batch` if other tokens are put at the positions
    `changed`; 0 if it is rounding.

    Args:
        batch: one row of tokens, whose `supervised` positions are outside `changed`.
    """
    ids = batch["input_ids"]
    others = ids.clone()
    others[:, changed] = (ids[:, changed].flip(1) + 1) % (int(ids.max()) + 1)
    expected = engine(batch, probe="hidden")
    moved = engine({**batch, "input_ids": others}, probe="hidden")
    error, scale = _difference(engine, moved, expected)
    limit = _tolerance(engine) * scale
    if _dtype(engine) not in _TOLERANCE:
        twice = {"input_ids": ids.expand(2, -1), "supervised": batch["supervised"]}
        once = {"input_ids": ids, "supervised": batch["supervised"]}
        states = [engine(some, probe="hidden") for some in (once, twice)]
        noise, _ = _difference(engine, *states)
        limit = max(_ROUNDING * scale, _TIMES_NOISE * noise)
    return error if error > limit else 0.0


def _difference(engine: Any, got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return (error of the worst row, or of the median row in bfloat16; mean norm of the expected
    rows)."""
    rows = (got - expected).float().norm(dim=-1)
    worst = rows.max() if _dtype(engine) in _TOLERANCE else rows.median()
    return worst.item(), expected.float().norm(dim=-1).mean().item()


def _dtype(engine: Any) -> torch.dtype:
    kind: torch.dtype = engine.module.model.get_output_embeddings().weight.dtype
    return kind


def _tolerance(engine: Any) -> float:
    return _TOLERANCE.get(_dtype(engine), _ROUGH_TOLERANCE)


def _random_tokens(engine: Any, count: int, device: torch.device) -> Tensor:
    """Return `[1, count]` ids, the same on every rank."""
    size = engine.module.model.config.get_text_config().vocab_size
    return torch.randint(size, (1, count), generator=torch.Generator().manual_seed(0)).to(device)


@contextmanager
def _refuse_errors(message: str) -> Iterator[None]:
    """Turn an error of a model that cannot be probed into one sentence, the same on every rank."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
        # Errors of memory and connections, which have classes of their own, are not the model's.
        of_torch = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
        if of_torch and type(error) is not RuntimeError:
            raise
        raise ValueError(f"{message} ({first_line(error)})") from error


@contextmanager
def _evaluate_only(engine: Any) -> Iterator[None]:
    training = engine.training
    engine.eval()
    with torch.no_grad():
        yield
    engine.train(training)
