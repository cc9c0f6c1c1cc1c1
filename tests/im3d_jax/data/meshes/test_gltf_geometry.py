"""Positions of glTF files against transforms that are computed by hand, in float64."""

import json
import struct

import numpy as np
import pytest

from im3d_jax.data.meshes.gltf import read_gltf
from im3d_jax.data.meshes.reading import load_mesh

TETRAHEDRON = np.array([[0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 3]], np.float32)
FACES = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]], np.uint16)


def tetrahedron(gltf, position=None, indices=None, mesh=None, primitive=None, **attributes):
    """A mesh with the tetrahedron; position: another accessor of its vertices."""
    attributes = {"POSITION": gltf.array(TETRAHEDRON) if position is None else position, **attributes}
    indices = gltf.array(FACES.reshape(-1)) if indices is None else indices
    entry = {"attributes": attributes, "indices": indices, **(primitive or {})}
    return gltf.add("meshes", primitives=[entry], **(mesh or {}))


def corners(path):
    """All corners in the frame of the file."""
    return np.concatenate([part.corners for part in read_gltf(path).parts])


def rotation(axis, angle):
    """Rodrigues' formula."""
    x, y, z = axis = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def quaternion(axis, angle):
    axis = np.asarray(axis) / np.linalg.norm(axis)
    return [*(axis * np.sin(angle / 2)).tolist(), float(np.cos(angle / 2))]


def is_outward(path):
    """Whether the triangles and the normals of a convex mesh look away from its centre."""
    mesh = load_mesh(path)
    centre = mesh.corners.reshape(-1, 3).mean(0)
    flat = np.cross(mesh.corners[:, 1] - mesh.corners[:, 0], mesh.corners[:, 2] - mesh.corners[:, 0])
    outward = mesh.corners.mean(1) - centre
    return (flat * outward).sum(-1).min() > 0 and (mesh.normals * outward[:, None]).sum(-1).min() > 0


@pytest.mark.parametrize("scale", [[2, 3, 0.5], [-2, 3, 0.5], [0.5, -1, -1]])
@pytest.mark.parametrize("with_normals", [False, True])
def test_nodes_within_nodes(scale, with_normals, gltf, tmp_path):
    more = {"NORMAL": gltf.array(TETRAHEDRON - TETRAHEDRON.mean(0))} if with_normals else {}
    turn = {"rotation": quaternion([1, 2, 3], 0.9), "translation": [3, 4, 5], "scale": scale}
    child = gltf.add("nodes", mesh=tetrahedron(gltf, **more), **turn)
    shear = np.array([[1, 0.5, 0, 7], [0, 1, 0, 8], [0.2, 0, 1, 9], [0, 0, 0, 1]])
    parent = gltf.add("nodes", matrix=shear.T.reshape(-1).tolist(), children=[child])
    gltf.add("scenes", nodes=[parent])
    inner = TETRAHEDRON * np.array(scale) @ rotation([1, 2, 3], 0.9).T + [3, 4, 5]
    expected = (inner @ shear[:3, :3].T + shear[:3, 3])[FACES]
    found = corners(gltf.glb(tmp_path / "a.glb"))
    np.testing.assert_allclose(np.sort(found, 1), np.sort(expected, 1), atol=1e-6)
    assert is_outward(tmp_path / "a.glb")


def test_a_skin_takes_its_joints_and_not_the_node(gltf, tmp_path):
    weights = np.array([[1, 0], [0.25, 0.75], [0, 2], [0.5, 0.5]], np.float32)  # the third sums to 2
    joints = np.array([[0, 1, 0, 0]] * 4, np.uint8)
    inverse = np.stack([np.eye(4), np.eye(4)])
    inverse[1, :3, 3] = [0, -1, 0]
    skinned = tetrahedron(
        gltf,
        JOINTS_0=gltf.array(joints),
        WEIGHTS_0=gltf.array(np.pad(weights, ((0, 0), (0, 2)))),
        NORMAL=gltf.array(TETRAHEDRON - TETRAHEDRON.mean(0)),
    )
    joint = gltf.add("nodes", rotation=quaternion([0, 0, 1], 0.3), translation=[1, 0, 0])
    root = gltf.add("nodes", scale=[2, 2, 2], children=[joint])
    bind = gltf.array(inverse.transpose(0, 2, 1).reshape(2, 16), np.float32)
    skin = gltf.add("skins", joints=[root, joint], inverseBindMatrices=bind)
    node = gltf.add("nodes", mesh=skinned, skin=skin, translation=[100, 0, 0], scale=[1, 1, 9])
    gltf.add("scenes", nodes=[root, node])
    points = TETRAHEDRON.astype(np.float64)
    by_root = 2 * points
    by_joint = 2 * ((points - [0, 1, 0]) @ rotation([0, 0, 1], 0.3).T + [1, 0, 0])
    share = np.array([[1, 0], [0.25, 0.75], [0, 1], [0.5, 0.5]])
    expected = share[:, :1] * by_root + share[:, 1:] * by_joint
    np.testing.assert_allclose(corners(gltf.glb(tmp_path / "a.glb")), expected[FACES], atol=1e-6)
    assert is_outward(tmp_path / "a.glb")


