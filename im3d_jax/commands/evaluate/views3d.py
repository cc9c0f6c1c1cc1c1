"""`im3d evaluate views3d`: the outputs of methods against frozen truth."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from im3d_jax.commands.evaluate import files, method_flags
from im3d_jax.evaluate.alignment import Alignment
from im3d_jax.evaluate.outputs.finding import MethodOutputs
from im3d_jax.evaluate.result_file import NAME
from im3d_jax.evaluate.surfaces import F_THRESHOLDS
from im3d_jax.stages import progress
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError, quoted
from recon_torch.outputs import Kind
from recon_torch.ranges import Flag, Seed, whole

if TYPE_CHECKING:
    from im3d_jax.data.clip import Clip
    from im3d_jax.evaluate.against_truth import Measured, Settings
    from im3d_jax.evaluate.frozen.manifest import Frozen, TrueObject
    from recon_torch.losses.lpips import PerceptualDistance

DESCRIPTION = """Measures the outputs of methods against the truth that `im3d evaluate truth` froze.

    im3d evaluate views3d --truth truth/gso_static --method sv3d:theirs=out/sv3d --out out/views3d
    im3d evaluate views3d --truth truth/shapes --method ours=out/batch --method other.yaml --out out/views3d

%s

An output belongs to the object of its name, which is that of its picture in inputs/, or of its caption.
Pictures are in the order of the truth's views, or their layout says their azimuths; splats, meshes and assets
of im3d are rendered from the true cameras. Of meshes the surfaces are compared as well, where their files
have them unless --align says otherwise. The view that methods are given is left out of all scores.

