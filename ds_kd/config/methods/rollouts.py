"""The section `rollouts`: samples that the student writes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ds_kd.config.keys import is_number, key
from ds_kd.config.text.origins import decode

_LOSS = "reverse_kl"


@dataclass
class Rollouts:
    ratio: float = key(
        1.0,
        "Has the student write the answers of this share of the samples itself, chosen by a hash "
        "of its place in the data; 0 switches it off, and at 1 the data need no answers.",
        "share",
        low=0,
        high=1,
    )
    max_new_tokens: int = key(256, "Cuts an answer after this many tokens.", "tokens", low=1)
    temperature: float = key(
        1.0, "Divides the logits when answers are drawn; 0 takes the likeliest token.", low=0
    )
    top_p: float = key(
        1.0,
        "Draws among the likeliest tokens that have this share of the probability together.",
        "probability",
        above=0,
        high=1,
    )
    samples_per_prompt: int = key(1, "Draws this many answers to each prompt.", "answers", low=1)
    reuse: int = key(
        1,
        "Trains this many optimizer steps on the same answers before new ones are written; an "
        "epoch has so many times more steps.",
        "steps",
        low=1,
    )
    generate: Literal["auto", "replica", "sharded"] = key(
        "auto",
        "Writes with a whole copy of the student on each rank (replica), with the sharded student "
        "(sharded), or with a copy if there is memory for one (auto).",
    )


def add_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Return a config's values with the defaults of a run with rollouts: reverse KL alone."""
    section = data.get("rollouts")
    ratio = decode(section.get("ratio", 1.0)) if isinstance(section, dict) else 0
    if not (is_number(ratio) and ratio > 0):
        return data
    loss = data.get("kd_loss_fn")
    if loss is None:
        loss = {"name": _LOSS}
    elif isinstance(loss, dict) and loss.get("name") is None and loss.get("_target_") is None:
        loss = {**loss, "name": _LOSS}
    share = data.get("kd_ratio")
    return {**data, "kd_loss_fn": loss, "kd_ratio": 1.0 if share is None else share}
