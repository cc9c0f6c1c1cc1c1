"""Variants of meshes, against the surfaces, light and colours that they should have."""

import json
from itertools import product

import numpy as np
import pytest
import trimesh

from im3d_jax.data import augmentation, mesh_rendering
from im3d_jax.data.augmentation import CHANNELS, Variant, draw, exchange_words, reshape
from im3d_jax.data.meshes.reading import UpAxis, load_mesh
from im3d_jax.data.procedural import LIGHT
from im3d_jax.data.rendering import MeshRenderer, Turntable
from recon_torch.views.cameras import orbit

PLAIN = Variant("rgb", (1.0, 1.0, 1.0), 0.0, tuple(map(float, LIGHT)))


def test_variants_depend_on_seed_and_name_and_stay_in_range():
    variants = [draw(3, f"a/mug~{number}") for number in range(400)]
    assert draw(3, "a/mug~7") == variants[7] != draw(4, "a/mug~7")
    scale = np.array([variant.scale for variant in variants])
    assert 0.8 <= scale.min() < 0.81 and 1.24 < scale.max() <= 1.25
    assert np.log(scale).mean() == pytest.approx(0, abs=0.02)
    turns = np.array([variant.yaw_rad for variant in variants])
    assert turns.min() >= 0 and turns.max() < 2 * np.pi and np.abs(np.exp(1j * turns).mean()) < 0.15
    light = np.array([variant.light for variant in variants])
    np.testing.assert_allclose(np.linalg.norm(light, axis=-1), 1)
    assert light[:, 2].min() >= 0.5 and light[:, 2].max() <= np.sin(np.deg2rad(80))
    counts = [sum(variant.channels == channels for variant in variants) for channels in CHANNELS]
    assert min(counts) > 40 and sum(counts) == 400
    json.dumps(variants[0].said())


def ball():
    """An icosphere of radius 0.5 with its exact normals: (corners, normals)."""
    mesh = trimesh.creation.icosphere(subdivisions=4, radius=0.5)
    corners = np.asarray(mesh.vertices[mesh.faces], np.float32)
    return corners, 2 * corners


def test_a_plain_variant_is_the_mesh():
    corners, normals = ball()
    found, shaded = reshape(corners, normals, PLAIN)
    np.testing.assert_allclose(found, corners, atol=1e-6)
    np.testing.assert_allclose(shaded, normals, atol=1e-6)
    assert found.dtype == corners.dtype and shaded.dtype == normals.dtype


