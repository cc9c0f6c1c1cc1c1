#!/usr/bin/env bash
# fast-simplification 0.2.0: `simplify` of a closed surface, with two triangles at each edge, gives one with edges of four triangles and
# triangles that are there twice, where it brings thin parts together. Nothing says so, and what needs a closed surface (printing, Boolean
# operations, a test for watertightness) refuses the result.
#
# Seen with fast-simplification 0.2.0 and numpy 2.4.6 on Python 3.11: a ring of 288 triangles with 40 and fewer left.
# In this project: `recon_torch.mesh.cleaning` lets manifold3d take such parts apart.
#
# Prints what it saw; fails if the ring that goes in is not closed, or each that comes out is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check fast-simplification==0.2.0 numpy==2.4.6
cd "$folder"
cat > ring.py <<'PY'
import sys

import fast_simplification
import numpy as np

AROUND, ACROSS = 24, 6  # a ring of radius 1 and thickness 0.2


def ring():
    i, j = np.meshgrid(np.arange(AROUND), np.arange(ACROSS), indexing="ij")
    a, b = 2 * np.pi * i / AROUND, 2 * np.pi * j / ACROSS
    radius = 1 + 0.1 * np.cos(b)
    vertices = np.stack([radius * np.cos(a), radius * np.sin(a), 0.1 * np.sin(b)], -1).reshape(-1, 3)
    number = lambda i, j: i % AROUND * ACROSS + j % ACROSS
    quads = np.stack([number(i, j), number(i + 1, j), number(i + 1, j + 1), number(i, j + 1)], -1).reshape(-1, 4)
    return vertices, np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int32)


def look(triangles):
    """How many edges have how many triangles."""
    edges = np.sort(triangles[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), 1)
    triangles_at = np.unique(edges, axis=0, return_counts=True)[1]
    return dict(zip(*(each.tolist() for each in np.unique(triangles_at, return_counts=True)), strict=True))


vertices, triangles = ring()
before = look(triangles)
print(f"{len(triangles)} triangles; edges by their number of triangles: {before}")
after = []
for target in (100, 60, 40, 30, 20):
    _, few = fast_simplification.simplify(vertices, triangles, target_count=target)
    after.append(look(few))
    twice = len(few) - len(np.unique(np.sort(few, 1), axis=0))
    print(f"of which {len(few)} are left: {after[-1]}, {twice} triangles are there twice")
sys.exit(not (set(before) == {2} and any(max(each) > 2 for each in after)))
PY
"$folder/venv/bin/python" ring.py
