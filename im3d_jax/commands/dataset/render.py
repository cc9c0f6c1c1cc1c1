"""`im3d dataset render`: objects as directories of views (Sec. 3.1)."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from im3d_jax.commands.dataset.progress import Skipped, check_flags, parse_part, progress
from im3d_jax.data import Renderer, isolation, rendering, views
from im3d_jax.data.blender import Engine, Look
from im3d_jax.data.blender.rendering import Blender
from im3d_jax.data.captions import read_captions
from im3d_jax.data.isolation import Failure
from im3d_jax.data.meshes.reading import UpAxis
from im3d_jax.data.placement import file_digest
from im3d_jax.data.rendering import MeshEngine, MeshRenderer, ProceduralRenderer, RayCaster, Turntable
from recon_torch import locks, outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import TEMPORARY, replacing
from recon_torch.outputs import Kind
from recon_torch.ranges import Count, ElevationDeg, Flag, NumViews, Pixels, Seed, real, whole

DESCRIPTION = """Renders objects as directories of views, which `im3d dataset build` reads.

    im3d dataset render --procedural 1000 --out data/views --size 64
    im3d dataset render --meshes objaverse/ --captions captions.csv --out data/views --part 0/8
    im3d dataset render --meshes objaverse/ --captions captions.csv --out data/views --augment 3
    im3d dataset render --meshes objaverse/ --out data/views --jobs 16 --timeout-s 600 --max-skipped 5000
    im3d dataset render --meshes objaverse/ --out data/views --renderer blender --samples 64

Objects that are in --out already are kept, so an interrupted command is simply started again. It then also
attempts the objects that failed before. What failed is in failures.csv (failures-I-of-N.csv with --part I/N):
name, reason, number of attempts and message. The reason is "unusable" for a file that cannot be rendered,
"memory" or "killed" where the memory did not suffice or the process died, "timeout", or "fault" for an error
of ours. With --jobs, an object that kills its process or takes too long does not stop the others.

With --augment N, every mesh has N variants NAME~1, NAME~2, ... beside it: stretched along each axis by
0.8 to 1.25, turned about the upright axis, lit from elsewhere, and with the channels of its colours
exchanged where the colours that its caption names can follow. metadata.json says how each differs.

With --renderer blender, Blender renders the meshes, with their metal, roughness and normal maps, in white
light with shadows or in that of --environment. It also reads .fbx, .usd, .usda, .usdc, .usdz, .dae and .blend
files, which say themselves what is up; scripts in .blend files are never run.

