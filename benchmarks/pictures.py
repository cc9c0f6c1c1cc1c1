"""How well the object of a user's picture is found, before backdrops as users have them.

    im3d dataset render --meshes DIR --out out/pictures/views --size 320 --num-views 2
    python benchmarks/pictures.py --views out/pictures/views --out out/pictures

The first view of each object is put before each backdrop and made view 0, as `im3d generate --image` does.
The truth is what its own alpha gives. Prints a table by backdrop: the mean IoU, how many of the objects have
less than 0.9, how many of these are refused or doubted in a word, and how many with 0.9 or more are doubted.
Writes sheet.png: each picture above the view made of it, with a red bar if it is doubted and an orange one
below 0.9.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from im3d_jax.conditions import pictures
from recon_torch.errors import UserError
from recon_torch.views.images import read_image

SIDE_PX, VIEW_PX = 480, 128
FILL, TOLERANCE = 0.8, 0.1
GOOD_IOU = 0.9
BAR_PX = 4
BACKDROPS = (
    "white", "white, JPEG 50", "grey", "gradient", "vignette", "noise 8/255", "soft shadow", "hard shadow",
    "specks", "RGBA, speck", "alpha 250", "rounded corners", "pattern",
)  # fmt: skip
Y, X = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32) / SIDE_PX


class Case(NamedTuple):
    picture: np.ndarray  # RGB or RGBA in [0, 1]
    view: np.ndarray  # RGB in [0, 1]
    iou: float  # 0 if the picture is refused
    doubted: bool  # or refused


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--views", type=Path, required=True, help="what `im3d dataset render` has written")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    objects = [on_canvas(path) for path in sorted(args.views.rglob("000.png"))]
    cases = {}
    print(f"{'backdrop':16s} mean IoU  below 0.9  of these named  doubted though right")
    for backdrop in BACKDROPS:
        cases[backdrop] = [measure(rgba, backdrop) for rgba in objects]
        good = np.array([case.iou >= GOOD_IOU for case in cases[backdrop]])
        doubted = np.array([case.doubted for case in cases[backdrop]])
        mean = np.mean([case.iou for case in cases[backdrop]])
        row = (~good).sum(), (~good & doubted).sum(), (good & doubted).sum()
        print(f"{backdrop:16s} {mean:8.3f} {row[0]:10d} {row[1]:15d} {row[2]:21d}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    sheet(list(cases.values())).save(args.out / "sheet.png")


def measure(rgba: np.ndarray, backdrop: str) -> Case:
    true = place(rgba).alpha[..., 0] > 0.5
    picture = before(rgba, backdrop)
    try:
        placed = place(picture)
    except UserError:
        return Case(picture, np.ones((VIEW_PX, VIEW_PX, 3)), 0.0, True)
    found = placed.alpha[..., 0] > 0.5
    return Case(picture, placed.rgb, (found & true).sum() / (found | true).sum(), bool(placed.doubts))


def place(picture: np.ndarray) -> pictures.Placed:
    return pictures.place(picture.astype(np.float32), "picture", VIEW_PX, FILL, TOLERANCE)


def on_canvas(path: Path) -> np.ndarray:
    """The object at 0.9 of its view's size, off the middle."""
    side = round(0.9 * SIDE_PX)
    view = Image.fromarray((read_image(path) * 255).round().astype(np.uint8)).resize(
        (side, side), Image.LANCZOS
    )
    canvas = Image.new("RGBA", (SIDE_PX, SIDE_PX))
    canvas.paste(view, (38, 17))
    return np.asarray(canvas) / np.float32(255)


