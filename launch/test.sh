#!/usr/bin/env bash
# Set up what is missing and run every test that this machine can run.
#
#     bash launch/test.sh [pytest arguments]      e.g. bash launch/test.sh tests/unit -k prune
#     VENV=/path/to/venv bash launch/test.sh      another environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
bash launch/setup.sh --dev "$VENV"

# DeepSpeed finds ninja, and the tests find `deepspeed`, on the PATH.
PATH="$(cd "$VENV/bin" && pwd):$PATH"
export PATH
# Two ranks share the cores: one thread each, or they take turns at everything.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
# No test asks the hub; one that tries shall fail at once instead of waiting for a network.
export HF_HUB_OFFLINE=1

exec python -m pytest "$@"
