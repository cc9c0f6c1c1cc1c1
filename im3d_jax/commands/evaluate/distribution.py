"""`im3d evaluate distribution`: FID, KID and CMMD of the outputs of methods from reference pictures."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from im3d_jax.commands.evaluate import files, method_flags
from im3d_jax.evaluate.frozen import MANIFEST
from im3d_jax.evaluate.outputs import finding
from im3d_jax.evaluate.outputs.finding import MethodOutputs
from im3d_jax.evaluate.outputs.layouts import Source
from im3d_jax.evaluate.result_file import NAME
from im3d_jax.stages import progress
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.outputs import Kind
from recon_torch.ranges import Flag, Seed

if TYPE_CHECKING:
    from im3d_jax.data.clip import Clip
    from im3d_jax.evaluate.distributions import Embedded, Inception
    from im3d_jax.evaluate.frozen.manifest import Frozen

DESCRIPTION = """Measures how far the pictures of methods are from reference pictures, as a whole.

    im3d evaluate distribution --reference truth/gso --method ours=out/batch --inception FILE --out out/fid
    im3d evaluate distribution --reference photographs/ --method other.yaml --clip DIR --out out/cmmd

%s

--reference is a truth of `im3d evaluate truth`, whose objects methods are then read by and rendered from its
cameras, the given view left out; or a directory of pictures, which is read as that of a method is.

