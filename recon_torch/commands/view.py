"""`im3d view`: an asset in the browser: Gaussians, mesh, views and their cameras, rounds, report."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.outputs import Kind
from recon_torch.ranges import LOOPBACK, Flag, Port

DESCRIPTION = """Shows an asset in a browser: Gaussians, mesh, views with their cameras, rounds and report.

Serves the page of an asset, or those of all assets below a directory, until it is interrupted. --html writes
the page into a file instead, which needs neither a server nor a network.

    im3d view out/mushroom
    im3d view out/mushroom --html mushroom.html"""
PORT = 8080


def main(argv: list[str]) -> None:
    view(_parse(argv))


def view(flags: Namespace) -> None:
    """Writes the page or serves it."""
    from recon_torch.page import server  # with torch, which takes seconds, see `commands.render`

    if flags.html is not None:
        return _write(flags.asset, flags.html)
    pages = server.pages_of(flags.asset)
    listening = server.serve(pages, flags.host, flags.port)
    port = listening.server_address[1]
    print(f"http://{flags.host}:{port}/ shows {flags.asset}; Ctrl-C ends it", flush=True)
    with listening:
        listening.serve_forever()


def _write(asset: Path, file: Path) -> None:
    """Writes the page in place of one that was written before, and of no other file."""
    from recon_torch.page import contents, html

    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html {file} is no name of a page; give one such as page.html")
    ours = Kind("view", (re.escape(file.name),))
    outputs.check(file.parent, ours, [asset])
    shown = contents.read(asset)
    with outputs.opened(file.parent, ours, [asset]) as folder:
        outputs.put(folder, ours, file.name, lambda path: html.write(shown, path))
    size_mb = file.stat().st_size / 1e6
    what = f"{shown.num_gaussians} Gaussians" if shown.num_gaussians else "a mesh"
    print(f"{file}: {what}, {len(shown.views)} views, {size_mb:.1f} MB")


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("view", DESCRIPTION)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("asset", type=Path, metavar="ASSET", help="directory of one or several assets, or a file of splats")
    add("--html", type=Path, metavar="FILE", help="write the page into this file, and serve nothing")
    add("--host", default=LOOPBACK, help="the address to listen on, 0.0.0.0 for all" + default)
    add("--port", type=Flag(Port), default=PORT, help="the port, or 0 for one that is free" + default)
    # fmt: on
    return parser.parse_args(argv)
