"""The `slurm` section: the sbatch command that runs a config on a cluster."""

from __future__ import annotations

from ds_kd.config.schema import Slurm

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
    """What to type in the repository's root.

    Args:
        wanted: the section.
        config: path of the YAML.
        overrides: `key.sub=value` of the run.

    Returns:
        Variables to set, which sbatch hands on to the job, and the words of one
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
