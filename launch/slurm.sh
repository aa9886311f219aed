#!/usr/bin/env bash
# Run a distillation on a SLURM cluster, one task per accelerator. Submit it from the repository's root:
#
#     sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh CONFIG [key.sub=value …]
#     sbatch --nodes=2 --ntasks-per-node=1 launch/slurm.sh CONFIG dist_env.backend=gloo           CPU nodes
#     DRY_RUN=1 bash launch/slurm.sh CONFIG        print the command, run nothing
#
# The options on sbatch's command line describe your nodes and win over those below; launch/submit.py makes them from the
# YAML's slurm section. ds_kd reads rank, size and address from SLURM's variables: no launcher, no host file, no ssh.
#
# Two minutes before its time is over (--signal below) the job saves, requeues itself and goes on in the next attempt,
# until the run is done. Each attempt has a log of its own.
#
#     VENV=/path/to/venv         environment to use, .venv by default
#     CONFIG=cfg.yaml OVERRIDES="a.b=1 c.d=2"     in place of arguments
#     LOG_DIR=logs               where each attempt's log goes
#     CONTAINER_IMAGE=…          run in this image (pyxis), CONTAINER_MOUNTS=a:b,c:d

#SBATCH --job-name=ds_kd
#SBATCH --output=slurm-%x-%j.log
# A requeued job goes on writing to its log; the default cuts it to nothing.
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Memory is not shared with other jobs: loading two models peaks above what a share per core gives.
#SBATCH --exclusive

set -euo pipefail

VENV=${VENV:-.venv}
DRY_RUN=${DRY_RUN:-0}

# SLURM runs a copy of this script out of its spool, so the script's own path says nothing.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
[ -f launch/kd.py ] || { echo "slurm.sh: submit from the repository's root; $PWD has no launch/kd.py" >&2 && exit 2; }
[ "$#" -gt 0 ] || set -- ${CONFIG:+"$CONFIG"} ${OVERRIDES:-}
[ "$#" -gt 0 ] || { echo "usage: sbatch [options] launch/slurm.sh CONFIG [key.sub=value …]" >&2 && exit 2; }
config=$1
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

attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
log=${LOG_DIR:-.}/slurm-${SLURM_JOB_NAME:-ds_kd}-${SLURM_JOB_ID:-0}.attempt-$attempt.log
command=(
  srun --output="$log"
  # When one rank dies the others wait for it in a collective: end the job at once instead of at the time-out.
  --kill-on-bad-exit=1
  # Rank numbers in front of each line: only rank 0 talks, so another number means trouble.
  --label
)
if [ -n "${CONTAINER_IMAGE:-}" ]; then
  command+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD")
  command+=(--container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
fi
command+=(python launch/kd.py --config "$config" "$@")
if [ "$DRY_RUN" != 0 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

# In the background, as bash looks at signals only between commands or in `wait`.
echo "attempt $attempt: $log"
"${command[@]}" &
srun=$!
time_is_up=0
trap 'signalled=1 time_is_up=1; kill -USR1 $srun' USR1 # srun passes it on to every rank
trap signalled=1 TERM # scancel and preemption reach the ranks by themselves: see them out
signalled=1
while [ "$signalled" = 1 ]; do # a signal ends `wait`, not srun
  signalled=0
  code=0
  wait "$srun" || code=$?
done

if [ "$time_is_up" = 1 ] && [ "$code" = 0 ]; then
  # A run that ended in that very moment finds all its steps done.
  echo "attempt $attempt: time is up; saved, and queued again"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # SLURM ends this script: ending by itself in between, the job would count as over
fi
echo "attempt $attempt: exit code $code"
exit "$code"
