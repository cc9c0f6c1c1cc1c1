"""An asset as files that other tools take, each read back and compared with what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.formats import files
from recon_torch.formats.framing import moved_into, world_of
from recon_torch.formats.ply import load_ply, save_ply
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render_images
from recon_torch.settings import Format
from recon_torch.views.axes import Axes
from recon_torch.views.cameras import orbit

MOST_APART = 1e-3  # of the size
ASSET_DB, MOST_LOST_DB = 30.0, 0.3
LEAST_DB = ASSET_DB - 10 * np.log10(10 ** (MOST_LOST_DB / 10) - 1)
"""The least PSNR of the renders before and after: what agrees with its views by 30 dB then loses 0.3 dB."""
NUM_CAMERAS, CAMERA_PX, TILT_RAD = 6, 128, 0.4


class Difference(NamedTuple):
    """How a file differs from what was written into it.

    Attributes:
        num: Gaussians. num_bytes: of the file.
        apart: the largest distance of a mean to where it was, as a share of the size of them all.
        psnr: of renders from around the object against those of the original, in dB; infinite if equal.
    """

    num: int
    num_bytes: int
    apart: float
    psnr: float

    def __str__(self) -> str:
        renders = "equal renders" if np.isinf(self.psnr) else f"renders agree by {self.psnr:.1f} dB"
        means = "equal means" if self.apart == 0 else f"means within {self.apart:.1g} of the size"
        return f"{self.num} Gaussians in {self.num_bytes} bytes; read back: {means}, {renders}"


def export(gaussians: Gaussians, path: Path, kind: Format | None, upright: Axes) -> Difference:
    """Writes Gaussians, reads them back and compares.

    Args:
        kind: None for the .ply of 3DGS.
        upright: the axes of a file that stands in viewers, see `views.axes.chosen`.

    Raises UserError, and leaves no file, where it cannot be written or is not what it should be.
    """
    gaussians = Gaussians(*(tensor.detach().cpu().float() for tensor in gaussians))
    with replacing(path) as temporary:
        if kind is None:
            save_ply(gaussians, temporary, upright)
            back = load_ply(temporary).gaussians
        else:
            files.save(gaussians, temporary, kind, upright)
            back = files.load_back(temporary, kind, upright)
        found = compare(gaussians, back, temporary.stat().st_size)
        if len(back.means) != found.num or found.apart > MOST_APART or found.psnr < LEAST_DB:
            limits = f"{MOST_APART:g} and {LEAST_DB:.1f} dB are asked for"
            raise UserError(f"{path} would not show the asset: {len(back.means)} of {found}; {limits}")
    return found


def compare(before: Gaussians, after: Gaussians, num_bytes: int) -> Difference:
    """How Gaussians, in any order, differ from those that they were made of, in one world."""
    means = before.means.double().numpy()
    size = float(np.ptp(means, axis=0).max()) or float(before.scales.max())
    others = after.means.double().numpy()
    apart = max(_farthest(means, others), _farthest(others, means)) / size
    world = world_of(before)
    signs = np.where(np.arange(NUM_CAMERAS) % 2, -1.0, 1.0)
    cameras = orbit(NUM_CAMERAS, TILT_RAD * signs, CAMERA_PX)
    first, second = (render_images(moved_into(each, world), cameras) for each in (before, after))
    error = float(((first - second) ** 2).mean())
    return Difference(len(means), num_bytes, apart, -10 * np.log10(error) if error else np.inf)


def _farthest(points: np.ndarray, others: np.ndarray) -> float:
    """The greatest distance of a point to the nearest of others."""
    return float(cKDTree(others).query(points)[0].max())


def export_beside(path: Path, formats: Sequence[Format | str], upright: Axes) -> list[str]:
    """Writes further formats beside an asset.ply. Returns a note on each; one that fails is left out."""
    if not formats:
        return []
    notes, gaussians = [], load_ply(path).gaussians
    for kind in map(Format, formats):
        target = path.with_suffix(kind.suffix)
        try:
            notes.append(f"{target.name}: {export(gaussians, target, kind, upright)}")
        except UserError as error:
            notes.append(f"{target.name} is left out: {error}")
    return notes
