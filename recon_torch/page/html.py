"""The page itself: HTML that holds the asset, the script that draws it, and the libraries of that script.

It makes no request: its Content-Security-Policy forbids them. What users wrote stands in it as JSON alone,
in which no tag can end.
"""

from __future__ import annotations

import base64
import functools
import gzip
import html
import json
from pathlib import Path
from string import Template

from recon_torch.files import replacing
from recon_torch.page import PAGE
from recon_torch.page.contents import Contents, read

HERE = Path(__file__).parent


def render(contents: Contents) -> str:
    """The page as text."""
    return Template(_resource("template.html")).substitute(
        title=html.escape(contents.title),
        style=_resource("style.css"),
        viewer=_resource("viewer.js"),
        libraries=_libraries(),
        asset=_json(contents),
    )


def write_beside(folder: Path, name: str) -> None:
    """Writes the page of an asset whose other files are written, as one of them.

    name: the title where there is no prompt.
    """
    write(read(folder, name), folder / PAGE)


def write(contents: Contents, path: str | Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(render(contents), encoding="utf-8", errors="replace")


def _json(contents: Contents) -> str:
    """What the script reads. "<" and "&" are escaped, so that no text ends the element or begins another."""
    rounds, mesh = contents.rounds, contents.mesh
    asset = {
        "title": contents.title,
        "verdict": contents.verdict,
        "facts": contents.facts,
        "notes": contents.notes,
        "ply": _base64(contents.ply),
        "numGaussians": contents.num_gaussians,
        "mesh": mesh and {"glb": _base64(mesh.glb), "scale": mesh.scale, "offset": mesh.offset.tolist()},
        "views": [
            {
                "c2w": view.c2w.ravel().tolist(),
                "fovDeg": view.fov_deg,
                "aspect": view.aspect,
                "picture": _png_url(view.picture),
            }
            for view in contents.views
        ],
        "rounds": rounds
        and {"sheet": _png_url(rounds.sheet), "rows": rounds.num_rows, "labels": rounds.labels},
    }
    return json.dumps(asset).replace("<", "\\u003c").replace("&", "\\u0026")


def _png_url(content: bytes) -> str:
    return f"data:image/png;base64,{_base64(content)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _resource(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@functools.cache
def _libraries() -> str:
    """Compressed, since they are three megabytes."""
    return _base64(gzip.compress(_resource("vendor/libraries.js").encode(), mtime=0))
