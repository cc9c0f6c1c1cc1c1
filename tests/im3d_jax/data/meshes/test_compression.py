"""Draco and meshoptimizer files, which the wheels' own encoders wrote, against what was encoded."""

import sys

import numpy as np
import pytest

from im3d_jax.data.meshes import compression
from im3d_jax.data.meshes.gltf import read_gltf
from im3d_jax.data.meshes.reading import load_mesh

DracoPy = pytest.importorskip("DracoPy")
meshoptimizer = pytest.importorskip("meshoptimizer")

SIDE = 12
GRID = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1).reshape(-1, 2).astype(np.float32) / (
    SIDE - 1
)
POSITIONS = np.concatenate([GRID, np.sin(5 * GRID[:, :1])], 1).astype(np.float32)
COLORS = np.concatenate([np.round(GRID * 255), np.full((len(GRID), 1), 90)], 1).astype(np.uint8)
START = (np.arange(SIDE - 1)[:, None] * SIDE + np.arange(SIDE - 1)).reshape(-1, 1)
FACES = np.concatenate([START + [0, 1, SIDE], START + [1, SIDE + 1, SIDE]]).astype(np.uint32)


def sorted_triangles(*arrays):
    """Triangles with attributes, in an order that does not depend on the file's."""
    rows = np.concatenate([array.reshape(len(array), 3, -1) for array in arrays], -1)
    start = np.lexsort(np.moveaxis(np.round(rows, 2), -1, 0)[::-1], axis=1)[:, 0]
    turned = np.stack([np.roll(row, -first, 0) for row, first in zip(rows, start, strict=True)])
    flat = turned.reshape(len(rows), -1)
    return flat[np.lexsort(np.round(flat, 2).T[::-1])]


# ---- Draco ----


def draco_file(gltf, **more):
    content = DracoPy.encode(
        POSITIONS,
        FACES,
        quantization_bits=16,
        preserve_order=False,
        colors=COLORS,
        tex_coord=GRID.astype(np.float64),
    )
    kinds = {0: "POSITION", 2: "COLOR_0", 3: "TEXCOORD_0"}
    found = DracoPy.decode(content).attributes
    numbers = {kinds[each["attribute_type"]]: each["unique_id"] for each in found}
    count = len(GRID)
    places = {
        "POSITION": gltf.add("accessors", componentType=5126, count=count, type="VEC3"),
        "COLOR_0": gltf.add("accessors", componentType=5121, count=count, type="VEC3", normalized=True),
        "TEXCOORD_0": gltf.add("accessors", componentType=5126, count=count, type="VEC2"),
    }
    extension = {"bufferView": gltf.view(content), "attributes": numbers}
    texture = gltf.texture(np.full((2, 2, 3), 255))
    material = gltf.add("materials", pbrMetallicRoughness={"baseColorTexture": {"index": texture}})
    indices = gltf.add("accessors", componentType=5125, count=FACES.size, type="SCALAR")
    primitive = {
        "attributes": places,
        "indices": indices,
        "material": material,
        "extensions": {"KHR_draco_mesh_compression": extension},
        **more,
    }
    gltf.add("nodes", mesh=gltf.add("meshes", primitives=[primitive]))
    gltf.json["extensionsRequired"] = ["KHR_draco_mesh_compression"]


def test_draco(gltf, tmp_path):
    draco_file(gltf)
    (part,) = read_gltf(gltf.glb(tmp_path / "a.glb")).parts
    found = sorted_triangles(part.corners, part.uvs, part.colors[..., :3])
    expected = sorted_triangles(POSITIONS[FACES], GRID[FACES], COLORS[FACES] / 255)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_broken_draco_is_one_line(gltf, tmp_path, user_error):
    draco_file(gltf)
    gltf.json["bufferViews"][0]["byteLength"] = 20
    with user_error("a.glb: its KHR_draco_mesh_compression data cannot be decoded"):
        load_mesh(gltf.glb(tmp_path / "a.glb"))


def test_without_the_wheels_files_are_refused(gltf, tmp_path, user_error, monkeypatch):
    monkeypatch.setitem(sys.modules, "DracoPy", None)
    draco_file(gltf)
    with user_error(r"it needs KHR_draco_mesh_compression: pip install 'im3d\[meshes\]'"):
        load_mesh(gltf.glb(tmp_path / "a.glb"))


def test_without_the_wheel_a_plain_copy_is_read(gltf, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "DracoPy", None)
    position, indices = gltf.array(POSITIONS), gltf.array(FACES.reshape(-1))
    extension = {"bufferView": gltf.view(b"?"), "attributes": {"POSITION": 0}}
    primitive = {
        "attributes": {"POSITION": position},
        "indices": indices,
        "extensions": {"KHR_draco_mesh_compression": extension},
    }
    gltf.add("nodes", mesh=gltf.add("meshes", primitives=[primitive]))
    (part,) = read_gltf(gltf.glb(tmp_path / "a.glb")).parts
    np.testing.assert_array_equal(part.corners, POSITIONS[FACES])


# ---- meshoptimizer ----


def compressed(gltf, content, name, count, stride, mode, **more):
    """A view in a buffer that has no data, with its compressed content in the file's own."""
    place = {"byteOffset": len(gltf.blob), "byteLength": len(content)}
    gltf.blob += content + bytes(-len(content) % 4)
    extension = {"buffer": 0, **place, "byteStride": stride, "count": count, "mode": mode, **more}
    return gltf.add("bufferViews", buffer=1, byteLength=stride * count, extensions={name: extension})


