"""The .ply of 3D Gaussian splatting (Kerbl et al. 2023), written for its viewers and read from its trainers.

A row has the mean, a normal that is all zero, the constant spherical harmonic of the colour, the logit of the
opacity, the logarithms of the scales, and a quaternion wxyz. A file of ours is upright in viewers, and the
comment "im3d axes -y -z x" in its header says how it was turned (`views.axes`). A file without such a comment
has the axes of its cameras.

Other tools write values that only stand for something: an opacity of 1 has the logit +inf, one of 0 has -inf,
and a scale of 0 has the logarithm -inf. The first is taken as opaque. Gaussians that cannot be drawn are left
out and counted.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32

from recon_torch.errors import UserError, quoted
from recon_torch.files import replacing
from recon_torch.formats import kinds
from recon_torch.raster.gaussians import Gaussians, turned
from recon_torch.text_files import check_not_stand_in
from recon_torch.views import axes
from recon_torch.views.axes import Axes

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
COUNT = re.compile(r"[0-9]{1,18}")  # Python refuses to read numbers of thousands of digits
OURS = ["comment", "im3d"]  # how the lines begin that our files have in their headers
HARMONIC = re.compile(r"f_rest_\d+")
OPAQUE_LOGIT = 20.0  # whose sigmoid is 1 in float32
LARGEST_LOG_SCALE = 40.0  # squares of scales below exp(40) are finite in float32, with room for a camera
QUATERNION_LENGTHS = 1e-15, 1e15  # whose squares are neither 0 nor infinite in float32


class Loaded(NamedTuple):
    """What a file holds.

    Attributes:
        gaussians: those that can be drawn, with finite values; at least one. In the world of their cameras.
        notes: what was left out of the file, and how much of it.
        upright: the axes of a file of this world that stands in viewers; None where nothing says what is up.
    """

    gaussians: Gaussians
    notes: list[str]
    upright: Axes | None = None


class _Header(NamedTuple):
    """The number of vertices, the type of a row, the bytes before the first row, and what is not read.

    has_more: whether other elements follow the vertices.
    axes: that the file states.
    """

    num: int
    row_type: np.dtype
    num_bytes: int
    notes: list[str]
    has_more: bool
    axes: Axes | None


def save_ply(gaussians: Gaussians, path: str | os.PathLike, file_axes: Axes = axes.UPRIGHT) -> None:
    """Writes Gaussians in float32, with quaternions of length 1.

    file_axes: of the file, by the axes of the world that the Gaussians are in.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(ply_bytes(gaussians, file_axes))


def ply_bytes(gaussians: Gaussians, file_axes: Axes = axes.UPRIGHT) -> bytes:
    """The content of the file that `save_ply` writes."""
    arrays = [tensor.detach().cpu().float().numpy() for tensor in turned(gaussians, axes.matrix(file_axes))]
    means, quats, log_scales, opacity_logits, sh0 = arrays
    quats = quats / np.linalg.norm(quats, axis=-1, keepdims=True)
    rows = np.concatenate(
        [means, np.zeros_like(means), sh0, opacity_logits[:, None], log_scales, quats], axis=1, dtype="<f4"
    )
    header = ["ply", "format binary_little_endian 1.0"]
    if file_axes != axes.WORLD:
        header.append(" ".join([*OURS, "axes", *file_axes]))
    header.append(f"element vertex {len(rows)}")
    header += [f"property float {name}" for name in PLY_NAMES] + ["end_header\n"]
    return "\n".join(header).encode("ascii") + rows.tobytes()


