""".ply and .stl files of all forms, polygons, and what `load_mesh` refuses."""

import struct

import numpy as np
import pytest
from PIL import Image

from im3d_jax.data.meshes import parts, pictures, reading
from im3d_jax.data.meshes.parts import GREY
from im3d_jax.data.meshes.ply import read_ply
from im3d_jax.data.meshes.polygons import triangulate
from im3d_jax.data.meshes.reading import load_mesh
from im3d_jax.data.meshes.stl import read_stl

HOUSE = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [1, 2, 0], [0, 1, 0]], float)
TYPES = {"f": "float", "d": "double", "B": "uchar", "H": "ushort", "i": "int"}
FORMATS = ["ascii", "binary_little_endian", "binary_big_endian"]


ASCII_PLY = """ply
format ascii 1.0
element vertex 3
property float x
property float y
property float z
element face 1
property list uchar int vertex_indices
end_header
0 0 0
1 0 0
0 1 0
{}
"""


def ply(form, columns, faces, face_columns=(), header=""):
    """A file of vertex columns (name, struct code, values), and of faces with columns of their own."""
    lines = [
        "ply",
        f"format {form} 1.0",
        *([header] if header else []),
        f"element vertex {len(columns[0][2])}",
    ]
    lines += [f"property {TYPES[code]} {name}" for name, code, _ in columns]
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    lines += [f"property {TYPES[code]} {name}" for name, code, _ in face_columns]
    content = "\n".join([*lines, "end_header", ""]).encode()
    rows = [[(code, values[row]) for _, code, values in columns] for row in range(len(columns[0][2]))]
    for row, face in enumerate(faces):
        own = [(code, values[row]) for _, code, values in face_columns]
        rows.append([("B", len(face)), *(("i", each) for each in face), *own])
    order = ">" if "big" in form else "<"
    for each in rows:
        if form == "ascii":
            content += " ".join(str(value) for _, value in each).encode() + b"\n"
        else:
            content += b"".join(struct.pack(order + code, value) for code, value in each)
    return content


def positions(points=HOUSE):
    return [(name, "f", points[:, axis].tolist()) for axis, name in enumerate("xyz")]


