"""What the directory of an asset holds for a mesh: its Gaussians, their cameras, and the views."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from recon_torch.asset_files import ASSET, gaussians_of
from recon_torch.errors import UserError
from recon_torch.formats import files
from recon_torch.formats.framing import moved_into, place_of
from recon_torch.losses.metrics import silhouette_iou
from recon_torch.mesh.making import Given
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render
from recon_torch.settings import UP_AXES
from recon_torch.views.directory import Views, load_views
from recon_torch.views.transforms import TRANSFORMS, read_cameras
from recon_torch.views.world import World

CHECKED_VIEWS, LEAST_AGREEMENT = 8, 0.5  # of silhouettes: a fit has 0.9 and more
ROUND = re.compile(r"views_(\d+)")  # the directories in which `im3d generate --save-views` keeps its views


class Found(NamedTuple):
    """What a mesh is made of, the file of the Gaussians, and notes on what was found and left out."""

    given: Given
    path: Path
    notes: list[str]


def read(asset: Path, views: Path | Views | None = None) -> Found:
    """Reads an asset and what lies beside it.

    Args:
        asset: a directory with an asset.ply, or a file of Gaussians in any format.
        views: those that were fitted, in the world of the asset, or their directory; default: those that
            `im3d generate --save-views` has left beside it.

    Raises:
        UserError: something is missing or cannot be read.
    """
    path = gaussians_of(asset)
    loaded = files.load(path)
    world, up = place_of(path, loaded)
    given = Given(moved_into(loaded.gaussians, world), world, np.array(UP_AXES[up]))
    notes = list(loaded.notes)
    if path.name == ASSET and path.with_name(TRANSFORMS).is_file():
        rigs, told = read_cameras(path.with_name(TRANSFORMS))
        notes += told
        given = given._replace(cameras=world.cameras(max(rigs, key=len)))
    source = _last_round(path.parent) if views is None else views
    if source is not None:
        seen = source if isinstance(source, Views) else load_views(source)
        notes += [f"views: {note}" for note in seen.notes]
        if seen.masks is None:
            notes.append("the views have no masks, so the texture is made of renders")
        else:
            seen = _in_unit_world(seen, world)
            if isinstance(views, Path):  # a user names them; all others are of this world for certain
                _check_place(given.gaussians, seen)
            given = given._replace(views=seen, cameras=seen.cameras)
    if given.cameras is None:
        notes.append("no cameras lie beside it, so its Gaussians are taken as large enough to leave no gaps")
    return Found(given, path, notes)


def _in_unit_world(views: Views, world: World) -> Views:
    return dataclasses.replace(views, cameras=world.cameras(views.cameras))


@torch.no_grad()
def _check_place(gaussians: Gaussians, views: Views) -> None:
    """Raises UserError where the views, in the unit world, show the asset somewhere else than it is."""
    assert views.masks is not None
    some = np.unique(np.linspace(0, len(views) - 1, CHECKED_VIEWS).round().astype(int))
    alphas = torch.cat([render(gaussians, views.cameras[int(view)]).alpha for view in some])
    agreement = float(silhouette_iou(alphas.cpu(), torch.from_numpy(views.masks[some])).median())
    if agreement < LEAST_AGREEMENT:
        raise UserError(
            f"the views show the asset elsewhere: {agreement:.0%} of its silhouette agrees; give those that "
            "were fitted, in the world of the asset (im3d fit --normalize changes it)"
        )


def _last_round(directory: Path) -> Path | None:
    rounds = {int(found[1]): path for path in directory.iterdir() if (found := ROUND.fullmatch(path.name))}
    last = rounds[max(rounds)] if rounds else None
    return last if last is not None and (last / TRANSFORMS).is_file() else None
