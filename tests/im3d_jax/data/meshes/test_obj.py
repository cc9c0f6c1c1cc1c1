""".obj and .mtl files as artists' programs write them, against what their lines say."""

import numpy as np
import pytest
from PIL import Image

from im3d_jax.data.meshes.mtl import read_reference
from im3d_jax.data.meshes.obj import read_obj
from im3d_jax.data.meshes.parts import GREY, AlphaMode, Wrap
from im3d_jax.data.meshes.reading import load_mesh

SQUARE = """v -1 -1 0
v 1 -1 0
v 1 1 0
v -1 1 0
vt 0 0
vt 1 0
vt 1 1
vt 0 1
"""
FACE = "f 1/1 2/2 3/3 4/4\n"
TEXEL = (200, 120, 40)


def write(folder, obj, mtl=None, name="a"):
    if mtl is not None:
        (folder / f"{name}.mtl").write_text(mtl)
        obj = f"mtllib {name}.mtl\nusemtl wood\n" + obj
    (folder / f"{name}.obj").write_text(obj)
    return folder / f"{name}.obj"


def picture(path, color=TEXEL, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), color).save(path)


def test_a_material_without_textures(tmp_path, seen, curve):
    path = write(tmp_path, SQUARE + FACE, "newmtl wood\nKd 0.5 0.25 0.1\nKe 0.1 0 0\n")
    (part,) = read_obj(path).parts
    np.testing.assert_allclose(part.colors[0, 0], [*curve[1](np.array([0.5, 0.25, 0.1]) * 255), 1])
    np.testing.assert_allclose(part.material.emission, curve[1](np.array([0.1, 0, 0]) * 255))
    bare = write(tmp_path, SQUARE + FACE, name="bare")
    np.testing.assert_allclose(seen(bare), [*[255 * GREY] * 3, 1], atol=0.05)


@pytest.mark.parametrize(
    "kd, expected", [("", 1), ("Kd 1 1 1\n", 1), ("Kd 0 0 0\n", 1), ("Kd 0.5 0.5 0.5\n", 0.5)]
)
def test_textures_are_multiplied_with_kd_unless_it_is_black(kd, expected, tmp_path, seen, curve):
    picture(tmp_path / "wood.png")
    path = write(tmp_path, SQUARE + FACE, f"newmtl wood\n{kd}map_Kd wood.png\n")
    linear = curve[1](TEXEL) * curve[1](255 * expected)
    np.testing.assert_allclose(seen(path), [*curve[0](linear), 1], atol=0.05)


@pytest.mark.parametrize(
    "line, file",
    [
        ("textures\\wood.png", "textures/wood.png"),
        (".\\Textures\\WOOD.png", "textures/wood.png"),
        ("C:\\work\\my wood.png", "my wood.png"),
        ("/home/anna/wood.png", "textures/wood.png"),
        ("my  old wood.png", "my  old wood.png"),
        ("-s 1 1 1 -o 0 0 0 -clamp on my wood.png", "my wood.png"),
        ("-bm 0.5 -blendu off -texres 512 2 wood.png", "2 wood.png"),
        ("my%20wood.png", "my wood.png"),
    ],
)
def test_textures_are_found(line, file, tmp_path, seen):
    picture(tmp_path / file)
    path = write(tmp_path, SQUARE + FACE, f"newmtl wood\nmap_Kd {line}\n")
    np.testing.assert_allclose(seen(path), [*TEXEL, 1], atol=0.05)
    assert load_mesh(path).left_out == ()


def test_the_texture_of_a_model_for_gazebo_is_found(tmp_path, seen):
    (tmp_path / "meshes").mkdir()
    picture(tmp_path / "materials" / "textures" / "texture.png")
    path = write(tmp_path / "meshes", SQUARE + FACE, "newmtl wood\nmap_Kd texture.png\n", "model")
    np.testing.assert_allclose(seen(path), [*TEXEL, 1], atol=0.05)
    assert load_mesh(path).left_out == ()


def test_a_mesh_may_stay_where_its_file_has_it(tmp_path):
    path = write(tmp_path, "v 7 1 0\nv 9 1 0\nv 7 2 0\nf 1 2 3\n")
    stays = load_mesh(path, in_ball=False).corners[0]
    np.testing.assert_array_equal(stays, [[0, 7, 1], [0, 9, 1], [0, 7, 2]])  # +Y up is turned to +Z
    np.testing.assert_array_equal(load_mesh(path, "z", in_ball=False).corners[0][0], [7, 1, 0])
    assert np.abs(load_mesh(path).corners).max() <= 0.5


