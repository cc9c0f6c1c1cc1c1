"""How well the fit reconstructs meshes from 16 views of one elevation, beside the plain 3DGS recipe.

    python benchmarks/reconstruction.py --meshes DIR --out out/reconstruction
    python benchmarks/reconstruction.py --meshes DIR --only default plain --sizes 128 256 --resume
    python benchmarks/reconstruction.py --meshes DIR --inconsistent

Each mesh is rendered from 16 azimuths at 20 degrees for training, and for testing from 24 directions between
-10 and 60 degrees of elevation. Variants take away one thing each, as the paper's Table 2 does (which scores
them with CLIP); "paper" takes away all that the fit adds to it. With --inconsistent the training views are
changed one by one, as a generator's are.
Renders, results (JSON) and contact sheets of held-out views stay in --out; --resume fits what has no result.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
import warnings
from pathlib import Path

import numpy as np
import perturbed_views
import plain_recipe
import torch

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.reading import load_mesh
from recon_torch.files import write_json
from recon_torch.fit.optimization import Fit
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.losses.metrics import psnr, ssim
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render_images
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import Views, load_views, write_views
from recon_torch.views.images import contact_sheet, read_image, write_image

MESH_SUFFIXES = (".glb", ".gltf", ".obj")
TRAIN_VIEWS, TRAIN_ELEVATION_DEG = 16, 20.0
TEST_VIEWS, TEST_ELEVATIONS_DEG = 24, (-10.0, 60.0)
GOLDEN_ANGLE_RAD = np.pi * (3 - np.sqrt(5))  # azimuths that never repeat
LPIPS = {"lpips_weights": "random"}  # unless torchvision's cache has weights, the default goes without
PAPER = LPIPS | {"start": "ball", "w_l1": 0.0, "prune_unseen": 0.0}
VARIANTS = {
    "default": {},
    "LPIPS": LPIPS,
    "no L1": {"w_l1": 0.0},
    "no SSIM": {"w_ssim": 0.0},
    "no mask": {"w_mask": 0.0},
    "start in a ball": {"start": "ball"},
    "unseen kept": {"prune_unseen": 0.0},
    "paper": PAPER,
    "paper, RGB for LPIPS": PAPER | {"w_lpips": 0.0, "w_rgb": 10.0},
}
PLAIN = "plain"
INCONSISTENT_VARIANTS = ["default", "LPIPS", "paper", "paper, RGB for LPIPS", PLAIN]
SHEET_VARIANTS, SHEET_VIEWS = ["default", PLAIN], np.array([0, 4, 9, 14, 19, 23])
COLUMNS = {  # the table's columns: heading, format
    "psnr": ("PSNR", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "train_psnr": ("PSNR of training views", ".2f"),
    "num_gaussians": ("Gaussians", "d"),
    "seconds": ("seconds", ".0f"),
}


def main() -> None:
    flags = _parse()
    rows = {}
    for path in sorted(path for path in flags.meshes.iterdir() if path.suffix in MESH_SUFFIXES):
        if flags.assets and path.stem not in flags.assets:
            continue
        for size in flags.sizes:
            train, test = _views(path, size, flags.out / "views" / f"{path.stem}_{size}")
            if flags.inconsistent:
                train = perturbed_views.perturb(train, seed=0)
            kind = "_inconsistent" if flags.inconsistent else ""
            folder = flags.out / f"{path.stem}_{size}{kind}_{flags.num_steps}_steps_seed_{flags.seed}"
            for name in flags.only:
                rows[path.stem, size, name] = _result(folder, name, train, test, flags)
                print(path.stem, size, name, json.dumps(rows[path.stem, size, name]), flush=True)
            _write_sheet(folder, train, test, flags)
    print("\n" + _table(rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--meshes", type=Path, required=True, metavar="DIR", help="a folder of .glb, .gltf or .obj files")
    add("--assets", nargs="+", metavar="NAME", help="only these files, without suffix (default: all)")
    add("--sizes", nargs="+", type=int, default=[128], metavar="PX")
    add("--only", nargs="+", choices=[*VARIANTS, PLAIN], metavar="VARIANT", help="default: all")
    add("--num-steps", type=int, default=FitSettings.num_steps)
    add("--seed", type=int, default=0, help="of the start, the order of views and what is split")
    add("--inconsistent", action="store_true", help="training views as a generator makes them")
    add("--resume", action="store_true", help="keep the results that --out has")
    add("--out", type=Path, default=Path("out/reconstruction"), metavar="DIR")
    flags = parser.parse_args()
    flags.only = flags.only or (INCONSISTENT_VARIANTS if flags.inconsistent else [*VARIANTS, PLAIN])
    return flags


def _views(mesh_file: Path, size: int, cache: Path) -> tuple[Views, Views]:
    """Training and held-out views, rendered where the cache has none."""
    cameras = {
        "train": orbit(TRAIN_VIEWS, np.radians(TRAIN_ELEVATION_DEG), size),
        "test": _test_cameras(size),
    }
    for name, orbits in cameras.items():
        if not (cache / name / "transforms.json").is_file():
            rgba, _ = mesh_rendering.render(load_mesh(mesh_file), orbits)
            write_views(cache / name, orbits, rgba)
    return tuple(dataclasses.replace(load_views(cache / name), cameras=cameras[name]) for name in cameras)


def _test_cameras(size: int) -> Cameras:
    """A spiral from the lowest to the highest elevation."""
    elevations_deg = np.linspace(*TEST_ELEVATIONS_DEG, TEST_VIEWS)
    azimuths_rad = np.arange(TEST_VIEWS) * GOLDEN_ANGLE_RAD
    return orbit(elevation_rad=np.radians(elevations_deg), size=size, azimuths_rad=azimuths_rad)


def _result(folder: Path, name: str, train: Views, test: Views, flags: argparse.Namespace) -> dict:
    file = folder / f"{name}.json"
    if flags.resume and file.is_file():
        return json.loads(file.read_text())
    started = time.perf_counter()
    gaussians = _fit(name, train, flags.num_steps, flags.seed)
    seconds = time.perf_counter() - started
    renders = render_images(gaussians, test.cameras)
    result = _quality(renders, test.images) | {"num_gaussians": len(gaussians.means), "seconds": seconds}
    trained = render_images(gaussians, train.cameras)
    result["train_psnr"] = _quality(trained, train.images)["psnr"]
    write_image(folder / f"{name}.png", np.concatenate(renders[SHEET_VIEWS], 1))
    write_json(file, result)
    return result


def _fit(name: str, train: Views, num_steps: int, seed: int) -> Gaussians:
    if name == PLAIN:
        return plain_recipe.fit(train, num_steps, seed)
    settings = dataclasses.replace(FitSettings(num_steps=num_steps, seed=seed), **VARIANTS[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no weights for LPIPS")  # the table's last line says so
        fit = Fit(train.cameras, settings)
    fit.set_targets(torch.from_numpy(train.images), torch.from_numpy(train.masks))
    fit.run(num_steps)
    return fit.scene.gaussians


def _quality(renders: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Means over the views. LPIPS has all its stages, whatever the fit used."""
    x, y = torch.from_numpy(renders), torch.from_numpy(truth)
    lpips = _lpips()
    with torch.no_grad():
        values = {"psnr": psnr(x, y), "ssim": ssim(x, y), "lpips": lpips.distance(x, lpips.features(y))}
    return {name: value.mean().item() for name, value in values.items()}