@pytest.mark.parametrize("of_node", [False, True])
def test_morph_targets_have_their_default_weights(of_node, gltf, tmp_path):
    """The second target is sparse: two vertices move, and it has no other data."""
    first = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
    moved = np.array([[0.5, 0, 0], [0, 0, 0.25]], np.float32)
    sparse = {
        "count": 2,
        "indices": {"bufferView": gltf.view(np.array([1, 3], np.uint16).tobytes()), "componentType": 5123},
        "values": {"bufferView": gltf.view(moved.tobytes())},
    }
    second = gltf.add("accessors", componentType=5126, count=4, type="VEC3", sparse=sparse)
    targets = {"targets": [{"POSITION": gltf.array(first)}, {"POSITION": second}]}
    weights = [0.5, 2.0]
    mesh = {"weights": [9.0, 9.0] if of_node else weights}
    node = {"weights": weights} if of_node else {}
    gltf.add("nodes", mesh=tetrahedron(gltf, mesh=mesh, primitive=targets), **node)
    delta = np.zeros((4, 3))
    delta[[1, 3]] = moved
    expected = TETRAHEDRON + 0.5 * first + 2 * delta
    np.testing.assert_allclose(corners(gltf.glb(tmp_path / "a.glb")), expected[FACES], atol=1e-6)


def test_sparse_accessors_change_stored_ones(gltf, tmp_path):
    position = gltf.array(TETRAHEDRON)
    gltf.json["accessors"][position]["sparse"] = {
        "count": 1,
        "indices": {"bufferView": gltf.view(bytes([2])), "componentType": 5121},
        "values": {"bufferView": gltf.view(np.array([5, 6, 7], np.float32).tobytes())},
    }
    gltf.add("nodes", mesh=tetrahedron(gltf, position))
    expected = TETRAHEDRON.copy()
    expected[2] = [5, 6, 7]
    np.testing.assert_array_equal(corners(gltf.glb(tmp_path / "a.glb")), expected[FACES])


@pytest.mark.parametrize(
    "dtype, normalized", [("i2", True), ("u2", True), ("i1", True), ("i2", False), ("u1", False)]
)
def test_quantised_positions(dtype, normalized, gltf, tmp_path):
    """KHR_mesh_quantization, with a stride that pads positions to four bytes as it asks for."""
    stored = np.array([[0, 0, 0], [100, 0, 0], [0, 50, 0], [0, 0, 127]], dtype)
    if dtype[0] == "i":
        stored[1, 1] = np.iinfo(dtype).min
    padded = np.zeros((4, 4), dtype)
    padded[:, :3] = stored
    view = gltf.view(padded.tobytes(), byteStride=padded.itemsize * 4)
    kind = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123}[dtype]
    position = gltf.add(
        "accessors", bufferView=view, componentType=kind, count=4, type="VEC3", normalized=normalized
    )
    gltf.json["extensionsRequired"] = ["KHR_mesh_quantization"]
    gltf.add("nodes", mesh=tetrahedron(gltf, position))
    expected = stored.astype(np.float64)
    if normalized:
        expected = np.maximum(expected / np.iinfo(dtype).max, -1)
    np.testing.assert_allclose(corners(gltf.glb(tmp_path / "a.glb")), expected[FACES], rtol=1e-12)


