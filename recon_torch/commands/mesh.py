"""`im3d mesh`: a textured mesh of an asset's Gaussians, as glTF, OBJ, PLY or USD."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from recon_torch import outputs
from recon_torch.asset_files import gaussians_of
from recon_torch.errors import CommandParser
from recon_torch.outputs import Kind
from recon_torch.ranges import Flag, hints_of
from recon_torch.settings import MESH_PATHS, MeshFormat, MeshMethod, MeshSettings

DESCRIPTION = """Makes a textured mesh of Gaussians: mesh.glb, or what --formats names, and mesh.json.

ASSET is a directory of im3d generate or im3d fit, or a file of Gaussians. Files have +Y up and the front
towards +Z, and one unit is one metre. docs/meshes.md says more. Needs pip install "im3d[mesh]"."""
KIND = Kind("mesh", MESH_PATHS)
DEFAULTS = MeshSettings()


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    flags.formats = tuple(flags.formats)
    mesh(flags, MeshSettings(**{each.name: getattr(flags, each.name) for each in fields(MeshSettings)}))


def mesh(flags: Namespace, settings: MeshSettings) -> None:
    """Makes the mesh that the flags ask for, and writes its files."""
    from recon_torch.mesh import assets, files, making  # torch takes seconds, for which --help need not wait

    files.check(settings.formats)
    path = gaussians_of(flags.asset)
    outputs.check(flags.out, KIND, [path])
    found = assets.read(flags.asset, flags.views)
    for note in found.notes:
        print(f"note: {found.path}: {note}", flush=True)
    with (
        outputs.opened(flags.out, KIND) as out,
        outputs.owned(out) as staging,
        tqdm(total=len(making.STAGES), desc="mesh", unit="stage", disable=None) as bar,
    ):
        report = making.make(found.given, settings, staging, _Told(bar))
        bar.update()
        outputs.replace(staging, out, KIND, making.REPORT)
    print(_told(report, flags.out))


class _Told:
    """Tells of stages that begin: on the bar of a terminal, or in plain lines."""

    def __init__(self, bar: tqdm) -> None:
        self._bar, self._begun, self._started = bar, "", time.monotonic()

    def __call__(self, stage: str) -> None:
        if self._begun:
            self._bar.update()
            if self._bar.disable:
                print(f"{self._begun}: {time.monotonic() - self._started:.1f} s", flush=True)
        self._bar.set_postfix_str(stage)
        self._begun, self._started = stage, time.monotonic()


def _told(report: dict, out: Path) -> str:
    tight = "watertight" if report["watertight"] else "not watertight"
    left_out = report["floaters_left_out"]
    lines = [f"{report['triangles']} triangles, {tight}, volume {report['volume']:.4g} in cubic metres"]
    lines += [f"{left_out} small pieces are left out"] * (left_out > 0)
    lines += [f"{report['texture_coverage']:.1%} of the texture is seen in {report['texture_from']}"]
    return "; ".join(lines) + "\n" + f"{', '.join(report['files'])} in {out}"


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("mesh", DESCRIPTION)
    add, hints = parser.add_argument, hints_of(MeshSettings)
    # fmt: off
    add("asset", type=Path, metavar="ASSET", help="a directory with an asset.ply, or a file of Gaussians")
    add("--out", type=Path, required=True, metavar="DIR", help="where the files are written")
    add("--views", type=Path, metavar="DIR",
        help="the views that were fitted, for the texture; by default those of im3d generate --save-views")
    add("--formats", nargs="+", choices=tuple(map(str, MeshFormat)),
        default=tuple(map(str, DEFAULTS.formats)),
        help="what to write (default glb)")
    add("--method", choices=tuple(map(str, MeshMethod)), default=str(DEFAULTS.method),
        help="the surface is where the density has a level, or by fused depth (default %(default)s)")
    add("--level", type=Flag(hints["level"].__args__[0]), metavar="L",
        help="of that density (default 0.45), or of the fused depth (default -0.25)")
    add("--resolution", type=Flag(hints["resolution"]), default=DEFAULTS.resolution, metavar="N",
        help="cells along the longest side (default %(default)s)")
    add("--floaters", type=Flag(hints["floaters"]), default=DEFAULTS.floaters, metavar="SHARE",
        help="pieces with less of the area are left out (default %(default)s)")
    add("--triangles", type=Flag(hints["triangles"]), default=DEFAULTS.triangles, metavar="N",
        help="at most so many (default %(default)s)")
    add("--watertight", action="store_true", help="a mesh with holes is an error")
    add("--texture", type=Flag(hints["texture"]), default=DEFAULTS.texture, metavar="PX",
        help="side of the square texture (default %(default)s)")
    # fmt: on
    return parser.parse_args(argv)
