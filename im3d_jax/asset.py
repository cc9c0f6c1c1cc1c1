"""What an asset is: a request, rounds, a report and files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recon_torch.process.client import ReconClient
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.images import contact_sheet, straight, write_image
from recon_torch.views.transforms import write_transforms
from recon_torch.views.video import write_video

PACKAGES = ("im3d", "jax", "flax", "torch", "gsplat", "numba", "lpips")

VERDICTS = ("good", "suspect", "bad")

REPORT = "report.json"


class Request(NamedTuple):
    """One asset to make. Either the prompt or the image (a path) may be empty, not both."""

    prompt: str
    image: str
    seed: int
    out: Path
    elevation_rad: float | None = None  # of the views, where it is known
    save_views: bool = False


class Round(NamedTuple):
    """A round of the fit: what it was given and what it made."""

    until_step: int
    quality: dict[str, float]
    targets: np.ndarray
    renders: np.ndarray
    alphas: np.ndarray


def rank(report: dict) -> tuple[int, int, float]:
    """Less is better: the verdict, how much speaks against the asset, how far it is from its views."""
    quality, last = report["quality"], report["rounds"][-1]
    return VERDICTS.index(quality["verdict"]), len(quality["reasons"]), -last["silhouette_iou"]


def version_of(package: str) -> str:
    """Its version; of a source tree that is only on the path there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_asset(
    request: Request, client: ReconClient, cameras, config, rounds: list[Round], report: dict
) -> None:
    """Writes an asset's files beside `out` and then moves them in, so that none is ever half there."""
    with tempfile.TemporaryDirectory(prefix=".im3d_", dir=request.out) as directory:
        staging = Path(directory)
        client.export(staging / "asset.ply")
        final = np.concatenate([rounds[-1].renders, rounds[-1].alphas], -1)
        write_views(staging, "images", final, cameras)
        if request.save_views:
            for number, each in enumerate(rounds):
                write_views(staging / f"views_{number}", "images", each.targets, cameras)
        rows = [rounds[0].targets[:1, ..., :3]]
        labels = ["input"]
        for number, each in enumerate(rounds):
            rows += [each.targets[..., :3], each.renders.clip(0, 1)]
            labels += [f"views {number}", f"renders {number}"]
        write_image(staging / "views.png", contact_sheet(rows, labels))
        around = orbit(
            config.turntable.num_frames, np.deg2rad(report["elevation_deg"]), config.turntable.size
        )
        client.render(around)
        write_video(staging / "turntable.mp4", client.renders.clamp(0, 1).cpu().numpy(), config.turntable.fps)
        move_into(staging, request.out)


def move_into(source: Path, target: Path) -> None:
    """Moves all that is in one directory to another, in place of what has the same name there.

    The report, which stands for a whole asset, goes first and comes last.
    """
    (target / REPORT).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == REPORT):
        if (target / path.name).is_dir():
            shutil.rmtree(target / path.name)
        os.replace(path, target / path.name)


def write_views(directory: Path, folder: str, rgba: np.ndarray, cameras: Cameras) -> None:
    """Pictures [K, H, W, 4] whose colours are over white, as RGBA files with a transforms.json beside."""
    names = [f"{folder}/{k:03d}.png" for k in range(len(rgba))]
    for name, picture in zip(names, straight(rgba[..., :3], rgba[..., 3:].clip(0, 1)), strict=True):
        write_image(directory / name, picture)
    write_transforms(directory / "transforms.json", cameras, names)


def image_digest(request: Request) -> str:
    """SHA-256, in hex, of the picture's file; "" without a picture."""
    return hashlib.sha256(Path(request.image).read_bytes()).hexdigest() if request.image else ""


def given_elevation_deg(request: Request) -> float | None:
    """What the user said, free of the rounding of its way to radians and back."""
    return None if request.elevation_rad is None else round(float(np.rad2deg(request.elevation_rad)), 6)
