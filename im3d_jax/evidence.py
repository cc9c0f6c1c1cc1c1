"""The views that the Gaussians are fitted to: those of a video, and the pictures that a user has given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.asset import Picture
from recon_torch.views.cameras import Cameras, orbit


class Video(NamedTuple):
    """The views of a video; an asset has B = 1.

    Attributes:
        rgb, alpha: the views over white and their foreground masks, in [0, 1].
        closure_db: how well the clip comes back to view 0, see `Clip.closure_db`; None if it does not.
    """

    rgb: Float[Array, "B K H W 3"]
    alpha: Float[Array, "B K H W 1"]
    closure_db: float | None = None


class Evidence(NamedTuple):
    """What a user's pictures add to the views of a video in the fit.

    The pictures beside view 0 take the place of views, or come after them where there is no view at their
    azimuth.

    Attributes:
        pictures: all of them, view 0 first.
        views: of the fit, by their numbers, that each picture shows; without pictures it is view 0 that the
            video was made from.
        num_views: of the video.
        weight: of these views in the fit; a generated one has 1.
    """

    pictures: Sequence[Picture]
    views: tuple[int, ...]
    num_views: int
    weight: float

    @classmethod
    def of(cls, pictures: Sequence[Picture], num_views: int, weight: float = 1.0) -> Evidence:
        """The views that pictures show, beside a video of `num_views`."""
        after = itertools.count(num_views)
        found = (each.view(num_views) for each in pictures)
        views = tuple(next(after) if view is None else view for view in found)
        return cls(pictures, views or (0,), num_views, weight)

    @property
    def beside(self) -> list[Picture]:
        """The pictures at whose azimuths the video has no view."""
        return [each for each in self.pictures if each.view(self.num_views) is None]

    @property
    def weights(self) -> list[float] | None:
        """Of each view in the fit; None if all are equal."""
        if self.weight == 1 or not self.pictures:
            return None
        count = self.num_views + len(self.beside)
        return [self.weight if view in self.views else 1.0 for view in range(count)]

    def cameras(self, turntable: Cameras, elevation_rad: float) -> Cameras:
        """The cameras of the video's views, and after them those of the pictures beside them."""
        if not self.beside:
            return turntable
        azimuths_deg = [*np.arange(self.num_views) * 360 / self.num_views]
        azimuths_deg += [each.azimuth_deg for each in self.beside]
        return orbit(0, elevation_rad, turntable.height, azimuths_rad=np.deg2rad(azimuths_deg))

    def within(self, video: Video) -> tuple[Float[Array, "B V H W 3"], Float[Array, "B V H W 1"]]:
        """The views of the fit: those of a video, with the pictures in their place and after them."""
        rgb, alpha = video.rgb, video.alpha
        for each in self.pictures[1:]:
            view, (picture_rgb, picture_alpha) = each.view(self.num_views), each.batch
            if view is None:
                rgb = jnp.concatenate([rgb, picture_rgb[:, None]], 1)
                alpha = jnp.concatenate([alpha, picture_alpha[:, None]], 1)
            else:
                rgb, alpha = rgb.at[:, view].set(picture_rgb), alpha.at[:, view].set(picture_alpha)
        return rgb, alpha
