#!/usr/bin/env bash
# Run a distillation on this machine, one rank per GPU.
#
#     bash launch/single_node.sh CONFIG [key.sub=value …]
#     NPROC=2 bash launch/single_node.sh CONFIG               so many ranks; on a CPU the default is 1
#     CUDA_VISIBLE_DEVICES=2,3 bash launch/single_node.sh …   these GPUs (leave NPROC unset)
#     DRY_RUN=1 bash launch/single_node.sh …                  print the command, run nothing
#
# Ctrl-C or SIGTERM: the ranks end their step, save and end, however long that takes; a second one ends them at once.
set -euo pipefail

NPROC=${NPROC:-}
VENV=${VENV:-.venv}
DRY_RUN=${DRY_RUN:-0}

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ "$#" -gt 0 ] || { echo "usage: bash launch/single_node.sh CONFIG [key.sub=value …]" >&2 && exit 2; }
config=$1
shift
[ -f "$config" ] || { echo "single_node.sh: no file $config" >&2 && exit 2; }
case ${NPROC:-1} in *[!0-9]* | 0*) echo "single_node.sh: NPROC: got '$NPROC', expected a number of ranks" >&2 && exit 2 ;; esac
case $VENV in /*) ;; *) VENV=$repo/$VENV ;; esac
if [ -x "$VENV/bin/deepspeed" ]; then
  PATH=$VENV/bin:$PATH
fi
export PATH
command -v deepspeed >/dev/null || { echo "single_node.sh: no deepspeed in $VENV or on the PATH; bash launch/setup.sh installs it" >&2 && exit 2; }

# nproc alone would answer with OMP_NUM_THREADS where that is set.
cores() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }
if [ -z "$NPROC" ] && ! has_gpu; then
  NPROC=1
fi
# Without a count the launcher takes all GPUs and heeds CUDA_VISIBLE_DEVICES; with one it ignores that variable.
count=()
if [ -n "$NPROC" ]; then
  count=(--num_accelerators "$NPROC")
  # Unset, every rank would start as many threads as the machine has cores.
  threads=$(($(cores) / NPROC))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi

# --quiet: the launcher only speaks of errors.
# The fixed default is taken as soon as two runs share a machine: ask the system for a free port.
port=${MASTER_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

command=(deepspeed --quiet --master_port "$port" "${count[@]}" "$repo/launch/kd.py" --config "$config" "$@")
if [ "$DRY_RUN" != 0 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

# The launcher, shown a signal, would leave its ranks alone (the outer process) or kill them after 30 seconds (the inner one):
# a session of its own keeps it from seeing any, and the ranks, its grandchildren, are asked from here.
setsid "${command[@]}" <&0 &
launcher=$!
children() { cat /proc/"$1"/task/*/children 2>/dev/null || true; }
ranks() { for inner in $(children "$launcher"); do children "$inner"; done; }
asked=0
ask() {
  signalled=1
  ranks=$(ranks)
  if [ "$asked" = 0 ] && [ -n "$ranks" ]; then
    # shellcheck disable=SC2086
    kill "-$1" $ranks 2>/dev/null || true
  else
    kill -KILL -- "-$launcher" 2>/dev/null || true
    ended=$((128 + $(kill -l "$1"))) # by that signal, for whoever looks at the exit code
  fi
  asked=1
}
trap 'ask INT' INT
trap 'ask TERM' TERM HUP
trap 'ask USR1' USR1
# bash would tell of a process that was killed, whichever line it is at by then.
exec 2>/dev/null
signalled=1
while [ "$signalled" = 1 ]; do # a signal ends `wait`, not the launcher
  signalled=0
  code=0
  wait "$launcher" || code=$?
done
exit "${ended:-$code}"
