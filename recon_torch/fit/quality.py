"""Quality gates: what speaks against a finished fit, in numbers, each with a threshold (docs/gates.md).

Generators of views fail in a few known ways: bits that float in the air, a ground that belonged to the
picture, views that contradict one another, a face on either side. Each gate looks for one of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32
from scipy import ndimage
from torch import Tensor

from recon_torch.fit.loss import Targets
from recon_torch.losses.metrics import psnr, standing_out
from recon_torch.raster import Render
from recon_torch.settings import GateSettings, Level, Verdict
from recon_torch.views import rigidity
from recon_torch.views.cameras import Cameras
from recon_torch.views.masks import problem

HALF_WIDTH, NUM_CELLS = 1.2, 60  # the searched cube; an object is 25 cells wide
SHEET_CELLS = 3  # the most that a floor is thick
CROP_PX = 32  # side of the pictures that the Janus gate compares
QUARTER_TURNS = 4


class Finding(NamedTuple):
    """What speaks against a fit. A hint does not change the verdict."""

    level: Level
    text: str


Judged = tuple[dict[str, float], Finding | None]  # what a gate has measured, and what follows from it


@runtime_checkable
class Searchable(Protocol):
    """The part of a `Scene` that gates search for floaters and floors."""

    def opacity_grid(self, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]: ...


@runtime_checkable
class Fitted(Protocol):
    """What gates ask of a `Fit`, which has targets."""

    cameras: Cameras
    targets: Targets

    @property
    def scene(self) -> Searchable: ...

    def render(self, cameras: Cameras) -> Render: ...


def inspect(
    fit: Fitted,
    around: Cameras,
    up: Float[np.ndarray, "3"] | None = None,
    settings: GateSettings | None = None,
    excursions: Float32[np.ndarray, " K"] | None = None,
) -> dict[str, Any]:
    """Runs all gates on a fit.

    Args:
        around: cameras on a closed orbit, view 0 first.
        up: of the fit's world; default: +Z.
        excursions: of the masks that the object was first known by; default: of those that it is fitted to.

    Returns:
        What report.json says: the "verdict" (`Verdict`), "reasons" for it, "hints" and "numbers".
    """
    settings = settings or GateSettings()
    grid = np.asarray(fit.scene.opacity_grid(HALF_WIDTH, NUM_CELLS).cpu())
    views, masks = fit.targets.views.cpu(), fit.targets.masks
    masks = None if masks is None else masks.cpu()
    renders, alphas = _render(fit, fit.cameras)
    if excursions is None and masks is not None:
        excursions = rigidity.excursions(fit.cameras, masks.numpy())
    quarters = _render(fit, around[np.arange(QUARTER_TURNS) * len(around) // QUARTER_TURNS])
    gates = [
        floaters_gate(grid, fit.cameras, settings),
        floor_gate(upright(grid, up), settings),
        coverage_gate(alphas, settings),
        agreement_gate(
            torch.ones(len(views)) if masks is None else shape_score(alphas, masks),
            psnr(renders, views, masks),
            settings,
        ),
        janus_gate(*quarters, settings),
    ]
    if excursions is not None:
        gates.append(rigidity_gate(excursions, settings))
    findings = [finding for _, finding in gates if finding]
    return {
        "verdict": _verdict(findings),
        "reasons": [finding.text for finding in findings if finding.level != Level.HINT],
        "hints": [finding.text for finding in findings if finding.level == Level.HINT],
        "numbers": {name: value for numbers, _ in gates for name, value in numbers.items()},
    }


def _verdict(findings: list[Finding]) -> Verdict:
    levels = {finding.level for finding in findings}
    if Level.BAD in levels:
        return Verdict.BAD
    return Verdict.SUSPECT if Level.SUSPECT in levels else Verdict.GOOD


def floaters_gate(grid: Float[np.ndarray, "n n n"], cameras: Cameras, settings: GateSettings) -> Judged:
    """Finds small pieces that float apart from the object, which may consist of several large ones.

    A piece counts only if it is apart in one of the views, too. Where no view shows how two parts are joined,
    such as a treetop and its trunk seen from above, a gap in 3D is no fault.
    """
    pieces, count = ndimage.label(grid > settings.cell_opacity, np.ones((3, 3, 3)))
    labels = np.arange(1, count + 1)
    opacity = ndimage.sum(grid, pieces, labels) if count else np.zeros(0)
    small = opacity < settings.floater_size * opacity.sum()
    body = ndimage.binary_dilation(_shadows(np.isin(pieces, labels[~small]), cameras), np.ones((1, 3, 3)))
    joined = [(_shadows(pieces == label, cameras) & body).any((1, 2)).all() for label in labels[small]]
    floating = ~np.array(joined, bool)
    share = float(opacity[small][floating].sum() / max(opacity.sum(), 1e-9))
    numbers = {"floaters_share": share, "floaters_count": int(floating.sum())}
    if share <= settings.floaters:
        return numbers, None
    level = Level.BAD if share > settings.floaters_bad else Level.SUSPECT
    text = f"{share:.1%} of the opacity floats apart, in {floating.sum()} small pieces"
    return numbers, Finding(level, text)


def _shadows(inside: Bool[np.ndarray, "n n n"], cameras: Cameras) -> Bool[np.ndarray, "K m m"]:
    """The silhouettes of the cells that are inside, on pixels about as wide as a cell at the origin."""
    cell, num_pixels = 2 * HALF_WIDTH / len(inside), 2 * len(inside)
    points = (np.argwhere(inside) + 0.5) * cell - HALF_WIDTH
    shadows = np.zeros((len(cameras), num_pixels, num_pixels), bool)
    for shadow, w2c in zip(shadows, cameras.w2c, strict=True):
        local = points @ w2c[:3, :3].T + w2c[:3, 3]
        local = local[local[:, 2] > cell]
        pixels_per_slope = np.linalg.norm(w2c[:3, 3]) / cell
        column, row = (local[:, :2] / local[:, 2:] * pixels_per_slope + num_pixels / 2).astype(int).T
        shadow[row.clip(0, num_pixels - 1), column.clip(0, num_pixels - 1)] = True
    return shadows


def floor_gate(grid: Float[np.ndarray, "n n n"], settings: GateSettings) -> Judged:
    """Finds a sheet as the lowest layer that is much wider than what is above. The grid's last axis is up."""
    areas = (grid > settings.cell_opacity).sum((0, 1)) * (2 * HALF_WIDTH / len(grid)) ** 2
    filled = np.flatnonzero(areas > 0)
    if not len(filled):
        return {"floor_area": 0.0, "floor_ratio": 0.0}, None
    lowest = filled[0]
    sheet = areas[lowest : lowest + SHEET_CELLS].max()
    above = areas[lowest + SHEET_CELLS : filled[-1] + 1]
    ratio = float(sheet / above.max()) if len(above) and above.max() > 0 else 1.0
    numbers = {"floor_area": float(sheet), "floor_ratio": ratio}
    if sheet < settings.floor_area or ratio < settings.floor_ratio:
        return numbers, None
    text = f"the object stands on a sheet of area {sheet:.2f}, {ratio:.1f} times as wide as itself: a floor?"
    return numbers, Finding(Level.SUSPECT, text)


