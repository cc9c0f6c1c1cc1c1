#!/usr/bin/env bash
# Trains the 128 px model on a folder of meshes: views, latents of the shipped autoencoder, text to image, turntables.
#
#     launch/train_toys.sh MESHES          # with MESHES/captions.csv and MESHES/split.json
#
# Every step is skipped if its result is there and goes on where it was interrupted, so the same command continues
# after anything. Views and data sets go to data/toys, runs to runs/. FLAGS adds flags to the two stages of
# `im3d train`, such as --config.train.num_steps=20000. VARIANTS (3) and PROCEDURAL (2000) are the numbers of variants
# of each mesh and of procedural objects.
set -euo pipefail

cd "$(dirname "$0")/.."
meshes=${1:?usage: launch/train_toys.sh MESHES}
data=data/toys
im3d=(${PYTHON:-python3} -m im3d_jax)

build() { # NAME FLAGS...: the data set $data/NAME_latents of the views $data/NAME_views
  local out=$data/$1_latents views=$data/$1_views
  shift
  [[ -d $out ]] || "${im3d[@]}" dataset build --views "$views" --out "$out" \
    --latents --config=configs/toys_128.py "$@"
}

"${im3d[@]}" dataset render --meshes "$meshes" --captions "$meshes/captions.csv" --augment "${VARIANTS:-3}" \
  --out "$data/meshes_views" --size 128
"${im3d[@]}" dataset render --procedural "${PROCEDURAL:-2000}" --out "$data/procedural_views" --size 128
build meshes --split-file "$meshes/split.json"
build procedural

# shellcheck disable=SC2086
"${im3d[@]}" train --config=configs/toys_128_text_to_image.py --workdir=runs/toys_128_text_to_image ${FLAGS:-}
# shellcheck disable=SC2086
"${im3d[@]}" train --config=configs/toys_128_turntable.py --workdir=runs/toys_128_turntable ${FLAGS:-}
