#!/usr/bin/env bash
# Measures on one GPU all that this project measures there, the most important first, within a budget of time.
#
#   launch/gpu_wheels.sh; launch/gpu_kernels.sh .wheels/kernels      # before, where there is a network
#   launch/gpu_session.sh SECONDS [PART...]                          # on the GPU machine; default: all parts
#
# Each part has its own time limit and log, and a part that fails does not stop the next. RESULTS (default
# runs/gpu) gets PART.json with the numbers and PART.done, which keeps the part from being done again. After each
# part, OUT (default out/gpu) gets summary.txt, and logs.tar.gz with all results. SMALL=1 tries the same on a CPU.
set -uo pipefail

cd "$(dirname "$0")/.."
budget=${1:?usage: gpu_session.sh SECONDS [PART...]}
shift
parts=("$@")
results=${RESULTS:-runs/gpu}
out=${OUT:-out/gpu}
small=${SMALL:+--small}
site=${SITE:-/tmp/im3d_site}
began=$SECONDS
mkdir -p "$results" "$out"

install() {  # installs the packages that this machine lacks, and gsplat's kernels if they were compiled before
  [[ -d .wheels && ! -d $site ]] || return 0
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" .wheels/*.whl
  [[ -f .wheels/kernels/csrc.so ]] && cp .wheels/kernels/csrc.so "$site/gsplat/"
}

left() { echo $((budget - (SECONDS - began))); }

pack() {
  cp "$results/summary.txt" "$out/"
  tar -czf "$out/logs.tar.gz" -C "$results" --exclude='*.safetensors' --exclude='xla_cache' .
}

part() {  # NAME LIMIT_S COMMAND...
  local name=$1 limit=$2 status=0 started=$SECONDS
  shift 2
  [[ ${#parts[@]} -eq 0 || " ${parts[*]} " == *" $name "* ]] || return 0
  [[ -e $results/$name.done ]] && return 0
  limit=$(($(left) < limit ? $(left) : limit))
  if ((limit < 30)); then
    echo "$name: not begun, no time left" | tee -a "$results/summary.txt"
    return 0
  fi
  timeout --signal=TERM --kill-after=20 "$limit" "$@" >"$results/$name.log" 2>&1 || status=$?
  ((status == 0)) && touch "$results/$name.done"
  echo "$name: exit $status after $((SECONDS - started)) s" | tee -a "$results/summary.txt"
  tail -n 12 "$results/$name.log" | cut -c1-160
  pack
}

install || echo "packages: not installed" | tee -a "$results/summary.txt"
export PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$results/xla_cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=2
export TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=16  # used only if gsplat has to compile

bench() { echo python3 "benchmarks/gpu_$1.py" $small --json "$results/$1.json" "${@:2}"; }
cuda_tests=(
  tests/im3d_jax/test_bridge.py
  tests/im3d_jax/data/test_procedural.py
  tests/recon_torch/raster
  tests/recon_torch/process/test_client.py
  tests/recon_torch/fit/test_optimization.py
)

part machine 120 $(bench machine)
part kernels 420 python3 -c 'import time; t = time.time(); from gsplat.cuda._backend import _C
assert _C, "no kernels"; print(f"gsplat {_C.__file__}: {time.time() - t:.1f} s")'
part tests 240 python3 -m pytest -p no:cacheprovider "${cuda_tests[@]}" -k 'cuda or gsplat_e or on_a_gpu'
part fit 300 $(bench fit)
part pipeline 540 $(bench pipeline)
part call 300 $(bench backbone --only call)
part peer 300 $(bench backbone --only peer)
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92  # the state of training takes most of a GPU
part temporal 300 $(bench backbone --only temporal)
part full 300 $(bench backbone --only full)
pack
echo "--- $((SECONDS - began)) s of $budget"
cat "$results/summary.txt"
