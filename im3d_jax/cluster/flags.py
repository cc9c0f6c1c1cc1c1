"""The flags of `im3d batch` for a cluster. Importing this needs neither Ray nor JAX."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace

from recon_torch.errors import UserError
from recon_torch.ranges import real, whole

MAX_ACTORS = 100_000
LABEL = re.compile(r"[\w.-]+(/[\w.-]+)?=[\w.-]+", re.ASCII)

ONLY_WITH_RAY = ("actors", "gpus_per_actor", "cpus_per_actor", "node_labels", "asset_timeout_s", "patience_s")


def add(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("on a Ray cluster (docs/batch.md)")
    group.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="make the assets on a cluster: auto (default), local (one in this machine), or HOST:PORT",
    )
    group.add_argument(
        "--actors", metavar="MIN:MAX", help="how many; default: at least 1, and as many as there is room for"
    )
    group.add_argument("--gpus-per-actor", type=real(0, 64), metavar="X", help="such as 1 or 0.5 (default 0)")
    group.add_argument("--cpus-per-actor", type=whole(1, 4096), metavar="N", help="and threads (default 1)")
    group.add_argument(
        "--node-labels",
        metavar="KEY=VALUE,...",
        help="of its nodes, as ray.io/accelerator-type=H100",
    )
    group.add_argument(
        "--asset-timeout-s",
        type=real(above=0, most=1e7),
        metavar="S",
        help="end an actor that takes longer for an asset (default: ten times the median so far)",
    )
    group.add_argument(
        "--patience-s",
        type=real(above=0, most=1e7),
        metavar="S",
        help="give up if there are no actors for so long (default 600)",
    )


def check(flags: Namespace) -> None:
    """Raises UserError for flags that do not go together, or that say nothing that can be."""
    if flags.ray is None:
        given = [name for name in ONLY_WITH_RAY if getattr(flags, name) is not None]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} goes with --ray")
        return
    if flags.shard:
        raise UserError("--shard does not go with --ray, whose actors share all assets")
    if flags.ray.startswith("ray://"):
        raise UserError("--ray takes no ray:// address; run im3d in the cluster, as by `ray job submit`")
    if not (flags.ray in ("auto", "local") or re.fullmatch(r"[^\s/]+:\d{1,5}", flags.ray)):
        raise UserError(f"--ray is {flags.ray!r}; give auto, local, or HOST:PORT")
    actor_range(flags.actors)
    node_labels(flags.node_labels)


def actor_range(text: str | None) -> tuple[int, int]:
    """(least, most) of "4:64", "4:", ":64" or "64"; most is 0 if there is no limit."""
    if text is None:
        return 1, 0
    least, colon, most = text.partition(":")
    if not colon:
        least = most = text
    if not all(each == "" or (each.isascii() and each.isdecimal()) for each in (least, most)) or text in (
        "",
        ":",
    ):
        raise UserError(f"--actors is {text!r}; write MIN:MAX, as in 4:64, or one number")
    found = int(least or 1), int(most or 0)
    if not (1 <= found[0] <= MAX_ACTORS and found[1] <= MAX_ACTORS and (not most or found[0] <= found[1])):
        raise UserError(f"--actors is {text!r}; MIN is at least 1, and MAX from MIN to {MAX_ACTORS}")
    return found


def node_labels(text: str | None) -> dict[str, str]:
    """The labels of "KEY=VALUE,..."."""
    pairs = [each.strip() for each in (text or "").split(",") if each.strip()]
    for pair in pairs:
        if not LABEL.fullmatch(pair):
            raise UserError(f"--node-labels has {pair!r}; write KEY=VALUE, with commas between several")
    return dict(pair.split("=", 1) for pair in pairs)
