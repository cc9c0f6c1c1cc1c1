"""What wrong cameras cost a fit, and whether it finds and mends them.

    python benchmarks/wrong_cameras.py --meshes DIR --out out/wrong_cameras --resume
    python benchmarks/wrong_cameras.py --meshes DIR --only found --assets apple fire_truck --resume

Each mesh is rendered from 16 azimuths at 20 degrees of elevation. Three of the cameras are then made wrong:
turned about the middle of the object by 5 degrees, or about their own place by 1 degree, about random axes.
"mended" fits the views as `im3d fit --refine-cameras` does, "given" with the cameras that it was given, and
both compare 24 other views. "found" takes a quarter of a fit's steps alone and says which cameras would be
moved. The lag is by how many dB the view that agrees worst is below the median, in that fit.
Renders and results (JSON) stay in --out; --resume measures what has no result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import view_cases
from scipy.spatial.transform import Rotation

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.reading import load_mesh
from recon_torch.files import write_json
from recon_torch.fit import asset, camera_moves
from recon_torch.fit.optimization import Fit
from recon_torch.losses.metrics import psnr
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import Views, load_views, write_views

MESH_SUFFIXES = (".glb", ".gltf", ".obj")
CASES = {  # the place about which wrong cameras are turned, and by how many degrees
    "right": None,
    "about the object, 5 degrees": ("object", 5.0),
    "about themselves, 1 degree": ("camera", 1.0),
}
MENDED, GIVEN, FOUND = VARIANTS = ("mended", "given", "found")


def main() -> None:
    flags = _parse()
    rows = []
    for path in sorted(path for path in flags.meshes.rglob("*") if path.suffix in MESH_SUFFIXES):
        if flags.assets and path.stem not in flags.assets:
            continue
        train, test = _views(path, flags.size, flags.out / "views" / f"{path.stem}_{flags.size}")
        for case in flags.cases:
            for variant in flags.only:
                rows.append(_result(path.stem, case, variant, train, test, flags))
                print(json.dumps(rows[-1]), flush=True)
    print("\n" + _table(rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--meshes", type=Path, required=True, metavar="DIR", help="a folder of .glb, .gltf or .obj files")
    add("--assets", nargs="+", metavar="NAME", help="only these files, without suffix (default: all)")
    add("--only", nargs="+", choices=VARIANTS, default=[MENDED, GIVEN])
    add("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="CASE", help="default: all")
    add("--size", type=int, default=128, metavar="PX")
    add("--num-steps", type=int, default=FitSettings.num_steps)
    add("--seed", type=int, default=0, help="of the fit, and of which cameras are wrong and how")
    add("--resume", action="store_true", help="keep the results that --out has")
    add("--out", type=Path, default=Path("out/wrong_cameras"), metavar="DIR")
    return parser.parse_args()


def _views(mesh_file: Path, size: int, cache: Path) -> tuple[Views, Views]:
    """Training and held-out views, rendered where the cache has none."""
    cameras = {
        "train": orbit(view_cases.NUM_VIEWS, np.radians(view_cases.ELEVATION_DEG), size),
        "test": view_cases.held_out_cameras(size),
    }
    for name, orbits in cameras.items():
        if not (cache / name / "transforms.json").is_file():
            write_views(cache / name, orbits, mesh_rendering.render(load_mesh(mesh_file), orbits)[0])
    return tuple(dataclasses.replace(load_views(cache / name), cameras=cameras[name]) for name in cameras)


def _result(name: str, case: str, variant: str, train: Views, test: Views, flags: argparse.Namespace) -> dict:
    folder = flags.out / f"{name}_{flags.size}_{flags.num_steps}_steps_seed_{flags.seed}"
    file = folder / f"{case}_{variant}.json"
    if flags.resume and file.is_file():
        return json.loads(file.read_text())
    wrong, cameras = _wrong_cameras(train.cameras, case, flags.seed)
    settings = FitSettings(num_steps=flags.num_steps, seed=flags.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no weights for LPIPS")
        made = asset.prepare(dataclasses.replace(train, cameras=cameras), settings)
    started_s = time.process_time()
    result = {"asset": name, "case": case, "variant": variant, "wrong": wrong}
    if variant == FOUND:
        result["lag_db"] = _find(made)
    else:
        result["psnr"] = _fit(made, variant == MENDED, test)
        result["lag_db"] = _lag_db(made.fit)
    result["seconds"] = time.process_time() - started_s
    result["moved"] = [move.view for move in made.judged.moves]
    result["stray"] = list(made.judged.stray)
    turned, shifted = _errors(made.unit.cameras_back(made.fit.cameras), train.cameras)
    left = set(result["moved"]) | set(wrong)
    result["left_deg"] = {view: turned[view] for view in sorted(left)}
    result["left_distance"] = {view: shifted[view] for view in sorted(left)}
    write_json(file, result)
    return result


def _fit(made: asset.Asset, refine: bool, test: Views) -> float:
    (error,) = asset.run([made], refine_cameras=refine)
    if error is not None:
        raise error
    cameras = made.unit.cameras(test.cameras)
    renders = torch.cat([made.fit.render(cameras[view]).rgb.clamp(0, 1) for view in range(len(cameras))])
    return psnr(renders, torch.from_numpy(test.images)).mean().item()


def _find(made: asset.Asset) -> float:
    made.fit.run(round(camera_moves.JUDGED_AT * made.fit.settings.num_steps))
    lag_db = _lag_db(made.fit)
    made.judged = camera_moves.judge(made.fit)
    made.fit = asset.new_fit(made.judged.moved(made.fit.cameras), made.fit.settings, made.train)
    return lag_db


def _lag_db(fit: Fit) -> float:
    """How far below the median the foreground's PSNR is of the view that agrees worst."""
    renders = torch.cat([fit.render(fit.cameras[view]).rgb.clamp(0, 1) for view in range(len(fit.cameras))])
    scores_db = psnr(renders, fit.targets.views, fit.targets.masks)
    return float(scores_db.median() - scores_db.min())


