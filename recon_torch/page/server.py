"""A server of pages for one's own browser: those of assets, made when asked for, and a list of them."""

from __future__ import annotations

import html
import ipaddress
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from recon_torch.asset_files import ASSET, MESH_REPORT
from recon_torch.errors import UserError, first_line
from recon_torch.page import contents
from recon_torch.page.html import render

MAX_DEPTH = 3  # of the directories in which assets are looked for
Pages = dict[str, Callable[[], str]]
"""The pages by the paths of their addresses. Nothing else is served, so no address can name a file."""


def pages_of(source: Path) -> Pages:
    """The page of an asset; or those of all assets below a directory, and a list of them.

    Raises:
        UserError: there is no asset.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; give the directory of an asset, or of several")
    if source.is_file() or contents.is_asset(source) or (source / MESH_REPORT).is_file():
        contents.read(source)  # what cannot be shown is said before anybody asks for it
        return {"/": lambda: render(contents.read(source))}
    folders = _assets_below(source, MAX_DEPTH)
    if not folders:
        raise UserError(f"{source} has no {ASSET}, nor has a directory in it; give that of an asset")
    if len(folders) == 1:
        return pages_of(folders[0])
    names = [folder.relative_to(source).as_posix() for folder in folders]
    pages: Pages = {"/": lambda: _list(source, names)}
    for name, folder in zip(names, folders, strict=True):
        pages[f"/{name}"] = lambda folder=folder: render(contents.read(folder))  # type: ignore[misc]
    return pages


def _assets_below(folder: Path, depth: int) -> list[Path]:
    found = []
    for each in sorted(each for each in folder.iterdir() if each.is_dir() and not each.is_symlink()):
        if contents.is_asset(each):
            found.append(each)
        elif depth > 1:
            found += _assets_below(each, depth - 1)
    return found


def _list(source: Path, names: list[str]) -> str:
    links = "\n".join(f'<li><a href="/{quote(name)}">{html.escape(name)}</a></li>' for name in names)
    title = html.escape(f"{len(names)} assets in {source}")
    head = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    head += '<link rel="icon" href="data:,">'  # or browsers ask for one, in vain
    return f"{head}<h1>{title}</h1><ul>{links}</ul></html>"


def serve(pages: Pages, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens; its caller runs `serve_forever`.

    port: 0 for one that is free.

    Raises:
        UserError: the address cannot be had.
    """

    class Handler(_Handler):
        served, is_local = pages, _is_loopback(host)

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {first_line(error)}; give --host and --port"
        ) from None


class _Handler(BaseHTTPRequestHandler):
    served: Pages
    is_local: bool

    def do_GET(self) -> None:  # noqa: N802 (the name that http.server calls)
        """Answers with a page. One that listens on this machine alone answers to no other name of it."""
        host = (self.headers.get("Host") or "").rpartition(":")[0] or (self.headers.get("Host") or "")
        if self.is_local and not _is_loopback(host.strip("[]")):
            return self._answer(HTTPStatus.FORBIDDEN, "this server is for the machine it runs on")
        page = self.served.get(unquote(urlsplit(self.path).path))
        if page is None:
            return self._answer(HTTPStatus.NOT_FOUND, "there is no such page")
        try:
            self._answer(HTTPStatus.OK, page())
        except UserError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, html.escape(str(error)))

    def _answer(self, status: HTTPStatus, text: str) -> None:
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing: the terminal is the user's."""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
