"""`im3d fit`: views with a transforms.json -> Gaussians, a turntable, a report (Sec. 3.3 alone)."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from recon_torch import export
from recon_torch.cameras import Cameras, orbit, write_transforms
from recon_torch.errors import CommandParser, UserError
from recon_torch.fit import Fit, FitSettings
from recon_torch.gaussians import Gaussians, save_ply
from recon_torch.masks import isnet_masks, threshold_masks
from recon_torch.views import Views, load_views

EXAMPLES = """examples:
  im3d fit --views out/views --out fitted
  im3d fit --views captured --held-out 8 --out fitted          # every 8th view is kept for testing
  im3d fit --views train --held-out test --out fitted --lpips-weights vgg16-397923af.pth
  im3d fit --views photos --isnet-weights isnet-general-use.onnx --out fitted

A directory of views has images and nerfstudio's transforms.json. Foreground: the mask_path of a frame, or the
image's alpha, or IS-Net, or else what differs from a white background. +Z is up in the turntable.
"""
PACKAGES = ("torch", "gsplat", "lpips", "numba", "numpy")
TURNTABLE_FRAMES, TURNTABLE_FPS = 96, 24
SHEET_VIEWS = 8
LOG_EVERY_STEPS = 200
UNIT_HALF_WIDTH = 2.0 * np.tan(np.radians(33.8 / 2))  # of what our own cameras see at the object


def main(argv: list[str]) -> None:
    flags = _parser().parse_args(argv)
    started = time.perf_counter()
    train, held_out = _load(flags)
    export.make_directory(flags.out)
    center, scale = unit_frame(train.cameras)
    fit = Fit(
        to_unit(train.cameras, center, scale),
        FitSettings(
            num_steps=flags.steps,
            seed=flags.seed,
            engine=flags.engine,
            lpips_net=flags.lpips_net,
            lpips_weights=flags.lpips_weights,
        ),
    )
    fit.set_targets(torch.from_numpy(train.images), torch.from_numpy(train.masks))
    loaded = time.perf_counter()
    _run_with_progress(fit, flags.steps)
    fitted = time.perf_counter()

    quality = {"training": fit.metrics()}
    if held_out is not None:
        cameras = to_unit(held_out.cameras, center, scale)
        quality["held_out"] = fit.compare(
            cameras, torch.from_numpy(held_out.images), torch.from_numpy(held_out.masks)
        )
    _write_asset(flags.out, fit, train, center, scale)
    seconds = {"load": loaded - started, "fit": fitted - loaded, "export": time.perf_counter() - fitted}
    report = _report(fit, flags, quality, seconds)
    export.write_json(flags.out / "report.json", report)
    for name, values in quality.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    print(f"{fit.num_gaussians} Gaussians in {flags.out}")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("fit", "Fit 3D Gaussians to views of one object.")
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("--views", type=Path, required=True, metavar="DIR", help="images and transforms.json")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="gets asset.ply, turntable.mp4, report.json ...",
    )
    add("--held-out", metavar="DIR|N", help="test views: another directory, or every N-th of --views")
    add("--size", type=int, metavar="PX", help="fit to the views reduced to this height")
    add("--steps", type=int, default=FitSettings.num_steps, help="optimisation steps (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--isnet-weights", type=Path, metavar="FILE", help="cut out the foreground with IS-Net")
    add("--lpips-net", default=FitSettings.lpips_net, help="vgg, alex or squeeze (default %(default)s)")
    add("--lpips-weights", metavar="FILE", help="its backbone weights as torchvision names them")
    add("--engine", default="auto", help="rasteriser: auto, gsplat or cpu (default %(default)s)")
    return parser


def _load(flags: argparse.Namespace) -> tuple[Views, Views | None]:
    """The training views and the held-out views."""
    if flags.steps < 1 or flags.seed < 0:
        raise UserError(f"--steps {flags.steps} must be at least 1 and --seed {flags.seed} at least 0")
    segment = threshold_masks
    if flags.isnet_weights is not None:
        segment = functools.partial(isnet_masks, weights_path=flags.isnet_weights)
    views = load_views(flags.views, segment)
    if flags.size is not None:
        views = views.resized(flags.size)
    if flags.held_out is None:
        return views, None
    if not flags.held_out.isdecimal():
        held_out = load_views(flags.held_out, segment)
        return views, held_out if flags.size is None else held_out.resized(flags.size)
    every, index = int(flags.held_out), np.arange(len(views))
    if not 2 <= every <= len(views):
        raise UserError(f"--held-out {every} must be from 2 to the number of views, {len(views)}")
    last_of_each = index % every == every - 1
    return views.take(index[~last_of_each]), views.take(index[last_of_each])


def unit_frame(cameras: Cameras) -> tuple[Float[np.ndarray, "3"], float]:
    """Where the object is, from the cameras alone: the point nearest to all optical axes, and the factor that
    makes what the cameras see there as wide as what this project's own orbits see.

    Raises:
        UserError: the axes are parallel, so they meet nowhere.
    """
    axes = cameras.w2c[:, 2, :3].astype(np.float64)
    positions = cameras.positions.astype(np.float64)
    off_axis = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    system = off_axis.sum(0)
    if np.linalg.cond(system) > 1e6:
        raise UserError("the cameras all look the same way; give views from around the object")
    center = np.linalg.solve(system, np.einsum("kij,kj->i", off_axis, positions))
    half_width = 0.5 * min(cameras.width, cameras.height) / cameras.intrinsics_px[:, 1, 1]
    distance = np.linalg.norm(positions - center, axis=-1)
    return center, float(UNIT_HALF_WIDTH / np.mean(distance * half_width))


def to_unit(cameras: Cameras, center: Float[np.ndarray, "3"], scale: float) -> Cameras:
    """The same cameras in a world that was moved by -center and then enlarged."""
    w2c = cameras.w2c.astype(np.float64)
    w2c[:, :3, 3] = scale * (w2c[:, :3, :3] @ center + w2c[:, :3, 3])
    return Cameras(w2c.astype(np.float32), cameras.intrinsics_px, cameras.width, cameras.height)


def from_unit(gaussians: Gaussians, center: Float[np.ndarray, "3"], scale: float) -> Gaussians:
    """Gaussians fitted in `to_unit`'s world, back in the views' own."""
    means = gaussians.means / scale + torch.from_numpy(center).to(gaussians.means)
    return gaussians._replace(means=means, log_scales=gaussians.log_scales - np.log(scale))


def _run_with_progress(fit: Fit, num_steps: int) -> None:
    """A bar with rate and ETA on a terminal, plain lines in a log."""
    with tqdm(total=num_steps, desc="fit", unit="step", disable=None) as bar:

        def on_step(step: int, losses: dict) -> None:
            bar.update()
            if bar.disable and step % LOG_EVERY_STEPS == 0:
                print(f"step {step}: loss {losses['loss']:.4f}, {fit.num_gaussians} Gaussians", flush=True)

        fit.run(num_steps, on_step)


def _write_asset(out: Path, fit: Fit, train: Views, center: np.ndarray, scale: float) -> None:
    save_ply(from_unit(fit.gaussians, center, scale), out / "asset.ply")
    export.write_video(out / "turntable.mp4", _rgb(fit, turntable(fit.cameras)), TURNTABLE_FPS)

    renders = [fit.render(fit.cameras[index]) for index in range(len(train))]
    names = [f"renders/{index:03d}.png" for index in range(len(train))]
    for name, render in zip(names, renders, strict=True):
        export.write_image(out / name, render.rgb[0].clamp(0, 1).cpu().numpy())
    write_transforms(out / "transforms.json", train.cameras, names)

    shown = np.unique(np.linspace(0, len(train) - 1, SHEET_VIEWS).round().astype(int))
    rows = [train.images[shown], _rgb(fit, fit.cameras[shown])]
    export.write_image(out / "views.png", export.contact_sheet(rows, ["views", "renders"]))


def turntable(cameras: Cameras) -> Cameras:
    """A full circle at the cameras' mean height, distance and field of view."""
    positions = cameras.positions.astype(np.float64)
    distance = np.linalg.norm(positions, axis=-1)
    elevation_rad = np.arcsin(positions[:, 2] / distance).mean()
    size = min(cameras.width, cameras.height)
    fov_rad = 2 * np.arctan(0.5 * size / cameras.intrinsics_px[:, 1, 1].mean())
    return orbit(
        TURNTABLE_FRAMES,
        float(elevation_rad),
        size,
        radius=float(distance.mean()),
        fov_deg=float(np.degrees(fov_rad)),
    )


def _rgb(fit: Fit, cameras: Cameras) -> Float[np.ndarray, "K H W 3"]:
    parts = [fit.render(cameras[index]).rgb.clamp(0, 1).cpu().numpy() for index in range(len(cameras))]
    return np.concatenate(parts)


def _report(fit: Fit, flags: argparse.Namespace, quality: dict, seconds: dict) -> dict:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if fit.device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    return quality | {
        "seconds": seconds,
        "num_steps": fit.step,
        "num_gaussians": fit.num_gaussians,
        "seed": flags.seed,
        "versions": versions | {"python": platform.python_version()},
        "device": device,
        "notes": fit.notes,
    }