def test_interleaved_attributes(gltf, tmp_path):
    rows = np.concatenate([TETRAHEDRON, TETRAHEDRON - TETRAHEDRON.mean(0)], 1)
    view = gltf.view(rows.astype(np.float32).tobytes(), byteStride=24)
    shared = {"bufferView": view, "componentType": 5126, "count": 4, "type": "VEC3"}
    position, normal = gltf.add("accessors", **shared), gltf.add("accessors", byteOffset=12, **shared)
    gltf.add("nodes", mesh=tetrahedron(gltf, position, NORMAL=normal))
    (part,) = read_gltf(gltf.glb(tmp_path / "a.glb")).parts
    np.testing.assert_array_equal(part.corners, TETRAHEDRON[FACES])
    np.testing.assert_allclose(part.normals, (TETRAHEDRON - TETRAHEDRON.mean(0))[FACES], atol=1e-6)


def test_instances(gltf, tmp_path):
    translations = np.array([[0, 0, 0], [5, 0, 0], [0, 7, 0]], np.float32)
    scales = np.array([[1, 1, 1], [2, 1, 1], [1, -1, 1]], np.float32)
    turns = np.array([[0, 0, 0, 32767], [0, 0, 23170, 23170], [0, 0, 0, 32767]], np.int16)
    attributes = {
        "TRANSLATION": gltf.array(translations),
        "SCALE": gltf.array(scales),
        "ROTATION": gltf.array(turns, normalized=True),
    }
    extension = {"EXT_mesh_gpu_instancing": {"attributes": attributes}}
    gltf.add("nodes", mesh=tetrahedron(gltf), translation=[0, 0, 1], extensions=extension)
    gltf.json["extensionsRequired"] = ["EXT_mesh_gpu_instancing"]
    found = corners(gltf.glb(tmp_path / "a.glb")).reshape(3, 4, 3, 3)
    angles = [0, np.pi / 2, 0]
    for instance, shift, scale, angle in zip(found, translations, scales, angles, strict=True):
        expected = (TETRAHEDRON * scale) @ rotation([0, 0, 1], angle).T + shift + [0, 0, 1]
        np.testing.assert_allclose(np.sort(instance, 1), np.sort(expected[FACES], 1), atol=1e-4)


