"""Damages meshes at random, reads and renders them, and prints how many were read or refused, and how.

    python tests/campaigns/damaged_meshes.py                    # 3,000 files, about a minute on one core
    python tests/campaigns/damaged_meshes.py --number 20000 --seed 1 --only obj glb

It is no test that pytest collects, because what it finds is random. The meshes are small valid ones of every
format that is read. A copy of one has bytes changed, removed, repeated or exchanged, or in its text or JSON a
number or a word replaced by one that is hard to take. `load_mesh` has to read the copy or to raise a
UserError, which `im3d dataset render` counts for --max-skipped; the mesh that it has read has to be
consistent: finite, with indices that exist, and with views that are finite. Whatever else is raised, and
every warning, is a row with a seed that makes it again.

The exit code is 1 if there was any.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.parts import Mesh
from im3d_jax.data.meshes.reading import load_mesh
from recon_torch.errors import UserError
from recon_torch.views.cameras import orbit

CORNERS = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], np.float32)
FACES = np.array([[0, 1, 2], [0, 2, 3], [0, 4, 1], [4, 5, 1]], np.uint16)
HARD = ("0", "-1", "1e400", "1e30", "nan", "-inf", "4294967296", 20 * "9", "1/2/3/4", "x", "", "1.5", "//")
HARD_JSON = (None, True, -1, 0, 1, 7, 1.5, 1e308, 2**31, 2**63, "", "x", [], {}, [[]], [-1], float("nan"))
CAMERAS = orbit(2, 0.3, 16)
LONGEST_S = 10.0  # that a file of this size may take

# ---- Valid files, by their names ----


def make_all(folder: Path) -> dict[str, bytes]:
    Image.new("RGB", (4, 4), (200, 30, 30)).save(folder / "red.png")
    (folder / "look.mtl").write_text("newmtl red\nKd 1 0.5 0\nd 0.5\nmap_Kd -s 2 2 red.png\n")
    document, blob = _document()
    return {
        "a.obj": _obj().encode(),
        "text.ply": _text_ply(),
        "binary.ply": _binary_ply("<"),
        "big.ply": _binary_ply(">"),
        "binary.stl": _binary_stl(),
        "text.stl": _text_stl(),
        "a.glb": _glb(document, blob),
        "a.gltf": json.dumps(_with_uri(document, blob)).encode(),
    }


def _obj() -> str:
    lines = ["mtllib look.mtl", "usemtl red"]
    lines += [f"v {x} {y} {z} 0.5 0.25 1" for x, y, z in CORNERS]
    lines += [f"vt {x} {y}" for x, y, _ in CORNERS] + ["vn 0 0 1"]
    lines += ["f " + " ".join(f"{i + 1}/{i + 1}/1" for i in face) for face in FACES]
    return "\n".join([*lines, "usemtl other", "f -1 -2 -3 -4", "f 1//1 2//1 3//1", "l 1 2", ""])


def _ply_header(form: str) -> bytes:
    vertex = [f"property float {axis}" for axis in "xyz"] + [
        f"property uchar {c}" for c in ("red", "green", "blue")
    ]
    lines = ["ply", f"format {form} 1.0", f"element vertex {len(CORNERS)}", *vertex]
    lines += [f"element face {len(FACES)}", "property list uchar int vertex_indices", "end_header\n"]
    return "\n".join(lines).encode()


def _text_ply() -> bytes:
    rows = [f"{x} {y} {z} 10 200 255" for x, y, z in CORNERS] + [f"3 {a} {b} {c}" for a, b, c in FACES]
    return _ply_header("ascii") + "\n".join(rows).encode()


def _binary_ply(order: str) -> bytes:
    body = b"".join(struct.pack(order + "fff3B", *corner, 10, 200, 255) for corner in CORNERS)
    body += b"".join(struct.pack(order + "B3i", 3, *map(int, face)) for face in FACES)
    return _ply_header("binary_little_endian" if order == "<" else "binary_big_endian") + body


def _binary_stl() -> bytes:
    rows = [struct.pack("<12fH", 0, 0, 1, *CORNERS[face].ravel(), 0) for face in FACES]
    return b"made here".ljust(80) + struct.pack("<I", len(rows)) + b"".join(rows)


def _text_stl() -> bytes:
    facets = [
        "facet normal 0 0 1\nouter loop\n"
        + "".join(f"vertex {x} {y} {z}\n" for x, y, z in CORNERS[face])
        + "endloop\nendfacet\n"
        for face in FACES
    ]
    return ("solid a\n" + "".join(facets) + "endsolid a\n").encode()


def _document() -> tuple[dict[str, Any], bytes]:
    """A glTF document with a material, a texture, a skin, a morph target, sparse data, and instances."""
    blob, views, accessors = b"", [], []

    def add(array: np.ndarray, kind: str, component: int, **more: Any) -> int:
        nonlocal blob
        blob += bytes(-len(blob) % 4)
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": array.nbytes})
        blob += array.tobytes()
        entry = {"bufferView": len(views) - 1, "componentType": component, "count": len(array), "type": kind}
        accessors.append(entry | more)
        return len(accessors) - 1

    count = len(CORNERS)
    indices = add(FACES.ravel(), "SCALAR", 5123)
    attributes = {
        "POSITION": add(CORNERS, "VEC3", 5126),
        "NORMAL": add(np.tile(np.float32([0, 0, 1]), (count, 1)), "VEC3", 5126),
        "TEXCOORD_0": add(CORNERS[:, :2], "VEC2", 5126),
        "COLOR_0": add(np.full((count, 4), 200, np.uint8), "VEC4", 5121, normalized=True),
        "JOINTS_0": add(np.zeros((count, 4), np.uint8), "VEC4", 5121),
        "WEIGHTS_0": add(np.tile(np.float32([1, 0, 0, 0]), (count, 1)), "VEC4", 5126),
    }
    target = add(0.1 * CORNERS, "VEC3", 5126)
    rows, values = add(np.uint16([1, 3]), "SCALAR", 5123), add(CORNERS[:2], "VEC3", 5126)
    accessors[target]["sparse"] = {
        "count": 2,
        "indices": {"bufferView": rows, "componentType": 5123},
        "values": {"bufferView": values},
    }
    matrices = add(np.eye(4, dtype=np.float32)[None], "MAT4", 5126)
    shifts = add(CORNERS[:2], "VEC3", 5126)
    plain = {name: attributes[name] for name in ("POSITION", "NORMAL", "TEXCOORD_0", "COLOR_0")}
    instancing = {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": shifts}}}
    material = {
        "pbrMetallicRoughness": {
            "baseColorFactor": [1, 0.5, 0, 1],
            "baseColorTexture": {
                "index": 0,
                "extensions": {"KHR_texture_transform": {"scale": [2, 2], "rotation": 0.5}},
            },
        },
        "emissiveFactor": [0.1, 0, 0],
        "alphaMode": "MASK",
    }
    document = {
        "asset": {"version": "2.0"},
        "extensionsUsed": ["EXT_mesh_gpu_instancing", "KHR_texture_transform"],
        "scene": 0,
        "scenes": [{"nodes": [0, 1]}],
        "nodes": [
            {"mesh": 0, "skin": 0, "children": [2]},
            {"mesh": 1, "extensions": instancing, "rotation": [0, 0, 0, 1], "scale": [1, 2, 1]},
            {"translation": [0, 0, 1]},
        ],
        "skins": [{"joints": [2], "inverseBindMatrices": matrices}],
        "meshes": [
            {
                "primitives": [
                    {
                        "attributes": attributes,
                        "indices": indices,
                        "targets": [{"POSITION": target}],
                        "material": 0,
                    }
                ],
                "weights": [0.5],
            },
            {"primitives": [{"attributes": plain, "indices": indices, "mode": 5, "material": 0}]},
        ],
        "materials": [material],
        "textures": [{"source": 0, "sampler": 0}],
        "samplers": [{"wrapS": 33071}],
        "images": [{"uri": "red.png"}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(blob)}],
    }
    return document, blob


def _glb(document: Any, blob: bytes) -> bytes:
    text = json.dumps(document).encode()
    text, blob = text + b" " * (-len(text) % 4), blob + bytes(-len(blob) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(blob), b"BIN\0") + blob
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


def _with_uri(document: dict[str, Any], blob: bytes) -> dict[str, Any]:
    uri = "data:application/octet-stream;base64," + base64.b64encode(blob).decode()
    return {**document, "buffers": [{"byteLength": len(blob), "uri": uri}]}


# ---- Damage ----


def damaged(name: str, content: bytes, chance: random.Random) -> bytes:
    """The content with one to three kinds of damage."""
    is_json = name.endswith((".gltf", ".glb"))
    kinds: list[Callable[[bytes, random.Random], bytes]] = [
        _bytes_changed,
        _cut,
        _stretch_moved,
        _word_replaced,
    ]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if is_json and chance.random() < 0.6:
            content = _json_changed(content, chance)
        else:
            content = chance.choice(kinds)(content, chance)
    return content


def _bytes_changed(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 2, 8, 64))):
        if changed:
            changed[chance.randrange(len(changed))] = chance.choice(
                (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
            )
    return bytes(changed)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _stretch_moved(content: bytes, chance: random.Random) -> bytes:
    """A stretch of it is left out, or stands twice, or elsewhere as well."""
    start = chance.randrange(len(content) + 1)
    end = min(len(content), start + chance.choice((1, 4, 40)))
    to = chance.choice((start, chance.randrange(len(content) + 1)))
    without = content[:start] + content[end:]
    return chance.choice((without, content[:to] + content[start:end] + content[to:]))


def _word_replaced(content: bytes, chance: random.Random) -> bytes:
    words = list(re.finditer(rb"[^\s/,\[\]{}\":]+", content))
    if not words:
        return content
    word = chance.choice(words)
    return content[: word.start()] + chance.choice(HARD).encode() + content[word.end() :]


def _json_changed(content: bytes, chance: random.Random) -> bytes:
    """A glTF document with one entry replaced, removed or exchanged; as it is where that is broken."""
    try:
        if content[:4] == b"glTF":
            (size,) = struct.unpack_from("<I", content, 12)
            document, blob = json.loads(content[20 : 20 + size]), content[28 + size :]
            return _glb(_changed(document, chance), blob)
        return json.dumps(_changed(json.loads(content), chance)).encode()
    except (ValueError, struct.error, RecursionError):
        return content


def _changed(document: Any, chance: random.Random) -> Any:
    places = list(_places(document))
    if not places:
        return document
    holder, key = chance.choice(places)
    if chance.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    elif chance.random() < 0.2:
        other, other_key = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[other_key]))
    else:
        holder[key] = chance.choice(HARD_JSON)
    return document


def _places(value: Any) -> Any:
    """(holder, key) of everything in a document."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, each in entries:
        yield value, key
        yield from _places(each)


