#!/usr/bin/env bash
# Compiles gsplat's CUDA kernels on a machine with a compiler and no GPU, so that no GPU time is spent on it.
#
#   launch/gpu_kernels.sh OUT_DIR      # makes OUT_DIR/csrc.so, which belongs beside gsplat's __init__.py
#
# It needs CUDA 13 (CUDA_HOME), g++, python3.12 with its headers, and 2 GB of disk under SCRATCH for the headers and
# libraries of the torch version that the GPU machine has. The libraries are linked against and never loaded, so
# this machine needs no CUDA driver. A run that was stopped continues where it was.
set -euo pipefail

out=$(mkdir -p "${1:?usage: gpu_kernels.sh OUT_DIR}" && cd "$1" && pwd)
scratch=${SCRATCH:-/tmp/gpu_kernels}
python=${PYTHON:-python3.12}
torch=${TORCH:-2.11.0}
gsplat=${GSPLAT:-1.5.3}
arch=${ARCH:-90}
jobs=${JOBS:-$(nproc)}
cuda=${CUDA_HOME:-/usr/local/cuda}

mkdir -p "$scratch/wheels" "$scratch/objects" && cd "$scratch"
download=("$python" -m pip download --quiet --no-deps --dest wheels)
test -d torch/include || {
    ls wheels/torch-*.whl > /dev/null 2>&1 || "${download[@]}" --only-binary=:all: "torch==$torch"
    unzip -q -o wheels/torch-*.whl 'torch/include/*' 'torch/lib/libc10*' 'torch/lib/libtorch*'
}
test -d gsplat || {
    ls wheels/gsplat-*.whl > /dev/null 2>&1 || "${download[@]}" --only-binary=:all: "gsplat==$gsplat"
    unzip -q -o wheels/gsplat-*.whl 'gsplat/*'
}

# The flags of torch.utils.cpp_extension and of gsplat's own build.
include=(-Igsplat/cuda/include -Igsplat/cuda/csrc/third_party/glm
    -isystem torch/include -isystem torch/include/torch/csrc/api/include -isystem "$cuda/include"
    -isystem "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')")
common=(-O3 -std=c++17 -DTORCH_EXTENSION_NAME=csrc -DTORCH_API_INCLUDE_EXTENSION_H -c)
host=(g++ -fPIC -Wno-attributes "${common[@]}")
device=("$cuda/bin/nvcc" "-gencode=arch=compute_$arch,code=sm_$arch" -use_fast_math --expt-relaxed-constexpr -diag-suppress 20012
    -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__
    -D__CUDA_NO_HALF2_OPERATORS__ --compiler-options -fPIC "${common[@]}")

for source in gsplat/cuda/csrc/*.cu gsplat/cuda/csrc/*.cpp gsplat/cuda/ext.cpp; do
    object=objects/$(basename "$source").o
    test -s "$object" && continue
    case $source in
        *.cu) compile=("${device[@]}") ;;
        *) compile=("${host[@]}") ;;
    esac
    printf '%q ' "${compile[@]}" "${include[@]}" "$source" -o "$object.part"
    printf '&& mv %q %q && echo compiled %q\0' "$object.part" "$object" "$source"
done | xargs --null --no-run-if-empty --max-procs="$jobs" -I{} nice -n 5 bash -c '{}'

g++ -shared -o "$out/csrc.so" objects/*.o -Ltorch/lib -lc10 -lc10_cuda -ltorch -ltorch_cpu -ltorch_cuda \
    -ltorch_python -L"$cuda/lib64" -lcudart
ls -l "$out/csrc.so"
