"""Directories of views: numbered images with a transforms.json, read as the fit takes them and written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from recon_torch.errors import UserError
from recon_torch.views import masks as masks_
from recon_torch.views.cameras import Cameras
from recon_torch.views.images import read_image, resize, write_image
from recon_torch.views.transforms import Frame, read_frames, write_transforms

OPAQUE = 0.99  # an alpha channel that is nowhere below this is no mask

# Makes masks of RGB images, both in [0, 1].
MaskFunction = Callable[[Float[np.ndarray, "K H W 3"]], Float[np.ndarray, "K H W 1"]]


@dataclass(frozen=True)
class Views:
    """K views of one object.

    Attributes:
        cameras: their w2c is float64, because the world of the views may be large.
        images: composited over white, in [0, 1].
        masks: coverage by the object, in [0, 1].
        names: what messages call each view.
        notes: what a report should say about the views.
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
        """Splits off every so many-th view: returns the others, and those held out.

        Raises:
            UserError: one of the two would be empty.
        """
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
    """Reads a transforms.json and its images, and brings all of them to one size.

    The mask of a frame is its mask_path (white is foreground); without one, the alpha channel of its image,
    unless that is opaque throughout. `segment` makes the masks of all other frames.

    Args:
        directory: where the transforms.json is.
        segment: makes masks of images that have none.
        height: rows of all views. By default the views have the size that most images have. Other images are
            resampled with a filter against aliasing, and their intrinsics are scaled to match; pixels are not
            square where the aspect ratio differs.
        allow_missing: leave out frames whose image does not exist, with a note.

    Raises:
        UserError: what `read_frames` finds; a mask of another size than its image; a view without foreground.
    """
    directory = Path(directory)
    frames, missing = read_frames(directory / "transforms.json", allow_missing)
    width, height = _common_size(frames, height)
    pictures = [read_frame(directory, frame, width, height) for frame in frames]
    cameras = Cameras(
        np.stack([frame.w2c for frame in frames]),
        np.stack([frame.intrinsics_at(width, height) for frame in frames]).astype(np.float32),
        width,
        height,
    )
    notes = [f"left out, as their images are missing: {', '.join(missing)}"] if missing else []
    names = [str(frame.image) for frame in frames]
    return assemble(cameras, np.stack(pictures), names, segment, notes, str(directory))


def write_views(
    directory: str | os.PathLike,
    cameras: Cameras,
    images: Float[np.ndarray, "K H W C"],
    folder: str = "",
) -> None:
    """Writes views as FOLDER/000.png, FOLDER/001.png, ... beside their transforms.json.

    Args:
        images: RGB, or RGBA whose colours are not multiplied by alpha.
        folder: below the directory; by default the images lie in the directory itself.
    """
    names = [os.path.join(folder, f"{index:03d}.png") for index in range(len(cameras))]
    for name, image in zip(names, images, strict=True):
        write_image(Path(directory, name), image)
    write_transforms(Path(directory, "transforms.json"), cameras, names)


def assemble(
    cameras: Cameras,
    pictures: Float[np.ndarray, "K H W 4"],
    names: list[str],
    segment: MaskFunction,
    notes: list[str],
    source: str,
) -> Views:
    """Makes views of RGB images with a mask as the fourth channel.

    Args:
        pictures: composited over white; where the mask is NaN, as they are, and `segment` finds the mask.
        source: the directory or the file that messages name.

    Raises:
        UserError: a view has no foreground.
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
    for problem in sorted({each for each in problems if each is not None}):
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


def read_frame(directory: Path, frame: Frame, width: int, height: int) -> Float[np.ndarray, "H W 4"]:
    """A frame's RGB over white and its mask, at the given size; RGB as it is and NaN if it has no mask."""
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
    # It is composited before it is resized, or hidden colours would bleed into the edges.
    return resize(np.concatenate([rgb * mask + 1 - mask, mask], -1), width, height)