What a mesh asks for and the views do not show, such as a normal map or a texture that is missing, is listed
as "left_out" in the object's metadata.json, and counted at the end. docs/data.md says what is read of meshes.
"""

SAMPLES = Look().samples

SETTINGS = "render.json"

TABLES = Kind("dataset render", (r"failures(-\d+-of-\d+)?\.csv",), grows=True)
OBJECT = Kind("dataset render", (r".*",))
"""A directory of an object is written as a whole, so that nothing may lie there."""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    if rendering.is_begun(flags.out / SETTINGS):
        outputs.claim(flags.out, TABLES)
    outputs.check(flags.out, TABLES)
    renderer = _renderer(flags)
    with outputs.opened(flags.out, TABLES, part=flags.part):
        _render(renderer, flags)


def _render(renderer: Renderer, flags: Namespace) -> None:
    settings = {key: getattr(flags, key) for key in ("size", "num_views", "elevation_deg", "seed")}
    settings |= {"renderer": flags.renderer, **_look_of(flags)}
    rendering.keep_settings(flags.out / SETTINGS, settings)
    part, num_parts = flags.part
    names = renderer.names[part::num_parts]
    missing = [name for name in names if not views.is_object(flags.out / name)]
    for name in missing:
        outputs.check(flags.out / name, OBJECT, root=flags.out)
    for folder in {(flags.out / name).parent for name in missing}:
        locks.clear(folder, TEMPORARY)
    num_kept = len(names) - len(missing)
    failures = _render_all(renderer, missing, num_kept, flags)
    num_made = len(missing) - len(failures)
    said = ""
    if failures:
        counts = Counter(failure.reason for failure in failures.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        said = f", {len(failures)} skipped ({reasons}); {_failures_file(flags)} names them"
    if not num_made and not num_kept:
        raise UserError(f"{flags.out}: no object was rendered{said}")
    kinds = Counter(kind for name in names for kind in _kinds_left_out(flags.out / name))
    listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    said += f"; left out: {listed}" if listed else ""
    print(f"{flags.out}: {num_made} objects rendered, {num_kept} were there{said}")


def _render_all(renderer: Renderer, names: list[str], num_kept: int, flags: Namespace) -> dict[str, Failure]:
    """Renders objects, and writes the table of failures even if it is interrupted. Returns that table."""
    skipped, failures = Skipped(flags.max_skipped), {}
    if flags.jobs:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # or each process would use all cores for its arrays
    running = isolation.run_all(
        rendering.RenderTo,
        (renderer, flags.out),
        names,
        jobs=flags.jobs,
        retries=flags.retries,
        timeout_s=flags.timeout_s,
    )
    try:
        with contextlib.closing(running):
            for name, failure in progress(running, len(names) + num_kept, num_kept):
                if failure:
                    failures[name] = failure
                    views.remove_unfinished(flags.out / name)
                    skipped.add(f"{name}: {failure.message}")
                elif named := [each for each in _left_out(flags.out / name) if ":" in each]:
                    tqdm.write(f"im3d: {name} is rendered without {'; '.join(named)}", file=sys.stderr)
    finally:
        _write_failures(_failures_file(flags), failures)
    return failures


def _left_out(directory: Path) -> list[str]:
    """What the views of an object do not show of its file; nothing if it is not there or cannot be read."""
    try:
        return views.read_metadata(directory).get("left_out", [])
    except views.Unfit:
        return []


def _kinds_left_out(directory: Path) -> set[str]:
    """The same without what follows a colon, which is the name of a texture or the like."""
    return {each.split(":")[0] for each in _left_out(directory)}


def _failures_file(flags: Namespace) -> Path:
    number, num_parts = flags.part
    return flags.out / ("failures.csv" if num_parts == 1 else f"failures-{number}-of-{num_parts}.csv")


def _write_failures(path: Path, failures: Mapping[str, Failure]) -> None:
    """Writes the table; without failures there is none, nor one of an earlier run."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["name", "reason", "attempts", "message"])
    rows.writerows(
        [name, each.reason, each.attempts, each.message] for name, each in sorted(failures.items())
    )
    with replacing(path) as temporary:  # names in another encoding have their bytes as \\udcNN
        temporary.write_bytes(text.getvalue().encode("utf-8", "backslashreplace"))


def _renderer(flags: Namespace) -> Renderer:
    turntable = Turntable(flags.size, flags.num_views, flags.elevation_deg, flags.seed)
    if not flags.meshes:
        return ProceduralRenderer(flags.procedural, turntable)
    captions = read_captions(flags.captions) if flags.captions else {}
    draw = Blender(_look(flags)) if flags.renderer == MeshEngine.BLENDER else RayCaster()
    renderer = MeshRenderer(flags.meshes, captions, flags.up, turntable, flags.augment, draw)
    if renderer.unread:
        print(f"im3d: {flags.meshes} has {rendering.in_unread_formats(renderer.unread)}", file=sys.stderr)
    if without := renderer.without_caption:
        of_all = f"{len(without)} of {len(renderer.names) // (1 + flags.augment)} meshes have no caption"
        print(f"im3d: {of_all}, as {without[0]}", file=sys.stderr)
    return renderer


def _look(flags: Namespace) -> Look:
    return Look(flags.engine or Engine.CYCLES, flags.samples or SAMPLES, flags.environment)


