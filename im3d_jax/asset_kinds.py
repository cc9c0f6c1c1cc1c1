"""Which files are an asset's. Importing this needs neither JAX nor torch."""

from recon_torch.outputs import Kind
from recon_torch.settings import EXPORTED, MESH_PATHS

ASSET = Kind(
    "generate",
    (
        r"asset\.(ply|safetensors|" + EXPORTED + ")",
        r"asset\.html",
        *MESH_PATHS,
        r"turntable\.(mp4|gif)",
        r"views\.png",
        r"transforms\.json",
        r"images/\d{3,}\.png",
        r"views_\d+/transforms\.json",
        r"views_\d+/images/\d{3,}\.png",
        r"report\.json",
    ),
)
"""The files of an asset. Whatever else lies in its directory belongs to somebody else."""

PICTURE = Kind(ASSET.command, (r"input\.png",))
"""What a text-to-image pipeline has drawn for an asset, which stays when the asset is made again."""