# ---- The campaign ----


def inconsistency(mesh: Mesh) -> str:
    """What is wrong with a mesh that was read; "" if nothing is."""
    count = len(mesh.corners)
    arrays = {name: getattr(mesh, name) for name in ("corners", "normals", "colors", "uvs", "emission_uvs")}
    for name, array in arrays.items():
        if len(array) != count or not np.isfinite(array).all():
            return f"{name} are not finite, or not of {count} triangles"
    if np.linalg.norm(mesh.corners, axis=-1).max() > 0.5001:
        return "corners lie outside the ball"
    numbers = [(mesh.material_index, len(mesh.materials))]
    for material in mesh.materials:
        textures = np.array([material.texture, material.emission_texture])
        numbers.append(
            (np.maximum(textures, 0) if len(mesh.textures) else textures + 1, max(len(mesh.textures), 1))
        )
        if not np.isfinite([material.alpha_cutoff, *material.emission]).all():
            return "a material is not finite"
    return next(
        ("an index does not exist" for each, end in numbers if each.min() < 0 or each.max() >= end), ""
    )


def _not_rendered(mesh: Mesh) -> str:
    rgba, _ = mesh_rendering.render(mesh, CAMERAS)
    return "" if np.isfinite(rgba).all() else "its views are not finite"


