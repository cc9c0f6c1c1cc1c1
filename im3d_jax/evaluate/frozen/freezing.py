"""Renders meshes from the cameras of a protocol, and freezes the views with a manifest.

An object is written as a whole, so that a command that was interrupted goes on where it was; the manifest is
written last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from im3d_jax.data import isolation, mesh_rendering
from im3d_jax.data.isolation import Failure, Outcome, attempt
from im3d_jax.data.meshes.parts import Mesh
from im3d_jax.data.meshes.reading import UpAxis, load_mesh
from im3d_jax.data.placement import file_digest
from im3d_jax.data.rendering import find_meshes
from im3d_jax.evaluate.frozen import INPUTS, MANIFEST, OBJECTS, manifest, protocols
from im3d_jax.evaluate.frozen.manifest import OBJECT, SURFACE, TrueObject
from im3d_jax.evaluate.frozen.protocols import Angles, Protocol
from recon_torch import outputs
from recon_torch.errors import UserError
from recon_torch.files import make_directory, replacing, write_json
from recon_torch.outputs import Kind
from recon_torch.text_files import is_utf8, read_json
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import write_views
from recon_torch.views.images import write_image

TRUTH = Kind(
    "evaluate truth",
    (r"truth\.json", rf"{OBJECTS}/[^.].*/", rf"{INPUTS}/[^.].*\.png"),
    grows=True,
)
"""What is written. Nothing of it that is there is written anew."""

GAZEBO = "/meshes/model"
"""How paths end in models for Gazebo, such as the Google Scanned Objects: NAME/meshes/model.obj."""

SUPERSAMPLING = 3


class How(NamedTuple):
    """What the views depend on beside the meshes. elevation_deg: see `protocols.angles`."""

    protocol: Protocol
    size_px: int
    elevation_deg: float | None
    seed: int
    up: UpAxis

    def said(self) -> dict[str, Any]:
        """As the manifest has it, with what renders."""
        renderer = {
            "name": "rays",
            "supersampling": SUPERSAMPLING,
            "code_sha256": file_digest(Path(mesh_rendering.__file__)),
            **{package: version(package) for package in ("embreex", "numpy")},
        }
        lens = {"fov_deg": protocols.FOV_DEG, "radius": protocols.RADIUS}
        return {**self._asdict(), "num_views": protocols.VIEWS[self.protocol], **lens, "renderer": renderer}


def objects_below(directory: Path) -> dict[str, Path]:
    """Name -> file of the meshes below a directory: their paths, with "__" for "/".

    Models for Gazebo have the names of their folders.

    Raises UserError as `find_meshes` does, and if two would have one name.
    """
    named: dict[str, Path] = {}
    for path_name, path in find_meshes(directory)[0].items():
        name = path_name.removesuffix(GAZEBO).replace("/", "__")
        if not is_utf8(name):
            raise UserError(f"{path} has a name that is not UTF-8; rename the file")
        if name in named:
            raise UserError(f"{path} and {named[name]} would both be called {name}; rename one")
        named[name] = path
    return named


class Freeze:
    """Renders objects into a directory, each by its name: the `isolation.Work` of `im3d evaluate truth`."""

    def __init__(
        self, meshes: Mapping[str, Path], root: Path, captions: Mapping[str, str], how: How, out: Path
    ):
        self._meshes, self._root, self._captions, self._how, self._out = meshes, root, captions, how, out

    def __call__(self, name: str) -> Failure | None:
        made = attempt(self._render, name)
        if isinstance(made, Failure):
            return made
        self._write(name, *made)
        return None

    def _render(self, name: str) -> tuple[Mesh, Angles, Cameras, Float[np.ndarray, "K H W 4"]]:
        how = self._how
        angles = protocols.angles(how.protocol, name, how.seed, how.elevation_deg)
        cameras = orbit(
            elevation_rad=np.deg2rad(angles.elevations_deg),
            size=how.size_px,
            radius=protocols.RADIUS,
            fov_deg=protocols.FOV_DEG,
            azimuths_rad=np.deg2rad(angles.azimuths_deg),
        )
        mesh = load_mesh(self._meshes[name], how.up)
        rgba, _ = mesh_rendering.render(mesh, cameras, SUPERSAMPLING)
        if not (rgba[..., 3] >= 0.5).any((1, 2)).all():
            raise UserError(f"{self._meshes[name]} is not seen in every view: it is too thin or see-through")
        return mesh, angles, cameras, rgba

    def _write(
        self, name: str, mesh: Mesh, angles: Angles, cameras: Cameras, rgba: Float[np.ndarray, "K H W 4"]
    ) -> None:
        folder, picture = self._out / OBJECTS / name, self._out / INPUTS / f"{name}.png"
        write_image(picture, rgba[angles.given])
        make_directory(folder.parent)
        with outputs.owned(folder.parent) as staging:
            whole = staging / name
            write_views(whole, cameras, rgba, "images")
            write_triangles(whole / SURFACE, mesh.corners)
            inside = manifest.digests(staging, [path for path in whole.rglob("*") if path.is_file()])
            files = {f"{OBJECTS}/{path}": sha256 for path, sha256 in inside.items()}
            item = self._described(name, mesh, angles, files | manifest.digests(self._out, [picture]))
            write_json(whole / OBJECT, {"settings": self._how.said(), "object": asdict(item)})
            try:
                os.replace(whole, folder)
            except OSError as error:
                raise UserError(f"cannot write {folder} ({error.strerror}); choose another place") from error

    def _described(self, name: str, mesh: Mesh, angles: Angles, files: dict[str, str]) -> TrueObject:
        path = self._meshes[name]
        return TrueObject(
            name,
            self._captions.get(path.relative_to(self._root).with_suffix("").as_posix(), ""),
            path.relative_to(self._root).as_posix(),
            file_digest(path),
            angles.azimuths_deg.tolist(),
            angles.elevations_deg.tolist(),
            angles.given,
            files,
            list(mesh.left_out),
        )


def write_triangles(path: Path, corners: Float[np.ndarray, "F 3 3"]) -> None:
    """Writes triangles as a binary .ply, which tools for meshes read. No vertices are shared."""
    faces = np.empty(len(corners), [("count", "u1"), ("indices", "<i4", 3)])
    faces["count"], faces["indices"] = 3, np.arange(3 * len(corners)).reshape(-1, 3)
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {3 * len(corners)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"element face {len(corners)}", "property list uchar int vertex_indices", "end_header", ""]
    content = "\n".join(header).encode() + corners.astype("<f4").tobytes() + faces.tobytes()
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def refuse_frozen(out: Path) -> None:
    """Raises UserError if a directory has a manifest: what is frozen is never changed."""
    if (out / MANIFEST).exists():
        raise UserError(f"{out} holds a truth already, which is frozen; choose another --out")


def is_begun(out: Path) -> bool:
    """Whether an earlier run has rendered objects into a directory, so that their files are ours."""
    return any((out / OBJECTS).glob(f"*/{OBJECT}")) if (out / OBJECTS).is_dir() else False


def kept(out: Path, names: Iterable[str], how: How) -> dict[str, TrueObject]:
    """The objects that an earlier, interrupted run has left.

    Raises UserError if they were rendered in another way, or were changed since.
    """
    found = {}
    for name in names:
        path = out / OBJECTS / name / OBJECT
        if path.is_file():
            found[name] = _read_kept(path, out, how)
    return found


def _read_kept(path: Path, out: Path, how: How) -> TrueObject:
    content = read_json(path)
    before = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(before, dict):
        raise UserError(f"{path} is broken; remove the directory of the object")
    said = how.said()
    if differing := [key for key in said if before.get(key) != said[key]]:
        key = differing[0]
        raise UserError(
            f"{out} was begun with {key} {before.get(key)}, now it is {said[key]}; choose another --out"
        )
    item = manifest.parse(content.get("object"), path)
    manifest.check(out, item.files)
    return item


def freeze(
    meshes: Mapping[str, Path],
    root: Path,
    captions: Mapping[str, str],
    how: How,
    out: Path,
    jobs: int,
    show: Callable[[Iterator[Outcome], int], Iterator[Outcome]] = lambda outcomes, _: outcomes,
) -> tuple[list[TrueObject], dict[str, str]]:
    """Renders meshes into a directory and writes its manifest; what an earlier run has left is kept.

    Args:
        meshes: name -> file, below `root`.
        captions: by the paths of the meshes below `root` without their suffix.
        jobs: processes; 0 renders in this one.
        show: passes on the outcomes as they come, and shows the progress. It is told their number.

    Returns the objects, and the meshes that could not be rendered and why.

    Raises UserError if none could be, or as `kept` does.
    """
    before = kept(out, meshes, how)
    missing = [name for name in meshes if name not in before]
    outcomes = isolation.run_all(Freeze, (meshes, root, captions, how, out), missing, jobs=jobs)
    failed = {}
    for name, failure in show(outcomes, len(missing)):
        if failure:
            failed[name] = failure.message
    made = kept(out, meshes, how)
    if not made:
        name, why = next(iter(failed.items()))
        raise UserError(f"none of {len(failed)} meshes could be rendered; {name}: {why}")
    manifest.write(out, how.said(), list(made.values()), failed)
    return list(made.values()), failed
