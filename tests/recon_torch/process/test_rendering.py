"""Renders of files of Gaussians, against a render of the Gaussians themselves."""

import numpy as np
import pytest
import torch

from recon_torch.formats.ply import save_ply
from recon_torch.process.rendering import render_file
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render
from recon_torch.views import axes
from recon_torch.views.cameras import orbit


@pytest.fixture
def blobs():
    """Opaque blobs of several colours in the ball of radius 0.45, more to one side than to the other."""
    generator = torch.Generator().manual_seed(0)
    means = 0.25 * torch.rand(40, 3, generator=generator) * torch.tensor([1.0, 0.6, 1.4])
    quats = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(40, 1)
    return Gaussians(
        means,
        quats,
        torch.full((40, 3), -3.2),
        torch.full((40,), 4.0),
        torch.rand(40, 3, generator=generator) * 2 - 1,
    )


def test_a_file_is_seen_as_its_gaussians_are(blobs, tmp_path):
    cameras = orbit(4, 0.3, 32)
    expected = render(blobs, cameras)
    save_ply(blobs, tmp_path / "asset.ply")
    found = render_file(tmp_path / "asset.ply", cameras)
    assert found.shape == (4, 32, 32, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found[..., 3:], expected.alpha, atol=1e-5)
    np.testing.assert_allclose(found[..., :3] * found[..., 3:], expected.rgb.clamp(0, 1), atol=1e-2)


def test_the_axis_of_a_file_that_is_up_can_be_named(blobs, tmp_path):
    """A file whose y points down the world's z, as some methods write it, and that does not say so."""
    cameras = orbit(4, 0.3, 32)
    rotation = axes.matrix(("x", "-z", "y"))
    save_ply(blobs, tmp_path / "a.ply", axes.axes_of(rotation))
    lines = (tmp_path / "a.ply").read_bytes().split(b"\n")
    (tmp_path / "a.ply").write_bytes(b"\n".join(line for line in lines if not line.startswith(b"comment")))
    found = render_file(tmp_path / "a.ply", cameras, "-y")
    expected = render(blobs, cameras).alpha.numpy()
    # Up is right; where the orbit begins is not known, so one of its quarter turns fits.
    errors = [abs(np.roll(found[..., 3:], turn, 0) - expected).max() for turn in range(4)]
    assert min(errors) < 1e-4 < 0.1 < sorted(errors)[1]
    other = render_file(tmp_path / "a.ply", cameras, "z")
    assert min(abs(np.roll(other[..., 3:], turn, 0) - expected).max() for turn in range(4)) > 0.1


def test_what_is_no_file_of_gaussians_is_refused(tmp_path, user_error):
    (tmp_path / "a.ply").write_text("nothing")
    with user_error("a.ply"):
        render_file(tmp_path / "a.ply", orbit(1, 0.0, 16))
