"""Charts and colours of a ball of two colours, and the files that they go into."""

import functools
import json
import struct
import subprocess

import numpy as np
import pytest
import trimesh
from PIL import Image

from recon_torch.mesh import baking, files, sights, unwrapping
from recon_torch.mesh.baking import Points
from recon_torch.mesh.files import Textured
from recon_torch.mesh.surface import Surface, joined
from recon_torch.mesh.unwrapping import Unwrapped
from recon_torch.settings import MeshFormat
from recon_torch.views.cameras import orbit
from recon_torch.views.directory import Views

RADIUS = 0.3
RED, BLUE = np.array([0.9, 0.1, 0.1]), np.array([0.1, 0.2, 0.9])
SIZE = 128


@functools.cache
def sphere_surface() -> Surface:
    sphere = trimesh.creation.icosphere(subdivisions=3, radius=RADIUS)
    return joined(Surface(np.array(sphere.vertices), np.array(sphere.faces)))


@functools.cache
def unwrapped() -> Unwrapped:
    return unwrapping.unwrap(sphere_surface(), SIZE)


@pytest.fixture(scope="module")
def sources(ball):
    return [sights.look(ball, sights.sphere(12, 96))]


def texel_points(size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    triangles, weights = baking.texels(unwrapped(), size)
    inside = triangles >= 0
    corners = unwrapped().surface.corners[triangles[inside]]
    return inside, (corners * weights[inside][..., None]).sum(1)


def test_charts_lie_in_the_picture_and_keep_the_surface():
    charts = unwrapped()
    assert charts.uvs.min() >= 0 and charts.uvs.max() <= 1
    np.testing.assert_array_equal(
        charts.surface.corners, sphere_surface().vertices[charts.original][charts.surface.triangles]
    )
    np.testing.assert_allclose(np.linalg.norm(charts.normals, axis=-1), 1)
    assert charts.surface.volume == pytest.approx(sphere_surface().volume, rel=1e-6)


def test_texels_lie_on_the_surface_and_do_not_overlap():
    inside, places = texel_points()
    distances = np.linalg.norm(places, axis=-1)
    assert 0.3 < inside.mean() < 1 and distances.max() < RADIUS + 1e-9 and distances.min() > 0.98 * RADIUS


def test_the_texture_of_two_colours(sources):
    """Away from the border of the colours, each texel has that of its side, up to the blur of splats."""
    texture = baking.bake(unwrapped(), SIZE, baking.from_sights(sources))
    inside, places = texel_points()
    assert texture.coverage > 0.99
    for side, color in ((places[:, 0] > 0.06, RED), (places[:, 0] < -0.06, BLUE)):
        error = abs(texture.pixels[inside][side] / 255 - color)
        assert error.mean() < 0.04 and error.max() < 0.12
    # Seams are dilated: what lies between charts has a colour of the object, too.
    between = texture.pixels[~inside].reshape(-1, 3) / 255
    nearest = np.minimum(abs(between - RED).sum(-1), abs(between - BLUE).sum(-1))
    assert np.median(nearest) < 0.1


def test_white_behind_views_does_not_get_into_the_texture():
    """Views over white, whose borders are mixed with it, as files of views are."""
    cameras = orbit(8, 0.0, 64)
    columns, rows = np.meshgrid(np.arange(64) - 31.5, np.arange(64) - 31.5)
    outline = RADIUS / np.sqrt(4 - RADIUS**2) * cameras.intrinsics_px[0, 0, 0]
    mask = (
        np.clip(outline - np.hypot(columns, rows) + 0.5, 0, 1)[None, ..., None]
        .repeat(8, 0)
        .astype(np.float32)
    )
    views = Views(cameras, RED.astype(np.float32) * mask + 1 - mask, mask, ["view"] * 8, [])
    seen = sights.of_views(views)
    texture = baking.bake(unwrapped(), SIZE, baking.from_sights([seen]))
    assert abs(texture.pixels / 255 - RED).max() < 0.01
    assert texture.coverage < 1  # no camera sees the poles, which have the colours beside them
    assert sights.of_views(Views(cameras, views.images, None, views.names, [])) is None


def test_what_hides_a_point_does_not_colour_it(ball):
    """A wall stands between the camera and the ball: the ball has none of the wall's colour."""
    wall = np.array([[0.6, -1, -1], [0.6, 1, -1], [0.6, 1, 1], [0.6, -1, 1]])
    both = Surface(
        np.concatenate([sphere_surface().vertices, wall]),
        np.concatenate(
            [sphere_surface().triangles, [[0, 1, 2], [0, 2, 3]] + np.int64(len(sphere_surface().vertices))]
        ),
    )
    green = np.zeros((1, 32, 32, 3), np.float32) + np.float32([0, 1, 0])
    before = sights.Sights(orbit(1, 0.0, 32), green, np.ones((1, 32, 32), np.float32))
    behind = sights.look(ball, orbit(1, 0.0, 64, azimuths_rad=np.array([np.pi])))
    points = Points(sphere_surface().vertices, sphere_surface().vertices / RADIUS)
    found = baking.colors(both, points, [before, behind])
    assert found.rgb[:, 1].max() < 0.35
    assert not found.seen[sphere_surface().vertices[:, 0] > 0.1].any()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    charts, whole = unwrapped(), sphere_surface()
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    colors = np.round((whole.vertices + 0.5) * 255).astype(np.uint8)
    mesh = Textured(charts.surface, charts.uvs, charts.normals, pixels, whole, colors)
    return directory, mesh, files.write(mesh, directory, ("glb", "obj", "ply", "glb"))


def test_trimesh_reads_what_was_written(written):
    directory, mesh, names = written
    assert names == ["mesh.glb", "mesh.obj", "mesh.mtl", "mesh.png", "mesh.ply"]
    found = trimesh.load(directory / "mesh.glb", process=False).geometry["mesh"]
    np.testing.assert_allclose(found.vertices, mesh.surface.vertices, atol=1e-7)
    np.testing.assert_array_equal(found.faces, mesh.surface.triangles)
    np.testing.assert_allclose(found.visual.uv, mesh.uvs * [1, -1] + [0, 1], atol=1e-6)
    np.testing.assert_allclose(found.vertex_normals, mesh.normals, atol=1e-6)
    material = found.visual.material
    np.testing.assert_array_equal(np.asarray(material.baseColorTexture.convert("RGB")), mesh.texture)
    assert (material.metallicFactor, material.roughnessFactor) == (0, 1)
    obj = trimesh.load(directory / "mesh.obj", process=False)
    np.testing.assert_allclose(obj.triangles, mesh.surface.corners, atol=1e-6)
    np.testing.assert_allclose(obj.visual.uv[obj.faces], found.visual.uv[found.faces], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(Image.open(directory / "mesh.png")), mesh.texture)
    ply = trimesh.load(directory / "mesh.ply", process=False)
    np.testing.assert_allclose(ply.vertices, mesh.whole.vertices, atol=1e-6)
    np.testing.assert_array_equal(ply.visual.vertex_colors[:, :3], mesh.colors)


def test_the_units_are_said(written):
    data = (written[0] / "mesh.glb").read_bytes()
    tree = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])
    assert tree["asset"]["extras"] == {"units": "1 unit is 1 metre", "up": "+Y", "front": "+Z"}


