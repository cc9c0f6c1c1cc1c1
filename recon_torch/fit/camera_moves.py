"""Finds views whose cameras are off by some degrees, and moves these cameras to where their pictures agree.

A fit that has come some way agrees with a view whose camera is wrong far worse than with the others. Such
views are left out of a second, short fit, and their cameras follow the gradient of its loss on their pictures
(as in iNeRF, Yen-Chen et al. 2021). All other cameras stay where they are, which fixes the world: cameras
that all move at once turn and bend it together.

A camera that a rigid motion moves sees what it would see if the Gaussians made the inverse motion. So it is
the Gaussians that move, and every engine that is differentiable by them is so by cameras as well.

Unspecified in the paper, whose views are generated for the cameras that they have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from recon_torch.fit import recovery
from recon_torch.fit.optimization import Fit
from recon_torch.losses.metrics import psnr, standing_out
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.reference import rotation_matrices
from recon_torch.raster.render import render
from recon_torch.scene.splats import Splats
from recon_torch.settings import Engine, Representation
from recon_torch.views.cameras import Cameras

JUDGED_AT = 0.25  # the share of a fit's steps after which wrong views stand out
DOUBTED_DB = 4.0  # how much worse than the median such a view agrees
FEWEST_VIEWS = 4  # that must be left to fit without them
ROUNDS = 3
CLEAN_STEPS = 300
ALIGN_STEPS = 80
FIRST_RATE, LAST_RATE = 1e-2, 3e-4  # of Adam, in radians and in units of the fit's world
BETAS = (0.8, 0.95)  # of Adam: 80 steps are too few for means over the last 1000
GAIN_DB, GAIN_SHARE = 2.0, 0.5  # the least that a moved camera must gain, also of what the view lags behind
FARTHEST_DEG, FARTHEST = 20.0, 1.0  # how far a camera may be moved, the second in units of the fit's world
STRAY = "its picture agrees far worse than the others, and no camera near its own mends that"
"""What to say about a view that stands out and is not explained."""


class Move(NamedTuple):
    """A camera that is wrong, and where it is moved to, in the fit's world."""

    view: int
    w2c: Float[np.ndarray, "4 4"]
    degrees: float  # by which it is turned
    distance: float  # by which its position moves
    before_db: float  # PSNR of the view's foreground in a fit to the trusted views, from the camera as given
    after_db: float


class Judged(NamedTuple):
    """What has been found out about the cameras of a fit.

    moves: of cameras that are wrong.
    stray: views that stand out and that no camera near their own explains.
    """

    moves: Sequence[Move] = ()
    stray: Sequence[int] = ()

    def moved(self, cameras: Cameras) -> Cameras:
        """The cameras of the fit, with the wrong ones moved."""
        w2c = cameras.w2c.copy()
        for move in self.moves:
            w2c[move.view] = move.w2c
        return dataclasses.replace(cameras, w2c=w2c)


def judge(fit: Fit) -> Judged:
    """Looks for wrong cameras in a fit, which is to have done a share JUDGED_AT of its steps.

    Raises:
        UserError: the fit without the views that stand out fails.
    """
    cameras, judged, trusted = fit.cameras, Judged(), [*range(len(fit.cameras))]
    scores_db = _agreement(fit, fit, cameras)
    for _ in range(ROUNDS):
        # Wrong cameras hide one another: some stand out only once others are left out or moved.
        doubted = [view for view in trusted if view in standing_out(scores_db, DOUBTED_DB)]
        if not doubted:
            break
        trusted = [view for view in trusted if view not in doubted]
        if len(trusted) < FEWEST_VIEWS:
            return Judged(judged.moves, [*judged.stray, *doubted])
        judged, scores_db = _align_all(fit, judged, trusted)
    return judged


def _align_all(fit: Fit, judged: Judged, trusted: list[int]) -> tuple[Judged, Float[Tensor, " K"]]:
    """Aligns the cameras of all views that are not trusted, from where they were moved before.

    Returns what is known then, and how well each view agrees with a fit to those trusted or moved before.
    """
    start = judged.moved(fit.cameras)
    # What was moved shows its side of the object to the others.
    used = sorted({*trusted, *(move.view for move in judged.moves)})
    clean = _fit_to(np.array(used), start, fit)
    doubted = [view for view in range(len(start)) if view not in trusted]
    w2c = start.w2c.copy()
    for view in doubted:
        motion = align(clean, start[view], *fit.targets.take(np.array([view])))
        w2c[view] = moved_camera(start[view], motion).w2c[0]
    aligned = dataclasses.replace(start, w2c=w2c)
    before_db, after_db = (_agreement(clean, fit, cameras) for cameras in (fit.cameras, aligned))
    usual_db = float(after_db[trusted].median())
    moves, stray = [], []
    for view in doubted:
        apart = _apart(fit.cameras[view], aligned[view])
        move = Move(view, w2c[view], *apart, float(before_db[view]), float(after_db[view]))
        if _is_credible(move, usual_db):
            moves.append(move)
        elif move.before_db < usual_db - DOUBTED_DB:
            stray.append(view)
    return Judged(moves, stray), after_db


def sentence(move: Move) -> str:
    """What to say about a camera that was wrong."""
    return (
        f"its camera is off: turned by {move.degrees:.1f} degrees, its picture agrees with the other views "
        f"by {move.after_db:.0f} instead of {move.before_db:.0f} dB"
    )