def test_options_move_and_clamp_textures(tmp_path):
    reference = read_reference("-s 2 3 -clamp on -o 0.25 -mm 0 1 my wood.png")
    assert reference.name == "my wood.png" and reference.clamp
    assert (reference.scale, reference.offset) == ((2, 3), (0.25, 0))
    picture(tmp_path / "my wood.png")
    path = write(
        tmp_path, SQUARE + FACE, "newmtl wood\nmap_Kd -s 2 3 -clamp on -o 0.25 -mm 0 1 my wood.png\n"
    )
    scene = read_obj(path)
    uv = np.array([[0, 0], [1, 0], [1, 1]])  # of the file, with v upwards
    np.testing.assert_allclose(scene.parts[0].uvs[0], np.stack([2 * uv[:, 0] + 0.25, 1 - 3 * uv[:, 1]], -1))
    assert scene.textures[0].wrap == (Wrap.CLAMP, Wrap.CLAMP)
    assert scene.left_out == {"texture option: -mm"}


def test_what_is_missing_is_named(tmp_path, seen, curve):
    mtl = "newmtl wood\nKd 0.5 0.5 0.5\nmap_Kd wood.png\nmap_Bump b.png\nKs 1 1 1\nPr 0.2\n"
    scene = read_obj(write(tmp_path, SQUARE + FACE + "usemtl iron\nf 1 2 4\nl 1 2\np 1\n", mtl))
    assert scene.left_out == {
        *("missing texture: wood.png", "missing material: iron", "normal map", "specular highlights"),
        *("lines", "points"),
    }
    (tmp_path / "a.mtl").unlink()
    assert load_mesh(tmp_path / "a.obj").left_out[1:4] == (
        "missing material file: a.mtl",
        "missing material: iron",
        "missing material: wood",
    )


def test_names_with_spaces_and_other_cases(tmp_path, seen):
    (tmp_path / "My Wood.mtl").write_text("newmtl Material #25\nKd 1 0 0\nnewmtl Other\nKd 0 1 0\n")
    obj = "mtllib my wood.mtl\n" + SQUARE + "usemtl material #25\n" + FACE
    np.testing.assert_allclose(seen(write(tmp_path, obj)), [255, 0, 0, 1], atol=0.05)
    (tmp_path / "one.mtl").write_text("newmtl x\nKd 0 0 1\n")
    obj = "mtllib one.mtl two.mtl\n" + SQUARE + "usemtl x\n" + FACE
    np.testing.assert_allclose(seen(write(tmp_path, obj, name="b")), [0, 0, 255, 1], atol=0.05)
    assert load_mesh(tmp_path / "b.obj").left_out == ("missing material file: two.mtl",)


@pytest.mark.parametrize(
    "lines, alpha",
    [("d 0.25", 0.25), ("Tr 0.75", 0.25), ("d 0.25\nTr 0.1", 0.25), ("d 1\nTr 0", 1), ("Tr 1", 1)],
)
def test_opacity(lines, alpha, tmp_path, seen):
    path = write(tmp_path, SQUARE + FACE, f"newmtl wood\nKd 1 0 0\n{lines}\n")
    np.testing.assert_allclose(seen(path), [255, 0, 0, alpha], atol=1e-3)
    assert ("opacity of 0" in load_mesh(path).left_out) == (lines == "Tr 1")


@pytest.mark.parametrize("mode, value, alpha", [("L", 51, 0.2), ("RGBA", (9, 9, 9, 102), 0.4)])
def test_map_d_is_alpha(mode, value, alpha, tmp_path, seen):
    picture(tmp_path / "wood.png")
    picture(tmp_path / "alpha.png", value, mode)
    path = write(tmp_path, SQUARE + FACE, "newmtl wood\nd 0.5\nmap_Kd wood.png\nmap_d alpha.png\n")
    np.testing.assert_allclose(seen(path), [*TEXEL, alpha * 0.5], atol=0.05)
    assert read_obj(path).parts[0].material.alpha_mode == AlphaMode.BLEND