@functools.cache
def _lpips() -> PerceptualDistance:
    return PerceptualDistance("vgg")


def _write_sheet(folder: Path, train: Views, test: Views, flags: argparse.Namespace) -> None:
    """Held-out views: the truth above what the variants made of them; inconsistent training views on top."""
    rows = {"truth": test.images[SHEET_VIEWS]}
    if flags.inconsistent:
        rows = {"views": train.images[: len(SHEET_VIEWS)]} | rows
    for name in INCONSISTENT_VARIANTS if flags.inconsistent else SHEET_VARIANTS:
        if (folder / f"{name}.png").is_file():
            rows[name] = np.split(read_image(folder / f"{name}.png"), len(SHEET_VIEWS), 1)
    write_image(folder / "sheet.png", contact_sheet(list(rows.values()), list(rows)))


def _table(rows: dict[tuple[str, int, str], dict]) -> str:
    lines = [["asset", "px", "variant", *(heading for heading, _ in COLUMNS.values())]]
    lines += [["---", "--:", "---", *["--:"] * len(COLUMNS)]]
    for key, result in rows.items():
        lines.append([*map(str, key), *(format(result[name], form) for name, (_, form) in COLUMNS.items())])
    note = "LPIPS with random weights." if _lpips().random_weights else "LPIPS with trained weights."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}"


if __name__ == "__main__":
    main()