def _look_of(flags: Namespace) -> dict[str, Any]:
    """What a directory of Blender's renders is begun with; nothing for other renderers."""
    if flags.renderer != MeshEngine.BLENDER:
        return {}
    look = _look(flags)
    digest = file_digest(look.environment) if look.environment else None
    return {"engine": look.engine, "samples": look.samples, "environment_sha256": digest}


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("dataset render", DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--meshes",
        type=Path,
        metavar="DIR",
        help="render the .glb, .gltf, .obj, .ply and .stl files below DIR, and more with --renderer blender",
    )
    source.add_argument(
        "--procedural",
        type=whole(1, 1_000_000_000),
        metavar="N",
        help="render the first N procedural training objects",
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
    parser.add_argument(
        "--augment",
        type=whole(0, 1000),
        default=0,
        metavar="N",
        help="also render N variants of each mesh: stretched, turned, with other light and colours (0)",
    )
    _add_view_flags(parser)
    _add_blender_flags(parser)
    _add_job_flags(parser)
    flags = parser.parse_args(argv)
    _check(flags)
    return flags


def _add_view_flags(parser: CommandParser) -> None:
    parser.add_argument(
        "--size", type=Flag(Pixels), default=512, help="side of the square views in pixels (512)"
    )
    parser.add_argument(
        "--num-views", type=Flag(NumViews), default=16, help="number of evenly spaced azimuths (16)"
    )
    parser.add_argument(
        "--elevation-deg",
        type=Flag(ElevationDeg),
        help="of all cameras; default: drawn from 0 to 45 for each object",
    )
    parser.add_argument("--seed", type=Flag(Seed), default=0, help="of procedural objects and elevations (0)")


def _add_blender_flags(parser: CommandParser) -> None:
    parser.add_argument(
        "--renderer",
        type=MeshEngine,
        choices=list(MeshEngine),
        default=MeshEngine.RAYS,
        help="what renders meshes (rays)",
    )
    parser.add_argument(
        "--engine",
        type=Engine,
        choices=list(Engine),
        help="of --renderer blender (cycles); eevee needs a GPU",
    )
    parser.add_argument(
        "--samples",
        type=whole(1, 65_536),
        help=f"of --renderer blender for each pixel ({SAMPLES})",
    )
    parser.add_argument(
        "--environment",
        type=Path,
        metavar="FILE",
        help="with --renderer blender, an .hdr or .exr panorama that lights the meshes",
    )


def _add_job_flags(parser: CommandParser) -> None:
    parser.add_argument(
        "--part",
        type=parse_part,
        default=(0, 1),
        metavar="I/N",
        help="render only part I, from 0, of N parts",
    )
    parser.add_argument(
        "--max-skipped", type=Flag(Count), default=10, help="how many objects may fail before it stops (10)"
    )
    parser.add_argument(
        "--jobs",
        type=whole(0, 4096),
        default=0,
        metavar="N",
        help="render in N processes; 0, the default, in this one",
    )
    parser.add_argument(
        "--retries",
        type=whole(0, 1000),
        default=1,
        help="further attempts at an object for want of memory or when its process dies (1)",
    )
    parser.add_argument(
        "--timeout-s",
        type=real(0, 1e7),
        default=0.0,
        help="with --jobs, the longest time for an object; 0: any (0)",
    )


def _check(flags: Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    check_flags(
        {
            "--augment needs --meshes": flags.augment == 0 or flags.meshes is not None,
            "--renderer blender needs --meshes": flags.renderer == MeshEngine.RAYS
            or flags.meshes is not None,
            "--engine, --samples and --environment need --renderer blender": flags.renderer != MeshEngine.RAYS
            or (flags.engine, flags.samples, flags.environment) == (None, None, None),
            "--timeout-s needs --jobs": flags.timeout_s == 0 or flags.jobs > 0,
        }
    )