def _wrong_cameras(cameras: Cameras, case: str, seed: int) -> tuple[list[int], Cameras]:
    """Which cameras are wrong, and all of them."""
    if CASES[case] is None:
        return [], cameras
    place, angle_deg = CASES[case]
    generator = np.random.default_rng(seed)
    wrong = sorted(generator.choice(len(cameras), view_cases.WRONG_POSES, replace=False).tolist())
    w2c = cameras.w2c.astype(np.float64)
    for view in wrong:
        turn = np.eye(4)
        turn[:3, :3] = view_cases.rotation(generator, np.radians(angle_deg))
        w2c[view] = w2c[view] @ turn if place == "object" else turn @ w2c[view]
    return wrong, dataclasses.replace(cameras, w2c=w2c.astype(np.float32))


def _errors(cameras: Cameras, true: Cameras) -> tuple[list[float], list[float]]:
    """By how many degrees cameras are turned, and how far away they are, from where they should be."""
    turns = cameras.w2c[:, :3, :3].astype(np.float64) @ true.w2c[:, :3, :3].transpose(0, 2, 1)
    angles_deg = np.degrees(np.linalg.norm(Rotation.from_matrix(turns).as_rotvec(), axis=-1))
    return angles_deg.tolist(), np.linalg.norm(cameras.positions - true.positions, axis=-1).tolist()


def _table(rows: list[dict]) -> str:
    lines = ["| asset | case | cameras | held-out PSNR | lag | wrong | moved | stray | degrees left | s |"]
    lines += ["|---|---|---|--:|--:|---|---|---|--:|--:|"]
    for row in rows:
        named = [" ".join(map(str, row[name])) for name in ("wrong", "moved", "stray")]
        score = f"{row['psnr']:.2f}" if "psnr" in row else ""
        left = " ".join(f"{degrees:.2f}" for degrees in row["left_deg"].values())
        numbers = [score, f"{row['lag_db']:.1f}"]
        taken = f"{row['seconds']:.0f}"
        cells = [row["asset"], row["case"], row["variant"], *numbers, *named, left, taken]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
