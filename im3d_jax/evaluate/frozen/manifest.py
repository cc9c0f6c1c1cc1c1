"""The manifest of frozen views: what there is, how it was made, and the SHA-256 of every file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from jaxtyping import Float

from im3d_jax.data.meshes.reading import UpAxis, load_mesh
from im3d_jax.data.placement import file_digest
from im3d_jax.evaluate.frozen import INPUTS, MANIFEST, OBJECTS
from im3d_jax.evaluate.scores import Pictures
from recon_torch.errors import UserError, quoted
from recon_torch.files import write_json
from recon_torch.text_files import read_json
from recon_torch.views.cameras import Cameras
from recon_torch.views.images import read_image
from recon_torch.views.transforms import TRANSFORMS, read_transforms

FORMAT = 1
OBJECT = "object.json"
SURFACE = "surface.ply"
NUM_NAMED = 5


@dataclass(frozen=True)
class TrueObject:
    """A mesh and its true views.

    Attributes:
        name: of its directory, and of the outputs of methods that are compared with it.
        caption: what text-to-3D methods are given; may be "".
        source: path of the mesh below the directory of meshes.
        source_sha256: of that file.
        azimuths_deg, elevations_deg: of the K views.
        given: the view that methods are given as their picture.
        files: path below the directory of the truth -> SHA-256.
        left_out: what the mesh asks for and the views do not show.
    """

    name: str
    caption: str
    source: str
    source_sha256: str
    azimuths_deg: list[float]
    elevations_deg: list[float]
    given: int
    files: dict[str, str]
    left_out: list[str]


@dataclass(frozen=True)
class Frozen:
    """The frozen truth in a directory.

    Attributes:
        settings: the protocol, the size of the views, the renderer and what else they depend on.
        objects: sorted by name.
        failed: the meshes that could not be rendered, and why.
    """

    directory: Path
    settings: dict[str, Any]
    objects: list[TrueObject]
    failed: dict[str, str]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the manifest, which stands for all files: results with the same one compare."""
        return file_digest(self.directory / MANIFEST)

    def folder(self, item: TrueObject) -> Path:
        return self.directory / OBJECTS / item.name

    def cameras(self, item: TrueObject) -> Cameras:
        return read_transforms(self.folder(item) / TRANSFORMS)[0]

    def pictures(self, item: TrueObject) -> Pictures:
        """The true views over white, and their alpha."""
        _, names = read_transforms(self.folder(item) / TRANSFORMS)
        rgba = np.stack([read_image(self.folder(item) / name) for name in names])
        alpha = rgba[..., 3:]
        return rgba[..., :3] * alpha + 1 - alpha, alpha

    def surface(self, item: TrueObject) -> Float[np.ndarray, "F 3 3"]:
        """The triangles of the mesh, in our world: in the ball of radius 0.5, with +Z up."""
        return load_mesh(self.folder(item) / SURFACE, UpAxis.Z, in_ball=False).corners


def digests(directory: Path, paths: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of files by their paths below a directory."""
    return {path.relative_to(directory).as_posix(): file_digest(path) for path in sorted(paths)}


def write(
    directory: Path, settings: Mapping[str, Any], objects: Sequence[TrueObject], failed: Mapping[str, str]
) -> None:
    """Writes the manifest, which makes the views in a directory the truth."""
    content = {
        "format": FORMAT,
        "settings": dict(settings),
        "objects": [asdict(item) for item in sorted(objects, key=lambda item: item.name)],
        "failed": dict(sorted(failed.items())),
    }
    write_json(directory / MANIFEST, content)


def read(directory: Path) -> Frozen:
    """Reads a manifest and compares every file with it.

    Raises UserError if there is none, it is broken or of another format, or files are missing or changed.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory} has no {MANIFEST}; give a directory that `im3d evaluate truth` made")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no manifest of format {FORMAT}; make it with `im3d evaluate truth`")
    settings, failed, entries = (content.get(key) for key in ("settings", "failed", "objects"))
    if not isinstance(settings, dict) or not isinstance(failed, dict) or not isinstance(entries, list):
        raise UserError(f"{path} lacks settings, objects or failed; copy it again")
    if not entries:
        raise UserError(f"{path} has no objects; make it anew with `im3d evaluate truth`")
    frozen = Frozen(directory, settings, [parse(entry, path) for entry in entries], failed)
    check(frozen.directory, {name: sha for item in frozen.objects for name, sha in item.files.items()})
    return frozen


def parse(entry: Any, path: Path) -> TrueObject:
    """An object of a manifest. Raises UserError, which names the file, for any other JSON."""
    hints = {key: getattr(hint, "__origin__", hint) for key, hint in get_type_hints(TrueObject).items()}
    if not isinstance(entry, dict) or set(entry) != set(hints):
        raise UserError(f"{path} has an object of another form, {quoted(entry, 60)}; copy it again")
    wrong = [key for key, kind in hints.items() if type(entry[key]) is not kind]
    if wrong or not _is_inside(entry["name"], entry["files"]):
        at = f"{entry['name']!r}: {wrong[0] if wrong else 'files'}"
        raise UserError(f"{path} is broken at {at}; copy it again")
    return TrueObject(**entry)


def _is_inside(name: str, files: dict) -> bool:
    """Whether the files of an object are where the truth has them."""
    folder, picture = f"{OBJECTS}/{name}/", f"{INPUTS}/{name}.png"
    inside = all(isinstance(each, str) and (each == picture or each.startswith(folder)) for each in files)
    return (
        inside and "/" not in name and name not in ("", ".", "..") and ".." not in "/".join(files).split("/")
    )


def check(directory: Path, files: Mapping[str, str]) -> None:
    """Raises UserError, which names files, if some are missing or are not what they were."""
    wrong = []
    for name, sha256 in files.items():
        path = directory / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif file_digest(path) != sha256:
            wrong.append(f"{name} was changed")
    if wrong:
        more = f" and {len(wrong) - NUM_NAMED} more" if len(wrong) > NUM_NAMED else ""
        said = ", ".join(wrong[:NUM_NAMED]) + more
        raise UserError(f"{directory} is not what was frozen: {said}; copy it again, or freeze another")
