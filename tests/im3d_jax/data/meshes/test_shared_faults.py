"""Files of others that were read wrongly once, and the right values. They are not in the repository."""

from pathlib import Path

import numpy as np
import pytest

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.reading import load_mesh
from im3d_jax.data.procedural import AMBIENT, LIGHT
from recon_torch.views.cameras import orbit

FAULTS = Path(__file__).parents[5] / "shared" / "faults" / "meshes"

pytestmark = pytest.mark.skipif(not FAULTS.is_dir(), reason="needs files of others")

UNLIT = {
    "f_color0.glb": (200, 100, 50),
    "f_color0_times_factor.glb": (200, 100, 50),
    "f_tex_color0.glb": (0, 40, 0),
    "f_tex_transform.glb": (40, 60, 220),
    "f_dark.glb": (30, 30, 30),
    "f_factor.glb": (200, 100, 50),
    "f_tex.glb": (220, 40, 40),
}
RED_VASE = ["second_uv.glb", "quantized.glb", "skinned.glb", "a_backslash/vase.obj", "c_percent/vase.gltf"]


def render(name, size=33):
    rgba, _ = mesh_rendering.render(load_mesh(FAULTS / name), orbit(2, 0.0, size), supersampling=1)
    return rgba


@pytest.mark.parametrize("name", UNLIT)
def test_colours(name):
    albedo = render(name)[0, 16, 16, :3] / (AMBIENT + (1 - AMBIENT) * LIGHT[0])
    np.testing.assert_allclose(albedo * 255, UNLIT[name], atol=0.1)


@pytest.mark.parametrize("name", RED_VASE)
def test_the_same_vase_in_many_forms(name):
    np.testing.assert_allclose(render(name), render("second_uv.glb"), atol=0.02)


def test_draco():
    pytest.importorskip("DracoPy")
    difference = np.abs(render("draco.glb") - render("second_uv.glb"))
    assert difference.mean() < 0.005


def test_transparency_and_what_is_missing():
    assert (render("leaf_cutout.glb")[..., 3] > 0).sum() < 0.9 * (render("second_uv.glb")[..., 3] > 0).sum()
    tree = render("tree-park-large.glb", 65)[..., 3]
    assert ((tree > 0) & (tree < 1)).any()
    assert load_mesh(FAULTS / "tree-park-large.glb").left_out == ("missing texture: Textures/tiles.png",)
    assert load_mesh(FAULTS / "f_texture_missing/vase.obj").left_out == ("missing texture: wood.png",)


def test_a_texture_transform_and_colours_times_a_texture():
    blue = render("texture_transform.glb")
    assert (blue[blue[..., 3] > 0][:, 2] > blue[blue[..., 3] > 0][:, 0]).mean() > 0.9
    plain, product = render("second_uv.glb"), render("colour_times_texture.glb")
    assert (product <= plain + 1e-6).all() and product.mean() < plain.mean()
