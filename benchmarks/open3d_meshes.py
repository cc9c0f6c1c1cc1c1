"""Meshes by Open3D, of renders that benchmarks/mesh.py hands over; that runs this with a Python that has it.

    python benchmarks/open3d_meshes.py tsdf RENDERS.npz MESH.npz
    python benchmarks/open3d_meshes.py poisson RENDERS.npz MESH.npz

RENDERS.npz has K renders: `rgb` [K, H, W, 3] in bytes, `depth` [K, H, W] along the camera's z axis, 0 where
nothing is, `w2c` [K, 4, 4], `intrinsics_px` [K, 3, 3], and `cell`, the side of a voxel. MESH.npz gets
`vertices` [V, 3], `triangles` [F, 3], `colors` [V, 3] in [0, 1], `seconds` of processor time, and the
`version` of Open3D. It needs NumPy and Open3D, and nothing of this project, whose environment need not hold
Open3D.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
import open3d

CELLS = 240  # along the volume, which is 1.3 times as long as the object
TRUNCATION_CELLS = 5.0  # Open3D's example of RGBD integration has 4 cm at voxels of 4 m / 512
POISSON_DEPTH = 8  # Open3D's default: 2^8 cells along 1.1 times the object
LEAST_DENSE = 0.01  # the share of vertices that Open3D's example of Poisson reconstruction leaves out
NORMALS_FROM, NORMALS_WITHIN_CELLS = 30, 4.0


def main() -> None:
    way, source, target = sys.argv[1:]
    with np.load(source) as file:  # never unpickles
        renders = dict(file)
    started = time.process_time()
    mesh = {"tsdf": tsdf, "poisson": poisson}[way](renders)
    seconds = time.process_time() - started
    np.savez(
        target,
        vertices=np.asarray(mesh.vertices),
        triangles=np.asarray(mesh.triangles),
        colors=np.asarray(mesh.vertex_colors),
        seconds=seconds,
        version=open3d.__version__,
    )


def tsdf(renders: dict[str, np.ndarray]) -> open3d.geometry.TriangleMesh:
    # The scalable volume of Open3D 0.20.0 stays empty: findings/open3d_scalable_volume_empty.sh.
    cell = float(renders["cell"])
    volume = open3d.pipelines.integration.UniformTSDFVolume(
        length=CELLS * cell,
        resolution=CELLS,
        sdf_trunc=TRUNCATION_CELLS * cell,
        color_type=open3d.pipelines.integration.TSDFVolumeColorType.RGB8,
        origin=np.full(3, -CELLS * cell / 2),
    )
    for picture, lens, w2c in _views(renders):
        volume.integrate(picture, lens, w2c)
    return volume.extract_triangle_mesh()


def poisson(renders: dict[str, np.ndarray]) -> open3d.geometry.TriangleMesh:
    """Of the pixels as points, one in a voxel, with normals towards the cameras that saw them."""
    cell, points = float(renders["cell"]), open3d.geometry.PointCloud()
    near = open3d.geometry.KDTreeSearchParamHybrid(NORMALS_WITHIN_CELLS * cell, NORMALS_FROM)
    for picture, lens, w2c in _views(renders):
        seen = open3d.geometry.PointCloud.create_from_rgbd_image(picture, lens, w2c)
        seen.estimate_normals(near)
        seen.orient_normals_towards_camera_location(np.linalg.inv(w2c)[:3, 3])
        points += seen
    points = points.voxel_down_sample(cell)
    mesh, density = open3d.geometry.TriangleMesh.create_from_point_cloud_poisson(points, POISSON_DEPTH)
    mesh.remove_vertices_by_mask(np.asarray(density) < np.quantile(density, LEAST_DENSE))
    return mesh


def _views(renders: dict[str, np.ndarray]) -> Iterator[tuple]:
    """Open3D's picture, lens and world-to-camera matrix of each render."""
    height, width = renders["depth"].shape[1:]
    names = ("rgb", "depth", "w2c", "intrinsics_px")
    for rgb, depth, w2c, k in zip(*(renders[name] for name in names), strict=True):
        picture = open3d.geometry.RGBDImage.create_from_color_and_depth(
            open3d.geometry.Image(np.ascontiguousarray(rgb)),
            open3d.geometry.Image(np.ascontiguousarray(depth)),
            depth_scale=1.0,
            depth_trunc=10.0,
            convert_rgb_to_intensity=False,
        )
        # Open3D's pixels have their centres at whole numbers.
        lens = open3d.camera.PinholeCameraIntrinsic(
            width, height, k[0, 0], k[1, 1], k[0, 2] - 0.5, k[1, 2] - 0.5
        )
        yield picture, lens, w2c.astype(np.float64)


if __name__ == "__main__":
    main()