def test_the_khronos_validator_finds_nothing(written, tmp_path):
    """Runs where node and the package gltf-validator are."""
    script = (
        "const v=require('gltf-validator'),fs=require('fs');"
        "v.validateBytes(new Uint8Array(fs.readFileSync(process.argv[1])))"
        ".then(r=>console.log(JSON.stringify(r.issues)))"
    )
    try:
        command = ["node", "-e", script, str(written[0] / "mesh.glb")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no node")
    if done.returncode:
        pytest.skip("no npm package gltf-validator where node looks for it")
    issues = json.loads(done.stdout)
    assert issues["messages"] == []


def test_usd_is_what_was_written(written, tmp_path):
    usd = pytest.importorskip("pxr.Usd")
    from pxr import UsdGeom

    mesh = written[1]
    names = files.write(mesh, tmp_path, (MeshFormat.OBJ, MeshFormat.USD))
    assert names == ["mesh.obj", "mesh.mtl", "mesh.png", "mesh.usdc"]  # the picture is of both
    stage = usd.Stage.Open(str(tmp_path / "mesh.usdc"))
    assert (UsdGeom.GetStageUpAxis(stage), UsdGeom.GetStageMetersPerUnit(stage)) == ("Y", 1.0)
    shape = UsdGeom.Mesh(stage.GetPrimAtPath("/asset/mesh"))
    np.testing.assert_allclose(np.array(shape.GetPointsAttr().Get()), mesh.surface.vertices, atol=1e-6)
    np.testing.assert_array_equal(
        np.array(shape.GetFaceVertexIndicesAttr().Get()), mesh.surface.triangles.ravel()
    )


def test_a_missing_package_is_one_line(monkeypatch, user_error):
    monkeypatch.setitem(__import__("sys").modules, "xatlas", None)
    with user_error(r'pip install "im3d\[mesh\]"'):
        files.check(("glb",))
