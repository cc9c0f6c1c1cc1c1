"""The files that the commands which measure outputs have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from im3d_jax.evaluate import result_file
from im3d_jax.evaluate.result_file import NAME
from recon_torch import outputs
from recon_torch.files import replacing
from recon_torch.outputs import Kind


def write(
    out: Path,
    kind: Kind,
    found: Mapping[str, Any],
    table: str,
    pictures: Mapping[str, UInt8[np.ndarray, "H W 3"]] | None = None,
) -> None:
    """Puts results.json, table.md and pictures in place of those of an earlier run, results.json last.

    Args:
        out: open for this command, see `outputs.opened`.
        pictures: by their file names.
    """
    with outputs.owned(out) as staging:
        result_file.write(staging / NAME, found)
        with replacing(staging / "table.md") as temporary:
            temporary.write_text(table)
        if pictures:
            from recon_torch.views.images import write_image

            for name, picture in pictures.items():
                write_image(staging / name, picture)
        outputs.replace(staging, out, kind, NAME)
