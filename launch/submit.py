"""Submit a run to SLURM as the YAML's `slurm` section says.

    python launch/submit.py --config cfg.yaml [key.sub=value …]
    python launch/submit.py --config cfg.yaml --dry-run       print the command, submit nothing

The whole config is checked first, and whether its batch sizes fit the ranks; then it is
`sbatch … launch/slurm.sh` with that section's options. Others go in slurm.sbatch_options.
Exit code: sbatch's, 2 when the config or the command is wrong.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # kd.py puts the root before it

from kd import parse

from ds_kd.config.checks.files import check_directory
from ds_kd.config.components import ConfigError
from ds_kd.config.load import check_world, load
from ds_kd.config.secrets import is_secret, without_secrets
from ds_kd.plan.slurm import sbatch_command

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    args = parse(words, prog="submit.py")
    if args.config is None:
        print("submit.py: --config is missing", file=sys.stderr)
        return 2
    config = Path(args.config).resolve()
    os.chdir(ROOT)  # where the job will start: the YAML's relative paths are meant from there
    try:
        cfg = load(config, args.overrides, allow=tuple(args.allow_targets))
        if cfg.slurm is None:
            raise ConfigError(
                [
                    "slurm: the section is missing; write slurm: {nodes: 2, ntasks_per_node: 8, "
                    "gpus_per_node: 8}, or use sbatch launch/slurm.sh with options of your own"
                ]
            )
        check_world(cfg, cfg.slurm.nodes * cfg.slurm.ntasks_per_node)
    except ConfigError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    options = [f"--allow-targets={prefix}" for prefix in args.allow_targets]
    variables, command = sbatch_command(cfg.slurm, str(config), [*args.overrides, *options])
    named = {name: "***" if is_secret(name) else value for name, value in variables.items()}
    shown = ["env", *(f"{name}={value}" for name, value in named.items()), *command]
    print(shlex.join(map(without_secrets, shown)), flush=True)
    if args.dry_run or args.check:
        return 0
    if shutil.which("sbatch") is None:
        print(
            "\nsbatch: not found; submit from a machine of the cluster, or add --dry-run",
            file=sys.stderr,
        )
        return 2
    if wrong := check_directory("slurm.log_dir", cfg.slurm.log_dir):
        print(f"\n{ConfigError([wrong])}", file=sys.stderr)
        return 2
    Path(cfg.slurm.log_dir).mkdir(parents=True, exist_ok=True)
    return subprocess.run(command, env={**os.environ, **variables}).returncode


if __name__ == "__main__":
    sys.exit(main())
