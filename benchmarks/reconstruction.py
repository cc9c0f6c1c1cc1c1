"""How well the fit reconstructs meshes, beside the plain 3DGS recipe, in a protocol that it was not tuned on.

    python benchmarks/reconstruction.py --meshes DIR --split train --count 8 --vary "w_ssim 1: w_ssim=1"
    python benchmarks/reconstruction.py --meshes DIR --split validation --count 20 --seeds 0 1
    python benchmarks/reconstruction.py --meshes DIR --split test --count 20 --sizes 128 256 --cases all

Tune on one split, decide on a second, and report the third once. DIR holds .glb, .gltf or .obj files and, for
--split, a split.json, {"train": ["furniture/chair", ...], ...}; the same meshes are drawn from it each time.
Each mesh is rendered for a case of `view_cases`, by default from 16 azimuths at 20 degrees, fitted by each
recipe, and compared with 24 held-out views at elevations from -10 to 60 degrees, drawn at --scales times the
size of the fit. Differences to the plain recipe are paired by mesh and seed, with 95% intervals by
bootstrap over meshes. `psnr` is over white, as the views are, and `psnr_black` over black: white Gaussians
around an object hide its faults only over white. `needles` is the share of the Gaussians ten times as long
as thick, and `outside` the opacity, drawn at the largest scale, that lies outside of the object, by the
object's own area.

Last comes what a fit without any error at its own size would show at others: its true views, resized.

Each fit, its result (JSON) and its picture stay in --out; a fit that is there is not made again. Give another
--out when the code has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paired
import plain_recipe
import torch
import view_cases
from jaxtyping import Float
from torch.nn import functional
from view_cases import Given

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.reading import load_mesh
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.fit.optimization import Fit
from recon_torch.formats.ply import save_ply
from recon_torch.losses.metrics import psnr, ssim
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render, render_images
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import Cameras
from recon_torch.views.images import contact_sheet, read_image, write_image

MESH_SUFFIXES = (".glb", ".gltf", ".obj")
SCALED_VIEWS = np.arange(0, view_cases.NUM_TESTED, 3)  # that are compared at other sizes
SHEET_VIEWS = np.array([0, 4, 9, 14, 19, 23])
NEEDLE = 10.0  # largest by middle standard deviation
COMPARED = ("psnr", "psnr_black")  # over white, as the views are, and over black, which no recipe has seen
PLAIN, DEFAULT = "plain", "default"
PAPER = {"lpips_weights": "random", "start": "ball", "w_l1": 0.0, "prune_unseen": 0.0, "zoomed": 0.0}
RECIPES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "no L1": {"w_l1": 0.0},
    "no SSIM": {"w_ssim": 0.0},
    "no mask": {"w_mask": 0.0},
    "start in a ball": {"start": "ball"},
    "unseen kept": {"prune_unseen": 0.0},
    "never zoomed": {"zoomed": 0.0},
    "paper": PAPER,
    "paper, RGB for LPIPS": PAPER | {"w_lpips": 0.0, "w_rgb": 10.0},
}


class Run(NamedTuple):
    """Which fit it is, of all that the flags ask for."""

    mesh: str
    size: int
    num_steps: int
    case: str
    recipe: str
    seed: int


def main() -> None:
    flags = _parse()
    results: dict[Run, dict[str, float]] = {}
    for path in _meshes(flags):
        name = str(path.relative_to(flags.meshes).with_suffix(""))
        for size in flags.sizes:
            for run in _runs(name, size, flags):
                results[run] = _result(run, path, flags)
                print(*run, json.dumps(results[run]), flush=True)
            _write_sheets(name, size, path, flags)
    print("\n" + _tables(results, flags))
    print("\n" + "\n".join(_limits(flags)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--meshes", type=Path, required=True, metavar="DIR", help="a folder of .glb, .gltf or .obj files")
    add("--split", help="of DIR/split.json (default: all files below DIR)")
    add("--count", type=int, default=20, help="how many meshes are drawn (20)")
    add("--names", nargs="+", metavar="NAME", help="these meshes instead, such as furniture/chair")
    add("--sizes", nargs="+", type=int, default=[128], metavar="PX")
    add("--scales", nargs="+", type=float, default=[0.5, 1, 2, 4], help="sizes of tests, by the fit's")
    add("--cases", nargs="+", choices=[*view_cases.CASES, "all"], default=["clean"], metavar="CASE")
    add("--recipes", nargs="+", choices=[*RECIPES, PLAIN], default=[DEFAULT, PLAIN], metavar="RECIPE")
    add("--vary", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="a recipe of your own")
    add("--num-steps", type=int, default=FitSettings.num_steps)
    add("--seeds", nargs="+", type=int, default=[0], help="of the start, the order of views and the cases")
    add("--out", type=Path, default=Path("out/reconstruction"), metavar="DIR")
    flags = parser.parse_args()
    flags.cases = list(view_cases.CASES) if "all" in flags.cases else flags.cases
    flags.own = dict(_recipe(text) for text in flags.vary)
    flags.recipes = [*flags.recipes, *flags.own]
    return flags


def _recipe(text: str) -> tuple[str, dict[str, Any]]:
    """A recipe's name, which is the text itself, so that another value is another fit, and its settings."""
    settings = {}
    for pair in text.partition(":")[2].split(","):
        key, _, value = (part.strip() for part in pair.partition("="))
        if not hasattr(FitSettings, key):
            raise UserError(f"--vary {text!r}: fits have no setting {key!r}; give NAME:KEY=VALUE,...")
        try:
            settings[key] = type(getattr(FitSettings, key))(value)
        except ValueError:
            raise UserError(f"--vary {text!r}: {key} cannot be {value!r}") from None
    return text, settings


