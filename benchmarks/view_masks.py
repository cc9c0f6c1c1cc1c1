"""How well the foreground masks of views are found that have neither alpha nor files of masks.

    im3d dataset render --meshes DIR --out out/view_masks/views --size 128 --num-views 16
    python benchmarks/view_masks.py --views out/view_masks/views

The views of each object are put before each of CASES and read as `im3d fit --views` reads them. The truth is
their own alpha. Prints a table by case: the mean and the least IoU of one threshold around the colour of the
border, as this project had it before; of what stands out from each view's own backdrop; and of that less the
pieces that other views do not allow. The last columns are shares of views: with a doubt in a word, and
without a mask.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage

from recon_torch.errors import UserError
from recon_torch.views import masks, silhouettes
from recon_torch.views.cameras import Cameras
from recon_torch.views.directory import load_views
from recon_torch.views.images import straight
from recon_torch.views.transforms import TRANSFORMS

CASES = (
    "white", "noise 2/255", "noise 4.5/255", "noise 6/255", "noise 10/255", "noise 20/255", "JPEG 75",
    "JPEG 30", "grey", "grey, noise 6/255", "vignette", "gradient", "pale object", "clutter",
)  # fmt: skip
THRESHOLD, SPECK_PX = 0.04, 8  # of the baseline
PALE = 0.15  # contrast of a pale object to white
CLUTTER, CLUTTER_SHARE = 2, 0.06  # discs beside the object, their radius by the side


class Row(NamedTuple):
    """IoU of each view by three methods, how many views are doubted, and how many have no mask."""

    baseline: list[float]
    alone: list[float]
    compared: list[float]
    doubted: int
    untold: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--views", type=Path, required=True, metavar="DIR", help="what `im3d dataset render` has written")
    add("--assets", nargs="+", metavar="NAME", help="directories below it (default: all)")
    add("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    args = parser.parse_args()
    found = sorted(path.parent for path in args.views.rglob(TRANSFORMS))
    chosen = [args.views / name for name in args.assets] if args.assets else found
    objects = [load(path) for path in chosen]
    print(f"{len(objects)} objects: IoU mean, least\n")
    print("| case | one threshold | backdrop | less strays | doubted | no mask |")
    print("|---|---:|---:|---:|---:|---:|")
    for case in args.cases:
        rows = [measure(*each, case) for each in objects]
        scores = [np.concatenate([row[k] for row in rows]) for k in range(3)]
        cells = [f"{score.mean():.3f}, {score.min():.2f}" for score in scores]
        cells += [f"{sum(row[k] for row in rows) / len(scores[0]):.1%}" for k in (3, 4)]
        print("| " + " | ".join([case, *cells]) + " |", flush=True)


def load(path: Path) -> tuple[Cameras, Float[np.ndarray, "K H W 4"]]:
    views = load_views(path)
    if views.masks is None:
        raise UserError(f"{path} has no alpha; give what `im3d dataset render` has written")
    return views.cameras, straight(views.images, views.masks)


def measure(cameras: Cameras, rgba: Float[np.ndarray, "K H W 4"], case: str) -> Row:
    images = np.stack([before(view, case, k) for k, view in enumerate(rgba)])
    true = rgba[..., 3] > 0.5
    found = masks.by_backdrop(images)
    untold = np.isnan(found.masks[:, 0, 0, 0])
    alone = np.nan_to_num(found.masks)
    compared = silhouettes.compare(cameras, alone).masks
    return Row(
        iou(np.stack([one_threshold(image) for image in images]), true),
        iou(alone[..., 0] > 0.5, true),
        iou(compared[..., 0] > 0.5, true),
        sum(map(bool, found.doubts)),
        int(untold.sum()),
    )


def iou(found: Bool[np.ndarray, "K H W"], true: Bool[np.ndarray, "K H W"]) -> list[float]:
    return list((found & true).sum((1, 2)) / np.maximum((found | true).sum((1, 2)), 1))


def one_threshold(image: Float[np.ndarray, "H W 3"]) -> Bool[np.ndarray, "H W"]:
    """What this project did before: all that is far from the border's median colour, less specks.

    Where less than 95% of the border is near that colour, the background is white.
    """
    edge = masks.border(image)
    color = np.median(edge, 0)
    plain = (np.abs(edge - color).max(-1) <= THRESHOLD).mean() >= 0.95
    inside = np.abs(image - (color if plain else 1.0)).max(-1) > THRESHOLD
    if not plain:
        return inside
    parts, _ = ndimage.label(inside, np.ones((3, 3)))
    return inside & (np.bincount(parts.ravel()) > SPECK_PX)[parts]


def before(rgba: Float[np.ndarray, "H W 4"], case: str, index: int) -> Float[np.ndarray, "H W 3"]:
    """A view of an object in one of CASES, in [0, 1], of 8 bits."""
    generator, side = np.random.default_rng(index), len(rgba)
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    white = np.ones((side, side, 3), np.float32)
    kind, _, number = case.partition(" ")
    match kind:
        case "noise":
            return noisy(over(rgba, white), float(number.removesuffix("/255")), generator)
        case "JPEG":
            return jpeg(over(rgba, white), int(number))
        case "grey":
            return rounded(over(rgba, 0.5 * white))
        case "grey,":
            return noisy(over(rgba, 0.7 * white), 6, generator)
        case "vignette":
            return rounded(over(rgba, 0.9 * white) * (1 - ((x - 0.5) ** 2 + (y - 0.5) ** 2) / 2)[..., None])
        case "gradient":
            return rounded(over(rgba, (0.55 + 0.4 * y[..., None]) * white))
        case "pale":
            return rounded(over(np.concatenate([1 - PALE * (1 - rgba[..., :3]), rgba[..., 3:]], -1), white))
        case "clutter":
            return rounded(over(rgba, np.where(clutter(rgba[..., 3], generator)[..., None], 0.2, white)))
        case _:
            return rounded(over(rgba, white))


def over(rgba: Float[np.ndarray, "H W 4"], behind: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
    return rgba[..., :3] * rgba[..., 3:] + behind * (1 - rgba[..., 3:])


def noisy(rgb: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    return rounded(rgb + generator.normal(0, sigma / 255, rgb.shape))


def rounded(rgb: np.ndarray) -> np.ndarray:
    return (np.rint(rgb.clip(0, 1) * 255) / 255).astype(np.float32)


def jpeg(rgb: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(np.uint8(255 * rounded(rgb) + 0.5)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / np.float32(255)


def clutter(alpha: Float[np.ndarray, "H W"], generator: np.random.Generator) -> Bool[np.ndarray, "H W"]:
    """Discs at random places beside the object, which are others in each view."""
    side = len(alpha)
    free = ndimage.distance_transform_edt(alpha < 0.01) > 2 * CLUTTER_SHARE * side
    rows, columns = np.nonzero(free)
    discs = np.zeros(alpha.shape, bool)
    if not len(rows):
        return discs
    y, x = np.mgrid[:side, :side]
    for chosen in generator.integers(0, len(rows), CLUTTER):
        discs |= np.hypot(y - rows[chosen], x - columns[chosen]) < CLUTTER_SHARE * side
    return discs


if __name__ == "__main__":
    main()
