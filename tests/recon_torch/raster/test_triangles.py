"""Renders of triangles: the kernels against the twin, finite differences, and closed forms."""

import importlib.util

import numpy as np
import pytest
import torch
import trimesh

from recon_torch.errors import UserError
from recon_torch.raster.triangles import Geometry
from recon_torch.raster.triangles.edges import edges_of
from recon_torch.raster.triangles.nvdiffrast_engine import clip_space
from recon_torch.raster.triangles.render import rasterizer, render
from recon_torch.settings import Engine
from recon_torch.views.cameras import orbit

CAMERAS = orbit(2, 0.3, 24)
BACKGROUND = torch.tensor([0.2, 0.3, 0.9])


def sphere(subdivisions: int, radius: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return torch.tensor(mesh.vertices), torch.tensor(mesh.faces)


@pytest.fixture(scope="module")
def bumpy():
    """Two bumpy balls that hide each other in part, and the colours of their vertices."""
    generator = torch.Generator().manual_seed(0)
    vertices, triangles = sphere(1, 0.25)
    both = torch.cat([vertices + torch.tensor([0.15, 0.1, 0]), vertices - torch.tensor([0.2, 0.02, 0.05])])
    both = both + 0.02 * torch.randn(both.shape, generator=generator, dtype=both.dtype)
    colors = torch.rand(both.shape, generator=generator, dtype=both.dtype)
    return both, torch.cat([triangles, triangles + len(vertices)]), colors


def scalar(vertices, triangles, colors, engine, samples=1):
    """A number that depends on all pixels, and the render."""
    seen = render(vertices, triangles, colors, CAMERAS, background=BACKGROUND, engine=engine, samples=samples)
    picture = torch.cat([seen.rgb, seen.alpha], -1)
    weights = torch.rand(picture.shape, generator=torch.Generator().manual_seed(1), dtype=picture.dtype)
    return (picture * weights).sum(), seen


@pytest.mark.parametrize("samples", [1, 2])
def test_the_kernels_agree_with_the_twin(bumpy, samples):
    found = []
    for engine in (Engine.CPU, Engine.TORCH):
        vertices, colors = bumpy[0].clone().requires_grad_(), bumpy[2].clone().requires_grad_()
        number, seen = scalar(vertices, bumpy[1], colors, engine, samples)
        number.backward()
        found.append((seen.rgb, seen.alpha, seen.depth, vertices.grad, colors.grad))
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 0.5
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    alpha = found[0][1]
    assert ((alpha > 0.05) & (alpha < 0.95)).sum() > 40, "no pixels were blended across silhouettes"


def test_gradients_agree_with_finite_differences(bumpy):
    vertices, triangles, colors = bumpy
    generator, step = torch.Generator().manual_seed(2), 1e-7
    inputs = vertices.clone().requires_grad_(), colors.clone().requires_grad_()
    gradients = torch.autograd.grad(scalar(inputs[0], triangles, inputs[1], Engine.CPU)[0], inputs)
    for _ in range(6):
        ways = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in inputs]
        moved = [
            [x.detach() + sign * step * way for x, way in zip(inputs, ways, strict=True)] for sign in (1, -1)
        ]
        ahead, back = (scalar(v, triangles, c, Engine.CPU)[0] for v, c in moved)
        slope = sum((gradient * way).sum() for gradient, way in zip(gradients, ways, strict=True))
        assert ((ahead - back) / (2 * step)).item() == pytest.approx(slope.item(), rel=2e-5, abs=2e-4)


def test_a_sphere_covers_the_circle_that_it_should():
    """Its outline is a cone that touches it, so the area of its picture is known."""
    vertices, triangles = sphere(4)
    seen = render(vertices.float(), triangles, vertices.float(), CAMERAS)
    focal, distance = CAMERAS.intrinsics_px[0, 0, 0], 2.0
    radius_px = focal * 0.4 / np.sqrt(distance**2 - 0.4**2)
    np.testing.assert_allclose(seen.alpha.sum((1, 2, 3)), np.pi * radius_px**2, rtol=5e-3)
    middle = seen.depth[:, 11:13, 11:13, 0]
    np.testing.assert_allclose(middle, distance - 0.4, atol=2e-3)