def test_the_alpha_of_a_picture_alone_does_not_count_and_is_named(tmp_path, seen):
    picture(tmp_path / "wood.png", (*TEXEL, 3), "RGBA")
    path = write(tmp_path, SQUARE + FACE, "newmtl wood\nmap_Kd wood.png\n")
    np.testing.assert_allclose(seen(path), [*TEXEL, 1], atol=0.05)
    assert load_mesh(path).left_out == ("alpha channel of map_Kd",)


@pytest.mark.parametrize("largest", [1, 255])
def test_vertex_colours_are_srgb(largest, tmp_path, curve):
    srgb = np.array([[0.1, 0.5, 0.9], [1, 0, 0], [0.3, 0.3, 0.3]])
    rows = [f"v {i} {i * i} 0 {r} {g} {b}" for i, (r, g, b) in enumerate(srgb * largest)]
    (part,) = read_obj(write(tmp_path, "\n".join(rows) + "\nf 1 2 3\n")).parts
    np.testing.assert_allclose(part.colors[0, :, :3], curve[1](srgb * 255), atol=1e-6)


def test_vertex_colours_are_multiplied_with_kd_and_give_way_to_textures(tmp_path, curve, seen):
    colored = SQUARE.replace(" 0\n", " 0 0.5 0.5 0.5\n")
    (part,) = read_obj(write(tmp_path, colored + FACE, "newmtl wood\nKd 1 0.5 0\n")).parts
    half = curve[1](127.5)
    np.testing.assert_allclose(part.colors[..., :3], [[[half, half**2, 0]] * 3] * 2)
    picture(tmp_path / "wood.png")
    path = write(tmp_path, colored + FACE, "newmtl wood\nmap_Kd wood.png\n")
    np.testing.assert_allclose(seen(path), [*TEXEL, 1], atol=0.05)
    assert load_mesh(path).left_out == ("vertex colours beside a texture",)


def test_materials_share_textures(tmp_path):
    picture(tmp_path / "wood.png")
    lines = {"wood": "wood.png", "b": "-s 2 2 wood.png", "c": "-clamp on wood.png"}
    mtl = "".join(f"newmtl {name}\nmap_Kd {line}\n" for name, line in lines.items())
    scene = read_obj(write(tmp_path, SQUARE + FACE + "usemtl b\n" + FACE + "usemtl c\n" + FACE, mtl))
    assert [part.material.texture for part in scene.parts] == [0, 0, 1] and len(scene.textures) == 2


def test_faces_in_all_their_spellings(tmp_path):
    obj = (
        SQUARE
        + "vn 0 0 1\nvn 0 0.6 0.8\ng group\ns off\nf 1//1 2//2 3//1\nf -4 -3 \\\n -2\nf 1/1/2 2/2/2 3/3/2\n"
    )
    (part,) = read_obj(write(tmp_path, obj)).parts
    square = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(part.corners, np.stack([square] * 3))
    np.testing.assert_allclose(part.normals[0], [[0, 0, 1], [0, 0.6, 0.8], [0, 0, 1]])
    np.testing.assert_allclose(part.normals[1, :, 2] > 0.99, True)  # found here, since the file has none
    np.testing.assert_allclose(part.normals[2], [[0, 0.6, 0.8]] * 3)


def test_uvs_and_normals_that_do_not_exist_are_named(tmp_path):
    obj = SQUARE + "f 1/9/1 2/1/1 3/-7/1\nf 1 2\n"
    mesh = load_mesh(write(tmp_path, obj))
    names = (
        "faces of fewer than three corners",
        "normals that do not exist",
        "texture coordinates that do not exist",
    )
    assert mesh.left_out == names and len(mesh.corners) == 1


@pytest.mark.parametrize("face", ["f 1 2 9", "f 1 2 -9", "f 0 1 2", "f a b c", "f 1/a 2 3"])
def test_broken_faces_are_one_line(face, tmp_path, user_error):
    with user_error("cannot read .*a.obj"):
        load_mesh(write(tmp_path, SQUARE + face + "\n"))


def test_encodings(tmp_path, seen):
    picture(tmp_path / "Fußboden.png")
    for encoding in ("utf-8-sig", "cp1252"):
        (tmp_path / "a.mtl").write_bytes("newmtl wood\nmap_Kd Fußboden.png\n".encode(encoding))
        (tmp_path / "a.obj").write_bytes(f"mtllib a.mtl\r\nusemtl wood\r\n{SQUARE}{FACE}".encode(encoding))
        np.testing.assert_allclose(seen(tmp_path / "a.obj"), [*TEXEL, 1], atol=0.05)
