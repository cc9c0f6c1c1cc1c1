"""What a method's outputs are: their kind, where they lie, which way they are seen. One small YAML says it.

    name: syncdreamer             # how tables call the method; by default the file's own name
    preset: syncdreamer           # of `presets`; the entries below override it
    root: ../SyncDreamer/output   # relative to this file; by default its directory
    prompts: prompts.jsonl        # what was asked for, as `im3d batch` reads it; relative to this file
    kind: grid
    path: "{name}/{index}.png"
    grid: [1, 16]

Every entry but these first four is a field of `Layout`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml

from im3d_jax.evaluate.outputs import presets
from recon_torch.errors import UserError, near, quoted
from recon_torch.ranges import AzimuthDeg, ElevationDeg, NumViews, Pixels, Range, hints_of, settings, taken
from recon_torch.text_files import read_text

SUFFIXES = (".yaml", ".yml")
LONGEST_NAME = 40


class Kind(StrEnum):
    """What holds the views of a row."""

    IMAGES = "images"  # a picture for each view: a folder of them, or files with {view} in their names
    GRID = "grid"  # one picture, tiled with the views row by row
    VIDEO = "video"  # a turn of the camera
    GAUSSIANS = "gaussians"  # a .ply of 3DGS, or any other file of splats that docs/formats.md lists
    MESH = "mesh"  # .glb, .gltf, .obj, .ply or .stl
    ASSETS = "assets"  # a directory of `im3d generate` or `im3d batch`


class Shows(StrEnum):
    """What the pictures of a method are, because Table 1 has a row for either."""

    VIEWS = "views"  # what a network has synthesised
    RENDERS = "renders"  # of a 3D object that was made of them


class Up(StrEnum):
    """The axis of a file in 3D that is up."""

    STATED = ""  # what a file of Gaussians says, or else z; y of a mesh
    X, Y, Z = "x", "y", "z"
    MINUS_X, MINUS_Y, MINUS_Z = "-x", "-y", "-z"


IN_3D = (Kind.GAUSSIANS, Kind.MESH)
"""Kinds that are rendered here, from cameras on an orbit."""


@settings
class Layout:
    """How the outputs of a method lie on a disk.

    Attributes:
        path: patterns below the root, see `patterns`; of several, a row has the first that is there.
        num_views: of each row. A row with another number of pictures is left out. Of a video so many frames
            are taken, and of a 3D object so many views are rendered. By default the number that most rows
            have, and 16 of videos and 3D objects.
        picture: what a row was made from: a path below the root with fields of its pattern, such as
            "{index}.jpg".
        square: of pictures and frames that are wider than high, take the leftmost square alone.
        grid: rows and columns of a kind "grid". tiles: those that are views, counted from 0 row by row; by
            default all.
        azimuths_deg: of the views, counter-clockwise from above, 0 being the input; by default even.
        elevations_deg: one for all views, or one for each. For files in 2D they only say how the views were
            made; () is not known.
        fov_deg: vertical field of view; of files in 2D, 0 is not known.
        up: of files in 3D. size: the side of their renders, in pixels.
        network_calls, minutes: what one asset took, for the table; 0 is not known.
    """

    kind: Kind
    path: tuple[str, ...] = ()
    shows: Shows = Shows.RENDERS
    num_views: Annotated[int, Range(0, 1024)] = 0
    picture: str = ""
    square: bool = False
    grid: tuple[NumViews, ...] = ()
    tiles: tuple[Annotated[int, Range(0, 1023)], ...] = ()
    azimuths_deg: tuple[AzimuthDeg, ...] = ()
    elevations_deg: tuple[ElevationDeg, ...] = ()
    fov_deg: Annotated[float, Range(0, 170)] = 0.0
    up: Up = Up.STATED
    size: Pixels = 256
    network_calls: Annotated[int, Range(0, 10**9)] = 0
    minutes: Annotated[float, Range(0, 1_000_000)] = 0.0

    def __post_init__(self) -> None:
        if not self.path and self.kind != Kind.ASSETS:
            raise UserError(f'a layout of kind {self.kind} needs a path, such as "{{name}}/{{view}}.png"')
        if (len(self.grid) == 2) != (self.kind == Kind.GRID):
            raise UserError("grid is [rows, columns], of the kind grid alone")
        if self.kind == Kind.MESH and self.up not in (Up.STATED, Up.Y, Up.Z):
            raise UserError(f"up is {self.up}, and of meshes it is y or z")
        if self.tiles and (not self.grid or max(self.tiles) >= self.grid[0] * self.grid[1]):
            raise UserError(f"tiles {list(self.tiles)} are not of a grid of {list(self.grid)}")
        for name, count in self._counts().items():
            if count != self.stated_views:
                raise UserError(
                    f"{name} is of {count} views, and {next(iter(self._counts()))} of {self.stated_views}"
                )

    @property
    def stated_views(self) -> int:
        """The number of views that the layout states; 0 if it states none."""
        return next(iter(self._counts().values()), 0)

    def _counts(self) -> dict[str, int]:
        """How many views each field is of that tells."""
        tiles = len(self.tiles) or (self.grid[0] * self.grid[1] if self.grid else 0)
        elevations = len(self.elevations_deg) if len(self.elevations_deg) > 1 else 0  # one is of all views
        counts = {"num_views": self.num_views, "grid": tiles, "azimuths_deg": len(self.azimuths_deg)}
        return {name: count for name, count in {**counts, "elevations_deg": elevations}.items() if count}


class Source(NamedTuple):
    """A method that a user names. layout: None for one that is found by convention."""

    name: str
    root: Path
    layout: Layout | None = None
    prompts: Path | None = None


OWN = ("name", "preset", "root", "prompts")
"""Entries of a file that are not of its layout."""


def named(text: str, flag: str = "") -> Source:
    """The method of a flag: NAME=DIR, PRESET:NAME=DIR, a YAML file or NAME=FILE.yaml.

    It is no type of a parser, which would hide what is wrong with a YAML file.

    flag: stands before the text in an error.

    Raises UserError for another form, and for what is wrong in a YAML file.
    """
    name, equals, directory = text.partition("=")
    path = Path(directory if equals else text)
    if path.suffix in SUFFIXES:
        return read(path, name.strip() if equals else "")
    preset, colon, rest = name.rpartition(":")
    if not (equals and directory and rest.strip()):
        raise UserError(f"{flag}{quoted(text)} is not NAME=DIR, PRESET:NAME=DIR or a YAML file")
    return Source(checked_name(rest), path, made(preset, {}) if colon else None)


def read(path: Path, name: str = "") -> Source:
    """The method that a YAML file describes.

    name: to call it by, in place of what the file says.

    Raises UserError for what is no such file, an unknown entry or preset, and values that no layout takes.
    """
    try:
        content = yaml.load(read_text(path), _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f", line {line + 1}" if line is not None else ""
        raise UserError(f"{path}{place}: is not YAML ({getattr(error, 'problem', 'damaged')})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no YAML with entries such as `kind: images`; docs/evaluate.md shows one")
    known = (*OWN, *hints_of(Layout))
    if unknown := [each for each in content if each not in known]:
        hint = near(str(unknown[0]), known)
        raise UserError(f"{path}: unknown entry {quoted(unknown[0])}{hint}; there is {', '.join(known)}")
    own = {each: content.pop(each) for each in OWN if content.get(each) is not None}
    if wrong := [each for each in own if not isinstance(own[each], str) or not own[each].strip()]:
        raise UserError(f"{path}: {wrong[0]} is {quoted(own[wrong[0]])}; give text")
    try:
        layout = made(own.get("preset", ""), content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Source(
        checked_name(name or own.get("name") or path.stem),
        path.parent / own.get("root", "."),
        layout,
        path.parent / own["prompts"] if "prompts" in own else None,
    )


def checked_name(name: str) -> str:
    """The name of a method. Raises UserError for one that tables cannot have."""
    name = name.strip()
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise UserError(
            f"{quoted(name)} is no name of a method of at most {LONGEST_NAME} characters; give another"
        )
    return name


class _Loader(yaml.SafeLoader):
    """Refuses an entry that a file gives twice, of which PyYAML would keep the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice[0]!r} stands there twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def made(preset: str, content: dict[str, Any]) -> Layout | None:
    """The layout of a preset, with some fields overridden; None for neither."""
    fields = dict(content)
    if isinstance(fields.get("path"), str):
        fields["path"] = (fields["path"],)
    for name in ("azimuths_deg", "elevations_deg"):
        if type(fields.get(name)) in (int, float):
            fields[name] = (fields[name],)
    if preset:
        if preset not in presets.PRESETS:
            hint = near(preset, presets.PRESETS)
            raise UserError(f"unknown preset {quoted(preset)}{hint}; there is {', '.join(presets.PRESETS)}")
        fields = {**presets.PRESETS[preset].fields, **fields}
    if not fields:
        return None
    if "kind" not in fields:
        raise UserError(f"there is no kind; give one of {', '.join(Kind)}")
    hints = hints_of(Layout)
    return Layout(**{field: taken(value, hints[field], field) for field, value in fields.items()})
