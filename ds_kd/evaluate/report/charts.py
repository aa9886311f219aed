"""Draw the curves of runs as SVG, to stand in a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ds_kd.evaluate.report.runs import Run

#: Title → (tag of training, tag of validation); either may be empty.
CHARTS = {
    "Optimised loss": ("train_loss", "val_loss"),
    "Cross-entropy, nats per token": ("ce_loss", "val_ce_loss"),
    "Distillation loss, nats per token": ("kd_loss", "val_kd_loss"),
    "Top-1 agreement with the teacher": ("top1_agreement", "val_top1_agreement"),
    "Agreement of the likeliest five": ("", "val_top5_agreement"),
    "KL(teacher ‖ student) at T = 1": ("kl_at_t1", "val_kl_at_t1"),
    "Acceptance": ("", "val_acceptance_at_t1"),
    "Learning rate": ("learning_rate", ""),
    "Gradient norm": ("grad_norm", ""),
    "Tokens per second": ("tokens_per_sec", ""),
}
#: Colours of runs, told apart by the colour-blind too (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TRAINING: dict[str, Any] = {"lw": 0.8, "alpha": 0.6}
_VALIDATION: dict[str, Any] = {"lw": 2, "marker": "o", "ms": 4}


def style_of(number: int) -> dict[str, Any]:
    """Return the line of a run by its number: runs that have a colour again are dashed."""
    dash = "--" if number // len(COLOURS) % 2 else "-"
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dash}


def draw_charts(runs: Sequence[Run]) -> dict[str, str]:
    """Return charts as SVG by title, those for which a run has values; all runs in each, training
    as a thin line and validation as a thick one with points."""
    found = {}
    for title, tags in CHARTS.items():
        if any(run.curve(tag)[0] for run in runs for tag in tags if tag):
            found[title] = _draw(title, tags, runs)
    return found


def _draw(title: str, tags: tuple[str, str], runs: Sequence[Run]) -> str:
    import matplotlib
    from matplotlib.figure import Figure  # of pyplot nothing is needed, and it would keep figures

    # Text stays text, and the same runs give the same file.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.subplots()
        for number, run in enumerate(runs):
            for tag, style in zip(tags, (_TRAINING, _VALIDATION), strict=True):
                steps, values = run.curve(tag) if tag else ([], [])
                if steps:
                    axes.plot(steps, values, **style_of(number), **style)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
