"""Blender's views against closed forms, the ray caster, and its own views of other formats."""

import importlib.util
import json
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image

from im3d_jax.data import augmentation, mesh_rendering
from im3d_jax.data.blender import SUFFIXES, Look, process
from im3d_jax.data.blender.importing import IMPORTERS
from im3d_jax.data.blender.rendering import Blender, to_straight_srgb
from im3d_jax.data.blender.scene import SUN, WORLD
from im3d_jax.data.meshes.reading import READERS, UpAxis, load_mesh
from im3d_jax.data.procedural import LIGHT
from im3d_jax.data.rendering import MeshDrawer, RayCaster
from recon_torch.views.cameras import orbit

if importlib.util.find_spec("bpy") is None:
    pytest.skip("Blender's module bpy is not installed", allow_module_level=True)
pytestmark = pytest.mark.slow


def to_srgb(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def to_linear(srgb):
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def draw(path, cameras, *, up=UpAxis.Z, samples=8, variant=None, **look):
    return Blender(Look(samples=samples, **look))(path, up, cameras, variant)


def iou(alpha, other):
    return np.minimum(alpha, other).sum() / np.maximum(alpha, other).sum()


def centroids(alpha):
    """Column and row of the mean of each view, with pixel centres at +0.5."""
    rows, columns = np.mgrid[: alpha.shape[1], : alpha.shape[2]] + 0.5
    total = alpha.sum((1, 2))
    return np.stack([(alpha * columns).sum((1, 2)) / total, (alpha * rows).sum((1, 2)) / total], -1)


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory):
    """A .glb with +Y up that no mirror and no turn maps onto itself: boxes at odd places."""
    scene = trimesh.Scene()
    for extents, place in (((2, 1, 3), (0, 0, 0)), ((1, 1, 1), (2, 0.5, 1)), ((0.5, 2, 0.5), (0.3, 1, -2))):
        box = trimesh.creation.box(extents)
        scene.add_geometry(box, transform=trimesh.transformations.translation_matrix(place))
    path = tmp_path_factory.mktemp("lopsided") / "boxes.glb"
    scene.export(path)
    return path


def quad(path, rgb=(200, 100, 50), normal="x"):
    """A square .ply of one colour with +Z up, which faces view 0, or up."""
    ring = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    corners = [(0, a, b) if normal == "x" else (a, b, 0) for a, b in ring]
    header = ["ply", "format ascii 1.0", "element vertex 4", *(f"property float {axis}" for axis in "xyz")]
    header += [*(f"property uchar {name}" for name in ("red", "green", "blue")), "element face 1"]
    rows = [" ".join(map(str, (*corner, *rgb))) for corner in corners]
    header += ["property list uchar int vertex_indices", "end_header", *rows, "4 0 1 2 3", ""]
    path.write_text("\n".join(header))
    return path


def triangle_gltf(path, material, **more):
    """A .gltf of one large triangle that faces view 0 with +Y up."""
    data = struct.pack("<9f", -1, -1, 0, 1, -1, 0, 0, 1, 0)
    path.with_suffix(".bin").write_bytes(data)
    content = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "material": 0}]}],
        "materials": [material],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}
            | {"min": [-1, -1, 0], "max": [1, 1, 0]}
        ],
        "bufferViews": [{"buffer": 0, "byteLength": len(data)}],
        "buffers": [{"uri": path.with_suffix(".bin").name, "byteLength": len(data)}],
        **more,
    }
    path.write_text(json.dumps(content))
    return path


# ---- Cameras ----


def test_small_balls_are_seen_where_the_cameras_project_them(tmp_path):
    compared, places = 0, np.array([[1.0, 0, 0], [-0.3, 0.8, 0.2], [0.1, -0.6, 0.9]])
    for number in range(3):  # one at a time, beside two that fix the fit: their pictures are subtracted
        balls = [trimesh.creation.icosphere(2, 0.06 if each == number else 0.02) for each in range(3)]
        for ball, place in zip(balls, places, strict=True):
            ball.apply_translation(place)
        whole = trimesh.util.concatenate(balls)
        whole.export(tmp_path / f"{number}.ply")
        centre = (whole.vertices.min(0) + whole.vertices.max(0)) / 2
        scale = 0.5 / np.linalg.norm(whole.vertices - centre, axis=-1).max()
        cameras = orbit(3, 0.4, 64)
        alpha = draw(tmp_path / f"{number}.ply", cameras, samples=64).rgba[..., 3]
        seen = cameras.project((places - centre) * scale).pixels
        columns, rows = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
        for view in range(3):
            column, row = seen[view, number]
            others = np.delete(seen[view], number, 0)
            if np.linalg.norm(others - seen[view, number], axis=-1).min() < 8:
                continue  # they overlap in this view
            near = alpha[view] * (np.hypot(columns - column, rows - row) < 4)
            found = np.array([(near * columns).sum(), (near * rows).sum()]) / near.sum()
            np.testing.assert_allclose(found, [column, row], atol=0.1)
            compared += 1
    assert compared >= 6


