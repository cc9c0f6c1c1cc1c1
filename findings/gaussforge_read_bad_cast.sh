#!/usr/bin/env bash
# gaussforge 0.6.0: `GaussForge().read(data, format)`, the first call of its own example, answers {"error": "std::bad_cast"} for every file,
# also for one that it has just written itself, while `convert` and `get_model_info` take the same bytes. There is no exception, so a
# caller who looks for the key "data" gets a KeyError, and one who looks for "error" takes a good file for a damaged one.
#
# Seen with gaussforge 0.6.0 on Python 3.11, with and without numpy 2.4.6 installed: in each of its six formats.
# In this project: `recon_torch.formats.conversion` uses `convert` alone, to and from the .ply of 3DGS.
#
# Prints what it saw; fails if `read` works for a format, or `convert` does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gaussforge==0.6.0
cd "$folder"
cat > read.py <<'PY'
import struct
import sys

import gaussforge

NAMES = "x y z f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
header = ["ply", "format binary_little_endian 1.0", "element vertex 3"]
header += [f"property float {name}" for name in NAMES] + ["end_header\n"]
rows = [(n, 10 * n, 100 * n, 0, 0, 0, 1, -4, -4, -4, 1, 0, 0, 0) for n in (1, 2, 3)]
ply = "\n".join(header).encode() + b"".join(struct.pack("<14f", *row) for row in rows)

converter = gaussforge.GaussForge()
kinds = converter.get_supported_formats()
answers = {kind: converter.read(converter.convert(ply, "ply", kind)["data"], kind) for kind in kinds}
for kind, answer in answers.items():
    print(f"read(.{kind}): {answer.get('error', 'it works')}")
num = converter.get_model_info(ply, "ply")["data"]["basic"]["numPoints"]
print(f"get_model_info: {num} Gaussians")
sys.exit(not (all("error" in each for each in answers.values()) and num == 3))
PY
"$folder/venv/bin/python" read.py
