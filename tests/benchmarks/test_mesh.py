"""What the mesh benchmark hands to Open3D, and that it says when Open3D is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_torch.errors import UserError
from recon_torch.raster.gaussians import Gaussians
from recon_torch.views.cameras import orbit


@pytest.fixture(scope="module", autouse=True)
def benchmarks_can_be_imported():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


def test_renders_for_open3d_unproject_onto_the_front_of_the_gaussians(monkeypatch):
    import mesh

    monkeypatch.setattr(mesh.making, "MOST_DEPTH_PX", 64)
    place, deviation = np.array([0.1, 0.2, -0.05]), 0.05
    blue = torch.tensor([[-1.7, -1.7, 1.7]])  # as coefficients of degree 0: 0.02, 0.02, 0.98
    one = Gaussians(
        torch.tensor(place[None], dtype=torch.float32),
        torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        torch.full((1, 3), float(np.log(deviation))),
        torch.tensor([6.0]),
        blue,
    )
    cameras = orbit(4, 0.3, 128)
    renders = mesh.renders_for_open3d(one, cameras)
    for k in range(4):
        rows, columns = np.nonzero(renders["depth"][k])
        assert (renders["rgb"][k][rows, columns] == [5, 5, 250]).all()
        # By the middles of pixels, independently of how the renderer projects.
        focal, z = renders["intrinsics_px"][k, 0, 0], renders["depth"][k][rows, columns]
        in_camera = np.stack([(columns + 0.5 - 32) * z / focal, (rows + 0.5 - 32) * z / focal, z], -1)
        rotation, shift = renders["w2c"][k, :3, :3], renders["w2c"][k, :3, 3]
        points = (in_camera - shift) @ rotation
        ray = cameras.positions[k] - place
        across = points - place
        across -= np.outer(across @ ray, ray) / (ray @ ray)
        np.testing.assert_allclose(points.mean(0), place, atol=0.02)
        assert np.linalg.norm(across, axis=-1).max() < 2 * deviation


def test_a_python_without_open3d_is_an_error_before_anything_is_fitted(tmp_path):
    import mesh

    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'open3d'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match="cannot import open3d: ModuleNotFoundError"):
        mesh.check_open3d(python)
    with pytest.raises(UserError, match="is no program"):
        mesh.check_open3d(tmp_path / "missing")