@pytest.mark.parametrize(
    "mode, triangles",
    [
        (4, [[0, 1, 2], [2, 1, 3]]),
        (5, [[0, 1, 2], [1, 3, 2], [2, 3, 1], [3, 0, 1]]),
        (6, [[1, 2, 0], [2, 1, 0], [1, 3, 0], [3, 1, 0]]),
    ],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_lists_strips_and_fans(mode, triangles, indexed, gltf, tmp_path):
    order = np.array({4: [0, 1, 2, 2, 1, 3], 5: [0, 1, 2, 3, 1, 0], 6: [0, 1, 2, 1, 3, 1]}[mode])
    primitive = {"mode": mode}
    if indexed:
        mesh = tetrahedron(gltf, indices=gltf.array(order, np.uint8), primitive=primitive)
    else:
        attributes = {"POSITION": gltf.array(TETRAHEDRON[order])}
        mesh = gltf.add("meshes", primitives=[{"attributes": attributes, **primitive}])
    gltf.add("nodes", mesh=mesh)
    np.testing.assert_array_equal(corners(gltf.glb(tmp_path / "a.glb")), TETRAHEDRON[np.array(triangles)])


def test_nodes_share_meshes_and_morph_them_apart(gltf, tmp_path):
    delta = np.ones((4, 3), np.float32)
    mesh = tetrahedron(gltf, primitive={"targets": [{"POSITION": gltf.array(delta)}]})
    for weight in (0.0, 1.0, 0.5):
        gltf.add("nodes", mesh=mesh, weights=[weight])
    found = corners(gltf.glb(tmp_path / "a.glb")).reshape(3, 4, 3, 3)
    for instance, weight in zip(found, (0.0, 1.0, 0.5), strict=True):
        np.testing.assert_allclose(instance, (TETRAHEDRON + weight)[FACES])
    assert len(load_mesh(tmp_path / "a.glb").materials) == 1


def test_points_and_lines_are_named(gltf, tmp_path, user_error):
    mesh = tetrahedron(gltf)
    triangles = gltf.json["meshes"][mesh]["primitives"][0]
    gltf.json["meshes"][mesh]["primitives"] = [{**triangles, "mode": 0}, triangles, {**triangles, "mode": 1}]
    gltf.add("nodes", mesh=mesh)
    read = load_mesh(gltf.glb(tmp_path / "a.glb"))
    assert read.left_out == ("lines", "points") and len(read.corners) == 4
    gltf.json["meshes"][mesh]["primitives"][1]["mode"] = 3
    with user_error("b.glb: it has no triangles, only lines and points"):
        load_mesh(gltf.glb(tmp_path / "b.glb"))


def test_the_default_scene_and_visible_nodes_are_read(gltf, tmp_path):
    mesh = tetrahedron(gltf)
    hidden = {"KHR_node_visibility": {"visible": False}}
    inside = gltf.add("nodes", mesh=mesh)
    gltf.add("nodes", children=[inside], extensions=hidden)
    gltf.add("nodes", mesh=mesh, translation=[1, 0, 0])
    gltf.add("nodes", mesh=mesh, translation=[2, 0, 0])
    gltf.json["scenes"], gltf.json["scene"] = [{"nodes": [3]}, {"nodes": [1, 2]}], 1
    np.testing.assert_array_equal(corners(gltf.glb(tmp_path / "a.glb")), TETRAHEDRON[FACES] + [1, 0, 0])
    assert load_mesh(tmp_path / "a.glb").left_out == ("other scenes",)


def test_text_with_data_in_it_and_beside_it(gltf, tmp_path, user_error):
    gltf.add("nodes", mesh=tetrahedron(gltf))
    (tmp_path / "my data.bin").write_bytes(gltf.blob)
    for uri in (None, "my%20data.bin"):
        found = corners(gltf.gltf(tmp_path / "a.gltf", uri))
        np.testing.assert_array_equal(found, TETRAHEDRON[FACES])
    (tmp_path / "my data.bin").unlink()
    with user_error("a.gltf: 'my%20data.bin', which it refers to, is not beside it"):
        load_mesh(tmp_path / "a.gltf")
    (tmp_path / "binary.gltf").write_bytes(gltf.glb(tmp_path / "a.glb").read_bytes())  # told apart by content
    np.testing.assert_array_equal(corners(tmp_path / "binary.gltf"), TETRAHEDRON[FACES])


# ---- Broken files ----


UNKNOWN = ["KHR_materials_transmission", "EXT_new", "KHR_materials_unlit"]
BROKEN = {
    "it needs EXT_new, KHR_materials_transmission, which": lambda j: j.update(extensionsRequired=UNKNOWN),
    "its own ancestor": lambda j: j["nodes"][0].update(children=[0]),
    "two parents": lambda j: j.update(nodes=[*j["nodes"], {"children": [0]}, {"children": [0]}]),
    "reaches beyond its buffer": lambda j: j["accessors"][0].update(count=100000),
    "of 1,000,000,000,000 elements": lambda j: j["accessors"][0].update(count=10**12),
    "indices of vertices that it does not have": lambda j: j["accessors"][0].update(count=2),
    "no entry 7 in accessors": lambda j: j["meshes"][0]["primitives"][0].update(indices=7),
    "no entry -1 in meshes": lambda j: j["nodes"][0].update(mesh=-1),
    "is glTF 1.0": lambda j: j.update(asset={"version": "1.0"}),
    "no triangles; nothing": lambda j: j["nodes"].clear(),
    "it is broken": lambda j: j.update(nodes="none"),
    "has no data": lambda j: j["bufferViews"][0].update(buffer=1) or j.update(buffers=[{"byteLength": 9}]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_documents_are_one_line(message, gltf, tmp_path, user_error):
    gltf.add("nodes", mesh=tetrahedron(gltf))
    BROKEN[message](gltf.json)
    with user_error(f"cannot read .*a.glb.*{message}"):
        load_mesh(gltf.glb(tmp_path / "a.glb"))


def test_cut_and_alien_files_are_one_line(gltf, tmp_path, user_error):
    gltf.add("nodes", mesh=tetrahedron(gltf))
    whole = gltf.glb(tmp_path / "a.glb").read_bytes()
    deep = b'{"asset": ' + b"[" * 100_000
    for content, message in [
        (whole[:-40], "it ends after"),
        (b"", "it is empty"),
        (b"glTF", "it is broken"),
        (b"<html>not found</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a git-lfs pointer"),
        (deep, "it is broken"),
        (b"glTF" + struct.pack("<II", 1, 12), "it is glTF 1"),
        (json.dumps({"asset": {"version": "2.0"}}).encode(), "no triangles"),
    ]:
        (tmp_path / "b.glb").write_bytes(content)
        with user_error(f"cannot read .*b.glb.*{message}"):
            load_mesh(tmp_path / "b.glb")
