"""The tables and curves of docs/results.md, from what a study has left.

    python benchmarks/studies/study.py study --curves docs/results.svg

`study/runs` holds the runs of `launch/sweep.py` over `rng.seed` and others with
`ds_configs/runs/squad_study.yaml`. Runs that differ in nothing but their seed are one setting. Each
is shown by its mean over seeds, with the lowest and the highest seed in brackets, and compared seed
by seed with cross-entropy alone (kd_ratio 0) at the same other settings.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import make_parser
from ds_kd.errors import UserError
from ds_kd.evaluate.comparison import shorten
from ds_kd.evaluate.report.charts import style_of
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
#: Titles of what is measured towards the teacher, so that another teacher gives another number.
OF_TEACHER = ("KL", "reverse KL", "acceptance", "top-1")
ALONE = "CE only"

_ALPHA, _TEMPERATURE = "kd_ratio", "kd_loss_fn.temperature"
_TEACHER = "teacher_model.pretrained_model_name_or_path"
_SEEDS = ("seed", "rng.seed")
#: Keys that a name tells by itself, and keys that change where and how a run works, but not what it
#: learns.
_TOLD = (_ALPHA, _TEMPERATURE, _TEACHER, *_SEEDS)
_WITHOUT_EFFECT = re.compile(
    r"(checkpoint|tensorboard|wandb|slurm|compile|dataloader\.num_workers"
    r"|step_scheduler\.(ckpt|val)_\w+)(\..*)?"
)


@dataclass(frozen=True)
class Setting:
    """The settings of runs that differ in nothing but their seed.

    Args:
        name: tells it from the others of a study.
        alpha: kd_ratio.
        temperature: of the loss.
        teacher: its directory or hub id, or "none".
        others: name and value of each other setting that varies in the study.
    """

    name: str
    alpha: float
    temperature: float
    teacher: str
    others: tuple[tuple[str, str], ...] = ()


Study = dict[Setting, dict[str, Run]]


def read_study(root: Path) -> Study:
    """Return the finished runs by setting and seed, cross-entropy alone first.

    Raises:
        UserError: a run cannot be read, or two of them have the same settings and seed.
    """
    runs = [
        read_run(each) for each in sorted((root / "runs").iterdir()) if (each / "FINISHED").exists()
    ]
    if without := [run.name for run in runs if not run.settings]:
        raise UserError(f"{without[0]}: no LATEST/config.yaml, which tells the settings of the run")
    found: Study = {}
    for run, setting in zip(runs, name_settings([run.settings for run in runs]), strict=True):
        seeds = found.setdefault(setting, {})
        seed = next((str(run.settings[key]) for key in _SEEDS if key in run.settings), "unset")
        if seed in seeds:
            raise UserError(
                f"{seeds[seed].name} and {run.name} are the same run: {setting.name}, seed {seed}; "
                f"move one of them out of {root / 'runs'}"
            )
        seeds[seed] = run
    return dict(sorted(found.items(), key=lambda each: (each[0].alpha != 0, each[0].name)))


def name_settings(given: Sequence[dict[str, Any]]) -> list[Setting]:
    """Return the setting of each run. Its name has kd_ratio and T, and of what else varies the
    values that most runs do not have.

    Args:
        given: the values of each run's YAML by dotted name.
    """
    values = [{key: _write(value) for key, value in each.items()} for each in given]
    teachers = [each.get(_TEACHER, "none") for each in values]
    short = shorten([*dict.fromkeys(map(_find_place, teachers))]) if teachers else {}
    alphas, temperatures = (
        [float(each.get(key, default)) for each in values]
        for key, default in ((_ALPHA, 0.5), (_TEMPERATURE, 1.0))
    )

    # The temperature of cross-entropy alone is told where there are several.
    usual_teacher = _find_usual(teachers)
    usual_heat = _find_usual([t for a, t in zip(alphas, temperatures, strict=True) if not a])
    keys = [key for key in dict.fromkeys(k for each in values for k in each) if key not in _TOLD]
    columns = {key: [each.get(key, "none") for each in values] for key in keys}
    varied = {
        key: column
        for key, column in columns.items()
        if len({*column}) > 1 and not _WITHOUT_EFFECT.fullmatch(key)
    }
    usual = {key: _find_usual(column) for key, column in varied.items()}

    made = []
    for k, (alpha, heat, teacher) in enumerate(zip(alphas, temperatures, teachers, strict=True)):
        others = tuple((key, column[k]) for key, column in varied.items())
        name = f"KD, α {alpha:g}, T {heat:g}" if alpha else ALONE
        name += f", T {heat:g}" if not alpha and heat != usual_heat else ""
        name += f", teacher {short[_find_place(teacher)]}" if teacher != usual_teacher else ""
        name += "".join(f", {key} {value}" for key, value in others if value != usual[key])
        made.append(Setting(name, alpha, heat, teacher, others))
    return made


def _write(value: Any) -> str:
    """Return a value as text, 1 and 1.0 alike."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:g}" if is_number else "none" if value is None else str(value)


