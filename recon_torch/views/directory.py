"""Directories of views: numbered images with a transforms.json, read as the fit takes them and written."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64
from scipy import ndimage

from recon_torch.errors import UserError
from recon_torch.views import defects, silhouettes
from recon_torch.views import masks as masks_
from recon_torch.views.cameras import Cameras
from recon_torch.views.frames import Frame, grouped
from recon_torch.views.images import OPAQUE, read_image, write_image
from recon_torch.views.mask_files import read_mask
from recon_torch.views.masks import Segment
from recon_torch.views.resizing import resize
from recon_torch.views.silhouettes import CONTRADICTED
from recon_torch.views.transforms import Part, parts_of, read_part, write_transforms

_SHARE = re.compile(r"\d+%")  # in doubts, which are told once for all views that have them
MOST_UNTOLD = 0.25  # share of the views whose foreground may be unknown; such views are left out
LIKE_ALPHA = 0.01  # the share of an image in which a mask may differ from its alpha channel without a word


class MaskSource(enum.StrEnum):
    """Where the mask of a view comes from."""

    FILE = "mask_path"
    ALPHA = "alpha"
    NONE = "background"


class Picture(NamedTuple):
    """The picture of a frame: its RGB over white with the mask as the fourth channel.

    Where the frame has no mask, RGB is as it is, the mask is NaN, and the background is what tells it.
    """

    rgbm: Float[np.ndarray, "H W 4"]
    mask: MaskSource
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Views:
    """K views of one object.

    Attributes:
        cameras: their w2c is float64, because the world of the views may be large.
        images: composited over white, in [0, 1]; without masks, as they are.
        masks: coverage by the object, in [0, 1]; None where they would be wrong.
        unsure: the pixels whose coverage is a guess, as it did not come with the pictures; None for none.
        names: what messages call each view.
        notes: what a report should say about the views.
        background: grey level behind the images.
    """

    cameras: Cameras
    images: Float[np.ndarray, "K H W 3"]
    masks: Float[np.ndarray, "K H W 1"] | None
    names: list[str]
    notes: list[str]
    background: float = 1.0
    unsure: Bool[np.ndarray, "K H W 1"] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: np.ndarray) -> Views:
        """The chosen views."""
        names = [self.names[i] for i in index]
        masks = None if self.masks is None else self.masks[index]
        unsure = None if self.unsure is None else self.unsure[index]
        own = {"cameras": self.cameras[index], "images": self.images[index], "names": names}
        return dataclasses.replace(self, masks=masks, unsure=unsure, **own)

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
    source: str | os.PathLike,
    segment: Segment = masks_.by_backdrop,
    *,
    height: int | None = None,
    allow_missing: bool = False,
) -> Views:
    """Reads a transforms.json and its images, and brings all of them to one size.

    The mask of a frame is its mask_path (see `mask_files`); without one, the alpha channel of its image,
    unless that is opaque throughout. `segment` makes the masks of all other frames. Where it cannot tell the
    foreground of a few, these are left out; where of many, or if the masks contradict each other, the views
    have no masks. Lens distortion is undone in images and masks.

    Args:
        source: where the transforms.json is, or this file by any name. Of views that are split, those to
            train with are taken, see `load_split`.
        segment: makes masks of images that have none.
        height: rows of all views. By default the views have the size that most images have. Other images are
            resampled with a filter against aliasing, and their intrinsics are scaled to match; pixels are not
            square where the aspect ratio differs.
        allow_missing: leave out frames whose image does not exist, with a note.

    Raises:
        UserError: what `read_part` finds; a mask of another size than its image; a view without foreground.
    """
    return _load(parts_of(source).train, segment, height, allow_missing)


def load_split(
    source: str | os.PathLike,
    segment: Segment = masks_.by_backdrop,
    *,
    height: int | None = None,
    allow_missing: bool = False,
) -> tuple[Views, Views | None]:
    """As `load_views`, with the views to test with; None if the source is not split.

    It is by transforms_train.json and transforms_test.json, or by the lists train_filenames and
    test_filenames of a transforms.json.
    """
    parts = parts_of(source)
    train = _load(parts.train, segment, height, allow_missing)
    if parts.test is None:
        return train, None
    return train, _load(parts.test, segment, height, allow_missing)


def _load(part: Part, segment: Segment, height: int | None, allow_missing: bool) -> Views:
    frames, missing = read_part(part, allow_missing)
    width, height = _common_size(frames, height)
    folder = part.path.parent
    pictures = [read_frame(folder, frame, width, height) for frame in frames]
    cameras = Cameras(
        np.stack([frame.w2c for frame in frames]),
        np.stack([frame.intrinsics_at(width, height) for frame in frames]).astype(np.float32),
        width,
        height,
    )
    names = [str(frame.image) for frame in frames]
    notes = [f"left out, as their images are missing: {', '.join(missing)}"] if missing else []
    told = [[*frame.notes, *picture.notes] for frame, picture in zip(frames, pictures, strict=True)]
    notes += part.notes + grouped(names, told)
    return assemble(
        cameras, np.stack([picture.rgbm for picture in pictures]), names, segment, notes, str(folder)
    )


def write_views(
    directory: str | os.PathLike,
    cameras: Cameras,
    images: Float[np.ndarray, "K H W C"],
    folder: str = "",
    **extra: Any,
) -> None:
    """Writes views as FOLDER/000.png, FOLDER/001.png, ... beside their transforms.json.

    Args:
        images: RGB, or RGBA whose colours are not multiplied by alpha.
        folder: below the directory; by default the images lie in the directory itself.
        extra: further entries of transforms.json, as values that JSON has.
    """
    names = [os.path.join(folder, f"{index:03d}.png") for index in range(len(cameras))]
    for name, image in zip(names, images, strict=True):
        write_image(Path(directory, name), image)
    write_transforms(Path(directory, "transforms.json"), cameras, names, **extra)


def assemble(
    cameras: Cameras,
    pictures: Float[np.ndarray, "K H W 4"],
    names: list[str],
    segment: Segment,
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
    unsure = np.zeros_like(masks, bool)
    doubts: list[list[str]] = [[] for _ in names]
    if len(unmasked):
        notes = notes + defects.notes(pictures[unmasked])
        found = segment(images[unmasked])
        images[unmasked], masks[unmasked], unsure[unmasked] = found.images, found.masks, found.unsure
        for index, said in zip(unmasked, found.doubts, strict=True):
            doubts[index] = [f"the object {_SHARE.sub('some', doubt)}" for doubt in said]
    empty = [name for name, mask in zip(names, masks, strict=True) if mask.max() < 0.5]
    if empty:
        raise UserError(f"{source}: {', '.join(empty)}: no foreground; give views with an object in each")
    views = Views(cameras, images, masks, names, notes + grouped(names, doubts))
    if len(unmasked):
        views = _trusted(dataclasses.replace(views, unsure=unsure), unmasked, pictures[..., :3])
    else:
        compared = _compared(views)
        views = views if compared is None else _doubted(views, compared.shares)
    if views.masks is None:
        return views
    problems = [masks_.problem(mask) for mask in views.masks]
    told = [[] if problem is None else [f"the mask {problem}"] for problem in problems]
    return dataclasses.replace(views, notes=views.notes + grouped(views.names, told))


def _trusted(
    views: Views, unmasked: Int64[np.ndarray, " U"], pictures: Float[np.ndarray, "K H W 3"]
) -> Views:
    """Views whose masks are right as far as can be told from all of them, or that have none.

    Args:
        views: with masks that are NaN where the foreground cannot be told.
        unmasked: those that came without a mask.
        pictures: the images as they came.
    """
    assert views.masks is not None
    untold = np.isnan(views.masks[:, 0, 0, 0])
    mostly_given = 2 * len(unmasked) <= len(views)
    if untold.sum() > MOST_UNTOLD * len(views) and not mostly_given:
        why = f"the foreground of {untold.sum()} of {len(views)} views cannot be told from their background"
        return _without_masks(views, unmasked, pictures, why)
    if untold.any():
        gone = ", ".join(views.names[k] for k in np.flatnonzero(untold))
        note = f"left out, as their foreground cannot be told from the background: {gone}"
        kept = np.flatnonzero(~untold)
        views, pictures = dataclasses.replace(views.take(kept), notes=[*views.notes, note]), pictures[kept]
        unmasked = np.flatnonzero(np.isin(kept, unmasked))
    masks, compared = views.masks, _compared(views)
    assert masks is not None and views.unsure is not None
    if compared is None:
        return views
    if compared.agreement < silhouettes.AGREED:
        why = f"only {compared.agreement:.0%} of the masks is where the others allow the object (see --check)"
        return _without_masks(views, unmasked, pictures, why)
    views, cleaned = _doubted(views, compared.shares), [k for k in compared.cleaned if k in unmasked]
    if not cleaned:
        return views
    assert views.unsure is not None
    images, masks, unsure = views.images.copy(), masks.copy(), views.unsure.copy()
    masks[cleaned] = compared.masks[cleaned]
    for k in cleaned:  # what was unsure around the pieces goes with them
        unsure[k, ..., 0] &= _around(masks[k, ..., 0] > 0)
    images[cleaned] = np.where((masks > 0) | unsure, images, 1)[cleaned]
    gone = ", ".join(views.names[k] for k in cleaned)
    note = f"pieces of masks where the other masks allow no object were left out: {gone}"
    return dataclasses.replace(views, images=images, masks=masks, unsure=unsure, notes=[*views.notes, note])


def _compared(views: Views) -> silhouettes.Compared | None:
    """None if the cameras have no focus, as the fit will say."""
    assert views.masks is not None
    try:
        return silhouettes.compare(views.cameras, views.masks)
    except UserError:
        return None


def _doubted(views: Views, shares: Float[np.ndarray, " K"]) -> Views:
    """The views with a note on those whose masks the others contradict, whatever is wrong with these."""
    against = [name for name, share in zip(views.names, shares, strict=True) if share < CONTRADICTED]
    if not against:
        return views
    note = (
        f"as little as {shares.min():.0%} of a mask is where the other masks allow the object; "
        f"are cameras or masks wrong (--check)? {', '.join(against)}"
    )
    return dataclasses.replace(views, notes=[*views.notes, note])


def _around(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """A mask and as much beside it as a picture's backdrop may reach into an object."""
    return ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=masks_.VIDEO_EDGE_PX)