OUT gets results.json, table.md and sheet.png, on which the truth is above the methods."""

FOUND = Kind("evaluate views3d", (r"results\.json", r"table\.md", r"sheet\.png"))
"""What the command writes."""

SHEET_OBJECTS, SHEET_VIEWS, TILE_PX = 12, 8, 96


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    # Imported after the flags are parsed, because it takes a second.
    from im3d_jax.evaluate.against_truth import Settings, asked
    from im3d_jax.evaluate.frozen import manifest

    with outputs.opened(flags.out, FOUND):
        frozen = manifest.read(flags.truth)
        methods = method_flags.find(flags.methods, asked(frozen))
        perceptual = _perceptual(flags)
        thresholds = tuple(sorted(set(flags.f_thresholds)))
        settings = Settings(perceptual, flags.align, thresholds, flags.unlit, _clip(flags.clip))
        measured = _measure(frozen, methods, settings)
        _write(frozen, methods, settings, measured, flags)


def _perceptual(flags: Namespace) -> PerceptualDistance | None:
    """LPIPS, if there are trained weights for it."""
    from recon_torch.losses.lpips import PerceptualDistance, cached_weights

    weights = flags.lpips_weights or cached_weights(flags.lpips_net)
    return PerceptualDistance(flags.lpips_net, weights) if weights else None


def _clip(path: Path | None) -> Clip | None:
    if path is None:
        return None
    from im3d_jax.data.clip import Clip  # transformers takes seconds

    return Clip(path, "--clip")


class Scored(NamedTuple):
    """What was measured. by_object: for each object that some method has, the scores of each of these."""

    by_object: dict[str, list[Measured]]
    objects: dict[str, TrueObject]

    @property
    def all(self) -> list[Measured]:
        return [each for measured in self.by_object.values() for each in measured]


def _measure(frozen: Frozen, methods: Sequence[MethodOutputs], settings: Settings) -> Scored:
    """Raises UserError if no row of any method can be scored."""
    from im3d_jax.evaluate.against_truth import measure

    scored = Scored({}, {})
    with progress("score", sum(len(each.rows) for each in methods)) as bar:
        for method in methods:
            for item, measured in measure(frozen, method, settings, bar.update):
                scored.by_object.setdefault(item.name, []).append(measured)
                scored.objects[item.name] = item
    left_out = [line for method in methods for line in method.left_out()]
    for line in left_out:
        print(f"im3d: {line}", file=sys.stderr)
    if not scored.by_object:
        raise UserError(f"nothing is left to score ({left_out[0]}); give outputs of the truth's objects")
    return scored


def _write(
    frozen: Frozen, methods: Sequence[MethodOutputs], settings: Settings, scored: Scored, flags: Namespace
) -> None:
    from im3d_jax.evaluate import against_truth, result_file, tables
    from im3d_jax.evaluate.result_file import Bootstrap

    protocol = against_truth.protocol(frozen, settings, flags.lpips_net)
    left_out = [line for method in methods for line in method.left_out()]
    found = result_file.content(
        "views3d",
        protocol,
        [each.row for each in scored.all],
        methods=[method.about() for method in methods],
        config_digest=result_file.digest(protocol),
        weights_digest=_weights_digest(protocol),
        bootstrap=Bootstrap(flags.resamples, flags.seed),
        about=[*against_truth.about(frozen, settings), *against_truth.notes(scored.all), *left_out],
    )
    found["per_view"] = [
        {"method": each.row.method, "key": each.row.key, "scores": each.per_view} for each in scored.all
    ]
    columns = against_truth.columns(settings.thresholds)
    sections = [section(found, columns) for section in (tables.scores_section, tables.differences_section)]
    text = tables.page("Against the truth", sections, found["about"])
    files.write(flags.out, FOUND, found, text, {"sheet.png": _sheet(frozen, scored)})
    print(text)
    print(f"see {flags.out / NAME}, table.md and sheet.png")


def _weights_digest(protocol: Mapping[str, Any]) -> str:
    """Of LPIPS and the CLIP, or of the one that there is."""
    from im3d_jax.evaluate import result_file

    used = [sha for part in ("lpips", "clip") if (sha := protocol[part].get("sha256"))]
    return result_file.digest(used) if len(used) > 1 else "".join(used)


def _sheet(frozen: Frozen, scored: Scored) -> np.ndarray:
    """Some views of some objects, evenly spread: the truth above what each method has."""
    from recon_torch.views.images import contact_sheet
    from recon_torch.views.resizing import resize

    rows, labels, names = [], [], sorted(scored.by_object)
    for place in np.unique(np.linspace(0, len(names) - 1, SHEET_OBJECTS).astype(int)):
        item = scored.objects[names[place]]
        truth, _ = frozen.pictures(item)
        chosen = [view for view in range(len(truth)) if view != item.given]
        chosen = [chosen[each * len(chosen) // SHEET_VIEWS] for each in range(min(SHEET_VIEWS, len(chosen)))]
        shown = [(f"truth, {item.name}", truth)]
        shown += [(each.row.method, each.pictures) for each in scored.by_object[item.name]]
        for label, pictures in shown:
            small = min(TILE_PX, pictures.shape[1])
            rows.append(np.stack([resize(pictures[view], small, small) for view in chosen]))
            labels.append(label)
    return contact_sheet(rows, labels, tile_px=TILE_PX)


def _threshold(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (0.0,)
    if not all(0 < each <= 1 for each in found):
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is not numbers above 0 and at most 1, such as 0.01,0.05"
        )
    return found


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("evaluate views3d", DESCRIPTION % method_flags.HELP)
    add, default = parser.add_argument, " (default %(default)s)"
    add("--truth", type=Path, required=True, metavar="DIR", help="what `im3d evaluate truth` made")
    method_flags.add(parser)
    # fmt: off
    add("--out", type=Path, required=True, metavar="DIR", help="directory for the results")
    add("--align", type=Alignment, choices=list(Alignment), default=Alignment.NONE,
        help="what of a mesh's place is fitted to the truth first: size and centre, yaw as well, or a"
        " similarity by ICP as well; the result names it" + default)
    add("--f-thresholds", type=_threshold, default=F_THRESHOLDS, metavar="T,...",
        help="of the F-score, in units in which the object's ball has a diameter of 1 (default"
        f" {','.join(map(str, F_THRESHOLDS))})")
    add("--unlit", action="store_true",
        help="meshes have the light in their textures, as those of `im3d mesh`: none is added")
    add("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg", help="of LPIPS" + default)
    add("--lpips-weights", type=Path, metavar="FILE",
        help="of torchvision's network (default: those in its cache; LPIPS is left out where there are none)")
    add("--clip", type=Path, metavar="DIR",
        help="a CLIP in transformers' or open_clip's layout, for CLIP-S; nothing is fetched")
    add("--resamples", type=whole(100, 1_000_000), default=10_000, metavar="N",
        help="of the bootstrap over objects" + default)
    add("--seed", type=Flag(Seed), default=0, help="of the bootstrap" + default)
    # fmt: on
    flags = parser.parse_args(argv)
    flags.methods = method_flags.sources(flags.methods)
    return flags
