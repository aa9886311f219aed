#!/usr/bin/env bash
# Run a distillation on a SLURM cluster, one task per accelerator. Submit it from the repository's root:
#
#     sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh CONFIG [key.sub=value …]
#     sbatch --nodes=2 --ntasks-per-node=1 launch/slurm.sh CONFIG dist_env.backend=gloo           CPU nodes
#     DRY_RUN=1 bash launch/slurm.sh CONFIG        print the command, run nothing
#
# The options on sbatch's command line describe your nodes and win over those below. ds_kd reads rank, size and address
# from SLURM's variables: no launcher, no host file, no ssh. Running the same command again resumes from the checkpoint.

#SBATCH --job-name=ds_kd
#SBATCH --output=slurm-%x-%j.log
# A requeued job goes on writing to its log; the default cuts it to nothing.
#SBATCH --open-mode=append
# Memory is not shared with other jobs: loading two models peaks above what a share per core gives.
#SBATCH --exclusive

set -euo pipefail

VENV=${VENV:-.venv}
DRY_RUN=${DRY_RUN:-0}

# SLURM runs a copy of this script out of its spool, so the script's own path says nothing.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[ -f launch/kd.py ] || { echo "slurm.sh: submit from the repository's root; $PWD has no launch/kd.py" >&2 && exit 2; }
config=${1:?usage: sbatch [options] launch/slurm.sh CONFIG [key.sub=value …]}
shift
[ -f "$config" ] || { echo "slurm.sh: no file $config" >&2 && exit 2; }
if [ -x "$VENV/bin/python" ]; then
  PATH=$(cd "$VENV/bin" && pwd):$PATH
fi
export PATH

# Since 22.05 srun no longer takes --cpus-per-task over from sbatch, and would pin each task to one core.
share=$((${SLURM_CPUS_ON_NODE:-1} / ${SLURM_NTASKS_PER_NODE:-1}))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((share > 0 ? share : 1))}
# Unset, every rank would start as many threads as the node has cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

command=(
  srun
  # When one rank dies the others wait for it in a collective: end the job at once instead of at the time-out.
  --kill-on-bad-exit=1
  # Rank numbers in front of each line: only rank 0 talks, so another number means trouble.
  --label
  python launch/kd.py --config "$config" "$@"
)
if [ "$DRY_RUN" != 0 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
# exec: a signal to the batch step reaches srun, which passes it on to every rank.
exec "${command[@]}"
