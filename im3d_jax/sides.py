"""Pictures of one object from several sides, told apart by the azimuths from which they were taken.

The azimuths of a turntable count from its view 0 on, counter-clockwise seen from above: at 90 degrees the
camera stands where the right-hand side of the first picture is, and at 180 it sees the back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from recon_torch.errors import UserError
from recon_torch.ranges import AzimuthDeg, taken

SAME_DEG = 0.5
"""Azimuths that differ by no more are one: a picture shows the view there, and two pictures are one side."""


class Side(NamedTuple):
    """A further picture: its path, and its azimuth in degrees."""

    image: str
    azimuth_deg: float


def arranged(images: Sequence[str], azimuths_deg: Sequence[float | int]) -> tuple[str, tuple[Side, ...]]:
    """The picture at azimuth 0, which is view 0, and the others in the order of their azimuths.

    azimuths_deg: one for each picture; () for a single one at azimuth 0.

    Raises UserError for another number of azimuths, for one that is no angle, for two pictures of one side,
    and where no picture is at azimuth 0.
    """
    if len(images) < 2 and not azimuths_deg:
        return "".join(images), ()
    if len(azimuths_deg) != len(images):
        counts = f"{len(images)} image{'s' * (len(images) != 1)}, {len(azimuths_deg)} of azimuth-deg"
        raise UserError(f"{counts}: give as many, with 0 for the front")
    angles = [float(taken(each, AzimuthDeg, "azimuth-deg")) % 360 for each in azimuths_deg]
    sides = sorted(map(Side, images, angles), key=lambda side: side.azimuth_deg)
    for side, following in zip(sides, [*sides[1:], sides[0]], strict=True):
        if side is not following and apart_deg(side.azimuth_deg, following.azimuth_deg) <= 2 * SAME_DEG:
            raise UserError(f"{side.image} and {following.image} are at one azimuth-deg; keep one of them")
    front = next((side for side in sides if apart_deg(side.azimuth_deg, 0.0) <= SAME_DEG), None)
    if front is None:
        raise UserError("no image is at azimuth-deg 0, where views begin; count the others from one of them")
    return front.image, tuple(side for side in sides if side is not front)


def view_at(azimuth_deg: float, num_views: int) -> int | None:
    """Which of the views of a turntable is at an azimuth; None where none is."""
    view = round(azimuth_deg * num_views / 360) % num_views
    return view if apart_deg(azimuth_deg, 360 * view / num_views) <= SAME_DEG else None


def apart_deg(first: float, second: float) -> float:
    """The angle between two azimuths, from 0 to 180."""
    return abs((first - second + 180) % 360 - 180)
