"""What `im3d dataset render` renders: procedural objects, or the meshes below a directory (Sec. 3.1).

Both are a `Renderer`. Every object is seen from the same number of evenly spaced azimuths at one elevation,
which is drawn for each object by its number or its name, so that it depends on no other object. What draws
a mesh is a `MeshDrawer`: the ray caster of `mesh_rendering`, or Blender.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from im3d_jax.data import RenderedObject, Renderer, augmentation, mesh_rendering, objects, procedural, views
from im3d_jax.data.augmentation import Variant
from im3d_jax.data.blender import SUFFIXES as BLENDER_SUFFIXES
from im3d_jax.data.isolation import Failure, attempt
from im3d_jax.data.meshes.reading import NOT_READ, READERS, UpAxis, load_mesh
from im3d_jax.data.objects import Split
from im3d_jax.data.placement import object_of
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.text_files import is_utf8
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.images import straight

MESH_SUFFIXES = tuple(READERS)


class MeshEngine(StrEnum):
    """What draws meshes: the ray caster of `mesh_rendering`, or Blender."""

    RAYS = "rays"
    BLENDER = "blender"


class Turntable(NamedTuple):
    """Where the cameras stand around every object.

    size: side of the square views in pixels.
    elevation_deg: of all cameras; None draws an elevation from U[0, 45] degrees for each object.
    seed: of what is drawn.
    """

    size: int
    num_views: int
    elevation_deg: float | None
    seed: int

    def elevation_rad(self, number: int) -> float:
        """The elevation of the cameras around object `number`."""
        if self.elevation_deg is None:
            return objects.elevation_rad(self.seed, number)
        return float(np.deg2rad(self.elevation_deg))


class ProceduralRenderer:
    """Renders the first `count` objects of the training split, each named by its number."""

    def __init__(self, count: int, turntable: Turntable):
        first, _ = objects.SPLITS[Split.TRAIN]
        self.names = [f"{number:08d}" for number in range(first, first + count)]
        self._turntable = turntable

    def render(self, name: str) -> RenderedObject:
        number, (size, num_views, _, seed) = int(name), self._turntable
        elevation_rad = self._turntable.elevation_rad(number)
        made = procedural.turntables(
            seed, [number], size=size, num_views=num_views, elevations_rad=[elevation_rad]
        )
        rgba = straight(np.asarray(made.views.rgb[0]), np.asarray(made.views.alpha[0]))
        return RenderedObject(rgba, orbit(num_views, elevation_rad, size), made.captions[0], elevation_rad)


class Drawn(NamedTuple):
    """Views of a mesh.

    rgba: in [0, 1], colours not multiplied by alpha.
    left_out: what its file asks for and the views do not show, sorted.
    more: what else the object's metadata.json is to say, as values that JSON has.
    """

    rgba: Float[np.ndarray, "K H W 4"]
    left_out: tuple[str, ...]
    more: Mapping[str, Any] = MappingProxyType({})


@runtime_checkable
class MeshDrawer(Protocol):
    """Draws the meshes of `MeshRenderer`, which says what they are called and where the cameras stand.

    Attributes:
        suffixes: of the files that it reads, in lower case.
    """

    @property
    def suffixes(self) -> Sequence[str]: ...

    def __call__(self, path: Path, up: UpAxis, cameras: Cameras, variant: Variant | None) -> Drawn:
        """Draws the mesh of a file, fitted into the ball of radius 0.5 at the origin.

        Args:
            up: the axis of the file that points up, if its format does not say it.
            variant: stretches and turns the mesh, and moves the light. The colours stay.

        Raises UserError if the file cannot be drawn.
        """
        ...


class RayCaster:
    """Draws meshes without GL: a `MeshDrawer`."""

    suffixes = MESH_SUFFIXES

    def __call__(self, path: Path, up: UpAxis, cameras: Cameras, variant: Variant | None) -> Drawn:
        mesh = load_mesh(path, up)
        if variant is not None:
            corners, normals = augmentation.reshape(mesh.corners, mesh.normals, variant)
            mesh = mesh._replace(corners=corners, normals=normals)
        rgba, _ = mesh_rendering.render(mesh, cameras)
        return Drawn(rgba, mesh.left_out)


class MeshRenderer:
    """Renders the meshes below a directory, each named by its path without the suffix.

    Args:
        directory: holds mesh files that `draw` reads, at any depth.
        captions: by name. A mesh that has none gets the caption "".
        up: the axis of the files that points up.
        num_variants: of each mesh, which are rendered beside it as NAME~1, NAME~2, ...; see `augmentation`.
        draw: makes the views; the ray caster by default.

    Attributes:
        unread: how many files of each suffix hold meshes, or may, in formats that are not read.

    Raises UserError if there are no meshes, or if two objects would have one name.
    """

    def __init__(
        self,
        directory: Path,
        captions: Mapping[str, str],
        up: UpAxis,
        turntable: Turntable,
        num_variants: int = 0,
        draw: MeshDrawer | None = None,
    ):
        self._draw: MeshDrawer = draw or RayCaster()
        self._paths, self.unread = find_meshes(directory, self._draw.suffixes)
        self._captions, self._up, self._turntable = captions, up, turntable
        variants = {name: [f"{name}~{number + 1}" for number in range(num_variants)] for name in self._paths}
        if taken := [each for names in variants.values() for each in names if each in self._paths]:
            raise UserError(f"a mesh has the name of a variant, {taken[0]}; rename it")
        self.names = [each for name in self._paths for each in (name, *variants[name])]

    @property
    def without_caption(self) -> list[str]:
        """The names of the meshes that have no caption."""
        return [name for name in self._paths if name not in self._captions]

    def render(self, name: str) -> RenderedObject:
        return self._render(name, name, None) if name in self._paths else self._render_variant(name)

    def _render_variant(self, name: str) -> RenderedObject:
        """Renders NAME~1 of NAME, whose colours are exchanged if its caption's can be."""
        object_name, variant = object_of(name), augmentation.draw(self._turntable.seed, name)
        made = self._render(name, object_name, variant)
        caption = augmentation.exchange_words(made.caption, made.rgba, variant.channels)
        if caption is None:
            variant, caption = variant._replace(channels=augmentation.CHANNELS[0]), made.caption
        told = {"of": object_name, "caption_of_object": made.caption, **variant.said()}
        rgba = augmentation.exchange(made.rgba, variant.channels)
        return made._replace(rgba=rgba, caption=caption, more={**made.more, "augmentation": told})

    def _render(self, name: str, object_name: str, variant: Variant | None) -> RenderedObject:
        """Renders the mesh of `object_name` as the object `name`."""
        path = self._paths[object_name]
        if not is_utf8(name):
            raise UserError(f"{path} has a name that is not UTF-8; rename the file")
        elevation_rad = self._turntable.elevation_rad(zlib.crc32(name.encode()))
        cameras = orbit(self._turntable.num_views, elevation_rad, self._turntable.size)
        drawn = self._draw(path, self._up, cameras, variant)
        if not drawn.rgba[..., 3].any():
            raise UserError(f"{path} is seen in no view: it is cut out, see-through or too thin")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        more: dict[str, Any] = {"mesh_sha256": digest, **drawn.more}
        if drawn.left_out:
            more["left_out"] = list(drawn.left_out)
        return RenderedObject(drawn.rgba, cameras, self._captions.get(object_name, ""), elevation_rad, more)


