"""`im3d render`: renders a .ply of Gaussians as views on an orbit with a transforms.json, and as a video."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from recon_torch import outputs
from recon_torch.errors import CommandParser
from recon_torch.files import check_regular
from recon_torch.outputs import Kind
from recon_torch.ranges import ElevationDeg, Flag, FovDeg, Length, NumViews, Pixels, Share

RENDERS = Kind("render", (r"\d{3,}\.png", r"transforms\.json", r"turntable\.(mp4|gif)"))


def main(argv: list[str]) -> None:
    render(_parse(argv))


def render(flags: Namespace) -> None:
    """Renders the asset that the flags name, and writes the files."""
    import torch  # it takes seconds, for which --help need not wait

    from recon_torch.formats.ply import load_ply
    from recon_torch.raster.gaussians import Gaussians
    from recon_torch.raster.render import render_images
    from recon_torch.views.cameras import orbit
    from recon_torch.views.directory import write_views
    from recon_torch.views.video import write_video

    check_regular(flags.asset)
    outputs.check(flags.out, RENDERS, [flags.asset])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asset = Gaussians(*(tensor.to(device) for tensor in load_ply(flags.asset)))
    elevation_rad = math.radians(flags.elevation_deg)
    cameras = orbit(flags.num_views, elevation_rad, flags.size, radius=flags.radius, fov_deg=flags.fov_deg)
    with outputs.opened(flags.out, RENDERS) as out, outputs.owned(out) as staging:
        rgb = render_images(asset, cameras, flags.background)
        write_views(staging, cameras, rgb)
        video = write_video(staging / "turntable.mp4", rgb)
        outputs.replace(staging, out, RENDERS)
    print(f"{len(cameras)} views of {len(asset.means)} Gaussians in {flags.out}, and {video.name}")


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("render", "Renders a .ply of Gaussians from an orbit around the origin.")
    add, default = parser.add_argument, " (default %(default)s)"
    add("--asset", type=Path, required=True, metavar="FILE", help="a .ply in the layout of 3DGS")
    add("--out", type=Path, required=True, metavar="DIR", help="where pictures and turntable.mp4 are written")
    add(
        "--num-views",
        type=Flag(NumViews),
        default=16,
        metavar="K",
        help="how many, at even azimuths" + default,
    )
    add("--elevation-deg", type=Flag(ElevationDeg), default=15.0, help="height above the equator" + default)
    add("--size", type=Flag(Pixels), default=256, metavar="PX", help="side of the square pictures" + default)
    add("--fov-deg", type=Flag(FovDeg), default=33.8, help="field of view" + default)
    add("--radius", type=Flag(Length), default=2.0, help="distance of the cameras to the origin" + default)
    add("--background", type=Flag(Share), default=1.0, help="grey level from 0, black, to 1, white" + default)
    return parser.parse_args(argv)
