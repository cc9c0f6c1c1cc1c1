"""A page of viser on which a fit is watched while it runs: its Gaussians, cameras with their views, and loss.

It is told what to show and looks at nothing itself, so a fit is the same with it as without.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import socket
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.spatial.transform import Rotation

from recon_torch.errors import UserError, first_line
from recon_torch.raster.gaussians import Gaussians
from recon_torch.views.cameras import Cameras

EVERY_STEPS = 25
"""Between two pictures of the Gaussians."""

FRUSTUM, THUMBNAIL_PX = 0.15, 96  # the size of a camera in the unit world, and of its picture
START_SHARE = 0.6  # of the way to the first camera, from which a browser sees the object first
GAUSSIANS, CAMERAS = "/gaussians", "/cameras"


class LivePage:
    """A page that shows one fit. It is a context manager, at whose end the page is gone.

    Attributes:
        address: of the page, for a browser.
    """

    def __init__(self, host: str, port: int, title: str) -> None:
        """Begins to listen.

        port: 0 for one that is free.

        Raises UserError where viser is not installed, and for an address that cannot be had.
        """
        try:
            viser = importlib.import_module("viser")
        except ImportError:
            raise UserError("--viewer needs the package 'viser'; pip install \"im3d[viewer]\"") from None
        _check_free(host, port)
        with contextlib.redirect_stdout(io.StringIO()):  # viser announces itself in a box
            self._server = viser.ViserServer(host=host, port=port, label=title, verbose=False)
        self._server.gui.configure_theme(show_share_button=False)  # it would ask a server of viser's
        self._text = self._server.gui.add_markdown("no step yet")
        self._splats: Any = None
        self.address = f"http://{host}:{self._server.get_port()}/"

    def show_cameras(
        self, cameras: Cameras, views: Float[np.ndarray, "K H W 3"], up: Float[np.ndarray, "3"]
    ) -> None:
        """Shows the cameras of a fit in place of those before, each with its view, and turns `up` upwards.

        views: in [0, 1].
        """
        scene, first = self._server.scene, cameras.positions[0]
        scene.set_up_direction(tuple(map(float, up)))
        # From within the ring of cameras, as the picture of the first would hide the object from behind it.
        self._server.initial_camera.position = tuple(START_SHARE * first)
        self._server.initial_camera.look_at = (0.0, 0.0, 0.0)
        self._server.initial_camera.up = tuple(map(float, up))
        with self._server.atomic():
            scene.remove_by_name(CAMERAS)
            for number, (w2c, view) in enumerate(zip(cameras.w2c, views, strict=True)):
                c2w = np.linalg.inv(w2c.astype(np.float64))
                scene.add_camera_frustum(
                    f"{CAMERAS}/{number:03d}",
                    fov=2 * math.atan(cameras.height / (2 * float(cameras.intrinsics_px[number, 1, 1]))),
                    aspect=cameras.width / cameras.height,
                    scale=FRUSTUM,
                    image=_thumbnail(view),
                    wxyz=Rotation.from_matrix(c2w[:3, :3]).as_quat(canonical=True)[[3, 0, 1, 2]],
                    position=c2w[:3, 3],
                )

    def show(self, gaussians: Gaussians, text: str) -> None:
        """Shows Gaussians of the unit world in place of those before, and a line of text."""
        centers, covariances, colors, opacities = splats_of(gaussians)
        with self._server.atomic():
            # There may be more or fewer of them than before, which viser takes for other splats.
            self._splats = self._server.scene.add_gaussian_splats(
                GAUSSIANS, centers, covariances, colors, opacities
            )
            self._text.content = text

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._server.stop()

    def __enter__(self) -> LivePage:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def splats_of(
    gaussians: Gaussians,
) -> tuple[
    Float[np.ndarray, "N 3"],
    Float[np.ndarray, "N 3 3"],
    Float[np.ndarray, "N 3"],
    Float[np.ndarray, "N 1"],
]:
    """(centres, covariances, colours in [0, 1], opacities in [0, 1]), as viser takes them, float32."""
    centers, quats, scales, opacities, colors = (
        each.detach().float().cpu().numpy() for each in gaussians.activated()
    )
    axes = Rotation.from_quat(quats[:, [1, 2, 3, 0]]).as_matrix() * scales[:, None]
    covariances = (axes @ axes.transpose(0, 2, 1)).astype(np.float32)
    return centers, covariances, colors.clip(0, 1), opacities[:, None]


def _thumbnail(view: Float[np.ndarray, "H W 3"]) -> np.ndarray:
    picture = Image.fromarray((255 * view.clip(0, 1)).round().astype(np.uint8))
    picture.thumbnail((4 * THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(picture)


def _check_free(host: str, port: int) -> None:
    """Raises UserError for an address that cannot be had: viser would take the next port that is free."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {first_line(error)}; give --viewer-host and --viewer-port"
        ) from None
