"""Write the page of runs: one HTML file that needs no network."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_kd.errors import first_line
from ds_kd.evaluate.comparison import SHOWN
from ds_kd.evaluate.report.charts import draw_charts, style_of
from ds_kd.evaluate.report.runs import ReportError, Run, find_differences, read_evaluation, read_run
from ds_kd.files import check_replaceable

_SUFFIXES = (".html", ".htm")
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>ds_kd: {{ runs | map(attribute="name") | join(", ") }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1150px; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border-bottom: 1px solid #ddd; padding: .3em .8em; text-align: left; vertical-align: top }
td.n { font-variant-numeric: tabular-nums; text-align: right }
td.t, pre { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 40em }
.charts { display: flex; flex-wrap: wrap; gap: 1em } .charts svg { width: 540px; height: auto }
.mark { display: inline-block; width: 1.6em; border-top: .4em; margin: 0 .5em .2em 0 }
</style></head><body>
{% macro label(k) %}<span class="mark" style="border-top-color:{{ styles[k].color }};
border-top-style:{{ "dotted" if styles[k].linestyle == "--" else "solid" }}"></span>
{{- runs[k].name }}{% endmacro %}
<h1>Distillation runs</h1>

<h2>Results</h2>
<table><tr><th>validation</th>{% for tag, name in shown %}<th>{{ name }}</th>{% endfor %}</tr>
{% for run in runs %}<tr><td>{{ label(loop.index0) }}</td>
{% for tag, name in shown %}<td class="n">{{ number(run.first(tag)) }} →
{{ number(run.last(tag)) }}</td>{% endfor %}</tr>
{% endfor %}</table>

{% if tasks %}
<h2>Evaluation</h2>
<p>In brackets: 95 % bootstrap intervals over the samples.</p>
<table><tr><th>in the run</th>
{% for run in runs %}<th>{{ label(loop.index0) }}</th>{% endfor %}</tr>
{% for task in tasks %}<tr><td>{{ task }}</td>{% for run in runs %}
<td class="n">{{ interval(run.list_evaluations().get(task)) }}</td>{% endfor %}</tr>{% endfor %}
</table>{% endif %}
{% for found in evaluations %}
<table><tr><th>{{ found.task }}, {{ found.models[0].samples }} samples</th>
{% for name in found.models[0].metrics %}<th>{{ name }}</th>{% endfor %}</tr>
{% for each in found.models + found.differences %}<tr>
<td>{{ each.model }}{% if each.minus %} − {{ each.minus }}{% endif %}</td>
{% for name in found.models[0].metrics %}<td class="n">
{{ interval(each.metrics.get(name)) }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}

<h2>Curves</h2>
<p>Training is thin, validation thick with points.
{% for run in runs %} {{ label(loop.index0) }}{% endfor %}</p>
<div class="charts">{% for chart in charts %}{{ chart | safe }}{% endfor %}</div>

<h2>Settings</h2>
{% if runs|length > 1 %}{% if differences %}
<table><tr><th></th>{% for run in runs %}<th>{{ label(loop.index0) }}</th>{% endfor %}</tr>
{% for name, values in differences.items() %}<tr><td>{{ name }}</td>
{% for value in values %}<td class="t">{{ value }}</td>{% endfor %}</tr>{% endfor %}</table>
{% else %}<p>The runs have the same settings.</p>{% endif %}{% endif %}
{% for run in runs if run.config %}<details><summary>the YAML of {{ run.name }}</summary>
<pre>{{ run.config }}</pre></details>{% endfor %}

<h2>Cost</h2>
<table><tr><th></th>{% for run in runs %}<th>{{ label(loop.index0) }}</th>{% endfor %}</tr>
{% for name in costs[0] %}<tr><td>{{ name }}</td>
{% for cost in costs %}<td class="n">{{ amount(cost.get(name)) }}</td>{% endfor %}</tr>
{% endfor %}</table>

<h2>Answers to held-out rows</h2>
{% for run in runs %}{% for each in run.last("val_samples") or [] %}
<table><tr><th colspan="2">{{ run.name }}, number {{ loop.index }}</th></tr>
{% for name, text in each.items() %}<tr><td>{{ name }}</td><td class="t">{{ text }}</td></tr>
{% endfor %}</table>{% else %}<p>{{ run.name }}: none (step_scheduler.val_samples).</p>
{% endfor %}{% endfor %}
</body></html>
"""


def write_report(directories: list[Path], output: Path, evaluations: Sequence[Path] = ()) -> None:
    """Write the page of the runs in some directories, replacing the one that is there.

    Args:
        evaluations: results of `launch/evaluate.py`, shown beside those of the runs.

    Raises:
        ReportError: a directory holds no run, a file no results, or `output` cannot be written.
    """
    with _name_output(output):
        _check_output(output)
    runs = [read_run(directory) for directory in directories]
    text = render(runs, [read_evaluation(path) for path in evaluations])
    with _name_output(output):
        output.write_text(text, "utf-8", "backslashreplace")


def _check_output(output: Path) -> None:
    """Refuse what is no place for a page, before the runs are read.

    Raises:
        OSError, ReportError: says what is wrong with it.
    """
    if output.suffix.lower() not in _SUFFIXES:
        raise ReportError(f"--output {output}: expected a name that ends in .html")
    check_replaceable(output)
    directory = output.absolute().parent
    directory.stat()
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is no directory")
    if not os.access(output if output.exists() else directory, os.W_OK):
        raise PermissionError("this user may not write there")


@contextmanager
def _name_output(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = error.strerror or first_line(error)
        raise ReportError(f"--output {output}: cannot be written ({told})") from error


def render(runs: list[Run], evaluations: Sequence[dict[str, Any]] = ()) -> str:
    """Return the page. Text of runs is escaped, and the page runs no script and loads nothing."""
    from jinja2 import Environment

    tags = [(tag, name) for tag, name in SHOWN if any(run.last(tag) is not None for run in runs)]
    tasks = dict.fromkeys(task for run in runs for task in run.list_evaluations())

    # Every run has a column, and a dash for what its log does not tell.
    costs = [run.measure_cost() for run in runs]
    longest = max(costs, key=len)
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            runs=runs,
            shown=tags,
            tasks=[*tasks],
            evaluations=evaluations,
            interval=_format_interval,
            charts=[*draw_charts(runs).values()],
            differences=find_differences(runs),
            costs=[{**dict.fromkeys(longest), **cost} for cost in costs],
            styles=[style_of(number) for number in range(len(runs))],
            number=lambda value: "—" if value is None else f"{value:.4f}",
            amount=_format_amount,
        )
    )


def _format_interval(found: dict[str, float] | None) -> str:
    if found is None:
        return "—"
    ends = f" [{found['low']:.4f}, {found['high']:.4f}]" if "low" in found else ""
    return f"{found['value']:.4f}{ends}"


def _format_amount(value: Any) -> str:
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
