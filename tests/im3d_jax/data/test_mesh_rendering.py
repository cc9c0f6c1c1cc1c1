"""The mesh renderer against closed forms of spheres, planes and boxes."""

from pathlib import Path

import numpy as np
import pytest
import trimesh

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.parts import GREY, Material, Part, Scene, Texture, assemble, grey
from im3d_jax.data.meshes.reading import load_mesh
from im3d_jax.data.procedural import AMBIENT, LIGHT
from recon_torch.views.cameras import orbit

pytestmark = pytest.mark.slow

ASSETS = Path(__file__).parents[4] / "shared" / "assets"


def rays_of(views, index):
    """Centre [3] and directions [H, W, 3] with unit z in the camera, from inverse matrices, in float64."""
    pixel = np.stack(np.meshgrid(np.arange(views.width) + 0.5, np.arange(views.height) + 0.5), -1)
    homogeneous = np.concatenate([pixel, np.ones_like(pixel[..., :1])], -1)
    c2w = np.linalg.inv(views.w2c[index].astype(np.float64))
    directions = homogeneous @ np.linalg.inv(views.intrinsics_px[index].astype(np.float64)).T
    return c2w[:3, 3], directions @ c2w[:3, :3].T


def unlit(rgba, normal):
    """Albedo, given what a surface of one normal was rendered as."""
    return rgba[..., :3] / (AMBIENT + (1 - AMBIENT) * np.dot(normal, LIGHT))


def to_linear(srgb):
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def mesh_of(geometry, srgb=GREY):
    """A mesh of trimesh's triangles. srgb: a colour in [0, 1] of all of them, or of each."""
    corners = np.asarray(geometry.triangles)
    colors = grey(len(corners))
    colors[..., :3] = to_linear(np.broadcast_to(srgb, (len(corners), 3)))[:, None]
    return assemble(Scene([Part(corners, None, colors)], [], set()), "it", y_up=False)


def test_sphere_matches_the_closed_form():
    ball = trimesh.creation.icosphere(subdivisions=6, radius=3.0)
    ball.apply_translation([4, 5, 6])
    mesh = mesh_of(ball, np.array([200, 100, 50]) / 255)
    views = orbit(3, 0.5, 48)
    rgba, depth = mesh_rendering.render(mesh, views, supersampling=1)
    for k in range(3):
        origin, direction = rays_of(views, k)
        a, b, c = (direction**2).sum(-1), direction @ origin, origin @ origin - 0.25
        discriminant = b**2 - a * c
        inside, outside = discriminant > 0.01, discriminant < 0
        expected = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
        assert (rgba[k, ..., 3][inside] == 1).all()
        assert (rgba[k, ..., 3][outside] == 0).all()
        assert (depth[k][outside] == 0).all()
        np.testing.assert_allclose(depth[k, ..., 0][inside], expected[inside], atol=1e-3)
        normal = (origin + expected[..., None] * direction) / 0.5
        shade = AMBIENT + (1 - AMBIENT) * (normal @ LIGHT)
        lit = np.array([200, 100, 50]) / 255 * shade[..., None]
        np.testing.assert_allclose(rgba[k, ..., :3][inside], lit[inside], atol=6e-3)


def test_supersampled_silhouette_has_the_area_of_the_disc():
    mesh = mesh_of(trimesh.creation.icosphere(subdivisions=5))
    views = orbit(1, 0.0, 64)
    rgba, depth = mesh_rendering.render(mesh, views, supersampling=4)
    radius_px = views.intrinsics_px[0, 0, 0] * np.tan(np.arcsin(0.5 / 2))
    assert rgba[..., 3].sum() == pytest.approx(np.pi * radius_px**2, rel=2e-3)
    partial = (rgba[..., 3] > 0) & (rgba[..., 3] < 1)
    assert partial.any()
    # Straight colours and mean depth: a half-covered pixel is neither dark nor near.
    assert rgba[..., :3][partial].min() > 0.9 * GREY * (2 * AMBIENT - 1)
    assert depth[..., 0][partial].min() > 1.7


