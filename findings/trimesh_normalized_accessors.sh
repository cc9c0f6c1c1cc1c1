#!/usr/bin/env bash
# trimesh 5.2.0 does not apply `normalized` to accessors of glTF files (glTF 2.0, Sec. 3.6.2.2): texture coordinates that are stored
# as normalised 16-bit integers, as KHR_mesh_quantization and gltfpack write them, arrive as numbers up to 65535, so that a texture
# becomes noise. Linear vertex colours (COLOR_0) arrive as 8-bit numbers in `vertex_colors`, whose colours are sRGB elsewhere (in .ply
# files, in `visual.main_color`), without the curve between the two, so that they look too dark. Neither gives a warning.
#
# Seen with trimesh 5.2.0 and numpy 2.4.6 on Python 3.11: coordinates of 1.0 become 65535.0; linear 0.5 becomes 127 or 128, and not
# 188. In this project: `im3d_jax.data.meshes` reads glTF files on its own.
#
# Prints what it saw; fails if the coordinates have become 1.0, or the colour another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check trimesh==5.2.0 numpy==2.4.6 pillow==13.0.0
cd "$folder"
cat > accessors.py <<'PY'
import io
import json
import struct
import sys

import numpy as np
import trimesh

positions = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4")
coordinates = np.array([[0, 0], [65535, 0], [0, 65535]], "<u2")
colors = np.full((3, 3), 0.5, "<f4")


def read(name, array, **accessor):
    """The mesh of a .glb file with a triangle that has one more attribute."""
    blob = positions.tobytes() + array.tobytes()
    views = [{"buffer": 0, "byteLength": 36}, {"buffer": 0, "byteOffset": 36, "byteLength": array.nbytes}]
    extremes = {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    position = {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3", **extremes}
    primitive = {"attributes": {"POSITION": 0, name: 1}}
    document = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "buffers": [{"byteLength": len(blob)}],
        "bufferViews": views,
        "accessors": [position, {"bufferView": 1, "count": 3, **accessor}],
        "meshes": [{"primitives": [primitive]}],
    }
    if name == "TEXCOORD_0":
        document["materials"], primitive["material"] = [{}], 0
        document["extensionsUsed"] = document["extensionsRequired"] = ["KHR_mesh_quantization"]
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(blob), b"BIN\0") + blob
    content = b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks
    (geometry,) = trimesh.load_scene(io.BytesIO(content), file_type="glb").geometry.values()
    return geometry


uv = read("TEXCOORD_0", coordinates, componentType=5123, type="VEC2", normalized=True).visual.uv
color = read("COLOR_0", colors, componentType=5126, type="VEC3").visual.vertex_colors
print(f"normalised coordinates up to 1 were read as numbers up to {uv.max()}")
print(f"linear 0.5, which is 188 in sRGB, was read as {color[0, 0]}")
sys.exit(not (uv.max() == 65535 and color[0, 0] in (127, 128)))
PY
"$folder/venv/bin/python" accessors.py
