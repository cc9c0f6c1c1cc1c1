"""How the K views of a turntable stand in the pictures of a clip, and these in the frames of latents.

A video model may want more pictures than there are views: the clip of 4n + 1 pictures that an autoencoder
takes which compresses time, or pictures between the views, because it knows slow motion alone. So the clip is
an orbit of `pictures_per_view` K pictures, of which every `pictures_per_view`-th is a view, and it may be
`closed`, which is to say that it ends with view 0 again:

    K   pictures_per_view   closed   pictures   latents of Wan (4n + 1 -> n + 1)
    16          1           False       16       none
    16          1           True        17        5
    16          5           True        81       21

`config.clip` says so in one place. An autoencoder that compresses time says itself what it makes
of them (`ClipAutoencoder.num_latents`).
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.autoencoders import Autoencoder, ClipAutoencoder
from im3d_jax.settings import ClipSettings
from recon_torch.errors import UserError

GREY = 0.5
"""Zero in the range [-1, 1] of autoencoders."""

Pictures = TypeVar("Pictures", Array, np.ndarray)
"""Arrays [B, P, ...], where P counts pictures."""


class Clip(NamedTuple):
    """The pictures of a clip that shows `num_views` views.

    Attributes:
        num_views: K.
        pictures_per_view: pictures from one view to the next.
        closed: whether the clip ends with view 0 again.
    """

    num_views: int
    pictures_per_view: int = 1
    closed: bool = False

    @classmethod
    def of(cls, settings: ClipSettings, num_views: int) -> Clip:
        """The clip of a config. A single view is a clip of one picture."""
        if num_views == 1:
            return cls(1)
        return cls(num_views, settings.pictures_per_view, settings.closed)

    def of_orbit(self, num_pictures: int) -> Clip:
        """The same kind of clip, of an orbit of so many pictures; that of one picture is this picture.

        Raises UserError if these are not `pictures_per_view` times a number of views.
        """
        if num_pictures == 1:
            return Clip(1)
        num_views, left_over = divmod(num_pictures, self.pictures_per_view)
        if left_over:
            raise UserError(
                f"{num_pictures} pictures of an orbit, and config.clip.pictures_per_view is"
                f" {self.pictures_per_view}; give a multiple of it"
            )
        return self._replace(num_views=num_views)

    @property
    def num_orbit(self) -> int:
        """Pictures of a whole orbit, of which the clip may lack the last ones."""
        return self.num_views * self.pictures_per_view

    @property
    def num_pictures(self) -> int:
        """P: pictures of the clip, from view 0 to the last view, or to view 0 again."""
        return self.num_orbit + 1 if self.closed else self.num_orbit - self.pictures_per_view + 1

    @property
    def is_views(self) -> bool:
        """Whether the pictures are the views, one for one."""
        return self.num_pictures == self.num_views

    def pictures(self, orbit: Float[Array | np.ndarray, "B O *rest"]) -> Float[Array, "B P *rest"]:
        """The pictures of the clip, from those of a whole orbit, view 0 first."""
        orbit = jnp.asarray(orbit)
        if self.closed:
            return jnp.concatenate([orbit, orbit[:, :1]], 1)
        return orbit[:, : self.num_pictures]

    def views(self, pictures: Pictures) -> Pictures:
        """Those of the clip's pictures [B, P, ...] that are views: [B, K, ...]."""
        return pictures[:, : self.num_orbit : self.pictures_per_view]

    def of_frames(self, per_view: float | tuple[float, ...], num_frames: int) -> float | tuple[float, ...]:
        """What a frame of latents has, where each view has a number: the mean over the frame's pictures.

        The first frame is picture 0, the others share the rest evenly. Between views numbers are
        interpolated, and after the last view towards view 0.
        """
        if not isinstance(per_view, tuple) or self.is_views and num_frames == self.num_views:
            return per_view
        place = np.arange(self.num_pictures) / self.pictures_per_view
        numbers = np.interp(place, np.arange(self.num_views + 1), [*per_view, per_view[0]])
        return (float(numbers[0]), *numbers[1:].reshape(num_frames - 1, -1).mean(1).tolist())

    def closure_db(
        self, rgb: Float[Array, "B P H W 3"], alpha: Float[Array, "B P H W 1"]
    ) -> Float[np.ndarray, " B"] | None:
        """PSNR between the picture that closes a clip and view 0, over the foreground of either.

        None for a clip that is not closed. A generator whose clips do not return to view 0 has drifted.
        """
        if not self.closed:
            return None
        seen = np.asarray(alpha)[:, [0, -1]].max(1) > 0.5
        squares = np.square(np.asarray(rgb, np.float64)[:, 0] - np.asarray(rgb, np.float64)[:, -1])
        axes = (1, 2, 3)
        error = (squares * seen).sum(axes) / np.maximum(3 * seen.sum(axes), 1)
        return -10 * np.log10(np.maximum(error, 1e-10))


def padded_clip(first: Float[Array, "B H W C"], num_pictures: int) -> Float[Array, "B P H W C"]:
    """A clip of B pictures, each followed by grey ones, as Wan's image to video is told its picture."""
    width = ((0, 0), (0, num_pictures - 1), (0, 0), (0, 0), (0, 0))
    return jnp.pad(first[:, None], width, constant_values=GREY)


def num_latents(clip: Clip, codec: Autoencoder) -> int:
    """F: the frames of latents that the autoencoder makes of the clip's pictures.

    Raises UserError if it takes no clips of so many.
    """
    if not isinstance(codec, ClipAutoencoder):
        return clip.num_pictures
    try:
        return codec.num_latents(clip.num_pictures)
    except UserError as error:
        raise UserError(
            f"{error}; config.num_views {clip.num_views} with config.clip.pictures_per_view"
            f" {clip.pictures_per_view} and closed {clip.closed} makes {clip.num_pictures}"
        ) from None
