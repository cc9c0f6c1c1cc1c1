"""Views of meshes by Blender, with the cameras and the sizes of the ray caster of `mesh_rendering`.

Materials are Blender's: metal, roughness, normal maps and glass are shown. The default light is white, half
of it from everywhere and half from a sun where the ray caster's light stands, with shadows and reflected
light. Light is added in linear colours, which are then clipped and turned to sRGB: Blender calls this
"Standard". A surface that glows or is unlit therefore has the sRGB colour that its file says.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from im3d_jax.data.augmentation import Variant
from im3d_jax.data.blender import SUFFIXES, Look, importing, process, scene
from im3d_jax.data.meshes.colors import srgb_from_linear
from im3d_jax.data.meshes.reading import UpAxis
from im3d_jax.data.rendering import Drawn
from recon_torch import locks
from recon_torch.errors import UserError
from recon_torch.views.cameras import Cameras

ENVIRONMENTS = {".hdr": b"#?", ".exr": b"\x76\x2f\x31\x01"}
"""Suffix of a panorama -> the bytes that it begins with."""


class Blender:
    """Draws meshes with Blender: a `MeshDrawer`. It may be sent to other processes.

    Raises UserError if Blender's module is not installed, or if the environment is no .hdr or .exr file.
    """

    suffixes = SUFFIXES

    def __init__(self, look: Look):
        process.check_installed()
        if look.environment is not None:
            check_environment(look.environment)
        self._look = look

    def __call__(self, path: Path, up: UpAxis, cameras: Cameras, variant: Variant | None) -> Drawn:
        """Draws the mesh of a file. Raises UserError if it cannot be read."""
        process.start()
        with process.quiet() as log:
            bpy = process.empty()
            imported = importing.read(bpy, path, up, log)
            try:
                fitted = scene.fit(scene.points_of(imported.placed), variant)
            except UserError as error:
                raise UserError(f"cannot render {path}: {error}") from error
            scene.place(bpy, imported.placed, fitted)
            scene.light(bpy, self._look.environment, variant)
            try:
                pixels = _take_all(bpy, self._look, cameras)
            except RuntimeError as error:
                why = process.last_line(log)
                raise UserError(f"Blender cannot render {path} ({why}); see docs/data.md") from error
        return Drawn(
            to_straight_srgb(pixels), imported.left_out, {"renderer": f"blender {bpy.app.version_string}"}
        )


def _take_all(bpy: object, look: Look, cameras: Cameras) -> Float[np.ndarray, "K H W 4"]:
    camera = scene.prepare(bpy, look, cameras)
    with tempfile.TemporaryDirectory(dir=locks.process_directory()) as folder:
        return np.stack([scene.take(bpy, camera, w2c, Path(folder, "view.exr")) for w2c in cameras.w2c])


def to_straight_srgb(pixels: Float[np.ndarray, "*N 4"]) -> Float[np.ndarray, "*N 4"]:
    """sRGB colours that are not multiplied by alpha, of linear ones that are. Black where alpha is 0."""
    alpha = np.clip(pixels[..., 3:], 0.0, 1.0)
    colors = np.where(alpha > 0, np.nan_to_num(pixels[..., :3]) / np.maximum(alpha, 1e-6), 0.0)
    return np.concatenate([srgb_from_linear(colors), alpha], -1).astype(np.float32)


def check_environment(path: Path) -> None:
    """Raises UserError unless a file begins as an .hdr or .exr picture does."""
    start = ENVIRONMENTS.get(path.suffix.lower())
    if start is None:
        raise UserError(f"--environment {path} must be an .hdr or .exr file")
    try:
        with path.open("rb") as file:
            found = file.read(len(start))
    except OSError as error:
        raise UserError(f"--environment {path} cannot be read ({error.strerror}); correct the path") from None
    if found != start:
        raise UserError(f"--environment {path} is no {path.suffix.lower()} picture; choose another one")
