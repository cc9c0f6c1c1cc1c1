"""The radiance field: absorption in closed form, gradients, and a fit that finds an object."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.ndimage import map_coordinates

from recon_torch.errors import UserError
from recon_torch.fit.optimization import Fit
from recon_torch.fit.quality import inspect
from recon_torch.losses.metrics import psnr
from recon_torch.scene import nerf
from recon_torch.scene.nerf import RADIUS, RadianceField, absorb, evaluate
from recon_torch.scene.splats import Splats
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit
from recon_torch.views.world import World

pytestmark = pytest.mark.slow

CAMERAS = orbit(8, 0.4, 32)
SETTINGS = FitSettings(
    representation="nerf",
    nerf_cells=32,
    nerf_samples=32,
    num_steps=120,
    lpips_net="alex",
    lpips_stages=2,
    lpips_weights="random",
)


def new_fit(**changes) -> Fit:
    return Fit(CAMERAS, dataclasses.replace(SETTINGS, **changes), "cpu")


def fill(fit: Fit, value: float) -> None:
    for name, param in fit.scene.parameters.tensors.items():
        param.data.fill_(value if name == f"octave_{fit.settings.nerf_cells}" else 0.0)


def bytes_of(fit: Fit) -> bytes:
    return b"".join(param.detach().numpy().tobytes() for param in fit.scene.parameters.tensors.values())


def test_absorption_agrees_with_a_loop():
    depths = 2 * torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, weights in zip(depths.tolist(), absorb(depths).tolist(), strict=True):
        light = 1.0
        for depth, weight in zip(row, weights, strict=True):
            assert weight == pytest.approx(light * (1 - math.exp(-depth)), rel=1e-12)
            light *= math.exp(-depth)


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(1)
    field = torch.randn(1, 4, 4, 4, 4, dtype=torch.float64, generator=generator)
    field[:, 0] += 3
    origins = torch.tensor([[2.0, 0.1, 0.2], [1.9, -0.2, 0.3]], dtype=torch.float64)
    directions = torch.nn.functional.normalize(-origins + 0.1, dim=-1)
    near, far = torch.tensor([[1.5, 1.6], [2.4, 2.3]], dtype=torch.float64)
    jitter = torch.rand(2, 6, dtype=torch.float64, generator=generator)
    rays = nerf.Rays(origins, directions, near, far)
    assert torch.autograd.gradcheck(lambda grid: nerf.march(grid, rays, jitter), field.requires_grad_())


def test_a_ball_of_constant_density_absorbs_in_closed_form():
    """Alpha is 1 - exp(-density times chord), over white; depth is the mean of what a ray loses."""
    fit = new_fit()
    fill(fit, 4.5)
    fit.scene.parameters.tensors["octave_32"].data[:, 1:] = 0.0
    density = math.log1p(math.exp(4.5 + nerf.INITIAL_DENSITY)) * 31 / (2 * RADIUS)
    render = fit.render(CAMERAS)
    rows, columns = np.mgrid[:32, :32] + 0.5
    for k in range(len(CAMERAS)):
        inverse = np.linalg.inv(CAMERAS.intrinsics_px[k].astype(float))
        rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ inverse.T
        lengths = np.linalg.norm(rays, axis=-1)
        to_middle = CAMERAS.w2c[k, :3, 3].astype(float)
        along = rays @ to_middle / lengths
        half_chord = np.sqrt(np.maximum(RADIUS**2 - (to_middle @ to_middle - along**2), 0))
        alpha = 1 - np.exp(-density * 2 * half_chord)
        np.testing.assert_allclose(render.alpha[k, ..., 0], alpha, atol=2e-4)
        np.testing.assert_allclose(render.rgb[k], np.stack([1 - alpha / 2] * 3, -1), atol=2e-4)
        seen = alpha > 0.2
        x = density * 2 * half_chord[seen]
        mean = along[seen] - half_chord[seen] + (1 / density) * (1 - x * np.exp(-x) / (1 - np.exp(-x)))
        np.testing.assert_allclose(render.depth[k, ..., 0][seen], mean / lengths[seen], atol=2e-3)


def test_the_opacity_grid_of_a_ball_has_its_volume_and_density():
    fit = new_fit()
    fill(fit, 4.5)
    grid = fit.scene.opacity_grid(1.2, 60)
    density = math.log1p(math.exp(4.5 + nerf.INITIAL_DENSITY)) * 31 / (2 * RADIUS)
    filled = grid > 0
    assert filled.sum() * 0.04**3 == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.02)
    torch.testing.assert_close(grid[filled], torch.full_like(grid[filled], 1 - math.exp(-density * 0.04)))


def test_a_fit_agrees_with_held_out_views(balls):
    fit = new_fit()
    fit.set_targets(*balls(CAMERAS))
    fit.run(SETTINGS.num_steps)
    held_out = orbit(8, 0.4, 32, azimuths_rad=2 * np.pi * (np.arange(8) + 0.5) / 8)
    views, masks = balls(held_out)
    quality = fit.compare(held_out, views, masks)
    best_constant = views.mean((0, 1, 2)).expand_as(views)
    assert quality["psnr"] > 26 > psnr(best_constant, views).mean() + 10
    assert quality["silhouette_iou"] > 0.9
    assert inspect(fit, CAMERAS)["verdict"] == "good"


def test_a_restored_fit_goes_on_bit_for_bit(balls):
    whole, broken, other = new_fit(), new_fit(), new_fit(seed=1)
    for fit, steps in ((whole, 9), (broken, 4), (other, 9)):
        fit.set_targets(*balls(CAMERAS))
        fit.run(steps)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed = new_fit()
    resumed.set_targets(*balls(CAMERAS))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.run(9)
    assert bytes_of(resumed) == bytes_of(whole) != bytes_of(other)


def test_rays_marched_in_parts_give_the_same_fit(balls, monkeypatch):
    """The gradients, which are computed by marching again, are the same, too."""
    steps = []
    for rays in (nerf.RAYS_AT_ONCE, 300):
        monkeypatch.setattr(nerf, "RAYS_AT_ONCE", rays)
        fit = new_fit(views_per_step=2)
        fit.set_targets(*balls(CAMERAS))
        fit.run(2)
        steps.append(fit.render(CAMERAS).rgb)
    torch.testing.assert_close(*steps, atol=1e-4, rtol=0)


def test_the_metadata_of_the_file_say_how_to_read_it(tmp_path):
    """SciPy reads density and colour at random points by the metadata alone, in another world."""
    fit, generator = new_fit(), torch.Generator().manual_seed(2)
    for param in fit.scene.parameters.tensors.values():
        param.data += 3 * torch.randn(param.shape, generator=generator)
    path = fit.scene.save(tmp_path / "asset.ply", World(np.array([1.0, 2.0, 3.0]), 0.5))
    assert path == tmp_path / "asset.safetensors"
    with safe_open(path, "np") as file:
        field, metadata = file.get_tensor("field"), file.metadata()
    center, half_width = json.loads(metadata["center"]), json.loads(metadata["half_width"])
    points = (torch.rand(50, 3, generator=generator) - 0.5).double() * RADIUS
    theirs = points.numpy() / 0.5 + center
    index = (theirs - center + half_width) / (2 * half_width) * (field.shape[-1] - 1)
    values = np.stack([map_coordinates(channel, index.T[::-1], order=1) for channel in field])

    def softplus(x):
        return np.log1p(np.exp(x))

    density, color = (part[0].detach().numpy() for part in evaluate(fit.scene.field(), points[None].float()))
    read = eval(metadata["density_per_unit"], {"softplus": softplus, "field": values})
    np.testing.assert_allclose(read, density * 0.5, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(1 / (1 + np.exp(-values[1:4])).T, color, atol=1e-4)


def test_the_representation_names_the_scene():
    assert type(new_fit().scene) is RadianceField
    assert type(new_fit(representation="gaussians").scene) is Splats
    with pytest.raises(UserError, match="representation is 'voxels'; give one of gaussians, nerf, mesh"):
        new_fit(representation="voxels")