def coverage_gate(alphas: Float[Tensor, "K H W 1"], settings: GateSettings) -> Judged:
    """Finds renders that the object does not appear in, fills, or leaves at the border."""
    found = [problem(alpha.cpu().numpy()) for alpha in alphas]
    problems = {k: each for k, each in enumerate(found) if each}
    numbers = {"coverage": float((alphas > 0.5).float().mean())}
    if not problems:
        return numbers, None
    kinds = sorted(set(problems.values()))
    cut_off = kinds == ["touches the border"]
    level = Level.BAD if len(problems) >= settings.views_bad * len(alphas) and not cut_off else Level.SUSPECT
    return numbers, Finding(level, f"the object {' or '.join(kinds)} in renders {_listed(list(problems))}")


def agreement_gate(
    shape: Float[Tensor, " K"], psnr_db: Float[Tensor, " K"], settings: GateSettings
) -> Judged:
    """Finds renders unlike the views that they were fitted to, or far less like them than the other renders.

    Such views contradict the others.

    shape, psnr_db: `shape_score` and PSNR of the foreground of each render and its view.
    """
    psnr_db = psnr_db.nan_to_num(99, posinf=99)  # views without foreground, and equal ones
    numbers = {
        "worst_view_shape": float(shape.min()),
        "worst_view_psnr": float(psnr_db.min()),
        "median_view_psnr": float(psnr_db.median()),
    }
    unlike = (shape < settings.view_shape) | (psnr_db < settings.view_psnr)
    unlike[standing_out(psnr_db, settings.view_gap)] = True
    wrong = torch.nonzero(unlike)[:, 0].tolist()
    if not wrong:
        return numbers, None
    level = Level.BAD if len(wrong) >= settings.views_bad * len(shape) else Level.SUSPECT
    colour = f"{psnr_db.min():.1f} dB, the median {psnr_db.median():.1f}"
    worst = f"in shape (score {shape.min():.2f}) or colour ({colour})"
    return numbers, Finding(level, f"the renders disagree with views {_listed(wrong)}, {worst}")