def area(corners):
    return (
        np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1).sum()
        / 2
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("code, largest", [("B", 255), ("H", 65535), ("f", 1.0), ("f", 255.0)])
def test_colours_of_vertices(form, code, largest, tmp_path, curve):
    shares = np.linspace(0, 1, 5)
    values = (shares * largest).tolist() if code == "f" else np.rint(shares * largest).astype(int).tolist()
    colors = [(name, code, values) for name in ("red", "green", "blue")]
    (tmp_path / "a.ply").write_bytes(ply(form, positions() + colors, [[0, 1, 2], [0, 2, 3], [0, 3, 4]]))
    (part,) = read_ply(tmp_path / "a.ply").parts
    expected = curve[1](np.array(values) / largest * 255)
    np.testing.assert_allclose(part.colors[..., 0], expected[[[0, 1, 2], [0, 2, 3], [0, 3, 4]]], atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_polygons_of_mixed_sizes_with_colours_and_alpha(form, tmp_path, curve):
    faces = [[0, 1, 2], [0, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1]]
    colors = [(name, "B", [10, 200, 90, 0]) for name in ("red", "green", "blue")]
    colors.append(("alpha", "B", [255, 51, 255, 0]))
    (tmp_path / "a.ply").write_bytes(ply(form, positions(), faces, colors))
    (part,) = read_ply(tmp_path / "a.ply").parts
    assert area(part.corners) == pytest.approx(1 + 2 + 3)
    np.testing.assert_allclose(part.colors[0, 0], [*curve[1]([10] * 3), 1])
    np.testing.assert_allclose(part.colors[1:3, 0], [[*curve[1]([200] * 3), 0.2]] * 2)
    assert part.material.alpha_mode == "BLEND"
    assert read_ply(tmp_path / "a.ply").left_out == {"faces of fewer than three corners"}


def test_an_alpha_of_0_everywhere_is_not_believed(tmp_path):
    colors = [(name, "B", [100] * 5) for name in ("red", "green", "blue")] + [("alpha", "B", [0] * 5)]
    (tmp_path / "a.ply").write_bytes(ply("ascii", positions() + colors, [[0, 1, 2]]))
    scene = read_ply(tmp_path / "a.ply")
    assert scene.left_out == {"opacity of 0"} and (scene.parts[0].colors[..., 3] == 1).all()


@pytest.mark.parametrize("of_faces", [False, True])
def test_textures(of_faces, tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "my wood.png")
    uv = HOUSE[:, :2] / 2
    header = "comment TextureFile my wood.png"
    if of_faces:
        content = ply("ascii", positions(), [[0, 1, 2]], header=header)
        numbers = " ".join(str(each) for each in uv[:3].reshape(-1))
        content = content.replace(b"end_header", b"property list uchar float texcoord\nend_header")
        content = content.rstrip() + f" 6 {numbers}\n".encode()
    else:
        columns = [("s", "f", uv[:, 0].tolist()), ("t", "f", uv[:, 1].tolist())]
        content = ply("binary_little_endian", positions() + columns, [[0, 1, 2]], header=header)
    (tmp_path / "a.ply").write_bytes(content)
    scene = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(scene.textures[0].pixels[..., :3], pixels)
    expected = np.stack([uv[:3, 0], 1 - uv[:3, 1]], -1)
    np.testing.assert_allclose(scene.parts[0].uvs, expected[None])
    (tmp_path / "my wood.png").unlink()
    assert read_ply(tmp_path / "a.ply").left_out == {"missing texture: my wood.png"}


def test_broken_plys_are_one_line(tmp_path, user_error):
    whole = ply("binary_little_endian", positions(), [[0, 1, 2], [0, 1, 2, 3]])
    text = ply("ascii", positions(), [[0, 1, 2], [0, 1, 2, 3]])
    points = ply("binary_little_endian", positions(), [])
    for content, message in [
        (whole[:-3], "."),
        (text[:-6], "."),
        (whole.replace(b"vertex 5", b"vertex 99999999"), "more elements than it has bytes"),
        (ply("ascii", positions(), [[0, 1, 7]]), "indices of vertices that it does not have"),
        (b"plyx", "does not begin"),
        (points, "no triangles, only points"),
        (points.replace(b"element face", b"element tristrips"), "only points and triangle strips"),
    ]:
        (tmp_path / "a.ply").write_bytes(content)
        with user_error(f"cannot read .*a.ply.*{message}"):
            load_mesh(tmp_path / "a.ply")


# ---- Polygons ----


def test_concave_polygons_keep_their_area():
    """An L, a star and a dented quad, each turned in space and begun at every corner."""
    angles = np.arange(10) * np.pi / 5
    star = np.stack([np.cos(angles), np.sin(angles)], -1) * np.where(np.arange(10) % 2, 0.3, 1.0)[:, None]
    shapes = {
        3.0: np.array([[0, 0], [2, 0], [2, 1], [1, 1], [1, 2], [0, 2]]),
        10 * 0.3 * np.sin(np.pi / 5) / 2: star,
        0.25: np.array([[0, 0], [1, 0], [0.25, 0.25], [0, 1]]),
    }
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    for expected, flat in shapes.items():
        for first in range(len(flat)):
            corners = np.pad(np.roll(flat, first, 0), ((0, 0), (0, 1))) @ turn
            found = corners[triangulate(np.array([len(flat)]), corners)]
            assert area(found) == pytest.approx(expected)
            normals = np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0])
            assert (normals @ normals.sum(0) > 0).all()


def test_polygons_keep_their_order():
    sizes = np.array([4, 3, 2, 5])
    corners = np.concatenate([HOUSE[[0, 1, 2, 4]], HOUSE[:3], HOUSE[:2], HOUSE])
    triangles = triangulate(sizes, corners)
    np.testing.assert_array_equal(triangles[:, 0], [0, 0, 4, 9, 9, 9])
    assert triangulate(np.zeros(0, int), np.zeros((0, 3))).shape == (0, 3)


# ---- .stl ----

TRIANGLES = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 0, 1], [0, 1, 2]]], np.float32)


def binary_stl(attributes=(0, 0), header=b""):
    content = header.ljust(80, b"\0") + struct.pack("<I", len(TRIANGLES))
    for corners, attribute in zip(TRIANGLES, attributes, strict=True):
        content += struct.pack("<12fH", 0, 0, 0, *corners.reshape(-1), attribute)
    return content


def text_stl():
    rows = "".join(
        "facet normal 0 0 1\n outer loop\n"
        + "".join(f"  vertex {x} {y} {z:e}\n" for x, y, z in corners)
        + " endloop\n"
        for corners in TRIANGLES
    )
    return f"solid a name\n{rows}endsolid\n".encode()


@pytest.mark.parametrize("content", [binary_stl(), binary_stl(header=b"solid but binary"), text_stl()])
def test_stl(content, tmp_path, curve):
    (tmp_path / "a.stl").write_bytes(content)
    (part,) = read_stl(tmp_path / "a.stl").parts
    np.testing.assert_array_equal(part.corners, TRIANGLES)
    np.testing.assert_allclose(part.colors[..., :3], curve[1](255 * GREY))


