#!/usr/bin/env bash
# Set up what is missing and run every test that this machine can run.
#
#     bash launch/test.sh [pytest arguments]      e.g. bash launch/test.sh tests/unit -k prune
#     bash launch/test.sh --system-packages …      install SLURM first (apt-get, as root): its tests are skipped without it
#     VENV=/path/to/venv bash launch/test.sh      another environment
#     WORKERS=8 bash launch/test.sh                files of tests that run side by side, 3 unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
if [ "${1:-}" = --system-packages ]; then
  shift
  if command -v slurmctld >/dev/null && command -v munged >/dev/null; then
    echo "test.sh: SLURM is there"
  elif command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null
  else
    echo "test.sh: --system-packages needs root and apt-get; going on without SLURM" >&2
  fi
fi
bash launch/setup.sh --dev "$VENV"

# DeepSpeed finds ninja, and the tests find `deepspeed`, on the PATH.
PATH="$(cd "$VENV/bin" && pwd):$PATH"
export PATH
# Two ranks share the cores: one thread each, or they take turns at everything.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
# No test asks the hub; one that tries shall fail at once instead of waiting for a network.
export HF_HUB_OFFLINE=1
# Hundreds of processes import ds_kd: compiled once, it costs each of them half a second less.
unset PYTHONDONTWRITEBYTECODE

# Half of a run waits for ranks to start, to stop or to be missed, so three files of tests run side by side on two cores.
# A file stays on one worker, whose tests share its runs; the folders with the longest files come first.
exec python -m pytest -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