def test_shading_is_smooth_up_to_the_silhouette_of_a_coarse_sphere():
    """There the smooth normals of visible triangles point away from the camera and must stay so."""
    mesh = mesh_of(trimesh.creation.icosphere(subdivisions=2))
    views = orbit(1, 0.0, 64)
    rgba, depth = mesh_rendering.render(mesh, views, supersampling=1)
    origin, direction = rays_of(views, 0)
    normal = origin + depth[0] * direction  # of the ball, up to its length
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    expected = GREY * (AMBIENT + (1 - AMBIENT) * (normal @ LIGHT))
    hit = rgba[0, ..., 3] == 1
    np.testing.assert_allclose(rgba[0, ..., 0][hit], expected[hit], atol=0.02)


def test_box_faces_are_flat_and_colours_per_face():
    box = trimesh.creation.box(extents=[1, 1, 1])
    colors = {axis: np.array([60 * axis + 60, 200 - 50 * axis, 90]) for axis in range(3)}
    mesh = mesh_of(box, np.array([colors[int(np.abs(n).argmax())] for n in box.face_normals]) / 255)
    views = orbit(4, 0.6, 64)
    rgba, depth = mesh_rendering.render(mesh, views, supersampling=1)
    half = 0.5 / np.sqrt(3)
    for k in range(4):
        origin, direction = rays_of(views, k)
        point = origin + depth[k] * direction
        axis = np.abs(point).argmax(-1)
        hit = rgba[k, ..., 3] == 1
        np.testing.assert_allclose(np.abs(point).max(-1)[hit], half, atol=1e-4)
        for a in range(3):
            on_face = hit & (axis == a) & (np.sort(np.abs(point), -1)[..., 1] < half - 0.02)
            for sign in (-1, 1):
                chosen = on_face & (np.sign(point[..., a]) == sign)
                albedo = unlit(rgba[k], sign * np.eye(3)[a])[chosen]
                np.testing.assert_allclose(albedo, np.broadcast_to(colors[a] / 255, albedo.shape), atol=1e-5)


def textured_plane(pixels):
    """The square y, z in [-1, 1] at x = 0, facing view 0 (+X); u grows with y, and v downwards."""
    vertices = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1]], float)
    uvs = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], float)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    rgba = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], -1)
    part = Part(vertices[faces], None, np.ones((2, 3, 4)), uvs[faces], None, Material(texture=0))
    return assemble(Scene([part], [Texture(rgba)], set()), "it", y_up=False)


def test_texture_is_interpolated_and_upright():
    size = 8
    ramp = np.arange(size) * 20 + 10
    pixels = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], 77), -1).astype(np.uint8)
    mesh = textured_plane(pixels)
    views = orbit(1, 0.0, 64)
    rgba, depth = mesh_rendering.render(mesh, views, supersampling=1)
    origin, direction = rays_of(views, 0)
    half = 0.5 / np.sqrt(2)
    point = origin - origin[0] / direction[..., :1] * direction
    u, v = (point[..., 1] / half + 1) / 2, (point[..., 2] / half + 1) / 2
    # Away from the border, where the texture repeats, linear colours are interpolated along u and along v.
    inner = (np.abs(u - 0.5) < 0.5 - 0.5 / size) & (np.abs(v - 0.5) < 0.5 - 0.5 / size)
    red, green = (
        255 * to_srgb(np.interp(place * size - 0.5, np.arange(size), to_linear(ramp / 255)))
        for place in (u, 1 - v)
    )
    albedo = unlit(rgba[0], [1, 0, 0]) * 255
    np.testing.assert_allclose(albedo[inner], np.stack([red, green, 0 * u + 77], -1)[inner], atol=0.02)
    np.testing.assert_allclose(depth[0][inner], 2.0, atol=1e-4)