def _without_masks(
    views: Views, unmasked: Int64[np.ndarray, " U"], pictures: Float[np.ndarray, "K H W 3"], why: str
) -> Views:
    """The views with pictures as they came, before a background as bright as these have at the border."""
    note = f"{why}: no masks are used; give mask_path, alpha or --isnet-weights"
    images = views.images.copy()
    images[unmasked] = pictures[unmasked]
    background = float(np.median([masks_.border(picture) for picture in pictures[unmasked]]))
    return dataclasses.replace(
        views, images=images, masks=None, unsure=None, notes=[*views.notes, note], background=background
    )


def _common_size(frames: list[Frame], height: int | None) -> tuple[int, int]:
    """The (width, height) of most frames, or with their aspect at the given height."""
    sizes = Counter((frame.width, frame.height) for frame in frames)
    common = max(sizes, key=lambda size: (sizes[size], -size[0] * size[1]))
    if height is None:
        return common
    if height < 1:
        raise UserError(f"views cannot have a height of {height} px")
    return max(1, round(common[0] * height / common[1])), height


def read_frame(folder: Path, frame: Frame, width: int, height: int) -> Picture:
    """The picture of a frame at the given size, as a pinhole sees it.

    folder: of the transforms.json.
    """
    image = read_image(folder / frame.image, frame.upright)
    rgb, mask, source, notes = image[..., :3], *_mask_of(folder, frame, image)
    # It is composited before it is resized, or hidden colours would bleed into the edges.
    seen = rgb if mask is None else np.concatenate([rgb * mask + 1 - mask, mask], -1)
    if frame.undistortion is not None:
        seen = frame.undistortion(seen)
    if mask is None:
        seen = np.pad(seen, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan)
    return Picture(resize(seen, width, height), source, notes)


def _mask_of(
    folder: Path, frame: Frame, image: Float[np.ndarray, "H W C"]
) -> tuple[Float[np.ndarray, "H W 1"] | None, MaskSource, tuple[str, ...]]:
    """A frame's own mask, if it has one, where that comes from, and notes on how it was read."""
    separates = image.shape[-1] == 4 and image[..., 3].min() <= OPAQUE
    alpha = image[..., 3:] if separates else None
    if frame.mask is None:
        if alpha is None:
            return None, MaskSource.NONE, ()
        if 0 < alpha.max() < 1.5 / 255:  # by a tool that takes it for a mask of 0 and 1
            return (
                np.sign(alpha),
                MaskSource.ALPHA,
                ("its alpha has values up to 1: all but 0 is the object",),
            )
        return alpha, MaskSource.ALPHA, ()
    mask, reading = read_mask(folder / frame.mask, image.shape[1], image.shape[0])
    notes: tuple[str, ...] = (f"its mask has {reading}",) if reading else ()
    if alpha is not None and ((alpha > 0.5) != (mask > 0.5)).mean() > LIKE_ALPHA:
        notes += ("its mask_path is taken, which its alpha channel contradicts",)
    return mask, MaskSource.FILE, notes
