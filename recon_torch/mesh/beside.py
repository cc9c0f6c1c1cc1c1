"""The mesh of an asset that a command has just made, among its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recon_torch.errors import UserError
from recon_torch.mesh import assets, making
from recon_torch.settings import MeshSettings
from recon_torch.views.directory import Views


def write_beside(directory: Path, settings: MeshSettings, views: Views | None) -> dict[str, Any]:
    """Makes the mesh of the asset whose files a directory has, report.json among them, and writes it there.

    An asset of which no mesh can be made is still an asset: its report then says why.

    views: that the texture is made from, in the world of the files.

    Returns:
        What report.json says of the mesh: what mesh.json says, or an "error".
    """
    try:
        return making.make(assets.read(directory, views).given, settings, directory)
    except UserError as error:
        return {"error": str(error)}