def meshopt_file(gltf, name, index_type, mode):
    gltf.json["buffers"] = [{"byteLength": 10**6, "extensions": {name: {"fallback": True}}}]
    encode = {
        "TRIANGLES": meshoptimizer.encode_index_buffer,
        "INDICES": meshoptimizer.encode_index_sequence,
    }[mode]
    vertices = compressed(
        gltf, meshoptimizer.encode_vertex_buffer(POSITIONS), name, len(POSITIONS), 12, "ATTRIBUTES"
    )
    stride = np.dtype(index_type).itemsize
    indices = compressed(gltf, encode(FACES.reshape(-1)), name, FACES.size, stride, mode)
    position = gltf.add(
        "accessors", bufferView=vertices, componentType=5126, count=len(POSITIONS), type="VEC3"
    )
    kind = {2: 5123, 4: 5125}[stride]
    places = gltf.add("accessors", bufferView=indices, componentType=kind, count=FACES.size, type="SCALAR")
    primitive = {"attributes": {"POSITION": position}, "indices": places}
    gltf.add("nodes", mesh=gltf.add("meshes", primitives=[primitive]))
    gltf.json["extensionsRequired"] = [name]


@pytest.mark.parametrize("index_type", ["u2", "u4"])
@pytest.mark.parametrize("mode", ["TRIANGLES", "INDICES"])
@pytest.mark.parametrize("version, name", [(0, "EXT_meshopt_compression"), (1, "KHR_meshopt_compression")])
def test_meshopt(index_type, mode, version, name, gltf, tmp_path):
    meshoptimizer.encode_vertex_version(version)
    meshopt_file(gltf, name, index_type, mode)
    (part,) = read_gltf(gltf.glb(tmp_path / "a.glb")).parts
    np.testing.assert_array_equal(
        sorted_triangles(part.corners), sorted_triangles(POSITIONS[FACES].astype(float))
    )


def test_meshopt_without_the_wheel(gltf, tmp_path, user_error, monkeypatch):
    name = "EXT_meshopt_compression"
    meshopt_file(gltf, name, "u2", "TRIANGLES")
    monkeypatch.setitem(sys.modules, "meshoptimizer", None)
    with user_error(rf"it needs {name}: pip install 'im3d\[meshes\]'"):
        load_mesh(gltf.glb(tmp_path / "a.glb"))


def decoded(values, filter):
    """What is left of stored rows after the codec and a filter."""
    rows = np.ascontiguousarray(values)
    stride = rows.itemsize * rows.shape[1]
    extension = {"count": len(rows), "byteStride": stride, "mode": "ATTRIBUTES", "filter": filter}
    content = meshoptimizer.encode_vertex_buffer(rows)
    return compression.decode_meshopt(content, extension, "KHR_meshopt_compression")


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_octahedral_filter(dtype):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    flat = vectors / np.abs(vectors).sum(1, keepdims=True)
    folded = (1 - np.abs(flat[:, [1, 0]])) * np.where(flat[:, :2] >= 0, 1, -1)
    plane = np.where(flat[:, 2:] >= 0, flat[:, :2], folded)
    one = np.iinfo(dtype).max
    stored = np.concatenate([np.round(plane * one), np.full((100, 1), one), np.zeros((100, 1))], 1).astype(
        dtype
    )
    found = decoded(stored, "OCTAHEDRAL").view(dtype).reshape(100, 4)[:, :3] / one
    np.testing.assert_allclose(found, vectors, atol=2.5 / one)


def test_exponential_and_quaternion_filters():
    mantissa, exponent = np.array([[5, -7, 1000, 3]]), np.array([[-3, 2, 0, -20]])
    stored = ((exponent << 24) | (mantissa & 0xFFFFFF)).astype(np.uint32)
    found = decoded(stored, "EXPONENTIAL").view(np.float32)
    np.testing.assert_array_equal(found, (mantissa * 2.0**exponent)[0])
    x, y, z = 0.1, -0.3, 0.5  # and the largest component, w, is left out: it has number 3
    stored = np.round(np.array([[x, y, z]]) * np.sqrt(2) * 32767)
    stored = np.concatenate([stored, [[32767 & ~3 | 3]]], 1).astype(np.int16)
    found = decoded(stored, "QUATERNION").view(np.int16) / 32767
    np.testing.assert_allclose(found, [x, y, z, np.sqrt(1 - x * x - y * y - z * z)], atol=1e-4)


@pytest.mark.parametrize("dtype, bits", [(np.uint8, 8), (np.uint16, 16), (np.uint16, 10)])
def test_color_filter(dtype, bits):
    """Encoded here as KHR_meshopt_compression says: luma, two differences, alpha with a bit on top."""
    largest = 2**bits - 1
    rng = np.random.default_rng(0)
    rgba = rng.uniform(size=(50, 4))
    red, green, blue = np.round(rgba[:, :3].T * largest).astype(int)
    orange, green_part = (red - blue) / 2, (2 * green - red - blue) / 4
    luma = (red + 2 * green + blue) / 4
    alpha = np.round(rgba[:, 3] * (largest >> 1)).astype(int) | 1 << (bits - 1)
    stored = np.stack([np.round(luma), np.round(orange), np.round(green_part), alpha], -1).astype(int)
    found = decoded(stored.astype(dtype), "COLOR").view(dtype).reshape(50, 4) / np.iinfo(dtype).max
    np.testing.assert_allclose(found, rgba, atol=3 / largest)


def test_broken_meshopt_is_one_line(gltf, tmp_path, user_error):
    meshopt_file(gltf, "EXT_meshopt_compression", "u2", "TRIANGLES")
    gltf.json["bufferViews"][1]["extensions"]["EXT_meshopt_compression"]["mode"] = "NEW"
    with user_error("its EXT_meshopt_compression data cannot be decoded"):
        load_mesh(gltf.glb(tmp_path / "a.glb"))
