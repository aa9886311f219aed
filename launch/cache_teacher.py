"""Run a teacher once over all samples of a run, and keep what it gives for later runs.

    python launch/cache_teacher.py --config cfg.yaml --output DIR [key.sub=value …]
    python launch/cache_teacher.py --config cfg.yaml --output DIR --dry-run    size and time only
    torchrun --nproc-per-node 8 launch/cache_teacher.py … / deepspeed launch/cache_teacher.py …

With `teacher: {kind: cached, directory: DIR}` the YAML then trains without a teacher. The same
command goes on where it was stopped, adds what new data lack, and takes any number of ranks. Exit
code 2 for a user's mistake.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.command_line import parse_run, positive, run_parser
from ds_kd.config.load import load
from ds_kd.config.schema import RunConfig
from ds_kd.config.text.yaml_source import quote_yaml
from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script

_STOPPED = "stopped; the same command goes on"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = run_parser("cache_teacher.py", __doc__)
    option = parser.add_argument
    option("--output", metavar="DIR", help="the cache; by default the YAML's teacher.directory")
    option("--dry-run", action="store_true", help="tell size and time, load no model")
    option("--mfu", type=positive(float, 1), default=0.4, help="share of the peak, for --dry-run")
    option("--tflops", type=positive(float), default=989.0, help="that peak (an H100's)")
    option("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parse_run(parser, argv)


def run(args: argparse.Namespace) -> None:
    # In quotes, as overrides are YAML and a directory may be called 2024 or off.
    place = [] if args.output is None else [f"teacher.directory={quote_yaml(args.output)}"]
    # Each rank takes samples of its own, whatever the layout of the run.
    whole = ["distributed.tp_size=1", "teacher_distributed=null"]
    words = [*args.overrides, *whole, "teacher.kind=cached", "teacher.fill=true", *place]
    cfg = load(args.config, words, tuple(args.allow_targets), config_only=args.dry_run)
    with cfg.source.add_places():
        quiet()
        if args.dry_run:
            show_plan(cfg, args)
        else:
            write(cfg)


def show_plan(cfg: RunConfig, args: argparse.Namespace) -> None:
    from ds_kd.parallel.world import start_or_alone
    from ds_kd.plan.cache import describe_time
    from ds_kd.plan.dry_run import model_shape
    from ds_kd.recipe.offline.write import plan_cache

    assert cfg.teacher_model is not None
    task = plan_cache(cfg, start_or_alone())
    print(*task.describe(), sep="\n")
    print(describe_time(task, model_shape(cfg.teacher_model), args.mfu, args.tflops))


def write(cfg: RunConfig) -> None:
    from ds_kd.parallel.signals import StopRequest
    from ds_kd.parallel.world import name_lost_ranks, start, stop
    from ds_kd.plan.placement import settle_placement
    from ds_kd.recipe.offline.write import plan_cache, write_cache

    world = start(cfg.dist_env.backend, cfg.dist_env.timeout_minutes)
    with name_lost_ranks(world):
        cfg = settle_placement(cfg, world)
        task, asked_to_stop = plan_cache(cfg, world), StopRequest()
        if world.is_main:
            print(*task.describe(), sep="\n", flush=True)
        asked_to_stop.listen()
        is_whole = write_cache(task, world, asked_to_stop)
        stop()
    if world.is_main:
        kept = f", keep: {cfg.teacher.keep}, k: {cfg.teacher.k}"
        words = f"kind: cached, directory: {quote_yaml(str(cfg.teacher.directory))}"
        words += kept if cfg.teacher.keep != "hidden" else ""
        print(f"done; teacher: {{{words}}} reads it" if is_whole else _STOPPED)


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
