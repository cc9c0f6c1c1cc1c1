#!/usr/bin/env bash
# open3d-cpu 0.20.0: a ScalableTSDFVolume stays empty whatever is integrated into it, so the example of RGBD integration in its own
# documentation gives a mesh without triangles. It says nothing. Its volumes are made where the depth is, by
# `PointCloud.create_from_depth_image` at that function's default scale; since that also divides pictures of floats, which are in metres
# already, they lie at a thousandth of the depth. A UniformTSDFVolume of the same picture has the surface.
#
# Seen with open3d-cpu 0.20.0 and numpy 2.4.6 on Python 3.11; in 0.19.0 both volumes have the same surface.
# In this project: benchmarks/open3d_meshes.py uses a UniformTSDFVolume.
#
# Prints what it saw; fails if the scalable volume has a surface, or the uniform one has none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check open3d-cpu==0.20.0 numpy==2.4.6
cd "$folder"
cat > wall.py <<'PY'
import sys

import numpy as np
import open3d
from open3d.pipelines import integration

SIZE = 64
lens = open3d.camera.PinholeCameraIntrinsic(SIZE, SIZE, 100, 100, SIZE / 2, SIZE / 2)
colour = open3d.geometry.Image(np.zeros((SIZE, SIZE, 3), np.uint8))
millimetres = open3d.geometry.Image(np.full((SIZE, SIZE), 2000, np.uint16))  # a wall, 2 m away
picture = open3d.geometry.RGBDImage.create_from_color_and_depth(
    colour, millimetres, depth_trunc=4.0, convert_rgb_to_intensity=False
)
shared = {"sdf_trunc": 0.04, "color_type": integration.TSDFVolumeColorType.RGB8}
volumes = [
    integration.ScalableTSDFVolume(voxel_length=4.0 / 512, **shared),
    integration.UniformTSDFVolume(length=4.0, resolution=512, origin=np.array([-2.0, -2.0, 0.0]), **shared),
]
found = []
for volume in volumes:
    volume.integrate(picture, lens, np.eye(4))
    found.append(len(volume.extract_triangle_mesh().triangles))
    print(f"{type(volume).__name__}: {found[-1]} triangles")
depth = np.asarray(picture.depth).max()
points = open3d.geometry.PointCloud.create_from_depth_image(picture.depth, lens)
print(f"depth {depth} in the picture, {np.asarray(points.points)[:, 2].max():g} in the points of it")
sys.exit(not (found[0] == 0 < found[1]))
PY
"$folder/venv/bin/python" wall.py
