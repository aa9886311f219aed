"""Submit a run to SLURM as the YAML's `slurm` section says.

    python launch/submit.py --config cfg.yaml [key.sub=value …]
    python launch/submit.py --config cfg.yaml --dry-run       print the command, submit nothing

The config is checked first, and that its batch sizes fit the ranks. Then
`sbatch … launch/slurm.sh` is run with the section's options; slurm.sbatch_options takes others.
Exit code: sbatch's, or 2 if the config or the command is wrong.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.command_line import parse_run, run_parser
from ds_kd.config.load import load
from ds_kd.errors import MachineError
from ds_kd.plan.slurm import check_slurm, format_command, make_log_directory, sbatch_command
from ds_kd.process import prepare
from ds_kd.script import run_script

ROOT = Path(__file__).resolve().parents[1]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = run_parser("submit.py", __doc__)
    option = parser.add_argument
    option("--dry-run", action="store_true", help="print the command, submit nothing")
    option("--check", action="store_true", help="the same")
    return parse_run(parser, argv)


def run(args: argparse.Namespace) -> int:
    config = Path(args.config).absolute()
    os.chdir(ROOT)  # where the job will start: the YAML's relative paths are meant from there
    cfg = load(config, args.overrides, allow=tuple(args.allow_targets))
    slurm = check_slurm(cfg)
    options = [f"--allow-targets={prefix}" for prefix in args.allow_targets]
    variables, command = sbatch_command(slurm, str(config), [*args.overrides, *options])
    print(shlex.join(format_command(variables, command)), flush=True)
    if args.dry_run or args.check:
        return 0
    if shutil.which("sbatch") is None:
        raise MachineError(
            "sbatch: not found; submit from a machine of the cluster, or add --dry-run"
        )
    make_log_directory(slurm)
    return subprocess.run(command, env={**os.environ, **variables}).returncode


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_script(lambda: run(args))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
