"""Distil a student under a teacher, as one YAML describes it.

    deepspeed launch/kd.py --config cfg.yaml [key.sub=value …]     every GPU of this machine
    python launch/kd.py --config cfg.yaml …                        one rank
    torchrun --nproc-per-node N launch/kd.py … / srun python launch/kd.py …
    python launch/kd.py --config cfg.yaml --check               list its problems, run nothing
    python launch/kd.py --config cfg.yaml --dry-run --ranks 8   its plan (launch/plan.py has more)
    python launch/kd.py --config cfg.yaml --show-samples 3      samples, supervised tokens marked
    python launch/kd.py --list-keys [prefix]                    every key of the YAML

Where the package is installed, `ds-kd` is the same as `python launch/kd.py`, `torchrun -m ds_kd` as
`torchrun launch/kd.py`, and `deepspeed --module ds_kd` as `deepspeed launch/kd.py`.

On Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP at any rank all ranks finish their step, save and end, and the
same command resumes. A second signal ends the process at once, without saving.

Exit code: 0 done or stopped by a signal, 1 the run failed, 2 the config, the command or the
environment is wrong, 130 ended at once by Ctrl-C, by a second one or before the first step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ds_kd
from ds_kd.command_line import parse_run, positive, run_parser
from ds_kd.config.checks.machine import notes_on_machine
from ds_kd.config.components import ConfigError
from ds_kd.config.load import check_slurm_world, check_world, load
from ds_kd.config.reference.keys import hint_at_keys, list_keys
from ds_kd.config.schema import RunConfig
from ds_kd.process import check_machine, prepare
from ds_kd.quiet import quiet
from ds_kd.script import Ending

PROGRAM = "ds-kd" if Path(sys.argv[0]).name == "ds-kd" else "kd.py"
#: Options of launch/plan.py that a user may give here.
OF_PLAN = (
    "--gpu", "--nodes", "--network", "--gpu-memory", "--host-memory", "--ranks-per-node",
    "--length", "--mfu", "--tflops",
)  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    parser = run_parser(PROGRAM, __doc__)
    option = parser.add_argument
    option("--check", action="store_true", help="check the config, run nothing")
    option("--dry-run", action="store_true", help="check, print the plan of the run, run nothing")
    option("--ranks", type=positive(int), metavar="N", help="of the plan, or to check for")
    option(
        "--show-samples",
        type=positive(int),
        metavar="N",
        help="print the first N training samples, supervised tokens marked; loads no model",
    )
    option(
        "--list-keys",
        nargs="?",
        const="",
        metavar="PREFIX",
        help="print the YAML's keys, their meaning and defaults",
    )
    option("--verbose", action="store_true", help="show DeepSpeed's and transformers' messages")

    # The deepspeed launcher passes this option; it is not for users.
    option("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parse_run(parser, argv, without_config=("list_keys",), of_plan=OF_PLAN)
    asked = {"--check": args.check, "--dry-run": args.dry_run, "--show-samples": args.show_samples}
    given = [name for name, value in asked.items() if value]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} are two questions; ask one at a time")
    return args


def print_keys(prefix: str) -> None:
    lines = list_keys(prefix)
    if not lines:
        raise ConfigError([hint_at_keys(prefix)])
    print("\n".join(lines))


def check(cfg: RunConfig, args: argparse.Namespace) -> None:
    if args.ranks is None:
        check_slurm_world(cfg)
    else:
        check_world(cfg, args.ranks)
    print(*cfg.notes, *notes_on_machine(cfg), f"{args.config}: nothing wrong with it", sep="\n")


def show_samples(cfg: RunConfig, args: argparse.Namespace) -> None:
    from ds_kd.recipe import data

    print("\n".join(data.show_samples(cfg, args.show_samples, sys.stdout.isatty())))


def show_plan(cfg: RunConfig, args: argparse.Namespace) -> None:
    from ds_kd.plan.dry_run import plan_of

    print(plan_of(cfg, args.ranks))


def train(cfg: RunConfig, args: argparse.Namespace) -> None:
    from ds_kd.recipe.results import closing_message, mark_without_checkpoints

    with ds_kd.build(cfg, listens=True) as trainer:
        summary = trainer.train()
        if trainer.metrics is not None:  # on rank 0
            mark_without_checkpoints(cfg, summary.step, summary.finished)
            trainer.metrics.say(closing_message(cfg, summary.step, summary.finished))


def main(argv: list[str] | None = None) -> int:
    """Run the command of this process, or one in it with the words `argv`, and return its exit
    code. The console command `ds-kd` is this."""
    if argv is None:
        prepare()
    args = parse(sys.argv[1:] if argv is None else argv)
    asked = {check: args.check, show_samples: args.show_samples, show_plan: args.dry_run}
    answer = next((answer for answer, is_asked in asked.items() if is_asked), train)

    # No function stands between this one and `train`, which a reader follows to the step.
    with Ending() as ending:
        check_machine()
        if args.list_keys is not None:
            print_keys(args.list_keys)
            return 0
        words = args.config, args.overrides, tuple(args.allow_targets)
        cfg = load(*words, config_only=args.dry_run)
        with cfg.source.add_places():
            if not (args.verbose or args.check):
                quiet()
            answer(cfg, args)
    return ending.code


if __name__ == "__main__":
    sys.exit(main())
