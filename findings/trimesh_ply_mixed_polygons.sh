#!/usr/bin/env bash
# trimesh 5.2.0 refuses binary .ply files whose faces differ in their number of corners, such as triangles beside quads, which is what
# the format's lists are for and what modelling programs write. The text form of the same mesh is read. (`ValueError: PLY is unexpected
# length!` sounds like a file that was cut off.)
#
# Seen with trimesh 5.2.0 and numpy 2.4.6 on Python 3.11. In this project: `im3d_jax.data.meshes.ply` reads such files.
#
# Prints what it saw; fails if the binary file is read, or the text one not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check trimesh==5.2.0 numpy==2.4.6
cd "$folder"
cat > faces.py <<'PY'
import io
import struct
import sys

import trimesh

vertices = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0.5, 2, 0)]
faces = [(0, 1, 2, 3), (2, 4, 3)]


def header(form):
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    lists = "property list uchar int vertex_indices\n"
    elements = f"element vertex {len(vertices)}\n{properties}element face {len(faces)}\n{lists}"
    return f"ply\nformat {form} 1.0\n{elements}end_header\n".encode()


rows = [*vertices, *((len(face), *face) for face in faces)]
text = header("ascii") + "".join(" ".join(map(str, row)) + "\n" for row in rows).encode()
binary = header("binary_little_endian") + b"".join(struct.pack("<3f", *vertex) for vertex in vertices)
binary += b"".join(struct.pack(f"<B{len(face)}i", len(face), *face) for face in faces)


def read(content):
    try:
        return f"{len(trimesh.load(io.BytesIO(content), file_type='ply').faces)} triangles"
    except ValueError as error:
        return f"ValueError: {error}"


found = {"text": read(text), "binary": read(binary)}
for form, result in found.items():
    print(f"a quad and a triangle, {form}: {result}")
sys.exit(not (found["text"] == "3 triangles" and found["binary"].startswith("ValueError")))
PY
"$folder/venv/bin/python" faces.py
