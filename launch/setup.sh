#!/usr/bin/env bash
# Make a virtual environment with everything ds_kd needs, or bring it up to date.
#
#     bash launch/setup.sh [--dev] [VENV]         VENV: .venv unless given; --dev adds the tests' and linters' packages
#     PYTHON=python3.12 bash launch/setup.sh      another interpreter, 3.10 or newer
#
# Running it again is free: a stamp inside VENV holds the hash of the requirement files it was made from. Where a GPU is
# found and VENV was made without one, torch is replaced by the build with CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=.venv
files=(requirements.txt)
for argument in "$@"; do
  case $argument in
    --dev) files+=(requirements-dev.txt) ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "launch/setup.sh" && exit 0 ;;
    -*) echo "setup.sh: unknown option $argument; usage: bash launch/setup.sh [--dev] [VENV]" >&2 && exit 2 ;;
    *) venv=$argument ;;
  esac
done

say() { printf 'setup: %s\n' "$*"; }
die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# --- already done? -------------------------------------------------------------------------------------------------
# One stamp per requirement file: what --dev installed also serves a later call without it.
stamp_of() { echo "$venv/.ds_kd-$(basename "$1")"; }
hash_of() { cksum <"$1"; }
all_current() {
  local file
  [ -x "$venv/bin/python" ] || return 1
  for file in "${files[@]}"; do
    [ "$(cat "$(stamp_of "$file")" 2>/dev/null)" = "$(hash_of "$file")" ] || return 1
  done
}
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }
# Of a machine without a GPU, such as a login node that shares its disk with the GPU nodes.
has_cpu_torch() { grep -qs '^cuda[^=]*= None' "$venv"/lib/python*/site-packages/torch/version.py; }
if all_current && ! { has_gpu && has_cpu_torch; }; then
  say "$venv is up to date"
  exit 0
fi

# --- what the machine must have ------------------------------------------------------------------------------------
command -v "$python" >/dev/null ||
  die "no $python here: apt-get install python3 python3-venv, or set PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "$("$python" --version) is too old, 3.10 is needed: install a newer one and set PYTHON=/path/to/python3.x"
# DeepSpeed compiles some of its operators when a run first needs them.
command -v c++ >/dev/null || command -v g++ >/dev/null || die "no C++ compiler here: apt-get install g++"

# pip comes last when an environment is made: where it answers, the environment is whole.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  # Debian and Ubuntu take ensurepip, which environments need, out of Python.
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make environments: apt-get install python3-venv"
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv" || die "$python -m venv $venv failed; the message above says why"
fi
bin=$(cd "$venv/bin" && pwd)
"$bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "$venv holds $("$bin/python" --version), 3.10 is needed: remove $venv and run this again"

# --- torch ---------------------------------------------------------------------------------------------------------
torch=$(sed -n 's/^\(torch==[^ ;#]*\).*/\1/p' requirements.txt)
torch_is_there() { "$bin/python" -c "
import importlib.metadata, sys
sys.exit(importlib.metadata.version('torch').split('+')[0] != '${torch#*==}')" 2>/dev/null; }
# Whether plain pip would bring CUDA along. pip says so in a dry run without downloading the wheels, from 23.3 on.
pulls_cuda() {
  local report
  "$bin/python" -c 'import pip, sys; sys.exit([int(n) for n in pip.__version__.split(".")[:2]] < [23, 3])' ||
    "$bin/python" -m pip install --quiet --upgrade pip ||
    return 0 # unknown: ask for the CPU build
  report=$("$bin/python" -m pip install --dry-run --quiet --ignore-installed --report - "$torch") ||
    die "pip cannot get $torch for $("$bin/python" --version); the message above says why"
  "$bin/python" -c '
import json, sys
names = [item["metadata"]["name"].lower() for item in json.load(sys.stdin)["install"]]
sys.exit(not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names))' <<<"$report"
}
if has_gpu && has_cpu_torch; then
  if pulls_cuda; then
    say "NVIDIA GPU found: the CPU build of torch makes room for the one with CUDA"
    "$bin/python" -m pip uninstall --quiet --yes torch
  else
    say "NVIDIA GPU found, but pip has only a CPU build of $torch: runs will use the CPU"
  fi
elif has_gpu; then
  say "NVIDIA GPU found: $torch comes with CUDA"
elif torch_is_there; then
  say "$torch is installed"
else
  say "asking pip which build of $torch it would take"
  if pulls_cuda; then
    say "no NVIDIA GPU: installing the CPU build (uv knows where it is), not gigabytes of CUDA"
    if ! { "$bin/python" -m pip install --quiet uv &&
      "$bin/python" -m uv pip install --python "$bin/python" --torch-backend cpu "$torch"; }; then
      say "the CPU build is not to be had from here; pip installs the one with CUDA, which works as well"
    fi
  else
    say "it is a CPU build"
  fi
fi

# --- the rest ------------------------------------------------------------------------------------------------------
for file in "${files[@]}"; do
  say "installing $file"
  "$bin/python" -m pip install --disable-pip-version-check -r "$file" ||
    die "pip could not install $file; the message above says why"
  hash_of "$file" >"$(stamp_of "$file")"
done
say "$venv is ready"
