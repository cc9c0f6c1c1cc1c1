#!/usr/bin/env bash
# Collects, as wheels for Python 3.12, the packages that a GPU machine without a network lacks.
#
#   launch/gpu_wheels.sh [OUT_DIR]     # default: .wheels
#
# That machine already has jax, flax, optax, orbax, torch, torchvision, transformers and numba, built for its CUDA.
# These are not collected, and neither are dependencies. tensorflow-datasets, trimesh and embreex are left out
# because nothing that runs there needs them.
set -euo pipefail

out=${1:-.wheels}
python=${PYTHON:-python3.12}
packages=(gsplat==1.5.3 lpips==0.1.4 clu==0.0.12 ml_collections==1.1.0 grain==0.2.18 array_record==0.8.6
  diffusers==0.42.1 importlib_metadata portpicker pytorch-msssim==1.0.0)

platforms=()
for glibc in 2_28 2_27 2_17; do
  platforms+=(--platform "manylinux_${glibc}_x86_64")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$out" "${packages[@]}"
# The published wheel contains 29 MB of ffmpeg, which only videos need. A wheel built from source does not.
"$python" -m pip wheel --quiet --no-deps --no-binary=:all: --wheel-dir "$out" imageio-ffmpeg==0.6.0
du -ch "$out"/*.whl
