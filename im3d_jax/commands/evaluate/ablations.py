"""`im3d evaluate ablations`: the paper's Tables 2, 3 and 4 and Fig. 4 and 6 on a model, against truth."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from im3d_jax import config_flags
from im3d_jax.commands.evaluate import suite
from im3d_jax.evaluate import MAX_OBJECTS
from im3d_jax.evaluate.result_file import NAME, Bootstrap
from recon_torch import outputs
from recon_torch.errors import CommandParser
from recon_torch.files import replacing
from recon_torch.outputs import Kind
from recon_torch.ranges import Flag, Seed, whole

if TYPE_CHECKING:
    from im3d_jax.evaluate.ablations.measuring import Bench
    from im3d_jax.evaluate.ablations.rows import Ready
    from im3d_jax.evaluate.ablations.tables import Table

DESCRIPTION = """Makes assets of test objects by the rows of the paper's ablations, and scores them.

    im3d evaluate ablations --table 3 --table 4 --table fig4 --num-objects 6 --out out/ablations
    im3d evaluate ablations --table 2 --table fig6 --config.fit.lpips_weights=vgg16.pth --out out/losses
    im3d evaluate ablations --row "no SSIM: fit.w_ssim=0" --row "half: frames=8" --out out/own

Tables: 2 (terms of the loss, NeRF), 3 (fewer frames), 4 (calls of the network), fig4 (rounds), fig6 (LPIPS
and L2). A row is the config with other values for some entries. Rows are scored against true views from
azimuths between those of the turntable, and with --clip as the paper does.

Writes table.md, results.json, plots/ and sheets/ into OUT, the first two after each object. What an earlier
run has measured there is kept, so an interrupted run resumes with the row and object at which it ended, and
tables share the rows that they have in common. Remove OUT to measure everything anew."""

FOUND = Kind(
    "evaluate ablations",
    (
        r"table\.md",
        r"results\.json",
        r"(plots|sheets)/\w+\.png",
        r"cells/[0-9a-f]+/\d+\.(json|png)",
        r"videos/[0-9a-f]+/\d+\.npz",
    ),
    grows=True,
)
"""What the command writes into OUT."""


def main(argv: list[str]) -> None:
    flags, config = config_flags.parse(argv, _parser(), default="configs/tiny.py")
    suite.check_suite(flags)
    # Imported after the flags are parsed, so that --help and mistakes in flags do not wait for JAX.
    from im3d_jax.evaluate.ablations import drawing, rows

    tables = rows.chosen(flags.table, flags.row)
    ready = rows.ready(config, tables)
    drawing.check()
    with outputs.opened(flags.out, FOUND) as out:
        bench = _bench(config, flags, out)
        rows.check_lpips(ready, bench.perceptual.random_weights)
        _run(bench, config, tables, ready, Bootstrap(flags.resamples, flags.seed))


def _bench(config: ConfigDict, flags: Namespace, out: Path) -> Bench:
    from im3d_jax.evaluate.ablations.measuring import Bench
    from recon_torch.losses.lpips import PerceptualDistance

    objects = suite.load_objects(config, flags)
    perceptual = PerceptualDistance(config.fit.lpips_net, config.fit.lpips_weights)
    clip = None
    if flags.clip:
        from im3d_jax.data.clip import Clip  # torch and transformers take seconds

        clip = Clip(flags.clip, "--clip")
    protocol = {
        "objects": objects.about,
        "size": config.size,
        "num_views": config.num_views,
        "lpips": config.fit.lpips_net,
        "lpips_has_random_weights": perceptual.random_weights,
        "clip": clip.about() if clip else None,
        "seed": config.seed,
    }
    shared = config.num_views, config.size, config.seed, perceptual, protocol, clip, out
    return Bench(objects, flags.num_objects, *shared)


def _run(
    bench: Bench,
    config: ConfigDict,
    tables: Mapping[str, Table],
    ready: Mapping[str, Sequence[Ready]],
    bootstrap: Bootstrap,
) -> None:
    """Measures all rows, and writes what is known after each object."""
    from im3d_jax.evaluate import result_file
    from im3d_jax.evaluate.ablations import drawing, reporting

    def write() -> tuple[dict[str, Any], str]:
        digest = config_flags.config_digest(config)
        found = reporting.content(bench, tables, ready, bootstrap, digest, config)
        text = reporting.text(found, tables, ready)
        with replacing(bench.out / "table.md") as temporary:
            temporary.write_text(text)
        result_file.write(bench.out / NAME, found)
        return found, text

    bench.measure([each for some in ready.values() for each in some], write)
    found, text = write()
    drawing.write(bench, found, tables, ready)
    print(text)
    print(f"see {bench.out / NAME}, table.md, plots and sheets")


def _parser() -> CommandParser:
    parser = CommandParser("evaluate ablations", DESCRIPTION)
    suite.add_objects(parser)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("--table", action="append", default=[], metavar="NAME",
        help="2, 3, 4, fig4 or fig6; may be given several times")
    add("--row", action="append", default=[], metavar="'NAME: KEY=VALUE'",
        help="a row of your own, with entries of the config, and frames=N for a fit that sees N of the views;"
        " may be given several times, and is compared with the config as it is")
    add("--num-objects", type=whole(1, MAX_OBJECTS), default=24, metavar="N", help="test objects" + default)
    add("--clip", type=Path, metavar="DIR",
        help="a CLIP in transformers' or open_clip's layout, for the paper's scores; nothing is fetched")
    add("--out", type=Path, required=True, metavar="DIR", help="directory for tables, results and pictures")
    add("--resamples", type=whole(100, 1_000_000), default=10_000, metavar="N",
        help="of the bootstrap over objects" + default)
    add("--seed", type=Flag(Seed), default=0, help="of the bootstrap" + default)
    # fmt: on
    return parser