@pytest.mark.parametrize("program", ["VisCAM", "Magics"])
def test_stl_colours(program, tmp_path, curve):
    red, green, blue = 31, 8, 2
    if program == "VisCAM":
        header, attributes = b"", (0x8000 | red << 10 | green << 5 | blue, 0)
        other = [255 * GREY] * 3
    else:
        header, attributes = b"COLOR=" + bytes([51, 102, 204, 255]), (red | green << 5 | blue << 10, 0x8000)
        other = [51, 102, 204]
    (tmp_path / "a.stl").write_bytes(binary_stl(attributes, header))
    (part,) = read_stl(tmp_path / "a.stl").parts
    np.testing.assert_allclose(part.colors[0, 0, :3], curve[1](np.array([red, green, blue]) / 31 * 255))
    np.testing.assert_allclose(part.colors[1, 0, :3], curve[1](other))


@pytest.mark.parametrize(
    "content", [b"no mesh", binary_stl()[:-5], text_stl()[:-60], b"solid nothing\nendsolid"]
)
def test_broken_stls_are_one_line(content, tmp_path, user_error):
    (tmp_path / "a.stl").write_bytes(content)
    with user_error("cannot read .*a.stl"):
        load_mesh(tmp_path / "a.stl")


# ---- Limits ----


def test_what_is_too_large_is_refused(tmp_path, user_error, monkeypatch):
    (tmp_path / "a.stl").write_bytes(binary_stl())
    monkeypatch.setattr(parts, "MAX_TRIANGLES", 1)
    with user_error("a.stl: it has 2 triangles; simplify it to at most 1"):
        load_mesh(tmp_path / "a.stl")
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 100)
    with user_error("a.stl: it has 184 bytes; at most 100 are read"):
        load_mesh(tmp_path / "a.stl")
    Image.new("RGB", (8, 8)).save(tmp_path / "wood.png")
    (tmp_path / "a.mtl").write_text("newmtl wood\nmap_Kd wood.png\n")
    (tmp_path / "b.obj").write_text(
        "mtllib a.mtl\nusemtl wood\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1\n"
    )
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 10**6)
    monkeypatch.setattr(parts, "MAX_TRIANGLES", 10)
    monkeypatch.setattr(pictures, "MAX_TEXELS", 63)
    with user_error("textures of more than 63 texels; shrink them"):
        load_mesh(tmp_path / "b.obj")


def test_other_formats_and_positions_that_are_not_finite(tmp_path, user_error):
    (tmp_path / "a.fbx").write_bytes(b"Kaydara")
    with user_error("a.fbx is in a format that is not read; give one of .glb, .gltf, .obj, .ply, .stl"):
        load_mesh(tmp_path / "a.fbx")
    for number, value in enumerate(("nan", "1e300", "inf")):
        (tmp_path / f"{number}.obj").write_text(f"v 0 0 {value}\nv -{value} 0 0\nv 0 1 0\nf 1 2 3\n")
        with user_error("positions that are not finite"):
            load_mesh(tmp_path / f"{number}.obj")


@pytest.mark.parametrize(
    "name, content",
    [
        ("two.obj", "v 0 0\nv 1 0\nv 0 1\nf 1 2 3\nv x\n"),
        ("half.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1.5 2 3\n"),
        ("nan.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf nan 2 3\n"),
        ("far.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1e30 2 3\n"),
        ("half.ply", ASCII_PLY.format("3 0 1.5 2")),
        ("nan.ply", ASCII_PLY.format("3 0 nan 2")),
        ("far.ply", ASCII_PLY.format("3 0 99999999999 2")),
    ],
)
def test_damaged_indices_are_refused(tmp_path, name, content, user_error):
    (tmp_path / name).write_text(content)
    with user_error(f"cannot read .*{name}"):
        load_mesh(tmp_path / name)


def test_colours_that_are_no_numbers_are_named(tmp_path, gltf):
    colors = np.ones((4, 4), np.float32)
    colors[2, 1], colors[3, 0] = np.nan, np.inf
    gltf.square(COLOR_0=gltf.array(colors))
    mesh = load_mesh(gltf.glb(tmp_path / "a.glb"))
    assert np.isfinite(mesh.colors).all() and "colours that are no numbers" in mesh.left_out


def test_a_material_that_is_not_finite_is_refused(tmp_path, gltf, user_error):
    gltf.square({"emissiveFactor": [0.5, float("nan"), 0]})
    with user_error("a material whose numbers are not finite"):
        load_mesh(gltf.glb(tmp_path / "a.glb"))
