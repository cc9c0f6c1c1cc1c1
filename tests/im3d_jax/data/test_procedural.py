"""The ray caster against closed forms and against meshes of the same primitives cast by Embree."""

import jax
import numpy as np
import pytest
import trimesh

from im3d_jax.data import objects, procedural
from recon_torch.views import cameras

pytestmark = pytest.mark.slow

SIZE, VIEWS = 32, 4  # of all renders here, which thus share two compiled programs
HALF_WIDTH = np.float32(np.tan(np.deg2rad(33.8) / 2))
ELEVATION_RAD = 0.5
AZIMUTHS_RAD = 2 * np.pi * np.arange(VIEWS) / VIEWS


def cast(scenes, supersampling=1, size=SIZE):
    """[B, K, H, W, C] arrays of scenes seen at `ELEVATION_RAD`."""
    orbit = cameras.orbit(VIEWS, ELEVATION_RAD, size)
    w2c = np.stack([orbit.w2c] * len(scenes))
    views = procedural.render(objects.pack(scenes), w2c, HALF_WIDTH, size, supersampling)
    return [np.asarray(view) for view in views]


def scene_of(kind, center, half_size, **keywords):
    scene = objects.Scene()
    scene.add(kind, center, half_size, (0.2, 0.5, 0.9), **keywords)
    return scene


def rays(azimuth_rad):
    """Origin [3] and directions [H, W, 3] of unit depth, from the definition of the orbit."""
    cos_a, sin_a, cos_e, sin_e = (
        *(f(azimuth_rad) for f in (np.cos, np.sin)),
        *(f(0.5) for f in (np.cos, np.sin)),
    )
    origin = 2 * np.array([cos_e * cos_a, cos_e * sin_a, sin_e])
    forward = -origin / 2
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    ticks = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1) * HALF_WIDTH
    return origin, forward + ticks[None, :, None] * right + ticks[:, None, None] * down


def mesh_of(kind, shape):
    if kind == "ellipsoid":
        return trimesh.creation.icosphere(subdivisions=5)
    if kind == "box":
        return trimesh.creation.box((2, 2, 2))
    if kind == "torus":
        return trimesh.creation.torus(1, shape, major_sections=192, minor_sections=96)
    return trimesh.creation.revolve([[0, -1], [1, -1], [shape, 1], [0, 1]], sections=512)