def _meshes(flags: argparse.Namespace) -> list[Path]:
    files = {
        str(path.relative_to(flags.meshes).with_suffix("")): path
        for path in sorted(flags.meshes.rglob("*"))
        if path.suffix in MESH_SUFFIXES
    }
    names = list(files)
    if flags.split:
        splits = json.loads((flags.meshes / "split.json").read_text())
        if flags.split not in splits:
            raise UserError(f"--split is {flags.split!r}; split.json has {', '.join(splits)}")
        names = splits[flags.split]
    if unknown := sorted({*(flags.names or names)} - files.keys()):
        raise UserError(f"no meshes in {flags.meshes}: {', '.join(unknown[:5])}")
    drawn = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[: flags.count]
    return [files[name] for name in flags.names or drawn]


def _runs(mesh: str, size: int, flags: argparse.Namespace) -> Iterator[Run]:
    for case in flags.cases:
        for recipe in flags.recipes:
            for seed in flags.seeds:
                yield Run(mesh, size, flags.num_steps, case, recipe, seed)


# ---- One fit ----


def _folder(run: Run, out: Path) -> Path:
    case = run.case.replace(" ", "_").replace(",", "")
    return out / f"{run.mesh}_{run.size}_{run.num_steps}_steps" / f"{case}_{run.seed}"


def _result(run: Run, mesh_file: Path, flags: argparse.Namespace) -> dict[str, float]:
    file = _folder(run, flags.out) / f"{run.recipe}.json"
    if file.is_file():
        return json.loads(file.read_text())
    given = _given(mesh_file, run.case, run.size, run.seed)
    started = time.perf_counter()
    gaussians = _fit(run, given, flags)
    result: dict[str, float] = {"seconds": round(time.perf_counter() - started, 1)}
    result["num_gaussians"] = len(gaussians.means)
    trained = render_images(gaussians, given.views.cameras)
    result["train_psnr"] = psnr(torch.from_numpy(trained), torch.from_numpy(given.views.images)).mean().item()
    result |= _held_out(gaussians, mesh_file, run, flags, file.with_suffix(".png"))
    save_ply(gaussians, file.with_suffix(".ply"))
    write_json(file, result)
    return result


@functools.lru_cache(maxsize=1)
def _given(mesh_file: Path, case: str, size: int, seed: int) -> Given:
    return view_cases.views_of(load_mesh(mesh_file), case, size, seed)


def _fit(run: Run, given: Given, flags: argparse.Namespace) -> Gaussians:
    views = given.views
    if run.recipe == PLAIN:
        pictures = dataclasses.replace(views, images=given.pictures)
        return plain_recipe.fit(pictures, flags.num_steps, run.seed)
    own = (RECIPES | flags.own)[run.recipe]
    settings = FitSettings(num_steps=flags.num_steps, seed=run.seed, background=views.background)
    settings = dataclasses.replace(settings, **own)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no weights for LPIPS")  # then the default goes without
        fit = Fit(views.cameras, settings)
    masks = None if views.masks is None else torch.from_numpy(views.masks)
    unsure = None if views.unsure is None else torch.from_numpy(views.unsure)
    fit.set_targets(torch.from_numpy(views.images), masks, unsure=unsure)
    fit.run(run.num_steps)
    return fit.scene.gaussians


