"""Textures: the files that meshes name, and their pictures."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from recon_torch.errors import UserError

MAX_TEXELS = 2**28  # of all textures of a file: 1 GB
TEXTURE_FOLDERS = ("images", "maps", "materials", "tex", "texture", "textures")
KTX2 = b"\xabKTX 20\xbb\r\n\x1a\n"


class UnreadablePicture(Exception):
    """A picture that is broken, or in a format that is not read."""


class TexelBudget:
    """Counts the texels of a file's textures, so that they fit into memory."""

    def __init__(self, name: str):
        self._name, self._left = name, MAX_TEXELS

    def spend(self, count: int) -> None:
        """Raises UserError once the textures have more than MAX_TEXELS texels."""
        self._left -= count
        if self._left < 0:
            raise UserError(f"{self._name} has textures of more than {MAX_TEXELS:,} texels; shrink them")


def decode_picture(content: bytes, budget: TexelBudget) -> UInt8[np.ndarray, "height width 4"]:
    """The RGBA of a picture in any format that Pillow reads, 16-bit ones rounded to 8.

    Raises:
        UnreadablePicture: it cannot be decoded.
        UserError: it is in KTX2, which is refused by name, or too large.
    """
    if content.startswith(KTX2):
        raise UserError("it has a texture in KTX2 (KHR_texture_basisu), which is not read; save it with PNG")
    try:
        with _without_warnings(), Image.open(io.BytesIO(content)) as picture:
            budget.spend(picture.width * picture.height)
            if picture.mode.startswith("I"):
                grey = np.clip(np.rint(np.asarray(picture) / 257), 0, 255).astype(np.uint8)
                return np.stack([grey, grey, grey, np.full_like(grey, 255)], -1)
            return np.array(picture.convert("RGBA"))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError("it has a texture of more texels than Pillow reads; shrink it") from None
    except Exception as error:  # Pillow's readers raise whatever their parsers raise
        raise UnreadablePicture(str(error)) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow warns of large pictures, which the budget limits, and of odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def find_beside(folder: Path, reference: str) -> Path | None:
    """The file that a mesh in `folder` refers to, or None.

    Tried in turn are the reference as it stands and with its percent escapes decoded; with the backslashes of
    Windows; without regard to upper and lower case; and, for paths of the artist's own machine, the name
    alone, in the folder and in folders for textures in or beside it.
    """
    spellings = list(dict.fromkeys([reference, unquote(reference)]))
    for spelling in spellings:
        # os.path says "no" to names that no file can have, where Path raises an error.
        if _is_inside(spelling) and os.path.isfile(folder / spelling):
            return folder / spelling
    for spelling in spellings:
        names = PurePosixPath(spelling.replace("\\", "/").strip()).parts
        if not names:
            continue
        candidates = [folder, *_texture_folders(folder), *_texture_folders(folder.parent)]
        candidates += _texture_folders(folder.parent / "materials")  # of models for Gazebo
        tries = [(folder, names)] if _is_inside(spelling.replace("\\", "/")) else []
        for start, parts in [*tries, *((each, names[-1:]) for each in candidates)]:
            if found := _without_case(start, parts):
                return found
    return None


def _is_inside(reference: str) -> bool:
    """Whether a path is relative; a file that says where on a disk to look is not obeyed."""
    return not reference.startswith(("/", "\\")) and ":" not in reference[:3]


def _without_case(folder: Path, names: Iterable[str]) -> Path | None:
    """The file at a path below a folder whose names may differ in upper and lower case."""
    path = folder
    for name in names:
        if name in (".", "..") or os.path.exists(path / name):
            path = path / name
            continue
        matches = sorted(each for each in _listed(path) if each.casefold() == name.casefold())
        if not matches:
            return None
        path = path / matches[0]
    return path if os.path.isfile(path) else None


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _texture_folders(folder: Path) -> list[Path]:
    return sorted(folder / name for name in _listed(folder) if name.casefold() in TEXTURE_FOLDERS)
