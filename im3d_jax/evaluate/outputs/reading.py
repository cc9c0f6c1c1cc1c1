"""Rows of any method as views [K,H,W,C]: decoded, cut out of a grid or a video, or rendered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from im3d_jax.data.meshes.reading import load_mesh
from im3d_jax.evaluate.outputs import pictures
from im3d_jax.evaluate.outputs.finding import MethodOutputs, Output, Rule
from im3d_jax.evaluate.outputs.layouts import IN_3D, Kind, Layout, Up
from im3d_jax.evaluate.outputs.pictures import OtherCount, Views, evenly, expected_views, squared
from recon_torch.errors import UserError
from recon_torch.process.rendering import render_file
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.images import to_uint8
from recon_torch.views.video import count_frames, frames_at

ELEVATION_DEG, FOV_DEG, UNIT_RADIUS = 15.0, 33.8, 2.0


def read_all(
    outputs: MethodOutputs, num_views: int = 0, any_count: bool = False
) -> Iterator[tuple[Output, Views]]:
    """The rows that can be read, with their views. The others are moved to what is left out.

    num_views: so many of each row, evenly spaced from the first one; 0 takes all. A row with fewer is left
        out. Of videos and 3D objects whose layout does not state a number, so many are made.
    any_count: rows of pictures may have different numbers of them, unless the layout states one.
    """
    count = expected_views(outputs, num_views)
    differ = any_count and outputs.layout.kind == Kind.IMAGES and not outputs.layout.stated_views
    for row in list(outputs.rows.values()):
        try:
            views = read_views(outputs.layout, row, len(row.paths) if differ else count)
            if num_views > len(views):
                raise OtherCount(f"{len(views)} views, not the {num_views} that are asked for")
        except UserError as error:
            rule = Rule.NUM_VIEWS if isinstance(error, OtherCount) else Rule.UNREADABLE
            outputs.exclude(row, rule, str(error))
            continue
        yield row, views[evenly(len(views), num_views or len(views))]


def read_views(layout: Layout, row: Output, num_views: int) -> Views:
    """The views of a row, RGBA where all have transparency that means something, else RGB.

    num_views: see `expected_views`.

    Raises OtherCount for another number of pictures, and UserError for what cannot be read and for pictures
    of several sizes.
    """
    if layout.kind in IN_3D:
        return to_uint8(render_views(layout, row, cameras_of(layout, num_views)))
    if layout.kind == Kind.VIDEO:
        return squared(_of_video(row.paths[0], num_views), layout)
    return pictures.read(layout, row.paths, num_views)


def render_views(layout: Layout, row: Output, cameras: Cameras) -> Float[np.ndarray, "K H W 4"]:
    """RGBA renders of a row in 3D, in [0, 1] and not multiplied by alpha.

    It is brought to unit size first, with its `up` axis along +Z.

    cameras: around the origin, such as those of `cameras.orbit`.

    Raises UserError if the file cannot be read.
    """
    if layout.kind == Kind.GAUSSIANS:
        return render_file(row.paths[0], cameras, layout.up)
    # Embree is not needed for what lies there as pictures.
    from im3d_jax.data import mesh_rendering

    return mesh_rendering.render(load_mesh(row.paths[0], layout.up or Up.Y), cameras)[0]


def cameras_of(layout: Layout, num_views: int) -> Cameras:
    """The cameras that rows in 3D are rendered from."""
    azimuths_deg = layout.azimuths_deg or 360 * np.arange(num_views) / num_views
    elevations_deg = layout.elevations_deg or (ELEVATION_DEG,)
    fov_deg = layout.fov_deg or FOV_DEG
    # A narrower view is taken from farther away, so that the object keeps its size.
    half_rad, unit_half_rad = np.deg2rad(fov_deg / 2), np.deg2rad(FOV_DEG / 2)
    return orbit(
        elevation_rad=np.broadcast_to(np.deg2rad(elevations_deg), len(azimuths_deg)),
        size=layout.size,
        radius=float(UNIT_RADIUS * np.sin(unit_half_rad) / np.sin(half_rad)),
        fov_deg=fov_deg,
        azimuths_rad=np.deg2rad(azimuths_deg),
    )


def _of_video(path: Path, num_views: int) -> UInt8[np.ndarray, "K H W 3"]:
    count, _ = count_frames(path)
    if count < num_views:
        raise OtherCount(f"{count} frames, fewer than {num_views}")
    chosen = np.round(np.arange(num_views) * count / num_views).astype(int)
    return np.stack(list(frames_at(path, chosen)))
