"""Reads a mesh file of any format that is known."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from im3d_jax.data.meshes.gltf import read_gltf
from im3d_jax.data.meshes.obj import read_obj
from im3d_jax.data.meshes.parts import Mesh, Scene, assemble
from im3d_jax.data.meshes.ply import read_ply
from im3d_jax.data.meshes.stl import read_stl
from recon_torch.errors import UserError, choice, first_line
from recon_torch.text_files import BEGINNING_BYTES, check_not_stand_in

MAX_FILE_BYTES = 2**31

READERS: dict[str, Callable[[Path], Scene]] = {
    ".glb": read_gltf,
    ".gltf": read_gltf,
    ".obj": read_obj,
    ".ply": read_ply,
    ".stl": read_stl,
}
"""Suffix -> reader. A reader raises UserError, with "it" for the file, or whatever a broken file makes it."""

NOT_READ = frozenset(
    (
        ".fbx",
        ".usd",
        ".usda",
        ".usdc",
        ".usdz",
        ".blend",
        ".dae",
        ".3ds",
        ".max",
        ".ma",
        ".mb",
        ".c4d",
        ".abc",
    )
    + (
        ".x3d",
        ".wrl",
        ".off",
        ".3mf",
        ".step",
        ".stp",
        ".iges",
        ".igs",
        ".vrm",
        ".lwo",
        ".skp",
        ".zip",
        ".7z",
        ".rar",
    )
)
"""Suffixes of files that hold meshes, or may, and are not read."""


class UpAxis(StrEnum):
    """The axis of a file that points up.

    Y is that of glTF and of most .obj files: +Y is turned to +Z, and the front, +Z, to +X, where view 0 is.
    Z changes nothing.
    """

    Y = "y"
    Z = "z"


def load_mesh(path: str | Path, up: UpAxis | str = UpAxis.Y, in_ball: bool = True) -> Mesh:
    """Reads a .glb, .gltf, .obj, .ply or .stl with all its parts, and scales it into the ball of radius 0.5.

    Args:
        up: the axis of the file that points up.
        in_ball: whether it is moved and scaled. Otherwise it keeps the place and the size that the file has.

    Raises:
        UserError: the file is missing, broken, too large or no mesh, it has no triangles, it needs what is
            not read, or `up` is not a `UpAxis`.
    """
    path, up = Path(path), choice(UpAxis, up, f"the up axis of {path}")
    if not path.is_file():
        raise UserError(f"no mesh at {path}; check the path")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is in a format that is not read; give one of {', '.join(READERS)}")
    try:
        if not (size := path.stat().st_size):
            raise UserError("it is empty; copy it again")
        if size > MAX_FILE_BYTES:
            raise UserError(f"it has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        with path.open("rb") as file:
            check_not_stand_in("it", file.read(BEGINNING_BYTES))
        scene = READERS[path.suffix.lower()](path)
        return assemble(scene, "it", y_up=up == UpAxis.Y, in_ball=in_ball)
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); check its permissions") from error
    except MemoryError:
        raise  # which may be for want of memory elsewhere, so that the file is worth another attempt
    except Exception as error:  # a broken file may break its reader anywhere
        why = f"{type(error).__name__}: {first_line(error, 200)}"
        raise UserError(f"cannot read {path}, it is broken ({why}); export it again") from error
