"""Make one run after another, of every combination of values, and compare them.

    python launch/sweep.py --config cfg.yaml kd_ratio=0,0.5,1 kd_loss_fn.temperature=1,2
    python launch/sweep.py --config cfg.yaml --ranks 8 optimizer.lr=1e-4,1e-5

A key with several values, commas between them, varies; each run has its own directory below the
YAML's checkpoint_dir. Run it again and it goes on: runs that are finished with these settings are
left out, a stopped one resumes. It ends in a table of each run's last validation. A signal that
stops a run stops the sweep after it. Exit code 0 done or stopped, 1 a run failed, 2 the config or
the command is wrong, all found before the first run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.command_line import parse_run, positive, run_parser
from ds_kd.parallel.signals import StoppableCommands
from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.script import run_script

KD = Path(__file__).with_name("kd.py")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = run_parser("sweep.py", __doc__)
    parser.add_argument("--ranks", type=positive(int), default=1, metavar="N", help="of each run")
    return parse_run(parser, argv)


def run(args: argparse.Namespace) -> int:
    quiet()
    from ds_kd.plan.sweep import lay_out, tabulate

    start = [sys.executable]
    if args.ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    start += [
        str(KD),
        "--config",
        args.config,
        *(f"--allow-targets={p}" for p in args.allow_targets),
    ]

    runs = lay_out(args.config, args.overrides, tuple(args.allow_targets), args.ranks)
    commands, failed = StoppableCommands(), []
    for number, each in enumerate(runs, 1):
        is_finished = each.mark.is_file() and each.mark.read_text("utf-8") == each.cfg.text
        said = ", finished before" if is_finished else ""
        print(f"[{number}/{len(runs)}] {each.name}{said}", flush=True)
        if is_finished:
            continue
        code = commands.run([*start, *each.overrides])
        if commands.is_asked or each.was_stopped:
            print("stopped; the same command goes on", flush=True)
            return code
        if code:
            failed.append(each.name)
        else:
            each.mark.parent.mkdir(parents=True, exist_ok=True)
            each.mark.write_text(each.cfg.text, "utf-8")
    print("\n".join([*tabulate(runs), *(f"failed: {name}" for name in failed)]))
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