def outcome(path: Path) -> tuple[str, str]:
    """(how the reading of a file ended, what to know about it)."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            mesh = load_mesh(path)
            problem = inconsistency(mesh) or _not_rendered(mesh)
        problem = problem or (f"warning: {warned[0].message}" if warned else "")
    except UserError as error:
        why = "refused, as its reader broke" if "it is broken (" in str(error) else "refused"
        many_lines = "\n" in str(error) or len(str(error)) > 600
        return ("FAULT", f"a message of {len(str(error))} characters") if many_lines else (why, str(error))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "FAULT", f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}: {error}"
    if (seconds := time.perf_counter() - started) > LONGEST_S:
        problem = problem or f"took {seconds:.0f} s"
    return ("FAULT", problem) if problem else ("read", "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=3000, help="of files (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first file; the others count up")
    parser.add_argument("--only", nargs="+", default=[], metavar="SUFFIX", help="formats, such as obj")
    parser.add_argument("--why", action="store_true", help="count how readers broke")
    flags = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    faults, broken = [], Counter()
    with tempfile.TemporaryDirectory() as folder:
        valid = make_all(Path(folder))
        names = [name for name in valid if not flags.only or name.rpartition(".")[2] in flags.only]
        for name in names:
            (Path(folder) / name).write_bytes(valid[name])
            assert outcome(Path(folder) / name)[0] == "read", (name, outcome(Path(folder) / name))
        for seed in range(flags.seed, flags.seed + flags.number):
            name, chance = names[seed % len(names)], random.Random(seed)
            path = Path(folder) / name
            path.write_bytes(damaged(name, valid[name], chance))
            how, told = outcome(path)
            counts.setdefault(name, Counter())[how] += 1
            if how == "FAULT":
                faults.append(f"seed {seed}, {name}: {told[:200]}")
            elif "broke" in how:
                broken[re.sub(r"\d+", "N", told.partition("it is broken (")[2])[:90]] += 1
    columns = ("read", "refused", "refused, as its reader broke", "FAULT")
    print(f"{'file':<12}" + "".join(f"{column:>30}" for column in columns))
    for name, counted in counts.items():
        print(f"{name:<12}" + "".join(f"{counted[column]:>30}" for column in columns))
    if flags.why:
        print(*(f"{count:5} {why}" for why, count in broken.most_common(40)), sep="\n")
    print(*faults[:60], sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
