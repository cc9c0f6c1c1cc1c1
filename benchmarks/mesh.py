"""How near textured meshes come to the truth, and to the splats that they are made of, by either method.

    python benchmarks/mesh.py --meshes DIR --count 5

Each .glb, .gltf or .obj file in DIR is rendered from 16 azimuths at 20 degrees and fitted, and `im3d mesh`
makes a mesh of the fit. Distances are those of `im3d_jax/evaluate/surfaces.py`, in thousandths of the world's
unit, in which objects have a radius of 0.5: `accuracy` from the mesh to the truth, `completeness` back, and
`chamfer` their mean; `normals` is the mean absolute cosine between normals of nearest points, both ways. The
GLB that was written is read back by our own reader, and rendered without further light, as light is in the
views; `psnr` is of 24 held-out views over white, beside that of the splats. `seconds` are of processor time,
without the fit. `dmtet` is a mesh that was fitted to the views itself (`im3d fit --representation mesh`); its
seconds are with the fit, and the column `splats` is of the fit's own renders.

The peers are Open3D's TSDF fusion and its Poisson reconstruction (open3d_meshes.py has their settings), where
--open3d-python is given. They get renders of the same splats from the cameras of the fit: colours, and the
depth that our fusion has. Their meshes are as Open3D leaves them, neither cleaned nor decimated, with colours
at the vertices, and their seconds are with the renders.

Fits and meshes stay in --out, and a fit that is there is not made again: give another --out when the code has
changed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import view_cases
from jaxtyping import Float

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.colors import linear_from_srgb
from im3d_jax.data.meshes.parts import Material, Mesh, Part, Scene, assemble
from im3d_jax.data.meshes.reading import load_mesh
from im3d_jax.evaluate import surfaces
from recon_torch.errors import UserError
from recon_torch.fit.optimization import Fit
from recon_torch.formats.ply import load_ply, save_ply
from recon_torch.losses.metrics import psnr
from recon_torch.mesh import making, sights
from recon_torch.mesh.depth import front_depth
from recon_torch.mesh.grid import grid_around
from recon_torch.mesh.making import Given
from recon_torch.mesh.surface import Surface
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render_images
from recon_torch.settings import FitSettings, MeshMethod, MeshSettings, Representation
from recon_torch.views.cameras import Cameras
from recon_torch.views.directory import Views
from recon_torch.views.images import contact_sheet, to_uint8, write_image
from recon_torch.views.world import World

MESH_SUFFIXES = (".glb", ".gltf", ".obj")
SHEET_VIEWS = np.array([0, 4, 9, 14, 19, 23])
FRAME = World(np.zeros(3), 1.0), np.array([0.0, 0.0, 1.0])
SPLATS, DMTET = "splats", "dmtet"
SCORES = ("chamfer", "accuracy", "completeness", "normals", "psnr", "splats")
COLUMNS = (*SCORES, "triangles", "watertight", "seconds")
PEERS = {"tsdf": "Open3D TSDF", "poisson": "Open3D Poisson"}

Row = tuple[str, str, dict[str, float]]


def main() -> None:
    flags = _parse()
    if flags.open3d_python:
        check_open3d(flags.open3d_python)
    rows = []
    for path in sorted(each for each in flags.meshes.iterdir() if each.suffix in MESH_SUFFIXES)[
        : flags.count
    ]:
        for row in _rows(path, flags):
            rows.append(row)
            print(*row, flush=True)
    print("\n" + _table(rows + _means(rows)))
    if not flags.open3d_python:
        print("\nOpen3D: not measured; give --open3d-python, a Python that has it (pip install open3d-cpu)")


def _rows(path: Path, flags: argparse.Namespace) -> Iterator[Row]:
    truth, name = load_mesh(path), path.stem
    views = view_cases.views_of(truth, "clean", flags.size, 0).views
    if flags.only != DMTET:
        gaussians = _fit(views, flags.out / f"{name}_{flags.size}.ply")
        for method in MeshMethod:
            yield name, str(method), _measure(truth, views, gaussians, method, name, flags)
        if flags.open3d_python:
            for method, scores in _peers(truth, views, gaussians, name, flags):
                yield name, method, scores
    if flags.only != SPLATS:
        yield name, DMTET, _measure_dmtet(truth, views, name, flags)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--meshes", type=Path, required=True, metavar="DIR", help="a folder of .glb, .gltf or .obj files")
    add("--count", type=int, default=5, help="how many of them, by name (5)")
    add("--size", type=int, default=128, metavar="PX", help="of the views that are fitted")
    add("--steps", type=int, default=FitSettings.num_steps, help="of the fits of meshes (1200)")
    add("--only", choices=(SPLATS, DMTET), help="of splats, or of views, alone")
    add("--open3d-python", type=Path, metavar="FILE", help="a Python that has open3d, for the peers")
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
    return _judged(truth, _read_back(out / "mesh.glb"), report, splats, out) | {"seconds": seconds}


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
    return _judged(truth, _read_back(out / "mesh.glb"), report, renders, out) | {"seconds": seconds}


def _judged(
    truth: Mesh, made: Mesh, report: dict[str, Any], renders: Float[np.ndarray, "K H W 3"], out: Path
) -> dict[str, float]:
    """A mesh, and renders of what it was made of, against the truth; writes a sheet."""
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


def _peers(
    truth: Mesh, views: Views, gaussians: Gaussians, name: str, flags: argparse.Namespace
) -> Iterator[tuple[str, dict[str, float]]]:
    """Open3D's meshes of renders of the splats."""
    splats = render_images(gaussians, view_cases.held_out_cameras(flags.size))
    started = time.process_time()
    renders = renders_for_open3d(gaussians, views.cameras)
    seconds = time.process_time() - started
    for way, title in PEERS.items():
        out = flags.out / f"{name}_open3d_{way}"
        out.mkdir(parents=True, exist_ok=True)
        np.savez(out / "renders.npz", **renders)
        made, report = _by_open3d(flags.open3d_python, way, out)
        scores = _judged(truth, made, report, splats, out)
        yield title, scores | {"seconds": seconds + report["seconds"]}


