"""Lay out TensorBoard's page of a run: its charts by subject, and its settings beside its results.

`CUSTOM SCALARS` shows the charts below, `HPARAMS` one line for each run with its settings and the
last values of `RESULTS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

#: Subject → chart → the tags it shows, as regular expressions.
CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Loss": {
        "optimised loss, training and validation": ("train_loss", "val_loss", "val_[^/]+/loss"),
        "cross-entropy": ("ce_loss", "val_ce_loss", "val_[^/]+/ce_loss"),
        "distillation loss": ("kd_loss", "val_kd_loss", "val_[^/]+/kd_loss"),
        "parts of the training loss": (
            "train_loss",
            "ce_loss",
            "kd_loss",
            "hidden_loss",
        ),
    },
    "Is the student near its teacher?": {
        "agreement": ("top1_agreement", "val_top[15]_agreement"),
        "acceptance": ("val_acceptance_at_t1",),
        "KL at T = 1": ("kl_at_t1", "val_kl_at_t1", "val_reverse_kl_at_t1"),
        "KL at T = 1 by position in the text": (r"val_kl_at_t1_from_\d+",),
        "entropy": ("teacher_entropy", "(val_)?(teacher|student)_entropy_at_t1"),
    },
    "What does the student write?": {
        "tokens of a text": ("rollouts/length",),
        "share of texts that the limit cut": ("rollouts/truncated",),
        "entropy of its distribution at T = 1, nats per token it wrote": ("rollouts/entropy",),
    },
    "Optimizer": {"learning rate": ("learning_rate",), "gradient norm": ("grad_norm",)},
    "Throughput": {
        "tokens per second": ("tokens_per_sec", "val_tokens_per_sec"),
        "samples per second": ("throughput/samples_per_sec",),
        "TFLOP/s of a rank": ("throughput/tflops_per_rank",),
        "share of the peak (MFU)": ("throughput/mfu",),
        "share of padding and of supervised tokens": ("padding", "supervised"),
        "tokens since the start, all and supervised": ("seen/(tokens|supervised)",),
    },
    "Time and memory": {
        "seconds of a step, by part": (
            "time/(step|data|rollouts|teacher|student_forward|backward|optimizer)",
        ),
        "seconds between steps": ("time/(validation|checkpoint)",),
        "peak memory of each rank, GiB": (r"memory/rank_\d+",),
    },
}
EVALUATION = "Evaluation, with 95 % intervals"
#: The values that a run is judged by, of which the last count.
RESULTS = (
    "val_loss", "val_ce_loss", "val_kl_at_t1", "val_top1_agreement", "train_loss", "tokens_per_sec",
)  # fmt: skip

_LONGEST = 600  # characters of a text that is shown


def choose_charts(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of a run that has logged these tags, as `add_custom_scalars` takes it:
    charts that would be empty are left out."""
    known = sorted(tags)
    layout: dict[str, dict[str, list[Any]]] = {}
    for subject, charts in CHARTS.items():
        for title, patterns in charts.items():
            shown = [p for p in patterns if any(re.fullmatch(p, tag) for tag in known)]
            if shown:  # TensorBoard looks for a pattern anywhere in a tag
                whole = [f"^{pattern}$" for pattern in shown]
                layout.setdefault(subject, {})[title] = ["Multiline", whole]

    # The metrics of tasks are any, each with its interval.
    for tag in known:
        ends = [f"{tag}_low", f"{tag}_high"]
        if tag.startswith("eval_") and {*ends} <= {*known}:
            title = tag.removeprefix("eval_").replace("/", ", ")
            layout.setdefault(EVALUATION, {})[title] = ["Margin", [tag, *ends]]
    return layout


def write_settings(writer: Any, settings: dict[str, Any], has_ended: bool) -> None:
    """Write a run's settings for the page that compares runs.

    Args:
        writer: a `SummaryWriter`.
        settings: numbers and texts by name.
        has_ended: the run is over; else it has just begun.
    """
    from torch.utils.tensorboard.summary import hparams

    # `add_hparams` would make a run of its own for them.
    begin = hparams(settings, dict.fromkeys(RESULTS, 0.0))
    for summary in begin[2:] if has_ended else begin[:2]:
        writer.file_writer.add_summary(summary)


def format_texts(texts: list[dict[str, str]]) -> str:
    """Return generations as Markdown, one table for each prompt; text is shown as it is."""
    tables = []
    for each in texts:
        rows = [f"| {name} | {_escape(text)} |" for name, text in each.items()]
        tables.append("\n".join(["| | |", "|---|---|", *rows]))
    return "\n\n".join(tables)


def _escape(text: str) -> str:
    """Return a text as a cell of a Markdown table, a long one cut at its beginning."""
    text = text if len(text) <= _LONGEST else "… " + text[-_LONGEST:]
    # Markdown has no escape for what would begin a tag of HTML.
    plain = text.replace("&", "&amp;").replace("<", "&lt;")
    marks = re.sub(r"([\\`*_{}\[\]()#+!|>-])", r"\\\1", plain)
    return " ".join(marks.split()) or "(nothing)"