def _held_out(
    gaussians: Gaussians, mesh_file: Path, run: Run, flags: argparse.Namespace, picture: Path
) -> dict[str, float]:
    """Agreement with views that no fit has seen: all of them in the size of the fit, some in others."""
    result = {}
    for scale in sorted({1.0, *flags.scales}):
        size = round(run.size * scale)
        chosen = np.arange(view_cases.NUM_TESTED) if scale == 1 else SCALED_VIEWS
        cameras, truth, masks = (each[chosen] for each in _truth(mesh_file, size, flags.out / "truth"))
        renders = render_images(gaussians, cameras)
        x, y = torch.from_numpy(renders), torch.from_numpy(truth)
        name = "" if scale == 1 else f"_{scale:g}x"
        result[f"psnr{name}"] = psnr(x, y).mean().item()
        if scale == 1:
            result["ssim"] = ssim(x, y).mean().item()
            black = torch.from_numpy(render_images(gaussians, cameras, background=0.0))
            result["psnr_black"] = psnr(black, y - (1 - torch.from_numpy(masks))).mean().item()
            write_image(picture, np.concatenate(renders[SHEET_VIEWS], 1))
    result["outside"] = _outside(gaussians, cameras, masks)
    lengths = gaussians.scales.sort(1).values
    result["needles"] = (lengths[:, 2] > NEEDLE * lengths[:, 1]).float().mean().item()
    return result


@torch.no_grad()
def _outside(gaussians: Gaussians, cameras: Cameras, masks: Float[np.ndarray, "K H W 1"]) -> float:
    alpha = np.stack([render(gaussians, cameras[i : i + 1]).alpha[0].numpy() for i in range(len(cameras))])
    return float((alpha * (masks == 0)).sum() / masks.sum())


# ---- The truth ----


@functools.lru_cache(maxsize=8)
def _truth(mesh_file: Path, size: int, cache: Path) -> tuple[Cameras, np.ndarray, np.ndarray]:
    """Cameras, views over white and masks, rendered where the cache has none."""
    cameras = view_cases.held_out_cameras(size)
    file = cache / f"{mesh_file.parent.name}_{mesh_file.stem}_{size}.npz"
    if not file.is_file():
        rgba, _ = mesh_rendering.render(load_mesh(mesh_file), cameras, supersampling=3 if size < 300 else 2)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, rgba=np.round(rgba * 255).astype(np.uint8))
    rgba = np.load(file)["rgba"].astype(np.float32) / 255
    return cameras, rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:], rgba[..., 3:]


def _limits(flags: argparse.Namespace) -> Iterator[str]:
    """Agreement of true views, resized (bicubic), with the true views of that size."""
    for size in flags.sizes:
        for scale in sorted({*flags.scales} - {1.0}):
            resized_px, scores = round(size * scale), []
            for path in _meshes(flags):
                small = torch.from_numpy(_truth(path, size, flags.out / "truth")[1][SCALED_VIEWS])
                truth = torch.from_numpy(_truth(path, resized_px, flags.out / "truth")[1][SCALED_VIEWS])
                resized = functional.interpolate(
                    small.movedim(-1, 1), size=resized_px, mode="bicubic", antialias=True
                )
                scores.append(psnr(resized.movedim(1, -1).clamp(0, 1), truth).mean().item())
            yield f"true views of {size} px resized by {scale:g}: {np.mean(scores):.2f} dB"


# ---- What people look at ----


def _write_sheets(mesh: str, size: int, mesh_file: Path, flags: argparse.Namespace) -> None:
    """Held-out views: the truth above what the recipes made of them, for the first seed of each case."""
    for case in flags.cases:
        folder = _folder(Run(mesh, size, flags.num_steps, case, "", flags.seeds[0]), flags.out)
        rows = {"truth": _truth(mesh_file, size, flags.out / "truth")[1][SHEET_VIEWS]}
        for recipe in flags.recipes:
            if (folder / f"{recipe}.png").is_file():
                rows[recipe] = np.split(read_image(folder / f"{recipe}.png"), len(SHEET_VIEWS), 1)
        write_image(folder / "sheet.png", contact_sheet(list(rows.values()), list(rows)))


def _tables(results: dict[Run, dict[str, float]], flags: argparse.Namespace) -> str:
    """Means of each recipe over meshes and seeds, and its differences to the plain recipe."""
    groups: dict[tuple, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    first, *others = results.values()
    columns = [column for column in first if all(column in result for result in others)]
    for run, result in results.items():
        for column in columns:
            by_mesh = groups[run.size, run.case, run.recipe][column]
            by_mesh.setdefault(run.mesh, []).append(result[column])
    lines = [["px", "case", "recipe", *columns, *(f"{column} less that of {PLAIN}" for column in COMPARED)]]
    lines += [["--:", "---", "---", *["--:"] * len(columns), *["---"] * len(COMPARED)]]
    for (size, case, recipe), values in groups.items():
        means = [f"{np.mean(sum(values[column].values(), [])):.4g}" for column in columns]
        peer = groups.get((size, case, PLAIN))
        compared = [""] * len(COMPARED)
        if peer is not None and recipe != PLAIN:
            compared = [str(paired.difference(values[column], peer[column])) for column in COMPARED]
        lines.append([str(size), case, recipe, *means, *compared])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"reconstruction.py: error: {error}") from None
