"""Submit a run to SLURM as the YAML's `slurm` section says.

    python launch/submit.py --config cfg.yaml [key.sub=value …]
    python launch/submit.py --config cfg.yaml --dry-run       print the command, submit nothing

The whole config is checked first, and whether its batch sizes fit the ranks; then it is
`sbatch … launch/slurm.sh` with that section's options. Others go in slurm.sbatch_options.
Exit code: sbatch's, 2 when the config or the command is wrong.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # kd.py puts the root before it

from kd import parse

from ds_kd.config import check_world, load
from ds_kd.slurm import sbatch_command
from ds_kd.targets import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    dry_run = "--dry-run" in words
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    args = parse([word for word in words if word != "--dry-run"], prog="submit.py")
    try:
        cfg = load(args.config, args.overrides, allow=tuple(args.allow_targets))
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
    command = sbatch_command(
        cfg.slurm, str(Path(args.config).resolve()), [*args.overrides, *options]
    )
    print(shlex.join(command))
    if dry_run:
        return 0
    (ROOT / cfg.slurm.log_dir).mkdir(parents=True, exist_ok=True)
    if shutil.which("sbatch") is None:
        print(
            "\nsbatch: not found; submit from a machine of the cluster, or add --dry-run",
            file=sys.stderr,
        )
        return 2
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