@pytest.mark.parametrize("up", UpAxis)
def test_silhouettes_are_those_of_the_ray_caster(lopsided, up, tmp_path):
    cameras = orbit(4, 0.45, 64)
    obj, ply = tmp_path / "same.obj", tmp_path / "same.ply"
    trimesh.load_mesh(lopsided).export(obj)
    trimesh.load_mesh(lopsided).export(ply)
    for path in (lopsided, obj, ply):
        alpha = draw(path, cameras, up=up, samples=64).rgba[..., 3]
        rgba, _ = mesh_rendering.render(load_mesh(path, up), cameras, supersampling=12)
        assert iou(alpha, rgba[..., 3]) > 0.99
        np.testing.assert_allclose(centroids(alpha), centroids(rgba[..., 3]), atol=0.1)


def test_variants_have_the_shape_that_they_have_in_the_ray_caster(lopsided):
    cameras, variant = orbit(3, 0.3, 48), augmentation.draw(0, "boxes~1")
    alpha = draw(lopsided, cameras, up=UpAxis.Y, samples=64, variant=variant).rgba[..., 3]
    expected = RayCaster()(lopsided, UpAxis.Y, cameras, variant).rgba[..., 3]
    plain = draw(lopsided, cameras, up=UpAxis.Y, samples=64).rgba[..., 3]
    assert iou(alpha, expected) > 0.97 > 0.9 > iou(alpha, plain)


# ---- Colours ----


def test_unlit_and_glowing_surfaces_have_the_colours_of_their_files(tmp_path):
    srgb = np.array([200, 100, 30]) / 255
    linear = to_linear(srgb).tolist()
    unlit = {"pbrMetallicRoughness": {"baseColorFactor": [*linear, 1]}}
    glows = {"pbrMetallicRoughness": {"baseColorFactor": [0, 0, 0, 1], "metallicFactor": 1.0}}
    paths = [
        triangle_gltf(
            tmp_path / "unlit.gltf",
            unlit | {"extensions": {"KHR_materials_unlit": {}}},
            extensionsUsed=["KHR_materials_unlit"],
        ),
        triangle_gltf(tmp_path / "glows.gltf", glows | {"emissiveFactor": linear}),
    ]
    for path in paths:
        rgba = draw(path, orbit(1, 0.0, 16), up=UpAxis.Y).rgba[0]
        inside = rgba[..., 3] == 1
        assert inside.sum() > 20
        np.testing.assert_allclose(rgba[inside][:, :3], np.tile(srgb, (inside.sum(), 1)), atol=1 / 255)
        edge = (rgba[..., 3] > 0) & ~inside  # straight alpha: as bright as inside
        assert edge.any()
        np.testing.assert_allclose(rgba[edge][:, :3], np.tile(srgb, (edge.sum(), 1)), atol=1 / 255)


def test_alpha_is_straight_where_a_surface_is_see_through(tmp_path):
    srgb = np.array([200, 100, 30]) / 255
    color = [*to_linear(srgb).tolist(), 0.25]
    material = {"pbrMetallicRoughness": {"baseColorFactor": color}, "alphaMode": "BLEND"}
    material["extensions"] = {"KHR_materials_unlit": {}}
    path = triangle_gltf(tmp_path / "a.gltf", material, extensionsUsed=["KHR_materials_unlit"])
    rgba = draw(path, orbit(1, 0.0, 16), up=UpAxis.Y, samples=64).rgba[0]
    middle = rgba[7:9, 7:9].reshape(-1, 4)
    np.testing.assert_allclose(middle[:, 3], 0.25, atol=0.15)  # Cycles passes through by chance
    np.testing.assert_allclose(middle[:, :3], np.tile(srgb, (4, 1)), atol=1.5 / 255)


@pytest.mark.parametrize("normal, towards", [("x", [1, 0, 0]), ("z", [0, 0, 1])])
def test_a_matt_surface_shows_its_share_of_the_default_light(tmp_path, normal, towards):
    path = quad(tmp_path / "quad.ply", normal=normal)
    elevation = 0.0 if normal == "x" else 1.2
    rgba = draw(path, orbit(2, elevation, 24), samples=256).rgba
    albedo = to_linear(np.array([200, 100, 50]) / 255)
    middle = rgba[0, 11:13, 11:13, :3].mean((0, 1))
    expected = to_srgb(albedo * (WORLD + SUN * np.dot(towards, LIGHT)))
    np.testing.assert_allclose(middle, expected, atol=1.5 / 255)
    if normal == "x":  # view 1 sees the side in the shade
        np.testing.assert_allclose(
            rgba[1, 11:13, 11:13, :3].mean((0, 1)), to_srgb(albedo * WORLD), atol=0.006
        )


