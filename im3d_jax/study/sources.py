"""The outputs of a method: its turntables, by what they were made from.

They are found as `im3d evaluate` finds them. Assets of im3d have their turntable.mp4; of any other method the
videos are shown, or its pictures as the frames of one.

Turntables of several methods belong together if their prompts are equal but for case and punctuation, where
an asset's prompt is that of its report.json, and any other's is its name. So `a_red_mug.mp4` belongs to the
asset of "A red mug".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from im3d_jax.evaluate.outputs import assets, finding, layouts, pictures
from im3d_jax.evaluate.outputs.layouts import IN_3D, Kind, Layout
from im3d_jax.evaluate.outputs.names import VIDEOS, key_of, named
from recon_torch.errors import UserError

LONGEST_PROMPT = 1000


@dataclass(frozen=True)
class Turntable:
    """A turntable of a method.

    Attributes:
        text: its prompt.
        paths: of a video, or of the pictures that are its frames.
        picture: that it was made from, if there is one.
        layout: of its files; None for a video as it is.
        num_views: how many pictures it must have.
    """

    text: str
    paths: tuple[Path, ...]
    picture: Path | None = None
    layout: Layout | None = None
    num_views: int = 0


@dataclass
class Source:
    """A method. turntables: by their keys; left_out: sentences on what of its directory is not used."""

    name: str
    turntables: dict[str, Turntable] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def read(source: layouts.Source) -> Source:
    """Raises UserError if there is no turntable, and for files in 3D, of which there are no videos."""
    if not source.root.is_dir():
        raise UserError(
            f"{source.name}: {source.root} is no directory; give NAME=DIR with the outputs of a method"
        )
    is_own = source.layout.kind == Kind.ASSETS if source.layout else assets.is_there(source.root)
    return _of_assets(source) if is_own else _of_files(source)


def _of_assets(source: layouts.Source) -> Source:
    found, doubles, failed = Source(source.name), [], []
    for asset in assets.read(source.root):
        text = asset.prompt or asset.name.replace("_", " ")
        if asset.problem or asset.turntable is None:
            failed.append(asset.name)
        elif key_of(text) in found.turntables:
            doubles.append(text)
        else:
            found.turntables[key_of(text)] = Turntable(shortened(text), (asset.turntable,), asset.given)
    if failed:
        found.left_out.append(f"{source.name} has {named(failed, 'folder')} without a whole asset")
    if doubles:
        found.left_out.append(
            f"{source.name} has {named(doubles, 'further turntable')} of prompts that it has already; "
            "the one of the least seed is used"
        )
    if beside := list(_videos_beside(source.root)):
        found.left_out.append(f"{source.name} has {named(beside, 'video')} beside its assets")
    if not found.turntables:
        raise UserError(f"{source.name}: {source.root} has no whole asset of im3d ({found.left_out[0]})")
    return found


def _videos_beside(root: Path) -> Iterator[str]:
    for path in sorted(root.iterdir()):
        if path.suffix.lower() in VIDEOS and path.name not in assets.TURNTABLES and path.name[0] != ".":
            yield path.name


def _of_files(source: layouts.Source) -> Source:
    (outputs,) = finding.find(source)
    layout = outputs.layout
    if layout.kind in IN_3D:
        raise UserError(
            f"{source.name}: {source.root} has files in 3D, and a study shows videos; render them first, such"
            " as by `im3d render`"
        )
    count = pictures.expected_views(outputs)
    found = Source(source.name)
    for row in outputs.rows.values():
        text = shortened(row.prompt or row.name)
        found.turntables[row.key] = Turntable(text, row.paths, row.picture, layout, count)
    found.left_out += outputs.left_out()
    return found


def shortened(text: str) -> str:
    """As a single line that UTF-8 can hold."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= LONGEST_PROMPT else line[:LONGEST_PROMPT] + "..."