FID and KID need --inception, which is weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release
v0.2.0; CMMD needs --clip, by its paper ViT-L/14 at 336 px. Nothing is fetched. `pip install "im3d[metrics]"`
installs the libraries. --out gets results.json and table.md."""

FOUND = Kind("evaluate distribution", (r"results\.json", r"table\.md"))
"""What the command writes."""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    if flags.inception is None and flags.clip is None:
        raise UserError(
            "give --inception FILE for FID and KID, --clip DIR for CMMD, or both; nothing is fetched"
        )
    with outputs.opened(flags.out, FOUND):
        frozen = _truth(flags.reference)
        methods = method_flags.find(flags.methods, _asked(frozen))
        # Imported now, because torch and transformers take seconds, which mistakes need not wait for.
        from im3d_jax.data.clip import Clip
        from im3d_jax.evaluate.distributions import Inception

        inception = Inception(flags.inception) if flags.inception else None
        clip = Clip(flags.clip, "--clip") if flags.clip else None
        _write(_measure(frozen, methods, inception, clip, flags), flags.out)


def _truth(reference: Path) -> Frozen | None:
    from im3d_jax.evaluate.frozen import manifest

    return manifest.read(reference) if (reference / MANIFEST).is_file() else None


def _asked(frozen: Frozen | None) -> list[finding.Asked]:
    if frozen is None:
        return []
    from im3d_jax.evaluate.against_truth import asked

    return asked(frozen)


def _measure(
    frozen: Frozen | None,
    methods: Sequence[MethodOutputs],
    inception: Inception | None,
    clip: Clip | None,
    flags: Namespace,
) -> dict[str, Any]:
    """The content of results.json."""
    from im3d_jax.evaluate import distance_differences, distributions, result_file

    reference, left_out = _reference(frozen, flags.reference, inception, clip)
    found = []
    for method in methods:
        made = _embedded(frozen, method, inception, clip)
        found.append({"method": method.label, **distributions.distances(made, reference, flags.seed)})
    left_out += [line for method in methods for line in method.left_out()]
    for line in left_out:
        print(f"im3d: {line}", file=sys.stderr)
    protocol = {
        "reference": frozen.digest if frozen else str(flags.reference),
        "num_reference": len(reference.names),
        "inception": inception.digest if inception else None,
        "clip": clip.about() if clip else None,
    }
    content = result_file.content(
        "distribution",
        protocol,
        [],
        methods=[method.about() for method in methods],
        config_digest=result_file.digest(protocol),
        weights_digest=result_file.digest([protocol["inception"], clip.digest if clip else None]),
        seeds={"subsets": flags.seed},
        about=[*_about(found, inception, clip), *left_out],
    )
    pairs = [each for other in found[1:] for each in distance_differences.differences(found[0], other)]
    return {**content, "differences": pairs, "distances": found}


def _reference(
    frozen: Frozen | None, path: Path, inception: Inception | None, clip: Clip | None
) -> tuple[Embedded, list[str]]:
    """The reference, and what of it is left out."""
    from im3d_jax.evaluate import distributions

    if frozen is not None:
        with progress("reference", len(frozen.objects)) as bar:
            pictures = _counted(_true_pictures(frozen), bar.update)
            return distributions.embed(pictures, inception, clip, "--reference"), []
    source = finding.find(Source("reference", path))[0]
    return _embedded(None, source, inception, clip), source.left_out()


def _embedded(
    frozen: Frozen | None, method: MethodOutputs, inception: Inception | None, clip: Clip | None
) -> Embedded:
    """The pictures of a method. Raises UserError, which says what is left out, if there are too few."""
    from im3d_jax.evaluate import distributions

    with progress(method.label, len(method.rows)) as bar:
        pictures = _counted(_pictures(frozen, method), bar.update)
        try:
            return distributions.embed(pictures, inception, clip, method.label)
        except UserError as error:
            why = "".join(f" ({line})" for line in method.left_out()[:1])
            raise UserError(f"{error}{why}") from None


Batches = Iterator[tuple[str, list[np.ndarray]]]
"""The name and the pictures of each row."""


def _counted(batches: Batches, tell: Callable[[], object]) -> Batches:
    for batch in batches:
        yield batch
        tell()


def _true_pictures(frozen: Frozen) -> Batches:
    """The true views of each object but the given one, over white."""
    from recon_torch.views.images import to_uint8

    for item in frozen.objects:
        rgb, _ = frozen.pictures(item)
        yield item.name, [to_uint8(each) for view, each in enumerate(rgb) if view != item.given]


def _pictures(frozen: Frozen | None, method: MethodOutputs) -> Batches:
    """The pictures of each row over white; against a truth from its cameras, without the given view."""
    from im3d_jax.evaluate import against_truth
    from im3d_jax.evaluate.outputs import pictures, reading
    from recon_torch.views.images import to_uint8

    if frozen is None:
        for row, views in reading.read_all(method, any_count=True):
            yield row.key, list(pictures.over_white(views))
        return
    for item, found in against_truth.read_all(frozen, method, against_truth.Settings(None)):
        yield item.name, [to_uint8(each) for view, each in enumerate(found.rgb) if view != item.given]


def _about(found: Sequence[Mapping[str, Any]], inception: Inception | None, clip: Clip | None) -> list[str]:
    """Remarks without which the numbers would mislead."""
    from im3d_jax.evaluate import distributions

    said = []
    fewest = min(min(each["num_pictures"], each["num_reference"]) for each in found)
    if inception is None:
        said.append("FID and KID are left out: there is no --inception.")
    elif fewest < distributions.FULL_RANK:
        said.append(
            f"FID of {fewest} pictures is biased upwards, the more the fewer there are: compare it at equal"
            " numbers alone, or take KID, which has no bias."
        )
    if clip is None:
        said.append("CMMD is left out: there is no --clip.")
    else:
        said.append(
            "CMMD is 1000 times the squared MMD of unit vectors with the kernel exp(-|x - y|^2 / 200)."
            " Published numbers are of ViT-L/14 at 336 px; of another CLIP they cannot be compared."
        )
    return said


def _table(found: Mapping[str, Any]) -> str:
    """The content of table.md."""
    from im3d_jax.evaluate import distance_differences, result_file, tables

    lines = [
        [each["method"], str(each["num_pictures"]), str(each["num_reference"]), *_cells(each)]
        for each in found["distances"]
    ]
    header = ["", "pictures", "of the reference", "FID ↓", "KID x 1000 ↓", "CMMD ↓"]
    said = (
        "KID: mean ± standard deviation over 100 subsets. In brackets the 95% interval, by a jackknife over"
        " groups of rows.\n"
    )
    sections = [result_file.table(header, lines), said]
    if found["differences"]:
        sections += ["## Differences\n", distance_differences.table(found["differences"])]
    return tables.page("Distances of distributions", sections, found["about"])


def _cells(each: Mapping[str, Any]) -> list[str]:
    fid, kid, cmmd = (each[name] for name in ("fid", "kid", "cmmd"))
    return [
        "-" if fid is None else f"{fid:.2f}{_interval(each, 'fid', '.2f')}",
        "-"
        if kid is None
        else f"{1000 * kid:.2f} ± {1000 * each['kid_std']:.2f}{_interval(each, 'kid', '.2f', 1000)}",
        "-" if cmmd is None else f"{cmmd:.3f}{_interval(each, 'cmmd', '.3f')}",
    ]


def _interval(each: Mapping[str, Any], name: str, form: str, scale: float = 1) -> str:
    if name not in each["intervals"]:
        return ""
    low, high = (scale * end for end in each["intervals"][name])
    return f" [{low:{form}}, {high:{form}}]"


def _write(found: dict[str, Any], out: Path) -> None:
    text = _table(found)
    files.write(out, FOUND, found, text)
    print(text)
    print(f"see {out / NAME} and table.md")


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("evaluate distribution", DESCRIPTION % method_flags.HELP)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("--reference", type=Path, required=True, metavar="DIR", help="a truth, or a directory of pictures")
    method_flags.add(parser)
    add("--inception", type=Path, metavar="FILE", help="weights of FID's Inception, .pth or .safetensors")
    add("--clip", type=Path, metavar="DIR", help="a CLIP in transformers' or open_clip's layout")
    add("--out", type=Path, required=True, metavar="DIR", help="directory for results.json and table.md")
    add("--seed", type=Flag(Seed), default=0, help="of the subsets of KID" + default)
    # fmt: on
    flags = parser.parse_args(argv)
    flags.methods = method_flags.sources(flags.methods)
    return flags
