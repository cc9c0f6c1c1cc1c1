"""Which way the axes of an asset's file point in the world of its cameras, so that it stands in viewers.

SuperSplat, splat-transform and mkkellogg's viewer take -Y of a file of splats as up, and see its +Z side
first. Here the world has +Z up, and the front of the object faces +X. An upright file therefore has
(-y, -z, x) of the world in its columns x, y, z. Its header says so (`formats.ply`), and so does the
transforms.json beside it.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError, quoted
from recon_torch.settings import UP_AXES, FileAxes
from recon_torch.views.world import upright_rows

Axes = tuple[str, str, str]
"""The axes of the world that a file's x, y and z are, such as "-y"."""

UP = np.array([0.0, 0.0, 1.0])  # of a world that does not say it
WORLD: Axes = ("x", "y", "z")
UPRIGHT: Axes = ("-y", "-z", "x")  # of a world in which +Z is up and +X is the front
ENTRY = "asset_axes"
"""Of a transforms.json: the axes of the asset.ply beside it, as its header has them."""

NAMES = {vector: name for name, vector in UP_AXES.items()}


def matrix(axes: Axes) -> Float[np.ndarray, "3 3"]:
    """The rotation that takes points of the world to those of the file."""
    return np.array([UP_AXES[name] for name in axes])


def axes_of(rotation: Float[np.ndarray, "3 3"]) -> Axes:
    """The axes whose `matrix` this is."""
    x, y, z = (NAMES[float(row[0]), float(row[1]), float(row[2])] for row in rotation)
    return x, y, z


def chosen(choice: FileAxes | str, up: Float[np.ndarray, "3"] | None = None) -> Axes:
    """The axes of a file of a world in which `up`, one of `UP_AXES` and +Z by default, is up.

    The front of an upright one is where turntables of that world begin (`world.around`).
    """
    if choice == FileAxes.WORLD:
        return WORLD
    return UPRIGHT if up is None else axes_of(matrix(UPRIGHT) @ upright_rows(up))


def up_of(upright: Axes) -> str:
    """The axis of the world that is up, by the axes of an upright file, in which it is -Y."""
    return upright[1][1:] if upright[1].startswith("-") else f"-{upright[1]}"


def y_up(upright: Axes) -> Axes:
    """Those of a file with +Y up and its front at +Z, as glTF has it, by those of an upright one."""
    return axes_of(np.diag([-1.0, -1.0, 1.0]) @ matrix(upright))


def entry(axes: Axes) -> dict[str, Any]:
    """What a transforms.json says of the asset.ply beside it."""
    return {ENTRY: " ".join(axes)}


def parse(text: str) -> Axes:
    """The axes that a file states, such as "-y -z x". Raises UserError for what no rotation makes."""
    for x, y, z in itertools.product(UP_AXES, repeat=3):
        if text.split() == [x, y, z] and np.linalg.det(matrix((x, y, z))) > 0.5:
            return x, y, z
    raise UserError(f"its axes are {quoted(text)}, which no rotation makes; was it written by a newer im3d?")
