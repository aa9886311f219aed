#!/usr/bin/env bash
# Set up what is missing and run every test that needs no GPU.
#
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh --dev
export PATH="$PWD/${VENV:-.venv}/bin:$PATH" # the tests start the real `deepspeed` launcher
export TOKENIZERS_PARALLELISM=false
exec python -m pytest "$@"
