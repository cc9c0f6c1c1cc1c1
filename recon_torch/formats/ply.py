"""The .ply of 3D Gaussian splatting (Kerbl et al. 2023), written for its viewers and read from its trainers.

A row has the mean, a normal that is all zero, the constant spherical harmonic of the colour, the logit of the
opacity, the logarithms of the scales, and a quaternion wxyz.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.raster.gaussians import Gaussians

PLY_NAMES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)
# numpy's types by the names of the .ply format, which has two for each.
PLY_TYPES = {
    **dict.fromkeys(("float", "float32"), "<f4"),
    **dict.fromkeys(("double", "float64"), "<f8"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("ushort", "uint16"), "<u2"),
    **dict.fromkeys(("short", "int16"), "<i2"),
    **dict.fromkeys(("uint", "uint32"), "<u4"),
    **dict.fromkeys(("int", "int32"), "<i4"),
}
MAX_PLY_HEADER_BYTES = 65536


def save_ply(gaussians: Gaussians, path: str | os.PathLike) -> None:
    """Writes Gaussians in float32, with quaternions of length 1."""
    arrays = [tensor.detach().cpu().float().numpy() for tensor in gaussians]
    means, quats, log_scales, opacity_logits, sh0 = arrays
    quats = quats / np.linalg.norm(quats, axis=-1, keepdims=True)
    rows = np.concatenate(
        [means, np.zeros_like(means), sh0, opacity_logits[:, None], log_scales, quats], axis=1, dtype="<f4"
    )
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    header += [f"property float {name}" for name in PLY_NAMES] + ["end_header\n"]
    with replacing(path) as temporary:
        temporary.write_bytes("\n".join(header).encode("ascii") + rows.tobytes())


def load_ply(path: str | os.PathLike) -> Gaussians:
    """Reads the .ply of a 3DGS trainer, binary and little endian, without its harmonics above degree 0.

    Raises:
        UserError: the file is missing or cut short, is not a .ply of Gaussians, or has values that are not
            finite.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(MAX_PLY_HEADER_BYTES)
            num, row_type, header_bytes = _parse_header(path, head)
            available = path.stat().st_size - header_bytes
            needed = num * row_type.itemsize
            if needed > available:  # checked before memory of that size is allocated
                raise UserError(
                    f"{path} is cut short: {num} Gaussians are {needed} bytes, it has {available}"
                )
            file.seek(header_bytes)
            rows = np.frombuffer(file.read(needed), row_type)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def columns(*names: str) -> Tensor:
        with np.errstate(over="ignore"):  # doubles beyond float32 become infinite, which is refused below
            values = np.stack([rows[name].astype(np.float32) for name in names], -1)
        if not np.isfinite(values).all():
            raise UserError(f"{path}: {names[0]} has values that are not finite")
        return torch.from_numpy(values)

    return Gaussians(
        means=columns("x", "y", "z"),
        quats=columns("rot_0", "rot_1", "rot_2", "rot_3"),
        log_scales=columns("scale_0", "scale_1", "scale_2"),
        opacity_logits=columns("opacity")[:, 0],
        sh0=columns("f_dc_0", "f_dc_1", "f_dc_2"),
    )


def _parse_header(path: Path, head: bytes) -> tuple[int, np.dtype, int]:
    """The number of vertices, the type of a row, and the number of bytes before the first row."""
    text, end, _ = head.partition(b"end_header\n")
    lines = [line.split() for line in text.decode("ascii", "replace").splitlines()]
    if not end or not lines or lines[0] != ["ply"]:
        raise UserError(f"{path} is not a .ply file")
    if ["format", "binary_little_endian", "1.0"] not in lines:
        raise UserError(f"{path} is a .ply of another format; only binary_little_endian is read")
    elements = [line for line in lines if line[:1] == ["element"]]
    first = elements[0] if elements else []
    if first[1:2] != ["vertex"] or len(first) != 3 or not first[2].isdecimal():
        raise UserError(f"{path}: the first element of the .ply must be the vertices")
    following = lines[lines.index(first) + 1 :]
    if len(elements) > 1:
        following = following[: following.index(elements[1])]
    fields = {}
    for line in following:
        if line[:1] == ["property"]:
            if len(line) != 3 or line[1] not in PLY_TYPES or line[2] in fields:
                raise UserError(f"{path}: unusable .ply property: {' '.join(line)[:80]}")
            fields[line[2]] = PLY_TYPES[line[1]]
    missing = [name for name in PLY_NAMES if name not in fields and name not in ("nx", "ny", "nz")]
    if missing:
        raise UserError(f"{path} is not a .ply of Gaussians: it lacks {', '.join(missing)}")
    return int(first[2]), np.dtype(list(fields.items())), len(text) + len(end)
