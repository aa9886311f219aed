"""The tables and curves of docs/results.md, from what a study has left.

    python benchmarks/studies/study.py study --curves docs/results.svg

`study/runs` holds the runs of `launch/sweep.py` over `rng.seed` and others with
`ds_configs/runs/squad_study.yaml`.
Each setting is shown by its mean over seeds, with the lowest and the highest seed in brackets, and
compared with cross-entropy alone (kd_ratio 0) seed by seed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import make_parser
from ds_kd.evaluate.report.charts import COLOURS
from ds_kd.evaluate.report.runs import Run, read_run

#: Tag of the log → title, digits.
LOGGED = {
    "val_ce_loss": ("CE", 3),
    "val_kl_at_t1": ("KL", 3),
    "val_reverse_kl_at_t1": ("reverse KL", 3),
    "val_acceptance_at_t1": ("acceptance", 3),
    "val_top1_agreement": ("top-1", 3),
}
#: Metric of an evaluation in the run → title, digits.
EVALUATED = {
    "squad, f1": ("SQuAD F1", 3),
    "squad, exact_match": ("exact match", 3),
    "hellaswag, acc_norm": ("HellaSwag", 3),
}
#: The teacher of which nothing is said.
TEACHER = "quickstart/teacher"
ALONE = "CE only"


def read_study(root: Path) -> dict[str, dict[str, Run]]:
    """Return the finished runs by setting and seed."""
    found: dict[str, dict[str, Run]] = {}
    for directory in sorted((root / "runs").iterdir()):
        if (directory / "FINISHED").is_file():
            run = read_run(directory)
            found.setdefault(name_setting(run), {})[str(run.settings["rng.seed"])] = run
    return dict(sorted(found.items(), key=lambda each: (each[0] != ALONE, each[0])))


def name_setting(run: Run) -> str:
    alpha = float(run.settings["kd_ratio"])
    temperature = float(run.settings["kd_loss_fn.temperature"])
    teacher = str(run.settings["teacher_model.pretrained_model_name_or_path"])
    taught = "" if teacher == TEACHER else f", teacher {Path(teacher).parent.name}"
    return ALONE if alpha == 0 else f"KD, α {alpha:g}, T {temperature:g}{taught}"


def measure(run: Run) -> dict[str, float]:
    """Return a run's last validation and its evaluations, by title."""
    values = {title: run.last(tag) for tag, (title, _) in LOGGED.items()}
    evaluated = run.list_evaluations()
    for metric, (title, _) in EVALUATED.items():
        values[title] = evaluated.get(metric, {}).get("value")
    return {title: value for title, value in values.items() if value is not None}


def show(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return the mean of the seeds, with the lowest and the highest."""
    if not values:
        return "—"
    mean = sum(values) / len(values)
    ends = ", ".join(f"{end:{sign}.{digits}f}" for end in (min(values), max(values)))
    return f"{mean:{sign}.{digits}f} [{ends}]"


def tabulate(study: dict[str, dict[str, Run]]) -> list[str]:
    """Return both tables as Markdown: the settings, and their differences from CE alone."""
    shown = [*LOGGED.values(), *EVALUATED.values()]
    found = {
        name: {seed: measure(run) for seed, run in runs.items()} for name, runs in study.items()
    }
    rows = [["", "seeds", *(title for title, _ in shown)], ["---"] * (len(shown) + 2)]
    for name, seeds in found.items():
        cells = [show([v[t] for v in seeds.values() if t in v], digits) for t, digits in shown]
        rows.append([name, str(len(seeds)), *cells])

    # A seed has the same packs in the same order for every setting, so differences are paired.
    differences = [[f"minus {ALONE}", "seeds", *rows[0][2:]], rows[1]]
    alone = found.get(ALONE, {})
    for name, seeds in found.items():
        both = [] if name == ALONE else [(seeds[k], alone[k]) for k in seeds if k in alone]
        cells = [
            show([one[t] - other[t] for one, other in both if t in one and t in other], digits, "+")
            for t, digits in shown
        ]
        differences += [[name, str(len(both)), *cells]] if both else []
    parts = [["| " + " | ".join(row) + " |" for row in part] for part in (rows, differences)]
    return [*parts[0], "", *parts[1]]


def draw(study: dict[str, dict[str, Run]], output: Path) -> None:
    """Write held-out CE and KL over the steps: each setting's mean, and its seeds as points."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": output.name, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(11.0, 3.4), layout="constrained")
        for axes, tag in zip(figure.subplots(1, 2), ("val_ce_loss", "val_kl_at_t1"), strict=True):
            for number, (name, runs) in enumerate(study.items()):
                colour, dash = (
                    COLOURS[number % len(COLOURS)],
                    "--" if number >= len(COLOURS) else "-",
                )
                curves = [run.curve(tag) for run in runs.values()]
                for steps, values in curves:
                    axes.plot(steps, values, "o", ms=3, color=colour, alpha=0.5)
                means = [
                    sum(each) / len(each) for each in zip(*(v for _, v in curves), strict=True)
                ]
                axes.plot(curves[0][0], means, dash, color=colour, label=name)
            axes.set_title(f"held-out {LOGGED[tag][0]}, nats per token")
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        figure.savefig(output, format="svg", metadata={"Date": None})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--curves", type=Path, metavar="SVG")
    args = parser.parse_args()
    if not (args.study / "runs").is_dir():
        parser.error(f"no directory {args.study / 'runs'}, into which launch/sweep.py writes runs")
    study = read_study(args.study)
    for seeds in study.values():
        for run in seeds.values():
            tokens = round(run.measure_cost()["tokens"])
            print(f"{re.sub('.*/', '', run.name)}: {tokens:,} tokens")
    print("\n".join(["", *tabulate(study)]))
    if args.curves is not None:
        draw(study, args.curves)


if __name__ == "__main__":
    main()
