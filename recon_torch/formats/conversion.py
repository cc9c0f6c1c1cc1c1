"""The formats that gaussforge converts to and from the .ply of 3DGS, in a process of its own."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from recon_torch import locks
from recon_torch.errors import UserError, quoted
from recon_torch.formats import sizes
from recon_torch.formats.ply import Loaded, load_ply, ply_bytes
from recon_torch.raster.gaussians import Gaussians
from recon_torch.settings import Format
from recon_torch.views.axes import Axes

FORMATS = (
    Format.COMPRESSED_PLY,
    Format.SPZ,
    Format.SPZ4,
    Format.SOG,
    Format.SPLAT,
    Format.KSPLAT,
)
CHILD = Path(__file__).with_name("gaussforge_child.py")
MEMORY_BYTES = 8 * 2**30  # of the process that converts
PATIENCE_S = 240.0  # less than a client of the worker process waits for a sign of life


def save(gaussians: Gaussians, path: Path, kind: Format, file_axes: Axes) -> None:
    """Writes a file in one of `FORMATS`. Raises UserError where gaussforge is missing or refuses."""
    with tempfile.TemporaryDirectory(dir=locks.process_directory()) as directory:
        plain = Path(directory, "plain.ply")
        plain.write_bytes(ply_bytes(gaussians, file_axes))
        _convert(plain, path, "ply", _name(kind), path, version=4 if kind == Format.SPZ4 else 3)


def load(path: Path, kind: Format) -> Loaded:
    """Reads a file in one of `FORMATS`, in its own axes.

    Raises UserError where gaussforge is missing, for damaged files, and as `load_ply` does.
    """
    sizes.check(path, kind)
    with tempfile.TemporaryDirectory(dir=locks.process_directory()) as directory:
        plain = Path(directory, "plain.ply")
        _convert(path, plain, _name(kind), "ply", path)
        return load_ply(plain, path, coded=True)


def _name(kind: Format) -> str:
    """What gaussforge calls a format."""
    return str(Format.SPZ if kind == Format.SPZ4 else kind)


def _convert(
    source: Path, target: Path, source_format: str, target_format: str, told: Path, version: int = 3
) -> None:
    """Raises UserError, which names the file `told`.

    version: of .spz.
    """
    need("gaussforge", told)
    arguments = [source, target, source_format, target_format, version, MEMORY_BYTES]
    try:
        done = subprocess.run(
            [sys.executable, "-P", CHILD, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{told} took longer than {PATIENCE_S:g} s to convert") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        why = quoted(lines[-1], 200)
        if done.returncode < 0:
            why = f"ended by {signal.Signals(-done.returncode).name}"
        raise UserError(f"{told} cannot be converted by gaussforge ({why}); is it damaged?")


def need(module: str, told: Path) -> None:
    """Raises UserError where a module of the extra "export" is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f'{told} needs the package {module}; pip install "im3d[export]"')
