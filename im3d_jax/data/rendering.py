"""What `im3d dataset render` renders: procedural objects, or the meshes below a directory (Sec. 3.1).

Both are a `Renderer`. Every object is seen from the same number of evenly spaced azimuths at one elevation,
which is drawn for each object by its number or its name, so that it depends on no other object.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from im3d_jax.data import RenderedObject, Renderer, augmentation, mesh_rendering, objects, procedural, views
from im3d_jax.data.isolation import Failure, attempt
from im3d_jax.data.meshes.parts import Mesh
from im3d_jax.data.meshes.reading import NOT_READ, READERS, UpAxis, load_mesh
from im3d_jax.data.objects import Split
from im3d_jax.data.placement import object_of
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.views.cameras import orbit
from recon_torch.views.images import straight

MESH_SUFFIXES = tuple(READERS)


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


class MeshRenderer:
    """Renders the meshes below a directory, each named by its path without the suffix.

    Args:
        directory: holds .glb, .gltf, .obj, .ply and .stl files, at any depth.
        captions: by name. A mesh that has none gets the caption "".
        up: the axis of the files that points up.
        num_variants: of each mesh, which are rendered beside it as NAME~1, NAME~2, ...; see `augmentation`.

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
    ):
        self._paths, self.unread = find_meshes(directory)
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
        if name not in self._paths:
            return self._render_variant(name)
        mesh = load_mesh(self._paths[name], self._up)
        return self._render(mesh, name, name)

    def _render_variant(self, name: str) -> RenderedObject:
        """Renders NAME~1 of NAME, whose colours are exchanged if its caption's can be."""
        object_name, variant = object_of(name), augmentation.draw(self._turntable.seed, name)
        mesh = load_mesh(self._paths[object_name], self._up)
        corners, normals = augmentation.reshape(mesh.corners, mesh.normals, variant)
        made = self._render(mesh._replace(corners=corners, normals=normals), name, object_name)
        caption = augmentation.exchange_words(made.caption, made.rgba, variant.channels)
        if caption is None:
            variant, caption = variant._replace(channels=augmentation.CHANNELS[0]), made.caption
        told = {"of": object_name, "caption_of_object": made.caption, **variant.said()}
        rgba = augmentation.exchange(made.rgba, variant.channels)
        return made._replace(rgba=rgba, caption=caption, more={**made.more, "augmentation": told})

    def _render(self, mesh: Mesh, name: str, object_name: str) -> RenderedObject:
        """Renders a mesh that was read from the file of `object_name`, as the object `name`."""
        path = self._paths[object_name]
        elevation_rad = self._turntable.elevation_rad(zlib.crc32(name.encode()))
        cameras = orbit(self._turntable.num_views, elevation_rad, self._turntable.size)
        rgba, _ = mesh_rendering.render(mesh, cameras)
        if not rgba[..., 3].any():
            raise UserError(f"{path} is seen in no view: it is cut out, see-through or too thin")
        more: dict[str, Any] = {"mesh_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if mesh.left_out:
            more["left_out"] = list(mesh.left_out)
        return RenderedObject(rgba, cameras, self._captions.get(object_name, ""), elevation_rad, more)


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


def find_meshes(directory: Path) -> tuple[dict[str, Path], Counter[str]]:
    """Name -> file of all meshes below a directory, sorted by path; and how many of each suffix are not read.

    Raises UserError if there are none, or if names collide: a name becomes the path of a directory.
    """
    files = _files_below(directory) if directory.is_dir() else []
    found = [path for path in files if path.suffix.lower() in MESH_SUFFIXES]
    unread = Counter(path.suffix.lower() for path in files if path.suffix.lower() in NOT_READ)
    paths = {path.relative_to(directory).with_suffix("").as_posix(): path for path in found}
    if not paths:
        others = (
            f", only {in_unread_formats(unread)}; convert them to .glb" if unread else "; correct --meshes"
        )
        raise UserError(f"no meshes ({', '.join(MESH_SUFFIXES)}) below {directory}{others}")
    if len(paths) < len(found):
        first = next(path for path in found if path not in paths.values())
        raise UserError(f"{directory} has meshes that differ only in their suffix, as {first}; rename them")
    for name in paths:
        if inside := [parent for parent in PurePosixPath(name).parents if str(parent) in paths]:
            raise UserError(f"{directory} has a mesh and a folder called {inside[0]}; rename one")
    return paths, unread


def in_unread_formats(unread: Counter[str]) -> str:
    """Such as "12 files in formats that are not read: .fbx 10, .blend 2"."""
    kinds = ", ".join(f"{suffix} {count}" for suffix, count in unread.most_common())
    return f"{unread.total()} files in formats that are not read: {kinds}"


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
    for key, value in settings.items():
        if before.get(key) != value:
            begun = f"{path.parent} was begun with {key} {before.get(key)}, now it is {value}"
            raise UserError(f"{begun}; give the same, or another --out")
