"""`im3d fit`: Gaussians, a turntable video and a report from views with known cameras (Sec. 3.3 alone).

The flags are here; `run` does the work, and is imported once they are known to be good.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from recon_torch.errors import CommandParser, UserError
from recon_torch.ranges import LOOPBACK, ElevationDeg, Flag, FovDeg, NumViews, Port, Seed, Steps, whole
from recon_torch.settings import (
    SMALLEST_SIDE_PX,
    UP_AXES,
    Engine,
    ExportSettings,
    FileAxes,
    FitSettings,
    Format,
    LpipsNet,
    Representation,
)

PORT = 8080
EXAMPLES = """examples:
  im3d fit --views out/views --out fitted
  im3d fit --views captured --check                         # says what is wrong with each frame
  im3d fit --views captured --held-out 8 --out fitted       # keeps every 8th view for testing
  im3d fit --views train --held-out test --out fitted --lpips-weights vgg16-397923af.pth
  im3d fit --views photos --isnet-weights isnet-general-use.onnx --normalize --out fitted
  im3d fit --views captured/* --at-once 8 --out fitted      # many assets, each to fitted/NAME
  im3d fit --views captured --viewer --out fitted           # a page to watch it at http://127.0.0.1:8080
  im3d fit --video turntable.mp4 --num-views 24 --elevation-deg 15 --out fitted

A directory of views has images and nerfstudio's transforms.json, or the original NeRF's transforms_train.json
and transforms_test.json, of which the second is held out. The foreground of a frame is its mask_path, or the
alpha of its image, or what IS-Net finds, or else what stands out from an even or smooth backdrop.
docs/reconstruction.md says more.
"""


def main(argv: list[str]) -> None:
    flags = parse(argv)
    from recon_torch.commands.fit import run  # torch and gsplat take seconds, for which --help need not wait

    if flags.check:
        run.check_all(flags)
    else:
        run.fit_all(flags)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Raises UserError for those that do not go together."""
    parser = CommandParser("fit", "Fits 3D Gaussians to views of an object whose cameras are known.")
    parser.epilog = EXAMPLES
    default = " (default %(default)s)"

    # fmt: off
    add = parser.add_argument_group("views").add_argument
    add("--views", type=Path, nargs="+", default=[], metavar="DIR",
        help="a directory with images and a transforms.json, or such a file; each further one is an asset")
    add("--video", type=Path, metavar="FILE", help="a video of one turn of the object, in place of --views")
    add("--check", action="store_true", help="say what is wrong with each frame of --views, and fit nothing")
    add("--allow-missing", action="store_true", help="leave out frames whose image does not exist")
    add("--size", type=whole(SMALLEST_SIDE_PX, 4096), metavar="PX", help="reduce the views to this height")
    add("--held-out", metavar="DIR|N",
        help="views to test with: another directory or file, or every N-th of the views, which is then not "
        "fitted; by default those that the views are split into, if they are")
    add("--isnet-weights", type=Path, metavar="FILE", help="find foreground masks with IS-Net")

    add = parser.add_argument_group("video").add_argument
    add("--num-views", type=Flag(NumViews), default=16, metavar="K", help="how many frames to fit" + default)
    add("--elevation-deg", type=Flag(ElevationDeg), metavar="E",
        help="how high the camera is above the equator")
    add("--fov-deg", type=Flag(FovDeg), default=33.8, help="vertical field of view" + default)
    add("--clockwise", action="store_true", help="seen from above, the camera goes clockwise")

    add = parser.add_argument_group("fit").add_argument
    add("--steps", type=Flag(Steps), default=FitSettings.num_steps, help="optimisation steps" + default)
    add("--start", type=Path, metavar="FILE",
        help="Gaussians to start from, in the world of the views: .ply, .spz, .sog, ...")
    add("--refine-cameras", action="store_true",
        help="move cameras that are off by some degrees among right ones")
    add("--seed", type=Flag(Seed), default=0, help="of all random numbers" + default)
    add("--at-once", type=whole(1, 256), default=4, metavar="N",
        help="how many assets are fitted together" + default)
    add("--representation", default=FitSettings.representation, choices=tuple(map(str, Representation)),
        help="Gaussians, a radiance field, or a mesh" + default)
    add("--engine", default=str(Engine.AUTO), choices=tuple(map(str, Engine)), help="rasteriser" + default)
    add("--lpips-net", default=str(FitSettings.lpips_net), choices=tuple(map(str, LpipsNet)),
        help="the network of LPIPS" + default)
    add("--lpips-weights", default=FitSettings.lpips_weights, metavar="FILE",
        help="the weights of that network as torchvision names them, or 'random'; by default those in "
        "torchvision's cache, and where it has none, a loss without LPIPS")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="where asset.ply, turntable.mp4, report.json ... are written")
    add("--resume", action="store_true", help="leave out assets that were made from the same views and flags")
    add("--normalize", action="store_true", help="find the object by its masks, and write it at unit size")
    add("--up", choices=UP_AXES, help="axis of the turntable; by default the one that is up in the pictures")
    add("--axes", default=str(ExportSettings.axes), choices=tuple(map(str, FileAxes)),
        help="of asset.ply: upright in public viewers, which take its -Y as up, or those of the views' world"
        + default)
    add("--formats", nargs="+", default=[], choices=tuple(map(str, Format)), metavar="FORMAT",
        help="further files beside asset.ply: " + ", ".join(Format))
    add("--mesh", action="store_true", help="write mesh.glb, a textured mesh; see `im3d mesh`")
    add("--page", action="store_true", help="write asset.html, a page that shows the asset; see `im3d view`")

    add = parser.add_argument_group("viewer").add_argument
    add("--viewer", action="store_true", help="show the fit on a page while it runs; needs the extra viewer")
    add("--viewer-host", default=LOOPBACK, help="the address to listen on, 0.0.0.0 for all" + default)
    add("--viewer-port", type=Flag(Port), default=PORT,
        help="the port, or 0 for one that is free" + default)
    add("--viewer-stay", action="store_true", help="keep the page after the fit, until Ctrl-C")
    # fmt: on
    flags = parser.parse_args(argv)
    _refuse_conflicts(flags)
    ExportSettings(axes=flags.axes, formats=tuple(flags.formats))
    FitSettings(representation=flags.representation)  # which says what is not installed
    return flags


def _refuse_conflicts(flags: argparse.Namespace) -> None:
    held_out = "2" if flags.held_out is None else flags.held_out
    mesh = flags.representation == Representation.MESH
    requirements = {
        "give either --views DIR or --video FILE": bool(flags.views) != (flags.video is not None),
        "--check needs --views DIR": not flags.check or bool(flags.views),
        "give --out DIR": flags.check or flags.out is not None,
        "--video needs --elevation-deg": flags.video is None or flags.elevation_deg is not None,
        "--held-out is empty; is a variable of your shell not set?": held_out != "",
        f"--held-out is {flags.held_out}; give a whole number from 2, or views": not held_out.isdecimal()
        or int(held_out) >= 2,
        "--mesh is made of Gaussians, and of no radiance field": flags.representation != Representation.NERF
        or not flags.mesh,
        "--page shows Gaussians, and no radiance field": flags.representation != Representation.NERF
        or not flags.page,
        "--viewer shows Gaussians, and no radiance field": flags.representation != Representation.NERF
        or not flags.viewer,
        "--viewer shows Gaussians, and no mesh": not mesh or not flags.viewer,
        "--viewer shows one fit; give one --views": len(flags.views) < 2 or not flags.viewer,
        "--viewer-stay keeps the page of --viewer; give that, too": flags.viewer or not flags.viewer_stay,
        '--viewer needs viser; pip install "im3d[viewer]"': not flags.viewer
        or importlib.util.find_spec("viser") is not None,
        "--formats are of Gaussians, and a radiance field has none; leave them out": flags.representation
        != Representation.NERF
        or not flags.formats,
        "--representation mesh writes a mesh by itself; leave --mesh out": not mesh or not flags.mesh,
        "--formats are of Gaussians, and --representation mesh writes mesh.glb; leave them out": not mesh
        or not flags.formats,
        "--axes is of asset.ply, and files of a mesh have +Y up; leave it out": not mesh
        or flags.axes == FileAxes.UPRIGHT,
        "a mesh cannot --start from Gaussians": not mesh or flags.start is None,
        "--engine gsplat renders Gaussians, and no mesh": not mesh or flags.engine != Engine.GSPLAT,
        "--start goes with one --views or --video": flags.start is None or len(flags.views) < 2,
        "a radiance field cannot --start from Gaussians": flags.start is None
        or flags.representation != Representation.NERF,
        "with several --views, --held-out is N": len(flags.views) < 2 or held_out.isdecimal(),
    }
    for message, holds in requirements.items():
        if not holds:
            raise UserError(message)