def notes(judged: Judged, names: Sequence[str]) -> list[str]:
    """What a report says about cameras that were moved, and about views that stand out.

    names: of all views.
    """
    said = [f"{names[move.view]}: {sentence(move)}; it was moved so" for move in judged.moves]
    return said + [f"{names[view]}: {STRAY}" for view in judged.stray]


def align(
    scene: Fit, camera: Cameras, view: Float[Tensor, "1 H W 3"], mask: Float[Tensor, "1 H W 1"] | None
) -> Float[Tensor, "6"]:
    """The `motion` of a camera from which a scene of Gaussians looks most like a view of it."""
    assert isinstance(scene.scene, Splats), "only Gaussians are moved"
    background = view.new_full((3,), scene.settings.background)
    still = scene.scene.gaussians
    motion = torch.zeros(6, device=view.device, requires_grad=True)
    optimizer = torch.optim.Adam([motion], FIRST_RATE, BETAS)
    for step in range(ALIGN_STEPS):
        optimizer.param_groups[0]["lr"] = FIRST_RATE * (LAST_RATE / FIRST_RATE) ** (step / (ALIGN_STEPS - 1))
        seen = render(
            moved(still, motion), camera, background=background, engine=Engine(scene.settings.engine)
        )
        terms = scene.loss.terms(seen.rgb, seen.alpha, view, mask, lambda: [])
        loss = sum(scene.loss.weights[name] * term.sum() for name, term in terms.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return motion.detach()


def moved(gaussians: Gaussians, motion: Float[Tensor, "6"]) -> Gaussians:
    """Gaussians after a rigid motion; differentiable by both.

    motion: a rotation vector in radians, about the origin, and the translation that follows it.
    """
    turn = _quaternion(motion[:3])
    means = gaussians.means @ rotation_matrices(turn[None])[0].mT + motion[3:]
    return gaussians._replace(means=means, quats=_product(turn, gaussians.quats))


def moved_camera(camera: Cameras, motion: Float[Tensor, "6"]) -> Cameras:
    """Cameras that see unmoved Gaussians as the given ones see those that are `moved`."""
    still = motion.detach().double().cpu()
    world = np.eye(4)
    world[:3, :3] = rotation_matrices(_quaternion(still[:3])[None])[0].numpy()
    world[:3, 3] = still[3:].numpy()
    w2c = (camera.w2c.astype(np.float64) @ world).astype(camera.w2c.dtype)
    return dataclasses.replace(camera, w2c=w2c)


def _quaternion(rotation: Float[Tensor, "3"]) -> Float[Tensor, "4"]:
    """wxyz, of a rotation vector."""
    half = rotation.norm() / 2  # its gradient is 0 where it is 0, as torch defines it
    return torch.cat([half.cos()[None], rotation / 2 * torch.sinc(half / torch.pi)])


def _product(turn: Float[Tensor, "4"], quats: Float[Tensor, "N 4"]) -> Float[Tensor, "N 4"]:
    """Quaternions of rotations that another one follows; all are wxyz."""
    w, xyz = quats[:, :1], quats[:, 1:]
    real = turn[0] * w - (xyz @ turn[1:])[:, None]
    rest = turn[0] * xyz + w * turn[1:] + torch.linalg.cross(turn[1:].expand_as(xyz), xyz)
    return torch.cat([real, rest], -1)


def _fit_to(views: Int64[np.ndarray, " V"], cameras: Cameras, fit: Fit) -> Fit:
    """A short fit of Gaussians to some of the views of another fit, without LPIPS, which is slow.

    cameras: of all views.
    """
    settings = dataclasses.replace(
        fit.settings, num_steps=CLEAN_STEPS, w_lpips=0.0, representation=Representation.GAUSSIANS
    )
    clean = Fit(cameras[views], settings, fit.device)
    chosen, targets = torch.from_numpy(views), fit.targets
    masks = None if targets.masks is None else targets.masks[chosen]
    unsure = None if targets.opacity is None else targets.opacity[chosen].isnan()
    clean.set_targets(targets.views[chosen], masks, unsure=unsure)
    recovery.run(clean, CLEAN_STEPS)
    return clean


@torch.no_grad()
def _agreement(scene: Fit, targets: Fit, cameras: Cameras) -> Float[Tensor, " K"]:
    """PSNR in dB of each view that is the target of one fit, in renders of another fit.

    It is that of the foreground where there are masks.
    """
    views, masks = targets.targets.views, targets.targets.masks
    renders = torch.cat([scene.render(cameras[view]).rgb.clamp(0, 1) for view in range(len(cameras))])
    return psnr(renders, views, masks)


def _is_credible(move: Move, usual_db: float) -> bool:
    """Whether a move explains the picture. usual_db: how well others agree."""
    near = move.degrees <= FARTHEST_DEG and move.distance <= FARTHEST
    gap_db = usual_db - move.before_db
    return near and move.after_db - move.before_db >= max(GAIN_DB, GAIN_SHARE * gap_db)


def _apart(first: Cameras, second: Cameras) -> tuple[float, float]:
    """The angle in degrees between the ways in which two cameras look, and the distance between them."""
    turn = first.w2c[0, :3, :3].astype(np.float64) @ second.w2c[0, :3, :3].T
    # The trace tells small angles badly: its rounding is that of their squares.
    sine = np.linalg.norm(turn - turn.T) / np.sqrt(8)
    degrees = np.degrees(np.arctan2(sine, (np.trace(turn) - 1) / 2))
    return float(degrees), float(np.linalg.norm(first.positions - second.positions))