def test_open_surfaces_are_lit_from_both_sides():
    mesh = textured_plane(np.full((2, 2, 3), 51, np.uint8))
    rgba, _ = mesh_rendering.render(mesh, orbit(2, 0.0, 32), supersampling=1)
    for k, sign in enumerate((1, -1)):
        np.testing.assert_allclose(unlit(rgba[k], [sign, 0, 0])[16, 16], 0.2, atol=1e-5)


def test_glb_parts_transforms_and_factors(tmp_path):
    """Three parts in glTF axes: red in front (+Z), a green one on top (+Y), a blue one to the side (+X)."""
    scene = trimesh.Scene()
    places = {"red": [0, 0, 1], "green": [0, 1, 0], "blue": [1, 0, 0]}
    for name, place in places.items():
        factor = [200 if name == color else 30 for color in places]
        box = trimesh.creation.box(extents=[0.5, 0.5, 0.5])
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=[*factor, 255])
        box.visual = trimesh.visual.TextureVisuals(uv=np.zeros((len(box.vertices), 2)), material=material)
        transform = np.diag([1.0, 1.0, -1.0, 1.0])  # mirrored, to test that faces do not turn inside out
        transform[:3, 3] = place
        scene.add_geometry(box, transform=transform)
    scene.export(tmp_path / "x.glb")
    mesh = load_mesh(tmp_path / "x.glb")
    assert len(mesh.corners) == 36
    assert np.linalg.norm(mesh.corners, axis=-1).max() == pytest.approx(0.5)
    centres = {}
    for k, name in enumerate(places):
        bright = mesh.colors[:, 0, :3].argmax(-1) == k
        centres[name] = mesh.corners[bright].reshape(-1, 3).mean(0)
        np.testing.assert_allclose(mesh.colors[bright][..., k], 200 / 255, atol=1e-6)
        outward = (mesh.normals[bright] * (mesh.corners[bright] - centres[name])).sum(-1)
        assert (outward > 0).all()
    front, top, side = centres["red"], centres["green"], centres["blue"]
    assert front[0] > max(top[0], side[0])
    assert top[2] > max(front[2], side[2])
    assert side[1] > max(front[1], top[1])


def test_bad_meshes_are_user_errors(tmp_path, user_error):
    (tmp_path / "bad.glb").write_bytes(b"glTF nonsense")
    (tmp_path / "empty.obj").write_text("v 0 0 0\n")
    (tmp_path / "point.obj").write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n")
    for name, message in [
        ("none.glb", "no mesh at"),
        ("bad.glb", "cannot read"),
        ("empty.obj", "no triangles"),
        ("point.obj", "no extent"),
    ]:
        with user_error(message):
            load_mesh(tmp_path / name)
    with user_error("the up axis of .*bad.glb is 'x'; choose one of y, z"):
        load_mesh(tmp_path / "bad.glb", up="x")


@pytest.mark.skipif(
    not ASSETS.is_dir(), reason="needs meshes made by others, which are not in the repository"
)
@pytest.mark.parametrize(
    "name, rgb", [("Duck.glb", [0.7, 0.6, 0.0]), ("CesiumMilkTruck.glb", [0.5, 0.5, 0.5])]
)
def test_real_meshes(name, rgb):
    mesh = load_mesh(ASSETS / name)
    views = orbit(4, 0.3, 32)
    rgba, depth = mesh_rendering.render(mesh, views, supersampling=2)
    covered = rgba[..., 3] == 1
    assert 0.1 < covered.mean() < 0.6
    np.testing.assert_allclose(rgba[covered][:, :3].mean(0), rgb, atol=0.1)
    for k in range(4):
        origin, direction = rays_of(views, k)
        point = (origin + depth[k] * direction)[covered[k]]
        assert np.linalg.norm(point, axis=-1).max() < 0.51
