"""How near textured meshes come to the truth, and to the splats that they are made of, by either method.

    python benchmarks/mesh.py --meshes DIR --count 5

Each .glb, .gltf or .obj file in DIR is rendered from 16 azimuths at 20 degrees and fitted, and `im3d mesh`
makes a mesh of the fit. Distances are those of `im3d_jax/evaluate/surfaces.py`, in thousandths of the world's
unit, in which objects have a radius of 0.5: `accuracy` from the mesh to the truth, `completeness` back;
`normals` is the mean absolute cosine between normals of nearest points, both ways. The
GLB that was written is read back by our own reader, and rendered without further light, as light is in the
views; `psnr` is of 24 held-out views over white, beside that of the splats. `seconds` are of processor time,
without the fit. The peer is Open3D's TSDF fusion of the splats' mean depth from the same cameras, where
open3d is installed; its colours are not compared. `dmtet` is a mesh that was fitted to the views itself
(`im3d fit --representation mesh`); its seconds are with the fit, and the column `splats` is of the fit's own
renders. --only dmtet leaves out what needs splats.

Fits and meshes stay in --out, and a fit that is there is not made again: give another --out when the code has
changed.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import view_cases
from jaxtyping import Float

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.parts import Mesh
from im3d_jax.data.meshes.reading import load_mesh
from im3d_jax.evaluate import surfaces
from recon_torch.errors import UserError
from recon_torch.fit.optimization import Fit
from recon_torch.formats.ply import load_ply, save_ply
from recon_torch.losses.metrics import psnr
from recon_torch.mesh import making, sights
from recon_torch.mesh.making import Given
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render, render_images
from recon_torch.settings import FitSettings, MeshMethod, MeshSettings, Representation
from recon_torch.views.cameras import Cameras
from recon_torch.views.directory import Views
from recon_torch.views.images import contact_sheet, write_image
from recon_torch.views.world import World

MESH_SUFFIXES = (".glb", ".gltf", ".obj")
SHEET_VIEWS = np.array([0, 4, 9, 14, 19, 23])
FRAME = World(np.zeros(3), 1.0), np.array([0.0, 0.0, 1.0])
DMTET = "dmtet"
COLUMNS = ("accuracy", "completeness", "normals", "psnr", "splats", "triangles", "watertight", "seconds")
PEER_CELL, PEER_TRUNCATION = 1.1 / 192, 4.0


def main() -> None:
    flags = _parse()
    rows = []
    for path in sorted(each for each in flags.meshes.iterdir() if each.suffix in MESH_SUFFIXES)[
        : flags.count
    ]:
        truth = load_mesh(path)
        views = view_cases.views_of(truth, "clean", flags.size, 0).views
        if flags.only:
            rows.append((path.stem, DMTET, _measure_dmtet(truth, views, path.stem, flags)))
            print(*rows[-1], flush=True)
            continue
        gaussians = _fit(views, flags.out / f"{path.stem}_{flags.size}.ply")
        for method in MeshMethod:
            rows.append((path.stem, str(method), _measure(truth, views, gaussians, method, path.stem, flags)))
            print(*rows[-1], flush=True)
        rows.append((path.stem, DMTET, _measure_dmtet(truth, views, path.stem, flags)))
        print(*rows[-1], flush=True)
        if (peer := _peer(truth, views.cameras, gaussians)) is not None:
            rows.append((path.stem, "Open3D TSDF", peer))
            print(*rows[-1], flush=True)
    print("\n" + _table(rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--meshes", type=Path, required=True, metavar="DIR", help="a folder of .glb, .gltf or .obj files")
    add("--count", type=int, default=5, help="how many of them, by name (5)")
    add("--size", type=int, default=128, metavar="PX", help="of the views that are fitted")
    add("--steps", type=int, default=FitSettings.num_steps, help="of the fits of meshes (1200)")
    add("--only", choices=(DMTET,), help="leave out what is made of splats")
    add("--out", type=Path, default=Path("out/mesh"), metavar="DIR")
    return parser.parse_args()


def _fit(views: Views, file: Path) -> Gaussians:
    if not file.is_file():
        fit = _fitted(views, FitSettings())
        file.parent.mkdir(parents=True, exist_ok=True)
        save_ply(fit.scene.gaussians, file)
    return load_ply(file).gaussians


def _fitted(views: Views, settings: FitSettings) -> Fit:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no weights for LPIPS")
        fit = Fit(views.cameras, settings)
    assert views.masks is not None
    fit.set_targets(torch.from_numpy(views.images), torch.from_numpy(views.masks))
    fit.run(settings.num_steps)
    return fit


def _measure(
    truth: Mesh, views: Views, gaussians: Gaussians, method: MeshMethod, name: str, flags: argparse.Namespace
) -> dict[str, float]:
    out = flags.out / f"{name}_{method}"
    out.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    given = Given(gaussians, *FRAME, views.cameras, views)
    report = making.make(given, MeshSettings(method=method), out)
    seconds = time.process_time() - started
    splats = render_images(gaussians, view_cases.held_out_cameras(flags.size))
    return _judged(truth, out, report, splats) | {"seconds": seconds}


def _measure_dmtet(truth: Mesh, views: Views, name: str, flags: argparse.Namespace) -> dict[str, float]:
    """Of a mesh that was fitted itself. `seconds` are with the fit, and `splats` is of the fit's renders."""
    out = flags.out / f"{name}_{DMTET}"
    out.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    fit = _fitted(views, FitSettings(representation=Representation.MESH, num_steps=flags.steps))
    fit.scene.save(out / "asset.ply")
    seconds = time.process_time() - started
    cameras = view_cases.held_out_cameras(flags.size)
    renders = np.concatenate([fit.render(cameras[k]).rgb.clamp(0, 1).numpy() for k in range(len(cameras))])
    report = json.loads((out / making.REPORT).read_text())
    return _judged(truth, out, report, renders) | {"seconds": seconds}


