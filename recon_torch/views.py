"""A directory of views on disk, as the fit takes them: cameras, pictures over white, foreground masks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from recon_torch.cameras import Cameras, load_transforms_json, read_transforms
from recon_torch.errors import UserError
from recon_torch.export import read_image
from recon_torch.masks import threshold_masks

MaskFunction = Callable[[Float[np.ndarray, "K H W 3"]], Float[np.ndarray, "K H W 1"]]


class Views(NamedTuple):
    """K views of one object. images are composited over white; masks are coverage; both in [0, 1]."""

    cameras: Cameras
    images: Float[np.ndarray, "K H W 3"]
    masks: Float[np.ndarray, "K H W 1"]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: np.ndarray) -> Views:
        """The chosen views."""
        return Views(self.cameras[index], self.images[index], self.masks[index])

    def resized(self, height: int) -> Views:
        """The views with so many rows, filtered against aliasing; the aspect stays."""
        if height < 1:
            raise UserError(f"views cannot have a height of {height} px")
        width = max(1, round(self.cameras.width * height / self.cameras.height))
        return Views(
            self.cameras.resized(width, height),
            _resize(self.images, height, width),
            _resize(self.masks, height, width),
        )


def load_views(directory: str | os.PathLike, segment: MaskFunction = threshold_masks) -> Views:
    """Reads a transforms.json and its images.

    A mask is, in this order, the frame's mask_path (white is foreground), the image's alpha, or what
    `segment` makes of all images that have neither.

    Raises:
        UserError: what `read_transforms` finds; an image of another size than the file says; an empty mask.
    """
    directory = Path(directory)
    cameras, paths = read_transforms(directory / "transforms.json")
    frames = load_transforms_json(directory / "transforms.json")["frames"]
    shape = (cameras.height, cameras.width)
    images, masks = (
        np.ones((len(paths), *shape, 3), np.float32),
        np.zeros((len(paths), *shape, 1), np.float32),
    )
    unmasked = []
    for index, (path, frame) in enumerate(zip(paths, frames, strict=True)):
        image, mask = _read_frame(directory, path, frame, shape)
        images[index] = image
        if mask is None:
            unmasked.append(index)
        else:
            masks[index] = mask
    if unmasked:
        masks[unmasked] = segment(images[unmasked])
    empty = [str(path) for path, mask in zip(paths, masks, strict=True) if mask.max() < 0.5]
    if empty:
        raise UserError(f"{directory}: {', '.join(empty)}: no foreground; give views with an object in each")
    return Views(cameras, images * masks + (1 - masks), masks)


def _resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, (height, width), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()


def _read_frame(
    directory: Path, path: Path, frame: dict, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    image = _read_sized(directory / path, shape)
    if "mask_path" in frame:
        if not isinstance(frame["mask_path"], str):
            raise UserError(f"{directory / 'transforms.json'}: the mask_path of {path} is not a file name")
        return image[..., :3], _read_sized(directory / frame["mask_path"], shape)[..., :1]
    return image[..., :3], image[..., 3:] if image.shape[-1] == 4 else None


def _read_sized(path: Path, shape: tuple[int, int]) -> np.ndarray:
    image = read_image(path)
    if image.shape[:2] != shape:
        found, expected = (f"{width}x{height}" for height, width in (image.shape[:2], shape))
        raise UserError(f"{path} is {found} px, transforms.json says {expected}; make them agree")
    return image
