"""A mesh as what a fit optimises: it finds an object, goes on from its state, and is written as it looks."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import trimesh

from recon_torch.errors import NoGaussiansLeft, UserError
from recon_torch.fit.optimization import Fit
from recon_torch.fit.quality import inspect
from recon_torch.scene import surface_terms
from recon_torch.scene.mesh import HALF_WIDTH
from recon_torch.settings import FitSettings, MeshSettings
from recon_torch.views.cameras import orbit
from recon_torch.views.world import World

CAMERAS = orbit(8, 0.4, 32)
SETTINGS = FitSettings(
    representation="mesh",
    mesh_cells=14,
    mesh_colors=24,
    num_steps=40,
    w_lpips=0.0,
    lpips_net="alex",
    lpips_weights="random",
)


def new_fit(**changes) -> Fit:
    return Fit(CAMERAS, dataclasses.replace(SETTINGS, **changes), "cpu")


@pytest.fixture(scope="module")
def fitted(balls) -> tuple[Fit, dict[str, float]]:
    """A fit that has ended, and its metrics before the first step."""
    fit = new_fit()
    fit.set_targets(*balls(CAMERAS))
    before = fit.metrics()
    fit.run(SETTINGS.num_steps)
    return fit, before


def test_a_fit_finds_shape_and_colours(fitted, balls):
    fit, before = fitted
    held_out = orbit(8, 0.4, 32, azimuths_rad=2 * np.pi * (np.arange(8) + 0.5) / 8)
    after = fit.compare(held_out, *balls(held_out))
    assert after["psnr"] > before["psnr"] + 6 and after["psnr"] > 24
    assert after["silhouette_iou"] > 0.95  # the hull of two balls, with which it begins, is nearly they
    surface = fit.scene.as_surface()
    assert surface.is_watertight
    assert surface.volume == pytest.approx(4 / 3 * np.pi * (0.25**3 + 0.14**3), rel=0.2)
    assert inspect(fit, CAMERAS)["verdict"] == "good"


def test_a_restored_fit_goes_on_bit_for_bit(balls):
    whole, broken = new_fit(), new_fit()
    for fit, steps in ((whole, 4), (broken, 2)):
        fit.set_targets(*balls(CAMERAS))
        fit.run(steps)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed = new_fit()  # which begins as a ball
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.set_targets(*balls(CAMERAS))
    resumed.run(4)
    for name, tensor in whole.scene.parameters.tensors.items():
        assert torch.equal(tensor, resumed.scene.parameters.tensors[name]), name


def test_the_file_has_the_shape_and_the_colours_in_its_world(fitted, tmp_path):
    fit, _ = fitted
    world, up = World(np.array([1.0, 2.0, 3.0]), 0.5), np.array([0.0, 0.0, 1.0])
    path = fit.scene.save(tmp_path / "asset.ply", world, up=up, mesh=MeshSettings(texture=128, triangles=600))
    assert path == tmp_path / "mesh.glb"
    report = json.loads((tmp_path / "mesh.json").read_text())
    assert report["triangles"] <= 600 < len(fit.scene.as_surface().triangles) and report["watertight"]
    mesh = trimesh.load(path, force="mesh")
    ours = mesh.vertices[:, [2, 0, 1]]  # from +Y up, with the front at +Z
    lower, upper = np.array([-0.25, -0.25, -0.4]) / 0.5, np.array([0.25, 0.25, 0.36]) / 0.5
    np.testing.assert_allclose(
        [ours.min(0), ours.max(0)], [lower + world.center, upper + world.center], atol=0.06
    )
    heights = (mesh.triangles_center[:, 1] - 3) * 0.5
    picture = np.asarray(mesh.visual.material.baseColorTexture.convert("RGB")) / 255.0
    uv = mesh.visual.uv[mesh.faces].mean(1) * 127
    colors = picture[(127 - uv[:, 1]).round().astype(int), uv[:, 0].round().astype(int)]
    for chosen, rgb in ((heights > 0.2, [0.2, 0.3, 0.8]), (abs(heights + 0.15) < 0.1, [0.8, 0.2, 0.2])):
        np.testing.assert_allclose(np.median(colors[chosen], 0), rgb, atol=0.08)


def test_colours_are_no_finer_than_pixels():
    """Cells beyond that would hold noise, as no view says what is between its pixels."""
    cells = [max(grid.rows.shape[0] - 1 for grid in new_fit(mesh_colors=n).scene._grids) for n in (12, 96)]  # noqa: SLF001
    assert cells[0] == 12
    ends = np.array([[0, 0, 0], [0, 0, 2 * HALF_WIDTH / cells[1]]])
    seen = orbit(1, 0.0, 32).project(ends).pixels[0]
    assert 1.2 <= np.linalg.norm(seen[1] - seen[0]) < 1.3


def test_terms_are_least_where_nothing_is_in_doubt():
    """A flat sheet has no bend, a right angle has one of 1; agreeing ends of an edge cost less."""
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, -1]])
    edge = torch.tensor([[0, 1, 0, 1]])
    flat, right = (torch.tensor([[0, 1, 2], [1, 0, other]]) for other in (3, 4))
    assert surface_terms.bends(corners, flat, edge).item() == pytest.approx(0, abs=1e-6)
    assert surface_terms.bends(corners, right, edge).item() == pytest.approx(1, abs=1e-6)
    assert surface_terms.area(corners, flat).item() == pytest.approx(1)
    near, far = (
        surface_terms.signs(torch.tensor([-each, each]), torch.tensor([[0, 1]])) for each in (0.1, 2.0)
    )
    assert near < far


def test_what_cannot_be_fitted_is_told(balls):
    fit = new_fit()
    with pytest.raises(UserError, match="give masks"):
        fit.set_targets(balls(CAMERAS)[0], None)
    fit.set_targets(*balls(CAMERAS))
    fit.scene.parameters.tensors["distances"].data.fill_(0.1)
    with pytest.raises(NoGaussiansLeft, match="vanished"):
        fit.run(1)
    with pytest.raises(UserError, match="gsplat renders Gaussians"):
        new_fit(engine="gsplat")


def test_masks_that_agree_nowhere_leave_a_ball(balls):
    views, masks = balls(CAMERAS)
    nowhere = torch.zeros_like(masks)
    nowhere[:4, :4, :4], nowhere[4:, -4:, -4:] = 1, 1
    fit = new_fit()
    fit.set_targets(views, nowhere)
    assert any("starts as a ball" in note for note in fit.notes)
    assert fit.scene.as_surface().volume == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=0.05)