def test_a_stretched_ball_is_an_ellipsoid():
    scale, angle = np.array([1.25, 0.9, 0.8]), 0.7
    corners, normals = reshape(*ball(), PLAIN._replace(scale=tuple(scale), yaw_rad=angle))
    assert np.linalg.norm(corners, axis=-1).max() == pytest.approx(0.5, abs=1e-4)
    along = np.stack([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    axes = 0.5 * scale / scale.max()
    local = corners @ along.T
    np.testing.assert_allclose((local**2 / axes**2).sum(-1), 1, atol=2e-3)
    gradient = (local / axes**2) @ along
    gradient /= np.linalg.norm(gradient, axis=-1, keepdims=True)
    np.testing.assert_allclose(normals, gradient, atol=2e-3)


@pytest.mark.parametrize("light", [(0.6, 0.0, 0.8), (-0.8, 0.1, 0.59), (0.0, 0.0, 1.0)])
def test_the_renderer_shades_as_that_light_would(light):
    light = np.array(light) / np.linalg.norm(light)
    corners, normals = ball()
    _, shaded = reshape(corners, normals, PLAIN._replace(light=tuple(map(float, light))))
    np.testing.assert_allclose(shaded @ LIGHT, normals @ light, atol=1e-5)
    turn = augmentation.turned_to_light(light)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)


@pytest.fixture
def meshes(tmp_path):
    """A box whose faces are red and gray, with a caption, and its directory."""
    box = trimesh.creation.box((1, 2, 3))
    colors = np.full((12, 4), [128, 128, 128, 255], np.uint8)
    colors[:6] = [200, 40, 30, 255]
    box.visual.face_colors = colors
    box.unmerge_vertices()
    box.export(tmp_path / "box.ply")
    return tmp_path


def renderer(meshes, caption="a red and gray box", num_variants=12):
    return MeshRenderer(meshes, {"box": caption}, UpAxis.Z, Turntable(32, 2, 20.0, 1), num_variants)


def test_a_variant_is_the_render_of_the_reshaped_mesh(meshes):
    rendering = renderer(meshes)
    assert rendering.names == ["box", *(f"box~{number}" for number in range(1, 13))]
    recoloured = [name for name in rendering.names[1:] if draw(1, name).channels[0] != "r"][0]
    made, variant = rendering.render(recoloured), draw(1, recoloured)
    mesh = load_mesh(meshes / "box.ply", UpAxis.Z)
    corners, normals = reshape(mesh.corners, mesh.normals, variant)
    colors = mesh.colors[..., ["rgb".index(channel) for channel in variant.channels] + [3]]
    changed = mesh._replace(corners=corners, normals=normals, colors=colors)
    expected, _ = mesh_rendering.render(changed, orbit(2, np.deg2rad(20.0), 32))
    np.testing.assert_allclose(made.rgba, expected, atol=1e-5)
    name = {"g": "green", "b": "blue"}["rgb"[variant.channels.index("r")]]
    assert made.caption == f"a {name} and gray box"
    told = made.more["augmentation"]
    assert (told["of"], told["channels"]) == ("box", variant.channels)
    assert told["caption_of_object"] == "a red and gray box"
    assert made.more["mesh_sha256"] == rendering.render("box").more["mesh_sha256"]


def test_where_the_caption_cannot_follow_the_colours_stay(meshes):
    rendering = renderer(meshes, "a wooden box that is red")
    for name in rendering.names[1:4]:
        made = rendering.render(name)
        assert made.caption == "a wooden box that is red" and made.more["augmentation"]["channels"] == "rgb"
        hue = made.rgba[made.rgba[..., 3] > 0.9]
        assert (hue[:, 0] >= hue[:, 1:3].max(-1) - 1e-6).all()


def test_meshes_with_names_of_variants_are_refused(meshes, user_error):
    (meshes / "box~2.ply").write_bytes((meshes / "box.ply").read_bytes())
    assert renderer(meshes, num_variants=1).names == ["box", "box~1", "box~2", "box~2~1"]
    with user_error("the name of a variant, box~2; rename it"):
        renderer(meshes, num_variants=2)


# ---- Words ----

COLORS = {"red": (0.8, 0.1, 0.1), "green": (0.1, 0.7, 0.1), "blue": (0.1, 0.1, 0.9)}
COLORS |= {"yellow": (0.8, 0.8, 0.1), "cyan": (0.1, 0.8, 0.8), "magenta": (0.8, 0.1, 0.8)}
SEEN = dict(orange=(0.9, 0.45, 0.0), brown=(0.5, 0.3, 0.12), white=(0.95, 0.95, 0.95), red=(0.9, 0.0, 0.05))


def pixels(*colors):
    """Equal shares of these colours, in light and in shadow."""
    rows = [np.array(color) * shade for color in colors for shade in np.linspace(0.5, 1, 20)]
    return np.concatenate([np.array(rows), np.ones((len(rows), 1))], -1)


def test_primary_colours_are_exchanged_as_their_channels_are():
    for (word, color), channels in product(COLORS.items(), CHANNELS):
        after = np.array(color)[["rgb".index(channel) for channel in channels]]
        bright = {name: tuple(np.array(each) > 0.5) for name, each in COLORS.items()}
        (expected,) = [name for name, each in bright.items() if each == tuple(after > 0.5)]
        assert exchange_words(f"a {word} mug", pixels(color), channels) == f"a {expected} mug"


def test_captions_keep_their_articles_and_their_neutral_colours():
    assert exchange_words("a blue mug", pixels((0.1, 0.4, 0.9)), "bgr") == "an orange mug"
    found = exchange_words("An orange car with white doors", pixels(SEEN["orange"], SEEN["white"]), "grb")
    assert found == "A green car with white doors"
    for caption, channels, expected in (
        ("a dark brown dog", "grb", "a dark green dog"),
        ("a brown dog", "rgb", "a brown dog"),
        ("a dog with brown-white fur", "bgr", "a dog with blue-white fur"),
    ):
        assert exchange_words(caption, pixels(SEEN["brown"]), channels) == expected


UNSURE = {
    "no hue": ("a white mug", [SEEN["white"]]),
    "another word": ("a golden and red mug", [SEEN["red"]]),
    "not seen": ("a red and green mug", [SEEN["red"]]),
    "two hues": ("a green mug", [(0.4, 0.8, 0.1), (0.1, 0.8, 0.4)]),
    "one name": ("a brown and orange mug", [SEEN["brown"], SEEN["orange"]]),
    "a fruit": ("half an orange", [SEEN["orange"]]),
    "its slices": ("a plate of orange slices", [SEEN["orange"]]),
}


@pytest.mark.parametrize("why", UNSURE)
def test_captions_that_cannot_follow_are_said_to(why):
    caption, colors = UNSURE[why]
    assert exchange_words(caption, pixels(*colors), "grb") is None
