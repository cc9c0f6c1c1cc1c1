"""A directory of views on disk, as the fit takes them: cameras, pictures over white, foreground masks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from recon_torch.errors import UserError
from recon_torch.views import masks as masks_
from recon_torch.views.cameras import Cameras
from recon_torch.views.images import read_image
from recon_torch.views.transforms import Frame, read_frames

OPAQUE = 0.99  # an alpha that is nowhere below says nothing

MaskFunction = Callable[[Float[np.ndarray, "K H W 3"]], Float[np.ndarray, "K H W 1"]]


@dataclass(frozen=True)
class Views:
    """K views of one object. images are composited over white; masks are coverage; both in [0, 1].

    cameras.w2c is float64, as the world may be large. notes: what a report should say about the views.
    """

    cameras: Cameras
    images: Float[np.ndarray, "K H W 3"]
    masks: Float[np.ndarray, "K H W 1"]
    names: list[str]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: np.ndarray) -> Views:
        """The chosen views."""
        names = [self.names[i] for i in index]
        return Views(self.cameras[index], self.images[index], self.masks[index], names, self.notes)

    def hold_out(self, every: int) -> tuple[Views, Views]:
        """All views but every so many-th, and those. Raises UserError if either would be empty."""
        if not 2 <= every <= len(self):
            raise UserError(
                f"cannot hold out every {every} views; give from 2 to the number of views, {len(self)}"
            )
        last_of_each = np.arange(len(self)) % every == every - 1
        return self.take(np.flatnonzero(~last_of_each)), self.take(np.flatnonzero(last_of_each))


def load_views(
    directory: str | os.PathLike,
    segment: MaskFunction = masks_.threshold_masks,
    *,
    height: int | None = None,
    allow_missing: bool = False,
) -> Views:
    """Reads a transforms.json and its images, all brought to one size.

    A mask is, in this order, the frame's mask_path (white is foreground), the image's alpha unless that is
    opaque throughout, or what `segment` makes of all images that have neither.

    Args:
        directory: where the transforms.json is.
        segment: RGB images to masks, both in [0, 1].
        height: rows of all views; default: the size that most images have. Other images are resampled,
            against aliasing, and their intrinsics follow; where the aspect differs pixels are no squares.
        allow_missing: leave out frames whose image does not exist, with a note.

    Raises:
        UserError: what `read_frames` finds; a mask of another size than its image; no foreground in a view.
    """
    directory = Path(directory)
    frames, missing = read_frames(directory / "transforms.json", allow_missing)
    width, height = _common_size(frames, height)
    pictures = [read_frame(directory, frame, width, height) for frame in frames]
    cameras = Cameras(
        np.stack([frame.w2c for frame in frames]),
        np.stack([_resized_intrinsics(frame, width, height) for frame in frames]),
        width,
        height,
    )
    notes = [f"left out, as their images are missing: {', '.join(missing)}"] if missing else []
    names = [str(frame.image) for frame in frames]
    return assemble(cameras, np.stack(pictures), names, segment, notes, str(directory))


def assemble(
    cameras: Cameras,
    pictures: Float[np.ndarray, "K H W 4"],
    names: list[str],
    segment: MaskFunction,
    notes: list[str],
    source: str,
) -> Views:
    """Views from pictures over white with masks as a fourth channel, or NaN there for `segment` to find.

    Raises UserError, which names the `source`, if a view has no foreground.
    """
    images, masks = np.ascontiguousarray(pictures[..., :3]), np.ascontiguousarray(pictures[..., 3:])
    unmasked = np.flatnonzero(np.isnan(masks[:, 0, 0, 0]))
    if len(unmasked):
        found = segment(images[unmasked])
        images[unmasked], masks[unmasked] = masks_.over_white(images[unmasked], found), found
    empty = [name for name, mask in zip(names, masks, strict=True) if mask.max() < 0.5]
    if empty:
        raise UserError(f"{source}: {', '.join(empty)}: no foreground; give views with an object in each")
    problems = [masks_.problem(mask) for mask in masks]
    for problem in sorted({problem for problem in problems if problem}):
        having = [name for name, own in zip(names, problems, strict=True) if own == problem]
        notes = [*notes, f"the mask {problem}: {', '.join(having)}"]
    return Views(cameras, images, masks, names, notes)


def _common_size(frames: list[Frame], height: int | None) -> tuple[int, int]:
    """The (width, height) of most frames, or with their aspect at the given height."""
    sizes = Counter((frame.width, frame.height) for frame in frames)
    common = max(sizes, key=lambda size: (sizes[size], -size[0] * size[1]))
    if height is None:
        return common
    if height < 1:
        raise UserError(f"views cannot have a height of {height} px")
    return max(1, round(common[0] * height / common[1])), height


def _resized_intrinsics(frame: Frame, width: int, height: int) -> Float[np.ndarray, "3 3"]:
    scale = np.array([[width / frame.width], [height / frame.height], [1.0]])
    return (frame.intrinsics_px * scale).astype(np.float32)


def read_frame(directory: Path, frame: Frame, width: int, height: int) -> Float[np.ndarray, "H W 4"]:
    """RGB over white and mask at the common size; if the frame has no mask, RGB as it is and NaN."""
    image = read_image(directory / frame.image)
    rgb, mask = image[..., :3], image[..., 3:]
    if frame.mask is not None:
        mask = read_image(directory / frame.mask)[..., :1]
        if mask.shape[:2] != rgb.shape[:2]:
            raise UserError(
                f"{directory / frame.mask} is {mask.shape[1]}x{mask.shape[0]} px, its image is "
                f"{rgb.shape[1]}x{rgb.shape[0]}; make them agree"
            )
    elif not mask.size or mask.min() > OPAQUE:
        return resize(np.pad(rgb, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan), width, height)
    # Over white before it is resized, or what is hidden would bleed into the edges.
    return resize(np.concatenate([rgb * mask + 1 - mask, mask], -1), width, height)


def resize(picture: Float[np.ndarray, "H W 4"], width: int, height: int) -> Float[np.ndarray, "h w 4"]:
    """A picture on another pixel grid, filtered against aliasing."""
    if picture.shape[:2] == (height, width):
        return picture
    channels_first = torch.from_numpy(picture).permute(2, 0, 1)[None]
    resized = F.interpolate(channels_first, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