def renders_for_open3d(gaussians: Gaussians, fitted: Cameras) -> dict[str, np.ndarray]:
    """What Open3D gets: see open3d_meshes.py. The depth, its size and the voxels are those of our fusion."""
    size = making.MOST_DEPTH_PX
    fitted_px = Given(gaussians, *FRAME, fitted).fitted_px
    assert fitted_px is not None
    cameras, low_pass = fitted.resized(size, size), sights.low_pass_px2(size, fitted_px)
    depth = np.stack([front_depth(gaussians, cameras[k], low_pass) for k in range(len(cameras))])
    box = grid_around(sights.blurred(gaussians, fitted_px), MeshSettings().resolution)
    return {
        "rgb": to_uint8(sights.look(gaussians, cameras, low_pass).rgb),
        "depth": np.where(np.isinf(depth), np.float32(0), depth),
        "w2c": cameras.w2c,
        "intrinsics_px": cameras.intrinsics_px,
        "cell": np.array(box.cell),
    }


def check_open3d(python: Path) -> None:
    command = [python, "-c", "import open3d; print(open3d.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--open3d-python {python} is no program: {error.strerror}") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"--open3d-python {python} cannot import open3d: {' '.join(reason)}")
    print(f"Open3D {done.stdout.strip().splitlines()[-1]}")


def _by_open3d(python: Path, way: str, out: Path) -> tuple[Mesh, dict[str, Any]]:
    """A mesh by open3d_meshes.py, whose colours are not lit, and a report."""
    files = out / "renders.npz", out / "mesh.npz"
    script = Path(__file__).with_name("open3d_meshes.py")
    subprocess.run([python, script, way, *files], check=True)
    with np.load(files[1]) as file:
        surface = Surface(file["vertices"], file["triangles"].astype(np.int64))
        colors, seconds = file["colors"][surface.triangles], float(file["seconds"])
    linear = np.concatenate([linear_from_srgb(colors), np.ones_like(colors[..., :1])], -1)
    part = Part(surface.corners, None, linear, material=Material(unlit=True))
    mesh = assemble(Scene([part], [], set()), out.name, y_up=False, in_ball=False)
    triangles, closed = len(surface.triangles), surface.is_watertight
    return mesh, {"triangles": triangles, "watertight": closed, "seconds": seconds}


def _against(made: Float[np.ndarray, "F 3 3"], truth: Float[np.ndarray, "T 3 3"]) -> dict[str, float]:
    found = surfaces.compare(made, truth)
    distances = {each: 1e3 * found[each] for each in ("chamfer", "accuracy", "completeness")}
    return distances | {"normals": found["normals"]}


def _means(rows: list[Row]) -> list[Row]:
    """Over the meshes, for each method; `watertight` becomes a share."""
    methods = dict.fromkeys(method for _, method, _ in rows)
    of = {each: [scores for _, method, scores in rows if method == each] for each in methods}
    return [
        ("mean", each, {column: float(np.mean([one[column] for one in of[each]])) for column in COLUMNS})
        for each in methods
    ]


def _table(rows: list[Row]) -> str:
    lines = [["mesh", "method", *COLUMNS], ["---", "---", *["--:"] * len(COLUMNS)]]
    for name, method, scores in rows:
        lines.append([name, method, *(f"{scores[each]:.4g}" for each in COLUMNS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"mesh.py: error: {error}") from None