def _judged(truth: Mesh, out: Path, report: dict, renders: Float[np.ndarray, "K H W 3"]) -> dict[str, float]:
    """The mesh in a directory, and renders of what it was made of, against the truth; writes a sheet."""
    made = _read_back(out / "mesh.glb")
    cameras = view_cases.held_out_cameras(renders.shape[1])
    white = [_over_white(mesh_rendering.render(each, cameras)[0]) for each in (truth, made)]
    rows = [each[SHEET_VIEWS] for each in (white[0], renders, white[1])]
    write_image(out / "sheet.png", contact_sheet(rows, ["truth", "the fit", "mesh"]))
    scores = [
        psnr(torch.from_numpy(each), torch.from_numpy(white[0])).mean().item() for each in (white[1], renders)
    ]
    return _against(made.corners, truth.corners) | {
        "psnr": scores[0],
        "splats": scores[1],
        "triangles": report["triangles"],
        "watertight": float(report["watertight"]),
    }


def _read_back(path: Path) -> Mesh:
    """A GLB as our reader reads it, at the place and size that the file has, and as bright as its texture."""
    mesh = load_mesh(path, in_ball=False)
    return mesh._replace(materials=[material._replace(unlit=True) for material in mesh.materials])


def _over_white(rgba: Float[np.ndarray, "K H W 4"]) -> Float[np.ndarray, "K H W 3"]:
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def _peer(truth: Mesh, cameras: Cameras, gaussians: Gaussians) -> dict[str, float] | None:
    """Open3D's fusion of mean depth from the fit's cameras and from the sphere around; None without it."""
    try:
        import open3d
    except ImportError:
        print("open3d is not installed; its fusion is left out")
        return None
    started = time.process_time()
    volume = open3d.pipelines.integration.ScalableTSDFVolume(
        voxel_length=PEER_CELL,
        sdf_trunc=PEER_TRUNCATION * PEER_CELL,
        color_type=open3d.pipelines.integration.TSDFVolumeColorType.NoColor,
    )
    size = 256
    low_pass = sights.low_pass_px2(size, cameras.height)
    for rig in (cameras.resized(size, size), sights.sphere(making.NUM_DEPTHS, size)):
        for index in range(len(rig)):
            with torch.no_grad():
                seen = render(gaussians, rig[index], low_pass_px2=low_pass)
            depth = torch.where(seen.alpha > 0.5, seen.depth, 0.0)[0].numpy()
            color = open3d.geometry.Image(np.zeros((size, size, 3), np.uint8))
            picture = open3d.geometry.RGBDImage.create_from_color_and_depth(
                color, open3d.geometry.Image(depth), depth_scale=1.0, depth_trunc=10.0
            )
            k = rig.intrinsics_px[index].astype(float)
            lens = open3d.camera.PinholeCameraIntrinsic(
                size, size, k[0, 0], k[1, 1], k[0, 2] - 0.5, k[1, 2] - 0.5
            )
            volume.integrate(picture, lens, rig.w2c[index].astype(float))
    found = volume.extract_triangle_mesh()
    corners = np.asarray(found.vertices)[np.asarray(found.triangles)]
    return _against(corners, truth.corners) | {
        "triangles": len(corners),
        "watertight": float(found.is_watertight()),
        "seconds": time.process_time() - started,
    }


def _against(made: Float[np.ndarray, "F 3 3"], truth: Float[np.ndarray, "T 3 3"]) -> dict[str, float]:
    found = surfaces.compare(made, truth)
    return {
        "accuracy": 1e3 * found["accuracy"],
        "completeness": 1e3 * found["completeness"],
        "normals": found["normals"],
    }


def _table(rows: list[tuple[str, str, dict[str, float]]]) -> str:
    lines = [["mesh", "method", *COLUMNS], ["---", "---", *["--:"] * len(COLUMNS)]]
    for name, method, result in rows:
        lines.append([name, method, *(f"{result[each]:.4g}" if each in result else "" for each in COLUMNS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"mesh.py: error: {error}") from None
