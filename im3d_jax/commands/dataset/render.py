"""`im3d dataset render`: objects as directories of views (Sec. 3.1)."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from im3d_jax.commands.dataset.progress import Skipped, check_flags, parse_part, progress
from im3d_jax.data import Renderer, rendering, views
from im3d_jax.data.captions import read_captions
from im3d_jax.data.mesh_rendering import UpAxis
from im3d_jax.data.rendering import MeshRenderer, ProceduralRenderer, Turntable
from recon_torch.errors import CommandParser, UserError

DESCRIPTION = """Renders objects as directories of views, which `im3d dataset build` reads.

    im3d dataset render --procedural 1000 --out data/views --size 64
    im3d dataset render --meshes objaverse/ --captions captions.csv --out data/views --part 0/8

Objects that are in --out already are kept, so an interrupted command is simply started again.
"""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    renderer = _renderer(flags)
    settings = {key: getattr(flags, key) for key in ("size", "num_views", "elevation_deg", "seed")}
    rendering.keep_settings(flags.out / "render.json", settings)
    part, num_parts = flags.part
    names = renderer.names[part::num_parts]
    missing = [name for name in names if not views.is_object(flags.out / name)]
    num_kept = len(names) - len(missing)
    skipped = Skipped(flags.max_skipped)
    for name in progress(missing, len(names), num_kept):
        try:
            made = renderer.render(name)
        except UserError as error:
            skipped.add(f"{name}: {error}")
        else:
            views.write_object(flags.out / name, *made)
    num_made = len(missing) - len(skipped.messages)
    print(f"{flags.out}: {num_made} objects rendered, {num_kept} were there", end="")
    print(f", {len(skipped.messages)} skipped" if skipped.messages else "")


def _renderer(flags: Namespace) -> Renderer:
    turntable = Turntable(flags.size, flags.num_views, flags.elevation_deg, flags.seed)
    if not flags.meshes:
        return ProceduralRenderer(flags.procedural, turntable)
    captions = read_captions(flags.captions) if flags.captions else {}
    renderer = MeshRenderer(flags.meshes, captions, flags.up, turntable)
    if without := renderer.without_caption:
        of_all = f"{len(without)} of {len(renderer.names)} meshes have no caption"
        print(f"im3d: {of_all}, as {without[0]}", file=sys.stderr)
    return renderer


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("dataset render", DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--meshes", type=Path, metavar="DIR", help="render the .glb, .gltf, .obj and .ply files below DIR"
    )
    source.add_argument(
        "--procedural", type=int, metavar="N", help="render the first N procedural training objects"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets a directory for each object"
    )
    parser.add_argument(
        "--captions", type=Path, metavar="CSV", help="captions of the meshes, in rows of name,caption"
    )
    parser.add_argument(
        "--up", type=UpAxis, choices=list(UpAxis), default=UpAxis.Y, help="the meshes' axis that is up (y)"
    )
    parser.add_argument("--size", type=int, default=512, help="side of the square views in pixels (512)")
    parser.add_argument("--num-views", type=int, default=16, help="number of evenly spaced azimuths (16)")
    parser.add_argument(
        "--elevation-deg", type=float, help="of all cameras; default: drawn from 0 to 45 for each object"
    )
    parser.add_argument("--seed", type=int, default=0, help="of procedural objects and elevations (0)")
    parser.add_argument(
        "--part",
        type=parse_part,
        default=(0, 1),
        metavar="I/N",
        help="render only part I, from 0, of N parts",
    )
    parser.add_argument(
        "--max-skipped", type=int, default=10, help="how many meshes may be unusable before it stops (10)"
    )
    flags = parser.parse_args(argv)
    check_flags(
        {
            "--procedural must be at least 1": flags.procedural is None or flags.procedural >= 1,
            "--size must be from 8 to 4096": 8 <= flags.size <= 4096,
            "--num-views must be at least 1": flags.num_views >= 1,
            "--elevation-deg must lie between -90 and 90": abs(flags.elevation_deg or 0) < 90,
            "--seed must not be negative": flags.seed >= 0,
        }
    )
    return flags
