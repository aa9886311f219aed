"""Parse the options that all scripts of a run share: the YAML, overrides of its values, and the
code that its `_target_` sections may name."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Collection
from typing import TypeVar

Number = TypeVar("Number", int, float)


def run_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of `--config YAML [key.sub=value …] [--allow-targets PREFIX]`, to which a
    script adds its own options."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", metavar="YAML", help="the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="YAML values (--key.sub value works too); null drops a section",
    )
    parser.add_argument(
        "--allow-targets",
        action="append",
        default=[],
        metavar="PREFIX",
        help="let _target_ name code under this prefix (and trust_remote_code), for this run",
    )
    return parser


def parse_run(
    parser: argparse.ArgumentParser,
    argv: list[str],
    without_config: tuple[str, ...] = (),
    of_plan: Collection[str] = (),
) -> argparse.Namespace:
    """Parse the words of a command; a word that is no option is an override.

    Args:
        without_config: options, by the name of their value, that need no `--config`.
        of_plan: options that only launch/plan.py has.
    """
    _refuse_misplaced(argv, parser, of_plan)
    args = parser.parse_intermixed_args(_as_overrides(argv, parser))
    if args.config is None and all(getattr(args, name) is None for name in without_config):
        parser.error("the following arguments are required: -c/--config")
    return args


def _refuse_misplaced(
    argv: list[str], parser: argparse.ArgumentParser, of_plan: Collection[str]
) -> None:
    """End the script with a hint at an option that is misspelt or belongs to launch/plan.py."""
    own = parser._option_string_actions
    for name in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if name in of_plan:
            parser.error(f"launch/plan.py has {name}")
        # A word with a dot is a key's name, however near to an option.
        if "." in name or any(option.startswith(name) for option in own):
            continue
        near = difflib.get_close_matches(name, [o for o in own if len(o) > 2], n=1, cutoff=0.8)
        if near:
            parser.error(f"{name}: no such option; did you mean {near[0]}?")


def _as_overrides(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Rewrite `--a.b value` and `--a.b=value` as `a.b=value`; options of the parser, abbreviated
    ones too, stay."""
    own = parser._option_string_actions
    words, rest = [], iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("--") or word == "--" or any(o.startswith(name) for o in own):
            words.append(word)
        elif equals:
            words.append(f"{name[2:]}={value}")
        else:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                parser.error(f"{name} expects a value; {name}=null gives none")
            words.append(f"{name[2:]}={following}")
    return words


def read_seed(text: str) -> int:
    """Return the number of an option that seeds torch's generators."""
    if not text.strip().isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"got {text:.40}, expected a whole number from 0 to 1e18")
    return int(text)


def positive(kind: Callable[[str], Number], most: float = math.inf) -> Callable[[str], Number]:
    """Return a function that reads an option's value as a finite number of this kind above 0."""

    def read(text: str) -> Number:
        try:
            number = kind(text)
        except ValueError:
            number = kind("0")
        if not (0 < number <= most and math.isfinite(number)):
            bound = "" if most == math.inf else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"got {text}, expected a number > 0{bound}")
        return number

    return read
