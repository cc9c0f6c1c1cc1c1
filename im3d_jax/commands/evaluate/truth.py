"""`im3d evaluate truth`: renders meshes once, and freezes the views that methods are measured against."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from im3d_jax.data.meshes.reading import UpAxis
from im3d_jax.evaluate.frozen.protocols import SIZES_PX, Protocol
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.ranges import ElevationDeg, Flag, Range, Seed, whole

DESCRIPTION = """Renders the meshes below a directory, and freezes the views with a manifest.

    im3d evaluate truth --meshes gso/ --up z --protocol sv3d-static --out truth/gso_static
    im3d evaluate truth --meshes shapes/ --split-file split.json --captions captions.csv --out truth/shapes
    im3d evaluate views3d --truth truth/shapes --method ours=out/batch --out out/views3d

Protocols:
    im3d           16 views, 22.5 degrees apart, at an elevation drawn from 0 to 45 degrees; view 0 is given
    sv3d-static    21 views, 360/21 degrees apart, at one elevation (10 degrees); the last view is given
    sv3d-dynamic   21 views at irregular azimuths whose elevations go up and down; the last view is given

OUT gets inputs/NAME.png, the picture that a method is given of each object; objects/NAME/ with the views,
their transforms.json and surface.ply; and truth.json, with how they were made and the SHA-256 of every file.
What has a truth.json is never changed. An interrupted command is simply started again.
"""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    # Imported after the flags are parsed, because it takes a second.
    from im3d_jax.data.captions import read_captions
    from im3d_jax.evaluate.frozen import freezing
    from im3d_jax.evaluate.frozen.freezing import TRUTH, How

    freezing.refuse_frozen(flags.out)
    how = How(
        flags.protocol, flags.size or SIZES_PX[flags.protocol], flags.elevation_deg, flags.seed, flags.up
    )
    captions = read_captions(flags.captions) if flags.captions else {}
    meshes = _chosen(freezing.objects_below(flags.meshes), flags)
    if freezing.is_begun(flags.out):
        outputs.claim(flags.out, TRUTH)
    with outputs.opened(flags.out, TRUTH):
        made, failed = freezing.freeze(meshes, flags.meshes, captions, how, flags.out, flags.jobs, _shown)
    for name, why in failed.items():
        print(f"im3d: left out {name}: {why}", file=sys.stderr)
    for item in made:
        if named := [each for each in item.left_out if ":" in each]:
            print(f"im3d: {item.name} is rendered without {'; '.join(named)}", file=sys.stderr)
    said = f", {len(failed)} meshes left out, as truth.json says" if failed else ""
    if kinds := Counter(kind for item in made for kind in {each.split(":")[0] for each in item.left_out}):
        said += f"; not shown: {', '.join(f'{kind} {count}' for kind, count in kinds.most_common())}"
    print(f"{flags.out}: {len(made)} objects, {how.protocol}, {how.size_px} px{said}")


def _chosen(meshes: dict[str, Path], flags: Namespace) -> dict[str, Path]:
    """The meshes of the split, or all; of these as many as are asked for, evenly spread over their names."""
    from im3d_jax.data.placement import read_split_file

    if flags.split_file:
        by_path = {
            path.relative_to(flags.meshes).with_suffix("").as_posix(): name for name, path in meshes.items()
        }
        names = read_split_file(flags.split_file).names().get(flags.split)
        if not names:
            raise UserError(f"--split-file {flags.split_file} has no split {flags.split!r}; give --split")
        if missing := [name for name in names if name not in by_path]:
            raise UserError(f"{missing[0]} of the split {flags.split!r} is no mesh below {flags.meshes}")
        meshes = {by_path[name]: meshes[by_path[name]] for name in names}
    if flags.num_objects and flags.num_objects > len(meshes):
        raise UserError(f"--num-objects {flags.num_objects}: there are {len(meshes)}")
    names = sorted(meshes)
    places = np.linspace(0, len(names) - 1, flags.num_objects or len(names)).astype(int)
    return {names[place]: meshes[names[place]] for place in places}


def _shown(outcomes: Iterator, total: int) -> Iterator:
    """Outcomes as they come, with a bar on a terminal."""
    return iter(tqdm(outcomes, total=total, desc="render", unit="object", disable=None, file=sys.stderr))


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("evaluate truth", DESCRIPTION)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("--meshes", type=Path, required=True, metavar="DIR",
        help="directory of .glb, .gltf, .obj, .ply and .stl files, at any depth")
    add("--up", type=UpAxis, choices=list(UpAxis), default=UpAxis.Y,
        help="the meshes' axis that is up" + default)
    add("--captions", type=Path, metavar="CSV", help="name,caption: the prompts of methods that take text")
    add("--split-file", type=Path, metavar="JSON", help="{split: [names]}, of which --split is taken")
    add("--split", default="test", metavar="NAME", help="of the split file" + default)
    add("--num-objects", type=whole(1, 100_000), metavar="N", help="of them, evenly spread (all)")
    add("--protocol", type=Protocol, choices=list(Protocol), default=Protocol.IM3D,
        help="which views" + default)
    add("--size", type=whole(32, 4096), metavar="PX", help="side of the views (512, of SV3D's protocols 576)")
    add("--elevation-deg", type=Flag(ElevationDeg), metavar="DEG", help="in place of the protocol's own")
    add("--seed", type=Flag(Seed), default=0, help="of the elevations and the dynamic orbits" + default)
    add("--jobs", type=Flag(Annotated[int, Range(0, 1024)]), default=0, metavar="N",
        help="processes; 0 renders in this one" + default)
    add("--out", type=Path, required=True, metavar="DIR", help="directory for the truth")
    # fmt: on
    return parser.parse_args(argv)