def _find_place(model: str) -> str:
    """Return the directory that a model is known by; `final` is the student of any run."""
    path = PurePath(model)
    return str(path.parent if path.name == "final" and path.parent.name else path)


def _find_usual(values: Sequence[Any]) -> Any:
    """Return what most values are, of several the first, or None."""
    return Counter(values).most_common(1)[0][0] if values else None


def find_alone(setting: Setting, study: Study) -> Setting | None:
    """Return cross-entropy alone with the same other settings, if possible beside the same teacher
    and at the same T; None if there is none."""
    fits = [each for each in study if not each.alpha and each.others == setting.others]

    def differ(each: Setting) -> tuple[bool, bool]:
        return each.teacher != setting.teacher, each.temperature != setting.temperature

    return min(fits, key=differ, default=None)


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


def tabulate(study: Study) -> list[str]:
    """Return both tables as Markdown: the settings, and their differences from CE alone. A dash
    stands for what a run has not measured, and where two numbers are of different teachers."""
    found = {
        setting: {seed: measure(run) for seed, run in runs.items()}
        for setting, runs in study.items()
    }
    measured = {title for seeds in found.values() for values in seeds.values() for title in values}
    shown = [each for each in (*LOGGED.values(), *EVALUATED.values()) if each[0] in measured]
    titles = [title for title, _ in shown]
    rows = [["", "seeds", *titles], ["---"] * (len(shown) + 2)]
    for setting, seeds in found.items():
        cells = [show([v[t] for v in seeds.values() if t in v], digits) for t, digits in shown]
        rows.append([setting.name, str(len(seeds)), *cells])

    # A seed has the same packs in the same order for every setting, so differences are paired.
    differences = [[f"minus {ALONE}", "seeds", *titles], rows[1]]
    for setting, seeds in found.items():
        alone = find_alone(setting, study) if setting.alpha else None
        if alone is None:
            continue
        both = [(seeds[seed], values) for seed, values in found[alone].items() if seed in seeds]
        hidden = OF_TEACHER if alone.teacher != setting.teacher else ()
        cells = [
            show([x[t] - y[t] for x, y in both if t in x and t in y and t not in hidden], n, "+")
            for t, n in shown
        ]
        differences += [[setting.name, str(len(both)), *cells]] if both else []
    parts = [["| " + " | ".join(row) + " |" for row in part] for part in (rows, differences)]
    return [*parts[0], "", *parts[1], *_tell_teachers(study)]


def _tell_teachers(study: Study) -> list[str]:
    """Return the sentence about numbers that are not to be compared, if there are any."""
    usual = _find_usual([setting.teacher for setting in study])
    names = "; ".join(setting.name for setting in study if setting.teacher != usual)
    told = f"{', '.join(OF_TEACHER[:-1])} and {OF_TEACHER[-1]} of these are towards another teacher"
    return ["", f"{told}, not to be compared with the other rows: {names}"] if names else []


def average(curves: Sequence[tuple[list[int], list[float]]]) -> dict[int, float]:
    """Return the mean of curves at each step that all of them have."""
    points = [dict(zip(steps, values, strict=True)) for steps, values in curves]
    common = sorted(set.intersection(*map(set, points))) if points else []
    return {step: sum(each[step] for each in points) / len(points) for step in common}


def draw(study: Study, output: Path) -> None:
    """Write held-out CE and KL over the steps: each setting's mean, and its seeds as points."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": output.name, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(11.0, 3.4), layout="constrained")
        for axes, tag in zip(figure.subplots(1, 2), ("val_ce_loss", "val_kl_at_t1"), strict=True):
            for number, (setting, runs) in enumerate(study.items()):
                style = style_of(number)
                curves = [run.curve(tag) for run in runs.values()]
                for steps, values in curves:
                    axes.plot(steps, values, "o", ms=3, color=style["color"], alpha=0.5)
                means = average(curves)
                axes.plot([*means], [*means.values()], label=setting.name, **style)
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
    try:
        study = read_study(args.study)
    except UserError as error:
        parser.error(str(error))
    if not study:
        parser.error(f"no run in {args.study / 'runs'} is finished; launch/sweep.py goes on")
    for seeds in study.values():
        for run in seeds.values():
            tokens = run.measure_cost().get("tokens", 0.0)
            print(f"{PurePath(run.name).name}: {round(tokens):,} tokens")
    print("\n".join(["", *tabulate(study)]))
    if args.curves is not None:
        draw(study, args.curves)


if __name__ == "__main__":
    main()
