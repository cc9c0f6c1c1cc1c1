#!/usr/bin/env bash
# bpy 4.5.15: a matrix property that is set from a nested list takes each inner list for a column, while mathutils.Matrix, which the same
# property returns, takes it for a row. So `object.matrix_world = [list(row) for row in object.matrix_world]` transposes the matrix, and a
# camera that is set from `array.tolist()` stands elsewhere without an error.
#
# bpy 4.5.15 also asks for numpy<2, so that pip cannot install it beside a package that needs NumPy 2 (`ResolutionImpossible`). With
# `--no-deps` it imports, reads glTF and renders with NumPy 2.4.6; only its audio module fails, with a traceback on stderr.
#
# Seen with bpy 4.5.15 and numpy 2.4.6 on Python 3.11. In this project: `im3d_jax.data.blender.scene` makes a Matrix first, and
# `im3d_jax.data.blender.process` names the installation without dependencies.
#
# Prints what it saw; fails if a nested list and a Matrix set the same matrix, or if bpy does not ask for numpy<2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps bpy==4.5.15 numpy==2.4.6
cd "$folder"
cat > matrices.py <<'PY'
import importlib.metadata
import sys

import bpy
from mathutils import Matrix

bpy.ops.wm.read_factory_settings(use_empty=True)
rows = [[1, 0, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]]
empty = bpy.data.objects.new("empty", None)
found = {}
for kind, value in {"list": rows, "Matrix": Matrix(rows)}.items():
    empty.matrix_parent_inverse = value
    found[kind] = [list(row) for row in empty.matrix_parent_inverse]
    print(f"rows {rows} set as a {kind}: rows {found[kind]}")
wants = [each for each in importlib.metadata.requires("bpy") if each.startswith("numpy")]
print(f"bpy asks for {wants}, and runs with numpy {importlib.metadata.version('numpy')}")
sys.exit(found["list"] == found["Matrix"] or "<2" not in wants[0])
PY
"$folder/venv/bin/python" matrices.py 2> stderr.txt || { tail -5 stderr.txt; exit 1; }
