"""The parameters of the asset (Sec. 3.3) and their file form, the .ply of 3DGS (Kerbl et al. 2023).

Colour does not depend on the view (spherical harmonics of degree 0), as the paper's short fits need no more.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recon_torch.errors import UserError
from recon_torch.export import replacing

SH_C0 = 0.5 / math.sqrt(math.pi)  # the constant spherical harmonic
INITIAL_OPACITY = 0.1

PLY_NAMES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)
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
MOST_POINTS = 4096  # for one Gaussian in `opacity_grid`
MAX_PLY_HEADER_BYTES = 65536


class Gaussians(NamedTuple):
    """N Gaussians as they are optimised: unconstrained numbers. The properties are what is rendered."""

    means: Float[Tensor, "N 3"]
    quats: Float[Tensor, "N 4"]  # wxyz, not normalised
    log_scales: Float[Tensor, "N 3"]
    opacity_logits: Float[Tensor, " N"]
    sh0: Float[Tensor, "N 3"]

    @property
    def scales(self) -> Float[Tensor, "N 3"]:
        """Standard deviations along the axes, in world units."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> Float[Tensor, " N"]:
        """In (0, 1)."""
        return self.opacity_logits.sigmoid()

    @property
    def colors(self) -> Float[Tensor, "N 3"]:
        """RGB, at least 0; not bounded above, as in 3DGS."""
        return (0.5 + SH_C0 * self.sh0).clamp_min(0)


def init_ball(
    num: int,
    radius: float = 0.5,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Gaussians:
    """Grey Gaussians spread evenly over a ball around the origin (Sec. A.1: 5000 points at the centre).

    Each is a sphere with a standard deviation of half the mean distance between neighbours. The random
    numbers are drawn on the CPU, so a seed gives the same start on every device.
    """
    direction = torch.randn(num, 3, generator=generator)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    distance = radius * torch.rand(num, 1, generator=generator) ** (1 / 3)
    spacing = radius * (4 / 3 * math.pi / num) ** (1 / 3)
    gaussians = Gaussians(
        means=direction * distance,
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(num, 1),
        log_scales=torch.full((num, 3), math.log(0.5 * spacing)),
        opacity_logits=torch.full((num,), math.log(INITIAL_OPACITY / (1 - INITIAL_OPACITY))),
        sh0=torch.zeros(num, 3),
    )
    return Gaussians(*(tensor.to(device) for tensor in gaussians))


def opacity_grid(gaussians: Gaussians, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
    """About how much light, in [0, 1], a ray loses in each cell of a cube around the origin (x, y, z).

    Each Gaussian strews its opacity times its mean shadow over as many points, drawn from itself, as its
    shadow has cells. What lies outside of the cube counts for the nearest cell of its surface.
    """
    cell = 2 * half_width / num_cells
    x, y, z = gaussians.scales.unbind(-1)
    shadows = 2 * math.pi / 3 * (x * y + y * z + z * x) / cell**2
    counts = shadows.ceil().clamp(1, MOST_POINTS).long()
    index = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    draws = (
        torch.randn(len(index), 3, generator=torch.Generator().manual_seed(0)).to(x) * gaussians.scales[index]
    )
    axis = F.normalize(gaussians.quats, dim=-1)[index]
    real, imaginary = axis[:, :1], axis[:, 1:]
    turned = torch.linalg.cross(imaginary, draws)
    points = gaussians.means[index] + draws + 2 * (real * turned + torch.linalg.cross(imaginary, turned))
    cells = ((points + half_width) / cell).long().clamp(0, num_cells - 1)
    flat = (cells * cells.new_tensor([num_cells**2, num_cells, 1])).sum(-1)
    grid = torch.zeros(num_cells**3, device=x.device)
    grid.index_add_(0, flat, (gaussians.opacities * shadows / counts)[index])
    return grid.clamp_max(1).view(num_cells, num_cells, num_cells)


def save_ply(gaussians: Gaussians, path: str | os.PathLike) -> None:
    """Writes the layout that 3DGS viewers read: log scales, opacity logits, wxyz, normals all zero."""
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
    """Reads a 3DGS .ply (binary, little endian). Spherical harmonics above degree 0 are left out.

    Raises:
        UserError: the file is missing or cut short, is not a .ply of Gaussians, or holds NaN or infinity.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(MAX_PLY_HEADER_BYTES)
            num, row_type, header_bytes = _parse_header(path, head)
            available = path.stat().st_size - header_bytes
            needed = num * row_type.itemsize
            if needed > available:  # checked before anything of that size is allocated
                raise UserError(
                    f"{path} is cut short: {num} Gaussians are {needed} bytes, it has {available}"
                )
            file.seek(header_bytes)
            rows = np.frombuffer(file.read(needed), row_type)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def columns(*names: str) -> Tensor:
        with np.errstate(over="ignore"):  # doubles beyond float32 become infinite, and are refused as such
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
    """The number of vertices, the type of one row, and where the rows start."""
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
