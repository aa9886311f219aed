"""Lay out the runs of a sweep: every combination of the values given, each in its own directory."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ds_kd.config.components import ConfigError
from ds_kd.config.load import check_world, load
from ds_kd.config.schema import RunConfig
from ds_kd.config.text.yaml_source import Source
from ds_kd.evaluate.comparison import SHOWN, read_lines
from ds_kd.recipe.results import log_of, marker_of

_MOST = 1000  # runs; each is checked before the first, which takes some milliseconds


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its directory's name, its config, and the overrides that start it."""

    name: str
    cfg: RunConfig
    overrides: list[str]

    @property
    def mark(self) -> Path:
        """Return the file that says that it has ended, and with which settings."""
        return Path(self.cfg.checkpoint.checkpoint_dir) / "FINISHED"

    @property
    def was_stopped(self) -> bool:
        """Return whether a signal ended it, and it is to go on."""
        return marker_of(self.cfg).exists()


def lay_out(config: str, overrides: list[str], allow: tuple[str, ...], ranks: int = 1) -> list[Run]:
    """Return the checked runs of all combinations, in order, the last key varying fastest.

    Args:
        overrides: `key=value`, or `key=value,value` for a key to vary.
        ranks: of each run.

    Raises:
        ConfigError: no key varies, two runs are the same, or a combination is refused.
    """
    given = {key: _split(values) for key, _, values in (each.partition("=") for each in overrides)}
    varied = [key for key, values in given.items() if len(values) > 1]
    if not varied:
        raise ConfigError(["nothing varies: give a key several values, such as kd_ratio=0,0.5,1"])
    if (count := math.prod(len(values) for values in given.values())) > _MOST:
        raise ConfigError([f"these values make {count:,} runs, and {_MOST:,} at most are laid out"])
    runs: dict[str, Run] = {}
    seen: dict[str, RunConfig] = {}
    for values in itertools.product(*given.values()):
        chosen = dict(zip(given, values, strict=True))
        name = re.sub(r"[^\w.=+-]+", "-", "_".join(f"{key}={chosen[key]}" for key in varied))[:200]
        words = [f"{key}={value}" for key, value in chosen.items()]

        # The directory is below the one that the YAML, or an override, names.
        cfg = load(config, words, allow)
        root = Path(cfg.checkpoint.checkpoint_dir)
        words += [f"checkpoint.checkpoint_dir={root / name}", "tensorboard.log_dir=null"]
        if name in runs:
            raise ConfigError([f"two runs would be in {root / name}; give values that differ"])
        check_world(cfg, ranks)

        # 0.5 and 0.50 are two texts and one value.
        seen[name] = replace(cfg, text="", notes=[], source=Source())
        if same := next((each for each in runs if seen[each] == seen[name]), None):
            raise ConfigError([f"{same} and {name} are the same run; give values that differ"])
        runs[name] = Run(name, load(config, words, allow), words)
    return [*runs.values()]


def _split(values: str) -> list[str]:
    """Return the values between commas that stand in no brackets or quotes."""
    try:
        nodes = yaml.compose(f"[{values}]", yaml.SafeLoader).value
    except yaml.YAMLError:  # to be told as the mistake that it is
        return [values]
    return [values[n.start_mark.index - 1 : n.end_mark.index - 1] for n in nodes] or [values]


def tabulate(runs: list[Run]) -> list[str]:
    """Return the last validation of each run as aligned lines."""
    width = max(len(run.name) for run in runs)
    lines = [f"{'last validation':<{width}}" + "".join(f"{label:>22}" for _, label in SHOWN)]
    for run in runs:
        log = log_of(run.cfg)
        found = [each for each in read_lines(log) if "val_loss" in each] if log.exists() else []
        last = found[-1] if found else {}
        cells = [f"{last[key]:.4f}" if key in last else "-" for key, _ in SHOWN]
        lines.append(f"{run.name:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
    return lines
