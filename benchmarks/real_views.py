"""How well `im3d fit` reconstructs meshes that are not procedural, from 16 perfect views.

    python benchmarks/real_views.py [MESH ...] [--sizes 128 256] [--out out/real_views]

Renders each mesh at 16 azimuths of one elevation, and at 8 between those for testing, fits the 16, and
prints one row for each mesh and size. The folders keep views, asset, turntable and contact sheet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from im3d_jax.data import mesh_rendering
from recon_torch import cameras, fit_views, render_views

ASSETS = Path(__file__).parents[2] / "shared" / "assets"  # meshes made by others, beside the repository
MESHES = [ASSETS / "Duck.glb", ASSETS / "CesiumMilkTruck.glb"]
ELEVATION_RAD = np.radians(20.0)
TRAIN_AZIMUTHS_RAD = 2 * np.pi * np.arange(16) / 16
TEST_AZIMUTHS_RAD = 2 * np.pi * (np.arange(8) + 0.25) / 8
HEADER = (
    "mesh              px |  training PSNR  SSIM   LPIPS | held-out PSNR  SSIM   LPIPS | Gaussians  fit s"
)


def write_views(mesh: mesh_rendering.Mesh, directory: Path, azimuths_rad: np.ndarray, size: int) -> None:
    views = cameras.orbit(elevation_rad=ELEVATION_RAD, size=size, azimuths_rad=azimuths_rad)
    rgba, _ = mesh_rendering.render(mesh, views)
    render_views.write_views(directory, views, rgba)


def row(name: str, size: int, report: dict) -> str:
    quality = [
        report[views][metric] for views in ("training", "held_out") for metric in ("psnr", "ssim", "lpips")
    ]
    numbers = "{:14.2f} {:5.3f} {:7.4f} | {:13.2f} {:5.3f} {:7.4f}".format(*quality)
    return f"{name:<16} {size:>3} | {numbers} | {report['num_gaussians']:9d} {report['seconds']['fit']:6.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fits Gaussians to views of meshes.")
    parser.add_argument("meshes", nargs="*", type=Path, default=[mesh for mesh in MESHES if mesh.is_file()])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--out", type=Path, default=Path("out/real_views"))
    flags = parser.parse_args()
    rows, notes = [], set()
    for path in flags.meshes:
        mesh = mesh_rendering.load_mesh(path)
        for size in flags.sizes:
            folder = flags.out / f"{path.stem}_{size}"
            write_views(mesh, folder / "train", TRAIN_AZIMUTHS_RAD, size)
            write_views(mesh, folder / "test", TEST_AZIMUTHS_RAD, size)
            directories = {"--views": "train", "--held-out": "test", "--out": "fit"}
            fit_views.main(
                [word for flag, name in directories.items() for word in (flag, str(folder / name))]
            )
            report = json.loads((folder / "fit" / "report.json").read_text())
            rows.append(row(path.stem, size, report))
            notes.update(report["notes"])
    print("\n".join([HEADER, *rows, *notes]))


if __name__ == "__main__":
    main()
