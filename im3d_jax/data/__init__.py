"""Objects to train and test on: procedural ones and renders of meshes, as examples of training.

The contracts of this room are here: what an `Example` holds, where examples come from (`Source`), and what
renders objects for a data set (`Renderer`). Nothing heavy is imported, because the worker processes of
`workers` import this package too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float, Num

from recon_torch.views.cameras import Cameras


class Example(TypedDict, total=False):
    """K views of one object: `rgb` and `alpha`, or `latents`, or a `scene` that is still to be rendered.

    id: a name for messages, such as "procedural/123".
    rgb: pictures over white, in [0, 1]. alpha: coverage in [0, 1].
    latents: what an autoencoder made of the pictures.
    scene: the arrays of `objects.pack` for this object, and its cameras as "w2c" [K, 4, 4]. `stack_views`
        of `input_pipeline` renders it in views of `size` pixels.
    elevation_rad: of all K cameras.
    text, text_mask: one entry for each text encoder. With `image_tokens`, they are there only where the
        data set holds them.
    """

    id: str
    rgb: Float[np.ndarray, "K H W 3"]
    alpha: Float[np.ndarray, "K H W 1"]
    latents: Float[np.ndarray, "K h w c"]
    scene: dict[str, Num[np.ndarray, "..."]]
    size: int
    caption: str
    elevation_rad: float
    text: tuple[Float[np.ndarray, "L d"], ...]
    text_mask: tuple[Float[np.ndarray, " L"], ...]
    image_tokens: Float[np.ndarray, "L d"]


class CorruptRecord(Exception):
    """A record that cannot be decoded.

    Args:
        name: which record, and where it lies.
        why: what is wrong with it.
    """

    def __init__(self, name: str, why: str):
        super().__init__(f"{name} ({why})")


@runtime_checkable
class Source(Protocol):
    """Examples by number, read from several threads at a time.

    `__getitem__` raises `CorruptRecord` for a record that it cannot decode.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class BatchSource(Source, Protocol):
    """A source whose examples are cheaper to make together than one by one. None of them is ever corrupt."""

    def batch(self, indices: Sequence[int]) -> list[Example]: ...


class RenderedObject(NamedTuple):
    """An object seen by K cameras at one elevation.

    rgba: in [0, 1], colours not multiplied by alpha.
    more: what else its metadata.json is to say, as values that JSON has.
    """

    rgba: Float[np.ndarray, "K H W 4"]
    cameras: Cameras
    caption: str
    elevation_rad: float
    more: Mapping[str, Any] = MappingProxyType({})


@runtime_checkable
class Renderer(Protocol):
    """Renders the objects of `im3d dataset render`, each by its name.

    Attributes:
        names: of all objects, each once. A name is also the path of the object's directory.
    """

    @property
    def names(self) -> Sequence[str]: ...

    def render(self, name: str) -> RenderedObject:
        """Raises UserError if this object cannot be rendered; the others may still be."""
        ...