def rigidity_gate(excursions: Float32[np.ndarray, " K"], settings: GateSettings) -> Judged:
    """Finds views of an object that moves instead of turning (A.4): no rigid one has all of their outlines.

    A few views that stick out are wrong themselves, which `agreement_gate` looks for.

    excursions: of the views, see `rigidity.excursions`.
    """
    enough = max(1, int(np.ceil(settings.views_bad * len(excursions))))
    numbers = {"motion": float(np.sort(excursions)[-enough])}
    if numbers["motion"] <= settings.view_motion:
        return numbers, None
    views = np.flatnonzero(excursions > settings.view_motion).tolist()
    text = (
        f"no rigid object explains views {_listed(views)}: their outlines stick out of what the others "
        f"allow, by up to {excursions.max():.1%} of its size; does it move?"
    )
    return numbers, Finding(Level.BAD, text)


def shape_score(alphas: Float[Tensor, "K H W 1"], masks: Float[Tensor, "K H W 1"]) -> Float[Tensor, " K"]:
    """The share of pixels of two silhouettes that are at most one pixel away from the other one."""
    first, second = ((image.permute(0, 3, 1, 2) >= 0.5).float() for image in (alphas, masks))
    wide = [F.max_pool2d(image, 3, stride=1, padding=1) for image in (first, second)]
    shared = (first * wide[1] + second * wide[0]).sum((1, 2, 3))
    total = (first + second).sum((1, 2, 3))
    return torch.where(total > 0, shared / total.clamp_min(1), 1.0)


def janus_gate(
    rgb: Float[Tensor, "4 H W 3"], alpha: Float[Tensor, "4 H W 1"], settings: GateSettings
) -> Judged:
    """Finds a back that looks like the front while the sides do not.

    This is only a hint, as tables and cars are meant so. The renders are at quarter turns, the front first.
    """
    crops = torch.stack([_crop(*view) for view in zip(rgb, alpha, strict=True)]).flatten(1)
    sides_1, back, sides_2 = (crops[1:] @ crops[0]).tolist()
    gap = back - max(sides_1, sides_2)
    numbers = {"janus_back": back, "janus_gap": gap}
    if back < settings.janus_back or gap < settings.janus_gap:
        return numbers, None
    text = f"the back looks like the front (correlation {back:.2f}) and the sides do not: two faces?"
    return numbers, Finding(Level.HINT, text)


def upright(grid: Float[np.ndarray, "n n n"], up: Float[np.ndarray, "3"] | None) -> np.ndarray:
    """The grid with its last axis along `up`, which is an axis of the world or the opposite of one."""
    if up is None:
        return grid
    axis = int(np.abs(up).argmax())
    turned = np.moveaxis(grid, axis, 2)
    return turned if up[axis] > 0 else turned[..., ::-1]


def _crop(rgb: Float[Tensor, "H W 3"], alpha: Float[Tensor, "H W 1"]) -> Float[Tensor, "3 c c"]:
    """The object alone in its bounding box, less its mean colour and normalised, for correlations."""
    inside = torch.nonzero(alpha[..., 0] > 0.5)
    if not len(inside):
        return torch.zeros(3, CROP_PX, CROP_PX)
    (top, left), (bottom, right) = inside.amin(0), inside.amax(0) + 1
    rgb, alpha = rgb[top:bottom, left:right], alpha[top:bottom, left:right]
    mean = (rgb * alpha).sum((0, 1)) / alpha.sum()
    picture = ((rgb - mean) * alpha).permute(2, 0, 1)[None]
    small = F.interpolate(picture, (CROP_PX, CROP_PX), mode="bilinear", antialias=True)[0]
    return F.normalize(small.flatten(), dim=0).view_as(small)


def _render(fit: Fitted, cameras: Cameras) -> tuple[Float[Tensor, "K H W 3"], Float[Tensor, "K H W 1"]]:
    renders = [fit.render(cameras[k]) for k in range(len(cameras))]
    rgb = torch.cat([render.rgb.clamp(0, 1).cpu() for render in renders])
    return rgb, torch.cat([render.alpha.cpu() for render in renders])


def _listed(views: list[int]) -> str:
    return ", ".join(map(str, views))