def test_the_light_of_a_variant_stands_elsewhere(tmp_path):
    path = quad(tmp_path / "quad.ply")
    variant = augmentation.Variant("rgb", (1.0, 1.0, 1.0), 0.0, (0.0, 0.6, 0.8))
    middle = draw(path, orbit(1, 0.0, 16), samples=64, variant=variant).rgba[0, 7:9, 7:9, :3].mean((0, 1))
    expected = to_srgb(to_linear(np.array([200, 100, 50]) / 255) * WORLD)
    np.testing.assert_allclose(middle, expected, atol=0.02)  # the sun, 5 degrees wide, just grazes it


def test_a_panorama_lights_from_its_side_and_turns_with_a_variant(tmp_path):
    """Light from azimuth 90 degrees alone: a face towards it is lit, and one against it is black."""
    width, height = 64, 32
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[:, :16] = (128, 64, 32, 130)  # Blender's panoramas have azimuth 180 - 360 u degrees
    panorama = tmp_path / "light.hdr"
    panorama.write_bytes(
        b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y %d +X %d\n" % (height, width) + pixels.tobytes()
    )
    path = quad(tmp_path / "quad.ply", (255, 255, 255))
    cameras = orbit(2, 0.0, 16)

    def seen(variant=None):
        rgba = draw(path, cameras, samples=32, environment=panorama, variant=variant).rgba
        return to_linear(rgba[:, 7:9, 7:9, :3].mean((1, 2)))

    front, back = seen()
    turned_front, turned_back = seen(augmentation.Variant("rgb", (1.0, 1.0, 1.0), 0.0, (-0.6, 0.0, 0.8)))
    assert back[0] > 0.3 and front.max() < 0.01
    np.testing.assert_allclose(back / back[0], [1, 0.5, 0.25], atol=0.02)
    np.testing.assert_allclose([turned_front, turned_back], [back, front], atol=0.05)


def test_blenders_own_standard_pictures_are_the_same(lopsided, tmp_path):
    cameras = orbit(1, 0.4, 24)
    rgba = draw(lopsided, cameras, up=UpAxis.Y).rgba[0]
    with process.quiet():
        bpy = process.start()  # the scene of the last object is still there
        bpy.context.scene.view_settings.view_transform = "Standard"
        bpy.context.scene.render.dither_intensity = 0.0
        picture = bpy.context.scene.render.image_settings
        picture.file_format, picture.color_mode, picture.color_depth = "PNG", "RGBA", "8"
        bpy.context.scene.render.filepath = str(tmp_path / "standard.png")
        bpy.ops.render.render(write_still=True)
    theirs = np.asarray(Image.open(tmp_path / "standard.png")) / 255
    covered = theirs[..., 3] > 0.1
    np.testing.assert_allclose(rgba[covered], theirs[covered], atol=3 / 255)
    np.testing.assert_allclose(rgba[..., 3], theirs[..., 3], atol=1 / 255)


def test_straight_colours_of_nothing_are_black():
    pixels = np.array([[0.25, 0.5, 4.0, 0.5], [1.0, 1.0, 1.0, 0.0]], np.float32)
    expected = [[*to_srgb(np.array([0.5, 1.0, 1.0])), 0.5], [0, 0, 0, 0]]
    np.testing.assert_allclose(to_straight_srgb(pixels), expected, atol=1e-6)


# ---- State ----


def test_nothing_of_an_object_is_left_in_the_next(lopsided, tmp_path):
    cameras = orbit(2, 0.4, 24)
    first = draw(lopsided, cameras, up=UpAxis.Y)
    glows = triangle_gltf(tmp_path / "glows.gltf", {"emissiveFactor": [1, 0, 0]})
    assert (draw(glows, orbit(1, 0.1, 16), up=UpAxis.Y, samples=3).rgba != first.rgba[:1, :16, :16]).any()
    (tmp_path / "broken.glb").write_bytes(b"glTF")
    with pytest.raises(ValueError):
        draw(tmp_path / "broken.glb", cameras)
    again = draw(lopsided, cameras, up=UpAxis.Y)
    np.testing.assert_array_equal(again.rgba, first.rgba)
    assert again.left_out == first.left_out == ()


def test_blender_says_nothing(lopsided, capfd):
    draw(lopsided, orbit(1, 0.4, 16))
    assert capfd.readouterr() == ("", "")


def test_it_is_a_drawer_that_reads_all_that_the_ray_caster_reads():
    assert isinstance(Blender(Look()), MeshDrawer)
    assert set(READERS) < set(SUFFIXES) == set(IMPORTERS)
