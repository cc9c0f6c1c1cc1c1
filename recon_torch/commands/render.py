"""`im3d render`: renders a file of Gaussians as views on an orbit with a transforms.json, and as a video."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from recon_torch import outputs
from recon_torch.asset_files import ASSET, MESH_REPORT, gaussians_of
from recon_torch.errors import CommandParser, UserError
from recon_torch.outputs import Kind
from recon_torch.ranges import ElevationDeg, Flag, FovDeg, NumViews, Pixels, Share, real
from recon_torch.settings import UP_AXES, FileAxes

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32

    from recon_torch.formats.ply import Loaded
    from recon_torch.views.cameras import Cameras
    from recon_torch.views.world import World

RENDERS = Kind("render", (r"\d{3,}\.png", r"transforms\.json", r"turntable\.(mp4|gif)"))
DESCRIPTION = """Renders Gaussians in any world, from an orbit around them or given cameras.

They are read from the .ply of 3DGS and what else docs/formats.md lists.

The orbit is around the object as the report.json of `im3d fit` beside the asset has it; or around the origin,
if the asset lies there at unit size, as those of `im3d generate` do; or else around most of the Gaussians."""
UNIT_RADIUS, UNIT_FOV_DEG = 2.0, 33.8  # of the orbit in the world where the object has unit size
NUM_VIEWS, ELEVATION_DEG, SIZE_PX = 16, 15.0, 256
ORBIT_DEFAULTS = {
    **{"num_views": NUM_VIEWS, "elevation_deg": ELEVATION_DEG, "size": SIZE_PX, "fov_deg": UNIT_FOV_DEG},
    **dict.fromkeys(("center", "radius", "up")),
}
MAX_COORDINATE = 1e8
AXES_UNSURE = (
    "its header does not say which way its axes point: if it is the asset of these cameras, which another "
    "program wrote anew, give --axes upright"
)


class Shot(NamedTuple):
    """How an asset is seen.

    Attributes:
        world: in which it is rendered.
        cameras: in this world; those of one size together.
        place: where the cameras are, in words.
        notes: what is left out of them.
    """

    world: World
    cameras: list[Cameras]
    place: str
    notes: list[str]


def main(argv: list[str]) -> None:
    render(_parse(argv))


def render(flags: Namespace) -> None:
    """Renders the asset that the flags name, and writes the files."""
    import torch  # it takes seconds, for which --help need not wait

    from recon_torch.formats import files
    from recon_torch.formats.framing import moved_into
    from recon_torch.raster.gaussians import Gaussians
    from recon_torch.raster.render import render_images

    _refuse_mesh(flags.asset)
    flags.asset = gaussians_of(flags.asset)
    outputs.check(flags.out, RENDERS, [flags.asset, *_camera_files(flags.cameras)])
    # An axis that is named as up is one of the file's own.
    choice = FileAxes(flags.axes) if flags.axes else FileAxes.WORLD if flags.up else None
    loaded = files.load(flags.asset, choice)
    shot = _shot(flags, loaded)
    for note in loaded.notes:
        print(f"note: {flags.asset}: {note}", flush=True)
    for note in shot.notes:
        print(f"note: {flags.cameras}: {note}", flush=True)
    is_unsure = loaded.upright is None and choice is None
    if is_unsure and any(map(files.stated_axes, _camera_files(flags.cameras))):
        print(f"note: {flags.asset}: {AXES_UNSURE}", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asset = Gaussians(*(tensor.to(device) for tensor in moved_into(loaded.gaussians, shot.world)))
    with outputs.opened(flags.out, RENDERS) as out, outputs.owned(out) as staging:
        renders = [render_images(asset, rig, flags.background) for rig in shot.cameras]
        rgb = [view for views in renders for view in views]
        empty = [index for index, view in enumerate(rgb) if abs(view - flags.background).max() < 1 / 255]
        if len(empty) == len(rgb):
            raise UserError(
                f"no view shows {flags.asset}; the cameras are {shot.place}: give others or --background"
            )
        names, video = _write(staging, shot, rgb)
        outputs.replace(staging, out, RENDERS)
    if empty:
        shown = ", ".join(names[index] for index in empty[:6])
        print(f"note: {len(empty)} views show nothing but background: {shown}{', ...' * (len(empty) > 6)}")
    told = f"{len(rgb)} views of {len(asset.means)} Gaussians in {flags.out}, and {video}"
    print(f"{told}; the cameras are {shot.place}")


def _refuse_mesh(asset: Path) -> None:
    """Raises UserError for an asset that is a mesh, by its directory or a file of it."""
    folder = asset if asset.is_dir() else asset.parent
    is_mesh = (folder / MESH_REPORT).is_file() and (
        not (folder / ASSET).is_file() if asset.is_dir() else asset.stem == "mesh"
    )
    if is_mesh:
        raise UserError(f"{asset} is a mesh, and this renders Gaussians; `im3d view {folder}` shows it")


def _write(directory: Path, shot: Shot, rgb: list[Float32[np.ndarray, "H W 3"]]) -> tuple[list[str], str]:
    """Writes the views beside their transforms.json. Returns their names, and what the video is called."""
    import numpy as np

    from recon_torch.views.images import write_image
    from recon_torch.views.transforms import write_transforms
    from recon_torch.views.video import write_video

    names = [f"{index:03d}.png" for index in range(len(rgb))]
    for name, view in zip(names, rgb, strict=True):
        write_image(directory / name, view)
    back = [shot.world.cameras_back(rig) for rig in shot.cameras]
    write_transforms(directory / "transforms.json", back, names)
    if len({view.shape for view in rgb}) > 1:
        return names, "no video, as these have different sizes"
    return names, write_video(directory / "turntable.mp4", np.stack(rgb)).name


def _camera_files(source: Path | None) -> list[Path]:
    if source is None:
        return []
    return [source / "transforms.json" if source.is_dir() else source]


def _shot(flags: Namespace, loaded: Loaded) -> Shot:
    """The cameras that the flags ask for, or those that suit the asset."""
    import numpy as np

    from recon_torch.formats.framing import place_of, world_of
    from recon_torch.views.cameras import orbit
    from recon_torch.views.transforms import read_cameras
    from recon_torch.views.world import World, around

    if flags.cameras is not None:
        world, (rigs, notes) = world_of(loaded.gaussians), read_cameras(flags.cameras)
        return Shot(world, [world.cameras(rig) for rig in rigs], f"those of {flags.cameras}", notes)
    world, up = place_of(flags.asset, loaded)
    up = flags.up or up
    # A narrower view is taken from farther away, so that the object keeps its size in the pictures.
    half_fovs_rad = [math.radians(each / 2) for each in (UNIT_FOV_DEG, flags.fov_deg)]
    distance = UNIT_RADIUS * math.sin(half_fovs_rad[0]) / math.sin(half_fovs_rad[1])
    if flags.radius is not None:
        world = world._replace(scale=distance / flags.radius)
    if flags.center is not None:
        world = World(np.array(flags.center), world.scale)
    elevation_rad = math.radians(flags.elevation_deg)
    circle = orbit(flags.num_views, elevation_rad, flags.size, radius=distance, fov_deg=flags.fov_deg)
    center = ", ".join(f"{each:.6g}" for each in world.center)
    told = f"{distance / world.scale:.6g} from ({center}), with {up} up"
    return Shot(world, [around(np.array(UP_AXES[up]), circle)], told, [])


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("render", DESCRIPTION)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("--asset", type=Path, required=True, metavar="DIR|FILE",
        help="Gaussians: a .ply, .spz, .sog, ..., or the directory of an asset")
    add("--out", type=Path, required=True, metavar="DIR", help="where pictures and turntable.mp4 are written")
    add("--cameras", type=Path, metavar="DIR|FILE",
        help="a transforms.json, or its directory: render from its cameras, in the world of the asset")
    add("--num-views", type=Flag(NumViews), metavar="K",
        help=f"how many, at even azimuths (default {NUM_VIEWS})")
    add("--elevation-deg", type=Flag(ElevationDeg),
        help=f"height above the equator (default {ELEVATION_DEG:g})")
    add("--size", type=Flag(Pixels), metavar="PX", help=f"side of the square pictures (default {SIZE_PX})")
    add("--fov-deg", type=Flag(FovDeg), help=f"field of view (default {UNIT_FOV_DEG:g})")
    add("--center", type=real(-MAX_COORDINATE, MAX_COORDINATE), nargs=3, metavar=("X", "Y", "Z"),
        help="what the cameras look at, in the world of the asset")
    add("--radius", type=real(1e-3, MAX_COORDINATE), help="distance of the cameras to what they look at")
    add("--up", choices=UP_AXES,
        help="axis of the orbit; by default what the file says, or the fit, or else z")
    add("--axes", choices=tuple(map(str, FileAxes)),
        help="of a file that does not say it: upright in viewers, the default but of a plain .ply or with "
        "--up, or those of its world")
    add("--background", type=Flag(Share), default=1.0, help="grey level from 0, black, to 1, white" + default)
    # fmt: on
    flags = parser.parse_args(argv)
    for name, value in ORBIT_DEFAULTS.items():
        given = getattr(flags, name)
        if given is not None and flags.cameras is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is of an orbit, and --cameras gives the cameras; give one"
            )
        setattr(flags, name, value if given is None else given)
    return flags
