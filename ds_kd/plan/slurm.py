"""Make the sbatch command that runs a config on a cluster, from the `slurm` section."""

from __future__ import annotations

from pathlib import Path

from ds_kd.config.checks.files import check_directory
from ds_kd.config.components import ConfigError
from ds_kd.config.load import check_slurm_world
from ds_kd.config.schema import RunConfig, Slurm
from ds_kd.config.text.secrets import blank_secrets, is_secret

_OPTIONS = (
    "job_name",
    "nodes",
    "ntasks_per_node",
    "gpus_per_node",
    "cpus_per_task",
    "time",
    "account",
    "partition",
)


def sbatch_command(
    wanted: Slurm, config: str, overrides: list[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the command to run in the repository's root.

    Args:
        wanted: the `slurm` section.
        config: path of the YAML.
        overrides: `key.sub=value` of the run.

    Returns:
        Variables to set, which sbatch passes to the job, and the words of one
        `sbatch … launch/slurm.sh …` command.
    """
    variables = {name: str(value) for name, value in wanted.env_vars.items()}
    variables["LOG_DIR"] = wanted.log_dir
    if wanted.container_image is not None:
        variables["CONTAINER_IMAGE"] = wanted.container_image
        variables["CONTAINER_MOUNTS"] = ",".join(wanted.container_mounts)
    command = ["sbatch", f"--output={wanted.log_dir}/slurm-%x-%j.log"]
    for name in _OPTIONS:
        value = getattr(wanted, name)
        if value is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    return variables, [*command, *wanted.sbatch_options, "launch/slurm.sh", config, *overrides]


def format_command(variables: dict[str, str], command: list[str]) -> list[str]:
    """Return the words of a command with its variables, with secrets blanked, to print them."""
    named = {name: "***" if is_secret(name) else value for name, value in variables.items()}
    words = ["env", *(f"{name}={value}" for name, value in named.items()), *command]
    return [blank_secrets(word) for word in words]


def check_slurm(cfg: RunConfig) -> Slurm:
    """Return the `slurm` section of a config whose batch sizes fit its ranks.

    Raises:
        ConfigError: there is no such section, or batch sizes do not fit.
    """
    if cfg.slurm is None:
        raise ConfigError(
            [
                "slurm: the section is missing; write slurm: {nodes: 2, ntasks_per_node: 8, "
                "gpus_per_node: 8}, or use sbatch launch/slurm.sh with options of your own"
            ]
        )
    check_slurm_world(cfg)
    return cfg.slurm


def make_log_directory(wanted: Slurm) -> None:
    """Create the directory of the jobs' logs.

    Raises:
        ConfigError: it cannot be created.
    """
    if wrong := check_directory("slurm.log_dir", wanted.log_dir):
        raise ConfigError([wrong])
    Path(wanted.log_dir).mkdir(parents=True, exist_ok=True)
