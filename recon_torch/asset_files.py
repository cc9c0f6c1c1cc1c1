"""Where the Gaussians of an asset are: in a file that a user names, or in the directory of an asset."""

from __future__ import annotations

from pathlib import Path

from recon_torch.errors import UserError

ASSET, RADIANCE_FIELD, REPORT = "asset.ply", "asset.safetensors", "report.json"
MESH_REPORT = "mesh.json"  # beside a mesh, which may stand in the Gaussians' place


def gaussians_of(asset: Path) -> Path:
    """The file of Gaussians that a user names by itself, or by its directory.

    A file is given back as it is, there or not: who reads it says what is wrong with it.

    Raises UserError for a directory that has none.
    """
    if not asset.is_dir():
        return asset
    if (asset / ASSET).is_file():
        return asset / ASSET
    if (asset / RADIANCE_FIELD).is_file():
        raise UserError(f"{asset} has a radiance field ({RADIANCE_FIELD}), and this is made of Gaussians")
    if (asset / MESH_REPORT).is_file():
        raise UserError(f"{asset} has a mesh ({MESH_REPORT}), and this is made of Gaussians")
    raise UserError(f"{asset} has no {ASSET}; give the directory of an asset, or a file of Gaussians")
