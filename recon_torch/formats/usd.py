"""OpenUSD's Gaussians: a .usda or .usdz with one ParticleField3DGaussianSplat, by usd-core.

Scales and opacities are stored as they are. A stage says whether +Y or +Z is up; ours have +Y, as viewers on
phones and headsets expect.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from recon_torch import locks
from recon_torch.errors import UserError, quoted
from recon_torch.formats import sizes
from recon_torch.formats.activated import from_activated
from recon_torch.formats.conversion import need
from recon_torch.formats.ply import Loaded
from recon_torch.raster.gaussians import Gaussians
from recon_torch.settings import Format

SCHEMA = "ParticleField3DGaussianSplat"
PRIM = "/asset"
SOME_TIME_S = 946_684_800  # the beginning of 2000
EXTENT_SIGMAS = 3.0  # how far the stated box reaches


def save(gaussians: Gaussians, path: Path, kind: Format) -> None:
    """Writes Gaussians that are in axes with +Y up. Raises UserError where usd-core is missing."""
    need("pxr", path)
    from pxr import Usd, UsdGeom, UsdUtils

    with tempfile.TemporaryDirectory(dir=locks.process_directory()) as directory:
        plain = Path(directory, "asset.usda" if kind == Format.USDA else "asset.usdc")
        stage = Usd.Stage.CreateNew(str(plain))
        UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
        UsdGeom.SetStageMetersPerUnit(stage, 1.0)
        _define(stage, gaussians)
        stage.SetDefaultPrim(stage.GetPrimAtPath(PRIM))
        stage.GetRootLayer().Save()
        if kind == Format.USDZ:
            package = Path(directory, "asset.usdz")
            os.utime(plain, (SOME_TIME_S, SOME_TIME_S))  # which the package states: equal assets, equal bytes
            UsdUtils.CreateNewUsdzPackage(str(plain), str(package))
            plain = package
        shutil.copyfile(plain, path)


def _define(stage: Any, gaussians: Gaussians) -> None:
    from pxr import UsdVol, Vt

    arrays = [tensor.detach().cpu().float().numpy() for tensor in gaussians.activated()]
    means, quats, scales, opacities, _ = arrays
    quats = quats / np.linalg.norm(quats, axis=-1, keepdims=True)
    field = UsdVol.ParticleField3DGaussianSplat.Define(stage, PRIM)
    reach = EXTENT_SIGMAS * scales.max(-1, keepdims=True)
    box = np.stack([(means - reach).min(0), (means + reach).max(0)])
    field.CreateExtentAttr(Vt.Vec3fArray.FromNumpy(box))
    field.CreatePositionsAttr(Vt.Vec3fArray.FromNumpy(means))
    field.CreateOrientationsAttr(Vt.QuatfArray.FromNumpy(quats[:, [1, 2, 3, 0]].copy()))  # kept as xyzw
    field.CreateScalesAttr(Vt.Vec3fArray.FromNumpy(scales))
    field.CreateOpacitiesAttr(Vt.FloatArray.FromNumpy(opacities))
    field.CreateRadianceSphericalHarmonicsDegreeAttr(0)
    colors = gaussians.sh0.detach().cpu().float().numpy()
    field.CreateRadianceSphericalHarmonicsCoefficientsAttr(Vt.Vec3fArray.FromNumpy(colors))


def load(path: Path) -> tuple[Loaded, bool]:
    """(the Gaussians of a stage in its own axes, whether +Z is up in it).

    Raises UserError where usd-core is missing, and for a file that is damaged, has no Gaussians or several
    sets of them, or moves them.
    """
    need("pxr", path)
    sizes.check_bytes(path)
    from pxr import Usd, UsdGeom

    try:
        stage = Usd.Stage.Open(str(path), Usd.Stage.LoadNone)
    except Exception:  # pxr's own, of no public type, whose text may not even be readable
        raise UserError(f"{path} cannot be read by usd-core; is it damaged?") from None
    found = [prim for prim in stage.Traverse() if prim.GetTypeName() == SCHEMA]
    if len(found) != 1:
        raise UserError(f"{path} has {len(found)} sets of Gaussians ({SCHEMA}); files with one are read")
    moves = [
        prim.GetPath().pathString
        for prim in stage.Traverse()
        if UsdGeom.Xformable(prim) and UsdGeom.Xformable(prim).GetXformOpOrderAttr().Get()
    ]
    if moves:
        raise UserError(f"{path}: {quoted(moves[0])} has a transform, which is not read; apply it first")
    xyzw = _values(path, found[0], "orientations", 4)
    means, scales = (_values(path, found[0], name, 3) for name in ("positions", "scales"))
    opacities = _values(path, found[0], "opacities", 1)[:, 0]
    if len({len(means), len(xyzw), len(scales), len(opacities)}) > 1:
        raise UserError(f"{path}: its attributes have different numbers of rows")
    sh0, told = _colors(path, found[0], len(means))
    gaussians, notes = from_activated(path, means, xyzw[:, [3, 0, 1, 2]], scales, opacities, sh0)
    return Loaded(gaussians, [*told, *notes]), UsdGeom.GetStageUpAxis(stage) == UsdGeom.Tokens.z


def _colors(path: Path, prim: Any, num: int) -> tuple[np.ndarray, list[str]]:
    """(the constant harmonics, a note on others)."""
    degree = prim.GetAttribute("radiance:sphericalHarmonicsDegree").Get() or 0
    values = _values(path, prim, "radiance:sphericalHarmonicsCoefficients", 3)
    each = (int(degree) + 1) ** 2
    if len(values) != num * each:
        raise UserError(f"{path} has {len(values)} harmonics of degree {degree} for {num} Gaussians")
    told = ["colours that depend on the view are left out: each Gaussian has its mean colour"]
    return values[::each], told if each > 1 else []


def _values(path: Path, prim: Any, name: str, width: int) -> np.ndarray:
    """An attribute in float32, or its half-precision twin. Raises UserError where it has neither."""
    for attribute in (name, f"{name}h"):
        values = prim.GetAttribute(attribute).Get()
        if values is not None and len(values):
            return np.asarray(values, np.float32).reshape(-1, width)
    raise UserError(f"{path}: its Gaussians have no {name}")