class RenderTo:
    """Renders objects into a directory: the `isolation.Work` of `im3d dataset render`.

    Calling it raises UserError if an object cannot be written.
    """

    def __init__(self, renderer: Renderer, out: Path):
        self._renderer, self._out = renderer, out

    def __call__(self, name: str) -> Failure | None:
        made = attempt(self._renderer.render, name)
        if isinstance(made, Failure):
            return made
        views.write_object(self._out / name, *made)
        return None


def find_meshes(
    directory: Path, suffixes: Sequence[str] = MESH_SUFFIXES
) -> tuple[dict[str, Path], Counter[str]]:
    """Name -> file of all meshes below a directory, sorted by path; and how many of each suffix are not read.

    suffixes: of the files that are meshes.

    Raises UserError if there are none, or if names collide: a name becomes the path of a directory.
    """
    files = _files_below(directory) if directory.is_dir() else []
    found = [path for path in files if path.suffix.lower() in suffixes]
    unread = Counter(
        suffix for path in files if (suffix := path.suffix.lower()) in NOT_READ and suffix not in suffixes
    )
    paths = {path.relative_to(directory).with_suffix("").as_posix(): path for path in found}
    if not paths:
        others = (
            f", only {in_unread_formats(unread)}; convert them to .glb" if unread else "; correct --meshes"
        )
        raise UserError(f"no meshes ({', '.join(suffixes)}) below {directory}{others}")
    if len(paths) < len(found):
        first = next(path for path in found if path not in paths.values())
        raise UserError(f"{directory} has meshes that differ only in their suffix, as {first}; rename them")
    for name in paths:
        if inside := [parent for parent in PurePosixPath(name).parents if str(parent) in paths]:
            raise UserError(f"{directory} has a mesh and a folder called {inside[0]}; rename one")
    return paths, unread


def in_unread_formats(unread: Counter[str]) -> str:
    """Such as "12 files in formats that are not read: .fbx 10, .max 2 (--renderer blender reads .fbx)"."""
    kinds = ", ".join(f"{suffix} {count}" for suffix, count in unread.most_common())
    readable = ", ".join(suffix for suffix, _ in unread.most_common() if suffix in BLENDER_SUFFIXES)
    hint = f" (--renderer blender reads {readable})" if readable else ""
    return f"{unread.total()} files in formats that are not read: {kinds}{hint}"


def _files_below(directory: Path) -> list[Path]:
    """All files at any depth, sorted, also in folders that are linked to; hidden ones are not meshes.

    Raises UserError if a folder cannot be read, since what is in it would be lost in silence.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}); correct its permissions")

    seen, found = set(), []
    for folder, folders, names in os.walk(directory, onerror=refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders) if name[0] != "." and name != "__MACOSX"]
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()  # a link that leads back
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found)


def is_begun(path: Path) -> bool:
    """Whether a directory of renders was begun by an earlier run, whose settings are in this file."""
    try:
        return {"size", "num_views", "elevation_deg", "seed"} <= set(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return False


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a directory of renders, or compares them with those that it was begun with.

    Raises UserError if they differ: all objects of a data set must be rendered alike.
    """
    if not path.exists():
        write_json(path, dict(settings))
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} cannot be read; remove it, or choose another --out") from None
    before.setdefault("renderer", MeshEngine.RAYS)  # there was no other one when it was begun
    for key, value in settings.items():
        if before.get(key) != value:
            begun = f"{path.parent} was begun with {key} {before.get(key)}, now it is {value}"
            raise UserError(f"{begun}; give the same, or another --out")