def cast_meshes(scene, azimuth_rad):
    """(rgb, hit, depth) of a scene's primitives as meshes, in float64."""
    meshes, colors = [], []
    for kind, group in scene.primitives.items():
        for center, axes, color, shape in group:
            mesh = mesh_of(kind, shape)
            mesh.apply_transform(np.block([[axes, center[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]]))
            meshes.append(mesh)
            colors += [color] * len(mesh.faces)
    mesh = trimesh.util.concatenate(meshes)
    origin, directions = rays(azimuth_rad)
    flat = directions.reshape(-1, 3)
    points, ray, face = mesh.ray.intersects_location(
        np.tile(origin, (len(flat), 1)), flat, multiple_hits=False
    )
    rgb, depth, hit = np.ones_like(flat), np.zeros(len(flat)), np.zeros(len(flat), bool)
    light = np.array([0.45, 0.35, 0.82]) / np.linalg.norm([0.45, 0.35, 0.82])
    shade = 0.62 + 0.38 * mesh.face_normals[face] @ light
    hit[ray], depth[ray] = True, (points - origin) @ (-origin / 2)
    rgb[ray] = np.clip(np.array(colors)[face] * shade[:, None], 0, 1)
    return rgb.reshape(SIZE, SIZE, 3), hit.reshape(SIZE, SIZE, 1), depth.reshape(SIZE, SIZE, 1)


@pytest.mark.parametrize("category", ["mug", "house", "duck", "donut", "ice cream", "rocket"])
def test_objects_agree_with_meshes(category):
    scene = objects.make_object(0, 3, category=category)
    rgb, alpha, depth = (array[0] for array in cast([scene]))
    for view, azimuth_rad in enumerate(AZIMUTHS_RAD):
        mesh_rgb, mesh_hit, mesh_depth = cast_meshes(scene, azimuth_rad)
        hit = alpha[view] > 0
        assert mesh_hit.sum() > 60
        assert (hit != mesh_hit).sum() <= 3  # rays that graze
        both = (hit & mesh_hit)[..., 0]
        depth_error = np.abs(depth[view] - mesh_depth)[both]
        color_error = np.abs(rgb[view] - mesh_rgb)[both].max(-1)
        assert np.mean(depth_error > 2e-3) < 0.02 and np.median(depth_error) < 2e-4
        assert np.mean(color_error > 0.02) < 0.04 and np.median(color_error) < 3e-3
        assert (rgb[view][~hit[..., 0]] == 1).all() and (depth[view][~hit] == 0).all()


def test_a_sphere_matches_the_closed_form():
    radius = 0.4
    rgb, alpha, depth = (array[0] for array in cast([scene_of("ellipsoid", (0, 0, 0), radius)]))
    for view, azimuth_rad in enumerate(AZIMUTHS_RAD):
        origin, direction = rays(azimuth_rad)
        a, b = (direction**2).sum(-1), direction @ origin
        discriminant = b**2 - a * (4 - radius**2)
        expected = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
        hit = discriminant > 0
        assert (alpha[view, ..., 0] == hit).all()
        np.testing.assert_allclose(depth[view, ..., 0][hit], expected[hit], atol=2e-4)
        normal = (origin + expected[..., None] * direction) / radius
        shade = procedural.AMBIENT + (1 - procedural.AMBIENT) * normal @ procedural.LIGHT
        np.testing.assert_allclose(rgb[view, ..., 2][hit], 0.9 * shade[hit], atol=2e-3)


def test_a_known_point_is_where_the_cameras_project_it_and_keeps_its_colour():
    """The top of a box has the same light in all views, because the light is fixed to the object."""
    center = np.array([0.12, -0.2, 0.1])
    rgb, alpha, depth = (array[0] for array in cast([scene_of("box", center, (0.08, 0.1, 0.05))]))
    orbit = cameras.orbit(VIEWS, ELEVATION_RAD, SIZE)
    top = center + [0, 0, 0.05]
    expected = np.array([0.2, 0.5, 0.9]) * (0.62 + 0.38 * procedural.LIGHT[2])
    for view in range(VIEWS):
        seen = orbit.w2c[view, :3, :3] @ top + orbit.w2c[view, :3, 3]
        x, y, _ = orbit.intrinsics_px[view] @ (seen / seen[2])
        row, column = int(y), int(x)
        assert alpha[view, row, column] == 1
        np.testing.assert_allclose(rgb[view, row, column], expected, atol=1e-4)
        assert abs(depth[view, row, column, 0] - seen[2]) < 0.06  # half a pixel of a slanted plane
        rows, columns = np.nonzero(alpha[view, ..., 0])
        assert abs(rows.mean() + 0.5 - y) < 3 and abs(columns.mean() + 0.5 - x) < 2


def test_nearer_primitives_hide_farther_ones_in_any_order():
    def pair(*halves):
        scene = objects.Scene()
        for half, color in halves:
            scene.add("ellipsoid", (0, 0, 0), half, color)
        return scene

    inner, outer = (0.1, (1.0, 0.0, 0.0)), (0.3, (0.0, 1.0, 0.0))
    images = [cast([pair(*halves)])[0] for halves in ((inner, outer), (outer, inner))]
    assert np.array_equal(*images)
    assert images[0][0, :, SIZE // 2, SIZE // 2, 0].max() == 0


def test_supersampling_is_the_mean_of_a_finer_image():
    scene = objects.make_object(0, 8, category="chair")
    fine, coarse = cast([scene]), cast([scene], supersampling=2, size=SIZE // 2)

    def pooled(array):
        return array.reshape(1, VIEWS, SIZE // 2, 2, SIZE // 2, 2, -1).mean((3, 5))

    np.testing.assert_allclose(coarse[0], pooled(fine[0]), atol=1e-5)
    np.testing.assert_allclose(coarse[1], pooled(fine[1]), atol=1e-6)
    np.testing.assert_allclose(coarse[2] * coarse[1], pooled(fine[2]), atol=1e-5)
    assert set(np.unique(coarse[1])) == {0, 0.25, 0.5, 0.75, 1}


@pytest.mark.parametrize("at_once", [2, 3, 8])
def test_objects_rendered_together_are_those_rendered_alone(at_once):
    """As a GPU renders them, the last group smaller. Of two faces at one depth, either may be in front."""
    scenes = objects.on_turntables(3, range(20_000, 20_005), VIEWS)
    arguments = scenes.packed, scenes.w2c, HALF_WIDTH, SIZE // 2
    assert_same(*(procedural.render(*arguments, at_once=count) for count in (1, at_once)))


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert np.mean(np.abs(np.asarray(a) - b).max(-1) > 1e-4) < 1e-3


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_objects_rendered_on_a_gpu_are_those_of_the_cpu():
    scenes = objects.on_turntables(3, range(20_000, 20_005), VIEWS)
    arguments = scenes.packed, scenes.w2c, HALF_WIDTH, SIZE // 2
    on_gpu = jax.device_get(procedural.render(*arguments))
    with jax.default_device(jax.devices("cpu")[0]):
        assert_same(on_gpu, jax.device_get(procedural.render(*arguments, at_once=1)))


def test_a_gpu_renders_as_many_objects_together_as_its_memory_holds(monkeypatch):
    num_rays = 16 * 256**2
    assert procedural.objects_at_once(num_rays) == 1
    monkeypatch.setattr(procedural.jax, "default_backend", lambda: "gpu")
    assert procedural.objects_at_once(num_rays) == 32 and procedural.objects_at_once(2**30) == 1


def test_one_compiled_program_renders_all_categories(caplog):
    with jax.log_compiles():
        for category in objects.CATEGORIES:
            cast([objects.make_object(5, 1, category=category)], size=SIZE - 2)  # a size of no other test
    compiled = [each for each in caplog.messages if "Finished XLA compilation of jit(render)" in each]
    assert len(compiled) == 1


def test_turntables_are_the_objects_on_their_orbits():
    def turntable(**keywords):
        return procedural.turntables(7, [20_001], size=SIZE // 2, **keywords)

    first = turntable(num_views=VIEWS)
    assert first.captions == [objects.make_object(7, 20_001).caption]
    assert first.views.rgb.shape == (1, VIEWS, SIZE // 2, SIZE // 2, 3)
    assert first.views.alpha.shape == first.views.depth.shape == (1, VIEWS, SIZE // 2, SIZE // 2, 1)
    assert first.elevation_rad.tolist() == pytest.approx([objects.elevation_rad(7, 20_001)])
    turned = turntable(azimuths_rad=np.roll(AZIMUTHS_RAD, 1))
    np.testing.assert_allclose(turned.views.rgb, np.roll(first.views.rgb, 1, axis=1), atol=1e-5)
    given = turntable(num_views=VIEWS, elevations_rad=[ELEVATION_RAD])
    scene = objects.make_object(7, 20_001)
    np.testing.assert_allclose(given.views.rgb, cast([scene], 2, SIZE // 2)[0], atol=1e-5)


def test_elevations_are_uniform_up_to_45_degrees():
    elevations = np.array([objects.elevation_rad(0, i) for i in range(2000)])
    assert elevations.min() >= 0 and elevations.max() <= np.pi / 4
    np.testing.assert_allclose(
        np.quantile(elevations, [0.25, 0.5, 0.75]), np.pi / 16 * np.arange(1, 4), atol=0.04
    )
