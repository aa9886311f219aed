"""Probes: a few tokens through the loaded model show what its class does, without a list of
architectures. What body and head, right padding or packs would get wrong is refused at start.

Every probe is a collective call through the engine. float32 is held to 1e-4, which is rounding; in
bfloat16, whose numbers have 8 bits, the middle row counts instead of the worst one, as rounding may
send a token to another expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_kd.errors import first_line
from ds_kd.models import attention

_TOKENS = 16
#: A window up to this long is probed across its edge; of longer ones it is only seen whether every
#: layer hands its window to the attention function.
_LONGEST_WINDOW = 256
_TOLERANCE = {torch.float32: 1e-4}
_ROUGH_TOLERANCE = 2e-2  # bfloat16: some roundings of 2⁻⁹, added up over the layers
#: A neighbour's effect may be as small as bfloat16's rounding: below this share of it, a difference
#: is no leak.
_SHARE_OF_EFFECT = 0.3


def check_head(engine: Any, device: torch.device, name: str) -> None:
    """Refuse a model whose head does more than `Head` computes, or which is not causal.

    Transformers' own logits are compared with those of body + `Head`: as they are, and with the
    head's input scaled up, so that caps show. Then the last tokens are changed: under a causal mask
    no earlier token notices, and right padding needs no mask.

    Args:
        engine: of a `Student` or `Teacher` (a collective call).
        device: where the probe goes.
        name: of the model, for the message.

    Raises:
        ValueError: the two differ, or a later token changes an earlier one.
    """
    kind = type(engine.module.model).__name__
    ids = _random_tokens(engine, _TOKENS, device)
    batch = {"input_ids": ids, "rows": torch.arange(1, _TOKENS, 2, device=device)}
    with (
        _evaluating(engine),
        _refusing(f"{name}: {kind} cannot be run as a body and a linear head"),
    ):
        errors = [engine(batch, probe="logits_error"), engine(batch, probe="scaled_logits_error")]
    for error, scale in errors:
        if not error.item() <= _tolerance(engine) * scale.item():
            raise ValueError(
                f"{name}: {kind} computes its logits in a way this loss does not know (largest "
                f"difference {error.item():.3g} on a probe). Use a model with a linear head."
            )

    cut = _TOKENS - 4
    others = torch.cat([ids[:, :cut], ids[:, cut:].flip(1) + 1], dim=1)
    others[:, cut:] %= int(ids.max()) + 1
    rows = torch.arange(_TOKENS, device=device)
    with _evaluating(engine):
        first, second = (
            engine({"input_ids": t, "rows": rows}, probe="hidden") for t in (ids, others)
        )
    error, scale = _difference(engine, second[:cut], first[:cut])
    if error > _tolerance(engine) * scale:
        raise ValueError(
            f"{name}: {kind} is not causal, a later token changes an earlier one (by {error:.3g} "
            f"on a probe). Use a decoder-only language model."
        )


def check_packing(engine: Any, device: torch.device, name: str) -> None:
    """Refuse a model in which a sample of a pack is not what it is alone.

    A model that does not hand its arguments on to its attention goes back to transformers' block
    mask first.

    Args:
        engine, device, name: as for `check_head`.

    Raises:
        ValueError: a sample's hidden states depend on the ones before it.
    """
    model = engine.module.model
    kind = type(model).__name__
    message = f"{name}: in {kind} the samples of a pack see each other"
    with _evaluating(engine), _refusing(f"{message}. Remove packed_sequence"):
        probe = _PackingProbe(engine, device)
        if attention.is_by_sample(model):
            with attention.recording() as windows:
                try:
                    error = probe.leak()
                except (RuntimeError, ValueError, TypeError, IndexError):
                    error = float("inf")
            if error == 0 and windows == attention.windows_of(model):
                return
            attention.attend_by_sample(model, False)
        error = probe.leak()
    if error:
        raise ValueError(
            f"{message} (hidden states differ by {error:.3g}). Remove packed_sequence."
        )


class _PackingProbe:
    """Two samples, each alone as transformers computes it, joined, and packed."""

    def __init__(self, engine: Any, device: torch.device):
        self.engine, model = engine, engine.module.model
        window = max((w for w in attention.windows_of(model) if w), default=0)
        size = 2 + (window if window <= _LONGEST_WINDOW else 0)
        self.lengths = [_TOKENS // 2, _TOKENS // 2 + size]
        ids = _random_tokens(engine, sum(self.lengths), device)
        rows = torch.arange(ids.shape[1], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in self.lengths])[None]
        self.pack = {
            "input_ids": ids,
            "rows": rows,
            "position_ids": positions,
            "segment_lengths": self.lengths,
        }
        by_sample = attention.is_by_sample(model)
        attention.attend_by_sample(model, False)
        cut = self.lengths[0]
        alone = {"input_ids": ids[:, cut:], "rows": rows[: self.lengths[1]]}
        self.expected = engine(alone, probe="hidden")
        joined = engine({"input_ids": ids, "rows": rows}, probe="hidden")[cut:]
        self.effect, _ = _difference(engine, joined, self.expected)
        attention.attend_by_sample(model, by_sample)

    def leak(self) -> float:
        """Return how much the second sample's states differ in the pack; 0 where that is
        rounding."""
        packed = self.engine(self.pack, probe="hidden")[self.lengths[0] :]
        error, scale = _difference(self.engine, packed, self.expected)
        small = error <= _tolerance(self.engine) * scale
        if _dtype(self.engine) not in _TOLERANCE:
            small = error <= _SHARE_OF_EFFECT * self.effect or error <= 2**-9 * scale
        return 0.0 if small else error


def _difference(engine: Any, got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return (how far the worst row, or in bfloat16 the middle one, is from what it should be, how
    long rows are)."""
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
def _refusing(message: str) -> Iterator[None]:
    """Turn what a model of another shape raises, on every rank alike, into one sentence."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, IndexError, KeyError) as error:
        # Memory and connections have errors of their own, which are not the model's fault.
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        raise ValueError(f"{message} ({first_line(error)})") from error


@contextmanager
def _evaluating(engine: Any) -> Iterator[None]:
    training = engine.training
    engine.eval()
    with torch.no_grad():
        yield
    engine.train(training)
