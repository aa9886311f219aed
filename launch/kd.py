"""Distil a student under a teacher, as one YAML describes it.

    deepspeed launch/kd.py --config cfg.yaml [key.sub=value …]     every GPU of this machine
    python launch/kd.py --config cfg.yaml …                        one rank
    torchrun --nproc-per-node N launch/kd.py … / srun python launch/kd.py …
    python launch/kd.py --config cfg.yaml --check       tell what is wrong with it, run nothing
    python launch/kd.py --config cfg.yaml --dry-run --gpu-memory 80GB  its plan: memory, time
    python launch/kd.py --config cfg.yaml --show-samples 3  what is supervised of its first samples
    python launch/kd.py --list-keys [prefix]                            every key of the YAML

Ctrl-C, SIGTERM or SIGUSR1 at any rank: all finish their step, save and end; the same command goes
on. A second one ends the process at once, with nothing saved.

Exit code: 0 done or stopped so, 1 the run failed, 2 the config or the command is wrong, 130 ended
by Ctrl-C at once: by the second, or before there was anything to save.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.config.checks.files import has_gpu, missing_packages
from ds_kd.config.components import ConfigError
from ds_kd.config.load import check_world, load
from ds_kd.config.reference.keys import list_keys
from ds_kd.config.schema import RunConfig
from ds_kd.errors import UserError
from ds_kd.parallel.signals import StopRequest
from ds_kd.quiet import quiet

if TYPE_CHECKING:  # torch takes seconds
    from ds_kd.checkpoint.run_lock import RunLock
    from ds_kd.parallel.world import World


def parse(argv: list[str] | None = None, prog: str = "kd.py") -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", metavar="YAML", help="the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="YAML values (--key.sub value works too); null drops a section",
    )
    parser.add_argument("--check", action="store_true", help="check the config, run nothing")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the plan of the run, run nothing"
    )
    parser.add_argument(
        "--show-samples",
        type=int,
        metavar="N",
        help="print the first N training samples, supervised tokens marked; loads no model",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="of the plan, or to check for")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of the plan: what has to fit, 80GB")
    parser.add_argument("--host-memory", metavar="SIZE", help="of the plan: of one node, 1TB")
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="of the plan: that share that memory"
    )
    parser.add_argument("--length", type=int, metavar="N", help="of the plan: tokens of a sample")
    parser.add_argument("--mfu", type=float, default=0.4, help="of the plan: share of the peak")
    parser.add_argument("--tflops", type=float, default=989.0, help="of the plan: that peak (H100)")
    parser.add_argument(
        "--list-keys",
        nargs="?",
        const="",
        metavar="PREFIX",
        help="print the YAML's keys, their meaning and defaults",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show DeepSpeed's and transformers' own messages"
    )
    parser.add_argument(
        "--allow-targets",
        action="append",
        default=[],
        metavar="PREFIX",
        help="let _target_ name code under this prefix (and trust_remote_code), for this run",
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    args = parser.parse_intermixed_args(_plain(sys.argv[1:] if argv is None else argv))
    for name in ("ranks", "ranks_per_node", "length", "mfu", "tflops", "show_samples"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected a number > 0")
    if args.mfu > 1:
        parser.error(f"--mfu: got {args.mfu:g}, expected a share from 0 to 1, such as 0.4")
    if args.config is None and args.list_keys is None:
        parser.error("the following arguments are required: -c/--config")
    return args


def _plain(argv: list[str]) -> list[str]:
    """`--a.b value` and `--a.b=value` as `a.b=value`; the options of this script stay."""
    own = {"--config", "--check", "--list-keys", "--verbose", "--allow-targets", "--local_rank"}
    own |= {"--help", "--dry-run", "--ranks", "--gpu-memory", "--mfu", "--tflops", "--show-samples"}
    own |= {"--host-memory", "--ranks-per-node", "--length"}
    plain, words = [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("--") or len(word) == 2 or any(o.startswith(name) for o in own):
            plain.append(word)
        elif equals:
            plain.append(f"{name[2:]}={value}")
        else:
            plain.append(f"{name[2:]}={next(words, '')}")
    return plain


def run(args: argparse.Namespace) -> int:
    if args.list_keys is not None:
        print("\n".join(list_keys(args.list_keys)))
        return 0
    cfg = load(
        args.config,
        args.overrides,
        tuple(args.allow_targets),
        config_only=args.dry_run and not args.check,
    )
    if args.check:
        if args.ranks is not None:
            with cfg.source.locating():
                check_world(cfg, args.ranks)
        notes = [*cfg.notes, *_missing(cfg)]
        if cfg.dist_env.backend == "nccl" and not has_gpu():
            notes.append("dist_env.backend: nccl needs CUDA; on this machine gloo takes its place")
        if cfg.wandb is not None and importlib.util.find_spec("wandb") is None:
            notes.append("wandb: the package is not installed here; pip install wandb")
        print("\n".join([*notes, f"{args.config}: nothing wrong with it"]))
        return 0
    with cfg.source.locating():
        if args.show_samples is not None:
            return show_samples(cfg, args)
        return dry_run(cfg, args) if args.dry_run else train(cfg, args)


def dry_run(cfg: RunConfig, args: argparse.Namespace) -> int:
    quiet()
    from ds_kd.plan import memory
    from ds_kd.plan.dry_run import bytes_of, describe

    sizes = [
        None if given is None else bytes_of(given, option)
        for option, given in (
            ("--gpu-memory", args.gpu_memory),
            ("--host-memory", args.host_memory),
        )
    ]
    ranks = args.ranks or cfg.distributed.dp_size or 1
    check_world(cfg, ranks)
    together = args.ranks_per_node or (cfg.slurm.ntasks_per_node if cfg.slurm is not None else 8)
    machine = memory.Machine(sizes[0], sizes[1], together)
    print(describe(cfg, ranks, machine, args.mfu, args.tflops, args.length))
    return 0


def show_samples(cfg: RunConfig, args: argparse.Namespace) -> int:
    if not args.verbose:
        quiet()
    from ds_kd.recipe import data as loaders

    shown = loaders.show_samples(cfg, args.show_samples, sys.stdout.isatty())
    print("\n".join(shown))
    return 0


def _missing(cfg: RunConfig) -> list[str]:
    """Packages that the models need and this machine lacks: --check may run on another one."""
    models = filter(None, (cfg.model, cfg.teacher_model))
    return [*filter(None, (missing_packages(model.key, model.kwargs) for model in models))]


def train(cfg: RunConfig, args: argparse.Namespace) -> int:
    if lacking := _missing(cfg):
        raise ConfigError(lacking)
    if not args.verbose:
        quiet()
    from ds_kd.parallel import world as distributed
    from ds_kd.recipe import build as recipe

    world = distributed.start(cfg.dist_env.backend, cfg.dist_env.timeout_minutes)
    with distributed.naming_lost_ranks(world), recipe.locked(cfg, world) as lock:
        train_in(cfg, args, world, lock)
        distributed.stop()
    return 0


def train_in(cfg: RunConfig, args: argparse.Namespace, world: World, lock: RunLock | None) -> None:
    """Train on the ranks of `world`, the checkpoint directory being this run's alone."""
    from ds_kd.recipe import build as recipe

    say = print if world.is_main else lambda *_: None
    for note in cfg.notes:
        say(note)
    if world.backend != cfg.dist_env.backend:
        say(
            f"dist_env.backend: {cfg.dist_env.backend} needs CUDA, which this machine lacks; "
            f"using {world.backend}"
        )
    started = time.monotonic()
    stop = StopRequest()
    stop.listen()
    trainer = recipe.build(cfg, world, stop)
    say(
        f"{world.size} rank(s) on {world.device.type}, {trainer.schedule.total_steps} steps, "
        f"ready in "
        f"{time.monotonic() - started:.0f} s"
    )
    if trainer.checkpointer is not None:
        trainer.checkpointer.lock = lock
        found = trainer.checkpointer.resume(trainer.student, trainer.state)
        if found is not None:
            say(f"resumed from {found} at step {trainer.state.step}")
            if trainer.schedule.is_last(trainer.state.step):
                recipe.refuse_changes(cfg, trainer.checkpointer.changes)
                trainer.checkpointer.export_final(trainer.student)
                say("all its steps are done; a larger max_steps or num_epochs goes on")
        trainer.checkpointer.check_room(trainer.student)
    finished = trainer.train()
    if trainer.metrics is not None:
        trainer.metrics.close()
    if world.is_main:
        if trainer.checkpointer is not None and trainer.schedule.total_steps:
            trainer.checkpointer.mark(trainer.state.step, finished)
        print(recipe.closing_message(cfg, trainer.state.step, finished))


def _speaks() -> bool:
    """Whether this rank is the one to tell of an error."""
    if os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) == "1":
        return True  # without the seconds that torch takes to import
    from ds_kd.parallel.world import is_first_to_fail

    return is_first_to_fail()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except KeyboardInterrupt:  # before the run listens to it itself
        return 130
    except ConfigError as error:
        message, code = error.text(excerpts=sys.stderr.isatty()), 2
    except UserError as error:
        message, code = str(error), 1
    if _speaks():
        rank = int(os.environ.get("RANK", "0"))
        where = f"rank {rank}: " if rank else ""
        print(f"\n{where}{message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