def load_ply(path: str | os.PathLike, told: Path | None = None, coded: bool = False) -> Loaded:
    """Reads the .ply of a 3DGS trainer, binary and little endian, without its harmonics above degree 0.

    Args:
        told: the file that messages name, of which this one was made; default: this one.
        coded: whether opacities were kept as bytes, so that 0 stands for what is hardly seen: such Gaussians
            stay, all but clear.

    Raises:
        UserError: the file is missing or cut short, is not a .ply of Gaussians, has none that can be drawn,
            states axes that are not understood, or has values that are not finite and stand for nothing.
            Other formats of splats are named.
    """
    file_path, path = Path(path), told or Path(path)
    try:
        with file_path.open("rb") as file:
            head = file.read(MAX_PLY_HEADER_BYTES)
            check_not_stand_in(path, head)
            if (kind := kinds.kind_of(file_path, head)) is not None:
                raise UserError(f"{path} is {kind.name}, which is not read; {kinds.ADVICE}")
            header = _parse_header(path, head)
            available = file_path.stat().st_size - header.num_bytes
            needed = header.num * header.row_type.itemsize
            if needed > available:  # checked before memory of that size is allocated
                raise UserError(
                    f"{path} is cut short: {header.num} Gaussians are {needed} bytes, it has {available}"
                )
            file.seek(header.num_bytes)
            rows = np.frombuffer(file.read(needed), header.row_type)
            if needed < available and not header.has_more:
                rest = f"{available - needed} bytes after the {header.num} Gaussians that the header states"
                header.notes.append(f"not read: {rest}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    gaussians, notes = drawable(path, rows, header.notes, coded)
    back = axes.matrix(header.axes or axes.WORLD).T
    return Loaded(turned(gaussians, back), notes, header.axes)


def drawable(
    path: Path, rows: np.ndarray, notes: list[str], coded: bool = False
) -> tuple[Gaussians, list[str]]:
    """(the Gaussians that can be drawn, in the file's axes; notes, and what is left out).

    rows: with the columns of a .ply by their names. Raises UserError as `load_ply` does.
    """
    if not len(rows):
        raise UserError(f"{path} has 0 Gaussians; export it again")
    means, sh0 = _columns(path, rows, "x", "y", "z"), _columns(path, rows, "f_dc_0", "f_dc_1", "f_dc_2")
    quats = _columns(path, rows, "rot_0", "rot_1", "rot_2", "rot_3")
    log_scales = _columns(path, rows, "scale_0", "scale_1", "scale_2", infinite=True)
    opacity_logits = _columns(path, rows, "opacity", infinite=True)[:, 0]
    if coded:
        opacity_logits = opacity_logits.clip(-OPAQUE_LOGIT, OPAQUE_LOGIT)
    least, most = QUATERNION_LENGTHS
    lengths = np.linalg.norm(quats.astype(np.float64), axis=-1)
    undrawable = {
        "an opacity of 0 (logit -inf)": opacity_logits == -np.inf,
        "a scale of 0 (logarithm -inf)": (log_scales == -np.inf).any(-1),
        "a scale that is too large for float32": (log_scales > LARGEST_LOG_SCALE).any(-1),
        "a quaternion of length 0": lengths < least,
        "a quaternion that is too long for float32": lengths > most,
    }
    dropped = np.any(list(undrawable.values()), axis=0)
    counts = {why: int(which.sum()) for why, which in undrawable.items() if which.any()}
    told = [
        f"{count} of {len(rows)} Gaussians are left out: they have {why}" for why, count in counts.items()
    ]
    if dropped.all():
        raise UserError(f"{path} has no Gaussian that can be drawn ({'; '.join(told)}); export it again")
    logits = np.where(opacity_logits == np.inf, np.float32(OPAQUE_LOGIT), opacity_logits)
    kept = (array[~dropped] for array in (means, quats, log_scales, logits, sh0))
    return Gaussians(*map(torch.from_numpy, kept)), [*_harmonics(rows), *notes, *told]


def _columns(
    path: Path, rows: np.ndarray, *names: str, infinite: bool = False
) -> Float32[np.ndarray, "N columns"]:
    """Columns in float32. Raises UserError, which names the column, for values that are not finite.

    infinite: whether infinity is taken, but not NaN.
    """
    with np.errstate(over="ignore"):  # doubles beyond float32 become infinite
        values = np.stack([rows[name].astype(np.float32) for name in names], -1)
    wrong: Bool[np.ndarray, "N columns"] = np.isnan(values) if infinite else ~np.isfinite(values)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UserError(
            f"{path}: {names[column]} has {wrong[:, column].sum()} values that are not finite in float32, "
            f"the first ({rows[names[column]][row]}) in row {row} counted from 0; export it again"
        )
    return values


def _harmonics(rows: np.ndarray) -> list[str]:
    names = [name for name in rows.dtype.names or () if HARMONIC.fullmatch(name)]
    if not any(rows[name].any() for name in names):
        return []
    return ["colours that depend on the view (f_rest_*) are left out: each Gaussian has its mean colour"]


def _parse_header(path: Path, head: bytes) -> _Header:
    text, end, _ = head.partition(b"end_header\n")
    if not end:
        text, end, _ = head.partition(b"end_header\r\n")
    lines = [line.split() for line in text.decode("ascii", "replace").splitlines()]
    if not end or not lines or lines[0] != ["ply"]:
        raise UserError(f"{path} is not a .ply file")
    if ["format", "binary_little_endian", "1.0"] not in lines:
        raise UserError(f"{path} is a .ply of another format; only binary_little_endian is read")
    elements = [line for line in lines if line[:1] == ["element"]]
    first = elements[0] if elements else []
    if first[1:2] != ["vertex"] or len(first) != 3 or not COUNT.fullmatch(first[2]):
        raise UserError(f"{path}: the first element of the .ply must be the vertices")
    following = lines[lines.index(first) + 1 :]
    if len(elements) > 1:
        following = following[: following.index(elements[1])]
    fields = _fields(path, following)
    unread = [name for name in fields if name not in PLY_NAMES and not HARMONIC.fullmatch(name)]
    unread += [f"element {' '.join(words[1:2])}" for words in elements[1:]]
    notes = [f"not read: {quoted(', '.join(unread))}"] if unread else []
    return _Header(
        int(first[2]),
        np.dtype(list(fields.items())),
        len(text) + len(end),
        notes,
        len(elements) > 1,
        _stated_axes(path, lines),
    )


def _stated_axes(path: Path, lines: list[list[str]]) -> Axes | None:
    """The axes that the header states. Raises UserError for a line of ours that is not understood."""
    ours = [line[len(OURS) :] for line in lines if line[: len(OURS)] == OURS]
    if not ours:
        return None
    if len(ours) > 1 or ours[0][:1] != ["axes"]:
        told = quoted("; ".join(" ".join([*OURS, *words]) for words in ours))
        raise UserError(f"{path}: its header has {told}; one line of ours with axes is understood")
    try:
        return axes.parse(" ".join(ours[0][1:]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _fields(path: Path, lines: list[list[str]]) -> dict[str, str]:
    """The types of the properties by their names. Raises UserError where some are missing or unusable."""
    fields = {}
    for line in lines:
        if line[:1] == ["property"]:
            if len(line) != 3 or line[1] not in PLY_TYPES or line[2] in fields:
                raise UserError(f"{path}: unusable .ply property: {' '.join(line)[:80]}")
            fields[line[2]] = PLY_TYPES[line[1]]
    missing = [name for name in PLY_NAMES if name not in fields and name not in ("nx", "ny", "nz")]
    if missing:
        raise UserError(f"{path} is not a .ply of Gaussians: it lacks {', '.join(missing)}")
    return fields