def before(rgba: np.ndarray, backdrop: str) -> np.ndarray:
    """The picture of an object before one of BACKDROPS, RGB or RGBA in [0, 1]."""
    white = np.ones((SIDE_PX, SIDE_PX, 3), np.float32)
    dots = (np.hypot(X - 0.06, Y - 0.06) < 0.006) | (np.hypot(X - 0.9, Y - 0.93) < 0.008)
    match backdrop:
        case "white":
            return over(rgba, white)
        case "white, JPEG 50":
            return jpeg(over(rgba, white), 50)
        case "grey":
            return over(rgba, 0.5 * white)
        case "gradient":
            return over(rgba, (0.55 + 0.4 * Y[..., None]) * white)
        case "vignette":
            dark = 1 - 0.5 * ((X - 0.5) ** 2 + (Y - 0.5) ** 2)
            return jpeg(over(rgba, 0.9 * white) * dark[..., None], 85)
        case "noise 8/255":
            noise = np.random.default_rng(0).normal(0, 8 / 255, white.shape)
            return (over(rgba, 0.8 * white) + noise).clip(0, 1)
        case "soft shadow":
            return jpeg(over(rgba, 0.95 * white * shadow(rgba, 9, 0.45)), 90)
        case "hard shadow":
            return jpeg(over(rgba, 0.95 * white * shadow(rgba, 2, 0.4)), 90)
        case "specks":
            return np.where(dots[..., None], 0.2, over(rgba, white))
        case "RGBA, speck":
            return np.concatenate([rgba[..., :3], np.maximum(rgba[..., 3:], dots[..., None])], -1)
        case "alpha 250":
            return np.concatenate([over(rgba, white), 250 / 255 * white[..., :1]], -1)
        case "rounded corners":
            beyond = np.hypot(*(np.maximum(abs(axis - 0.5) - 0.42, 0) for axis in (X, Y)))
            return np.concatenate([over(rgba, 0.93 * white), (beyond < 0.08)[..., None]], -1)
        case _:
            waves = 1 + 0.25 * np.sin(60 * Y + 6 * np.sin(9 * X))
            return over(rgba, (np.array([0.6, 0.45, 0.3]) * waves[..., None]).clip(0, 1))


def over(rgba: np.ndarray, behind: np.ndarray) -> np.ndarray:
    return rgba[..., :3] * rgba[..., 3:] + behind * (1 - rgba[..., 3:])


def shadow(rgba: np.ndarray, blur_px: float, strength: float) -> np.ndarray:
    """What light is left [H, W, 1] in the shadow of contact, an ellipse below the object."""
    rows, columns = (np.flatnonzero(rgba[..., 3].max(axis) > 0.5) for axis in (1, 0))
    height, width = max(np.ptp(rows), 30), np.ptp(columns)
    distance = np.hypot(
        (X * SIDE_PX - columns.mean()) / (0.58 * width + 1),
        (Y * SIDE_PX - rows[-1] + 0.02 * height) / (0.12 * height),
    )
    blurred = Image.fromarray(np.uint8(255 * (distance < 1))).filter(ImageFilter.GaussianBlur(blur_px))
    return 1 - strength * np.asarray(blurred)[..., None] / np.float32(255)


def jpeg(rgb: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray((rgb.clip(0, 1) * 255).round().astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / np.float32(255)


def sheet(rows: list[list[Case]]) -> Image.Image:
    """A row of pictures and a row of the views made of them for each backdrop."""
    picture = Image.new("RGB", (VIEW_PX * len(rows[0]), 2 * VIEW_PX * len(rows)))
    for i, row in enumerate(rows):
        for j, case in enumerate(row):
            view = case.view.copy()
            if case.doubted:
                view[:BAR_PX] = (1, 0, 0)
            if case.iou < GOOD_IOU:
                view[-BAR_PX:] = (1, 0.6, 0)
            for k, each in enumerate((case.picture[..., :3], view)):
                small = Image.fromarray((each.clip(0, 1) * 255).astype(np.uint8)).resize((VIEW_PX, VIEW_PX))
                picture.paste(small, (VIEW_PX * j, VIEW_PX * (2 * i + k)))
    return picture


if __name__ == "__main__":
    main()
