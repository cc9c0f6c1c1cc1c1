"""The page of a running fit, with viser really listening."""

import socket
import sys

import numpy as np
import pytest
import torch
from gsplat.cuda._torch_impl import _quat_scale_to_covar_preci

from recon_torch.page import live
from recon_torch.raster.gaussians import Gaussians
from recon_torch.views.cameras import orbit

viser = pytest.importorskip("viser")


def some_gaussians(count):
    rng = torch.Generator().manual_seed(count)
    return Gaussians(
        *(torch.randn(count, size, generator=rng) for size in (3, 4, 3)),
        torch.randn(count, generator=rng),
        torch.randn(count, 3, generator=rng),
    )


def test_splats_are_those_that_are_rendered():
    gaussians = some_gaussians(7)
    centers, covariances, colors, opacities = live.splats_of(gaussians)
    wanted, _ = _quat_scale_to_covar_preci(gaussians.quats, gaussians.scales, True, False)
    np.testing.assert_allclose(covariances, wanted.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(centers, gaussians.means.numpy())
    np.testing.assert_allclose(opacities[:, 0], torch.sigmoid(gaussians.opacity_logits).numpy(), rtol=1e-6)
    assert colors.min() >= 0 and colors.max() <= 1


def frames_until(connection, *wanted):
    """What a browser is sent, up to the first frame by which all of these bytes have come."""
    received = b""
    while not all(each in received for each in wanted):
        received += connection.recv(timeout=60)
    return received


def test_a_browser_gets_the_gaussians_the_cameras_and_the_text():
    from websockets.sync.client import connect

    cameras = orbit(3, 0.3, 32)
    with live.LivePage("127.0.0.1", 0, "a fit") as page:
        page.show_cameras(cameras, np.full((3, 32, 32, 3), 0.5, np.float32), np.array([0.0, 0.0, 1.0]))
        page.show(some_gaussians(5), "step 1")
        page.show(some_gaussians(6), "step 2")
        address = page.address.replace("http", "ws")
        with connect(address, subprotocols=[f"viser-v{viser.__version__}"], max_size=None) as connection:
            last = some_gaussians(6).means.numpy().tobytes()
            received = frames_until(connection, last[:12])
            assert last[-12:] in received and some_gaussians(5).means.numpy().tobytes()[:12] not in received
            page.show(some_gaussians(8), "step 3")
            frames_until(connection, some_gaussians(8).means.numpy().tobytes()[:12])
        handles = page._server.scene._handle_from_node_name  # noqa: SLF001 (viser has no list of its nodes)
        frustums = [handles[f"{live.CAMERAS}/{number:03d}"] for number in range(3)]
        # The first camera's picture, which hangs FRUSTUM before it, is behind who looks first.
        start = np.array(page._server.initial_camera.position)  # noqa: SLF001
        assert np.linalg.norm(start) < 2 - 2 * live.FRUSTUM and start @ cameras.positions[0] > 0
        for frustum, position in zip(frustums, cameras.positions, strict=True):
            np.testing.assert_allclose(frustum.position, position, atol=1e-6)
            assert frustum.fov == pytest.approx(np.deg2rad(33.8), abs=1e-6)
            # A camera of viser looks along its +Z, which here is at the origin.
            w, x, y, z = frustum.wxyz
            forward = np.array([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])
            np.testing.assert_allclose(forward, -position / 2, atol=1e-6)
        assert page._text.content == "step 3"  # noqa: SLF001
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1].strip("/"))), timeout=5)


def test_addresses_that_cannot_be_had_and_a_missing_package(user_error, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with user_error(f"cannot listen on 127.0.0.1:{port}"):
            live.LivePage("127.0.0.1", port, "")
    with user_error("cannot listen on 203.0.113.1:0"):
        live.LivePage("203.0.113.1", 0, "")
    monkeypatch.setitem(sys.modules, "viser", None)
    with user_error(r"pip install .im3d\[viewer\]"):
        live.LivePage("127.0.0.1", 0, "")