def test_what_is_interpolated_lies_on_the_rays_of_the_pixels(bumpy):
    vertices, triangles, _ = bumpy
    taken = []

    def shade(points):
        taken.append(points)
        return points

    one = CAMERAS[0]
    seen = render(vertices, triangles, vertices, one, shade=shade)
    pixels, depths, _ = one.project(taken[0].numpy())
    rows, columns = np.nonzero(seen.depth[0, ..., 0].numpy())
    np.testing.assert_allclose(pixels[0], np.stack([columns, rows], -1) + 0.5, atol=1e-4)
    np.testing.assert_allclose(depths[0], seen.depth[0, ..., 0][rows, columns], atol=1e-6)


def test_what_cannot_be_drawn_is_left_out():
    """Triangles that face away, behind the camera, or with a corner that is not finite."""
    vertices, triangles = sphere(1)
    broken = vertices.clone()
    broken[0, 0] = torch.nan
    turned = triangles[vertices[triangles].mean(1)[:, 0] > 0.2].flip(1)  # the side that the first camera sees
    for places, chosen in ((vertices, turned), (vertices + torch.tensor([5.0, 0, 0]), triangles)):
        seen = render(places, chosen, places, CAMERAS[0], background=BACKGROUND)
        assert seen.alpha.sum() == 0
        torch.testing.assert_close(seen.rgb, BACKGROUND.double().expand_as(seen.rgb))
    broken.requires_grad_()
    seen = render(broken, triangles, torch.rand_like(vertices), CAMERAS)
    seen.rgb.sum().backward()
    assert seen.rgb.isfinite().all() and seen.alpha.sum() > 50
    assert broken.grad[1:].isfinite().all()


def test_edges_have_the_triangles_beside_them():
    tetrahedron = torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])
    edges = edges_of(tetrahedron)
    assert len(edges) == 6
    for start, end, one, other in edges.tolist():
        rings = [[*tetrahedron[n].tolist(), tetrahedron[n, 0].item()] for n in (one, other)]
        runs = [list(zip(ring, ring[1:], strict=False)) for ring in rings]
        assert (start, end) in runs[0] and (end, start) in runs[1]
    assert (edges_of(tetrahedron[:1])[:, 3] == -1).all()
    assert edges_of(tetrahedron[:0]).shape == (0, 4)


def test_clip_space_shows_what_pixels_do():
    generator = torch.Generator().manual_seed(3)
    z = 1 + torch.rand(1, 9, 1, generator=generator)
    pixels = torch.rand(1, 9, 2, generator=generator) * torch.tensor([20.0, 10.0])
    geometry = Geometry(
        torch.cat([pixels * z, z], -1), torch.zeros(1, 3).long(), torch.zeros(1, 4).long(), 20, 10
    )
    x, y, depth, w = clip_space(geometry).unbind(-1)
    torch.testing.assert_close(torch.stack([(x / w + 1) * 10, (y / w + 1) * 5], -1), pixels)
    order = z[0, :, 0].argsort()
    ordered = (depth / w)[0, order]
    assert (ordered.diff() > 0).all() and ordered.abs().max() < 1


def test_an_engine_that_cannot_run_is_refused(monkeypatch):
    with pytest.raises(UserError, match="'gsplat' renders Gaussians"):
        rasterizer(Engine.GSPLAT, torch.device("cpu"))
    with pytest.raises(UserError, match="'cpu' needs tensors on cpu"):
        rasterizer(Engine.CPU, torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="need nvdiffrast"):
        rasterizer(Engine.AUTO, torch.device("cuda"))
