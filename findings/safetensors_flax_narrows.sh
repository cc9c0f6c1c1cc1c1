#!/usr/bin/env bash
# safetensors 0.8.0 with its Flax reader: int64 and float64 tensors of a valid file come back as int32 and float32, whatever they hold and
# with no error: 2^40 + 1 becomes 1, and 1e300 becomes infinity (for which NumPy warns of an overflow, for the integer nothing does). The
# NumPy reader returns both as they are. float8_e4m3fn, which JAX has as a type and the PyTorch reader reads, ends in an AttributeError in
# the Flax and NumPy readers ("module 'numpy' has no attribute 'float8_e4m3fn'").
#
# Seen with safetensors 0.8.0, jax 0.10.2, flax 0.12.8, numpy 2.4.6 on Python 3.11. In this project: checkpoints are
# never read by the Flax reader; `recon_torch.weights_files` reads every type, fp8 too, and refuses what float32 does not hold.
#
# Prints what it saw; fails if the values or the error change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 ml_dtypes==0.6.0 numpy==2.4.6
cd "$folder"
cat > read.py <<'PY'
import json
import struct
import sys
import warnings

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy

warnings.simplefilter("ignore")


def write(name, dtype, values):
    """A file of one tensor, made by hand after the format's description."""
    data = values.tobytes()
    header = json.dumps({"x": {"dtype": dtype, "shape": list(values.shape), "data_offsets": [0, len(data)]}}).encode()
    open(name, "wb").write(struct.pack("<Q", len(header)) + header + data)
    return name


def read(load, name):
    try:
        tensor = load(name)["x"]
        return str(tensor.dtype), np.asarray(tensor).tolist()
    except Exception as error:
        return type(error).__name__, str(error)


print(f"safetensors {safetensors.__version__}, jax {jax.__version__}, numpy {np.__version__}")
files = {
    "I64": write("i64", "I64", np.array([2**40 + 1])),
    "F64": write("f64", "F64", np.array([1e300, 0.5])),
    "F8_E4M3": write("f8", "F8_E4M3", np.array([1.0, 2.0]).astype(ml_dtypes.float8_e4m3fn)),
}
seen = {}
for dtype, name in files.items():
    for reader, load in (("flax", safetensors.flax.load_file), ("numpy", safetensors.numpy.load_file)):
        seen[dtype, reader] = read(load, name)
        print(dtype, reader, *seen[dtype, reader])
as_seen = (
    seen["I64", "flax"] == ("int32", [1])
    and seen["I64", "numpy"] == ("int64", [2**40 + 1])
    and seen["F64", "flax"] == ("float32", [float("inf"), 0.5])
    and seen["F64", "numpy"] == ("float64", [1e300, 0.5])
    and seen["F8_E4M3", "flax"][0] == seen["F8_E4M3", "numpy"][0] == "AttributeError"
)
sys.exit(not as_seen)
PY
"$folder/venv/bin/python" read.py
