#!/usr/bin/env bash
# Trains the 128 px model on one GPU for a limited time. Called again, it continues where it stopped.
#
#   launch/train_tiny_gpu.sh SECONDS        # at most, in this call
#
# Stage 1 is text to image, stage 2 turntables. Each stage first times some steps, and then makes as many steps as
# fit into its time: IMAGE_SECONDS (default 200) and TURNTABLE_SECONDS (default 600), over all calls. The learning
# rate falls in the last quarter of the steps. RUNS (default runs) holds the runs with their checkpoints. OUT
# (default out/gpu) gets the newest weights of each stage in pieces of 15 MiB, which
# `cat turntable.part_* > weights.safetensors` joins, and the logs with the tables and pictures of the evaluation.
#
# On another machine, which has no checkpoints, a stage starts from RUNS/tiny_128_STAGE/weights.safetensors if it
# is there, and counts as done if there is a file `done` beside it. TRY=FLAGS adds flags to `im3d train`, such as
# --config.train.streams.image.batch_size=2.
set -uo pipefail

cd "$(dirname "$0")/.."
budget=${1:?usage: train_tiny_gpu.sh SECONDS}
runs=${RUNS:-runs}
out=${OUT:-out/gpu}
timed_steps=${TIMED_STEPS:-60}
export PYTHONPATH=${SITE:-/tmp/im3d_site}:$PWD${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$runs/xla_cache}
mkdir -p "$runs" "$out"

left() { echo $((budget - SECONDS)); }

im3d_train() { # STAGE SECONDS FLAGS...: runs `im3d train`, which saves when its time is over, and returns its exit code
  local stage=$1 limit=$2
  shift 2
  # shellcheck disable=SC2086
  timeout --signal=TERM --kill-after=60 "$limit" python3 -m im3d_jax train \
    --config="configs/tiny_128_$stage.py" --workdir="$runs/tiny_128_$stage" "$@" ${TRY:-} 2>&1 |
    tee -a "$runs/tiny_128_$stage.log" | grep --line-buffered -E '^(step .*00 |wrote|im3d:)'
  return "${PIPESTATUS[0]}"
}

steps_for() { # STAGE SECONDS: prints how many steps fit, by the rate in the newest lines of the stage's metrics
  python3 - "$runs/tiny_128_$1/metrics.jsonl" "$2" "$timed_steps" <<'PYTHON'
import json, statistics, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
rate = statistics.median(line["steps_per_second"] for line in lines[-3:])
print(int(sys.argv[3]) + int(rate * float(sys.argv[2])))
PYTHON
}

stage() { # STAGE SECONDS FLAGS...: trains a stage; returns 0 if it is done
  local stage=$1 seconds=$2 workdir=$runs/tiny_128_$1 status=0 steps
  shift 2
  [[ -e $workdir/done ]] && return 0
  if [[ -s $workdir/weights.safetensors && ! -d $workdir/checkpoints ]]; then # weights that were brought from another machine
    mv "$workdir/weights.safetensors" "$runs/$stage.start.safetensors"
  fi
  [[ -s $runs/$stage.start.safetensors ]] && set -- "--config.train.init_from=$runs/$stage.start.safetensors"
  if [[ ! -s $workdir/steps ]]; then
    im3d_train "$stage" "$(($(left) - 60))" "$@" --config.train.num_steps="$timed_steps" \
      --config.train.decay_steps=0 || return
    steps_for "$stage" "$seconds" >"$workdir/steps" || return
  fi
  steps=$(<"$workdir/steps")
  echo "$stage: $steps steps"
  im3d_train "$stage" "$(($(left) - 60))" "$@" --config.train.num_steps="$steps" \
    --config.train.decay_steps=$((steps / 4)) || status=$?
  ((status == 0)) && touch "$workdir/done"
  return "$status"
}

bring() { # puts weights and logs into OUT
  for stage in text_to_image turntable; do
    local weights=$runs/tiny_128_$stage/weights.safetensors
    [[ -s $weights ]] && split --bytes=15M "$weights" "$out/$stage.part_"
  done
  tar -czf "$out/train.tar.gz" -C "$runs" --exclude='checkpoints' --exclude='*.safetensors' \
    --exclude='xla_cache' --exclude='gpu' .
}

trap bring EXIT
stage text_to_image "${IMAGE_SECONDS:-200}" || exit
first="--config.train.init_from=$runs/tiny_128_text_to_image/weights.safetensors"
stage turntable "${TURNTABLE_SECONDS:-600}" "$first" || exit
[[ ${EVALUATE:-1} == 0 ]] || timeout "$(left)" python3 -m im3d_jax evaluate --suite procedural --parts views \
  --config=configs/tiny_128.py --config.weights="$runs/tiny_128_turntable/weights.safetensors" \
  --out "$runs/evaluation"
