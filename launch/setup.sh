#!/usr/bin/env bash
# Make a virtual environment with everything ds_kd needs; a second run finds it done.
#
#   bash launch/setup.sh [--dev]          VENV=.venv  PYTHON=python3
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
requirements=requirements.txt
[ "${1:-}" = --dev ] && requirements=requirements-dev.txt

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "ds_kd needs Python 3.10 or newer; set PYTHON to one, for example PYTHON=python3.11" >&2
    exit 2
}
stamp=$VENV/.$requirements.$(cat requirements.txt "$requirements" | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit 0
if [ ! -x "$VENV/bin/python" ]; then
    echo "creating the virtual environment $VENV"
    "$PYTHON" -m venv "$VENV" || { echo "python venv is missing: apt-get install python3-venv" >&2; exit 2; }
fi
pip=("$VENV/bin/python" -m pip)
torch=$(grep -o '^torch==[^ ]*' requirements.txt)
if ! "${pip[@]}" show --quiet torch 2>/dev/null && ! nvidia-smi >/dev/null 2>&1; then
    # No GPU here. Where plain pip would fetch gigabytes of CUDA libraries, ask uv for the CPU build of the same version.
    if "${pip[@]}" install --dry-run --quiet --report - "$torch" 2>/dev/null | grep -q '"name": "nvidia-'; then
        echo "no GPU: installing the CPU build of $torch"
        "${pip[@]}" install --quiet uv
        VIRTUAL_ENV=$VENV "$VENV/bin/uv" pip install --torch-backend cpu "$torch" ||
            echo "no CPU build is to be had; going on with the CUDA build"
    fi
fi
echo "installing $requirements (torch first; this downloads some hundred MB)"
"${pip[@]}" install --progress-bar off --quiet "$torch"
"${pip[@]}" install --progress-bar off --quiet -r "$requirements"
touch "$stamp"
