"""Finds the rows of methods, and names what is left out and by which rule. No file is decoded here."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from im3d_jax.evaluate.outputs import assets, patterns
from im3d_jax.evaluate.outputs.assets import Cost
from im3d_jax.evaluate.outputs.layouts import SUFFIXES, Kind, Layout, Shows, Source
from im3d_jax.evaluate.outputs.names import PICTURES, VIDEOS, key_of, named
from im3d_jax.evaluate.outputs.patterns import Match
from im3d_jax.jobs import prompt_files
from recon_torch.errors import UserError
from recon_torch.text_files import read_text

MESHES, SPLATS = (".glb", ".gltf", ".obj", ".stl"), (".spz", ".sog", ".splat", ".ksplat")
PLY_HEADER_BYTES = 4096


class Rule(StrEnum):
    """Why something of a method is left out."""

    MISSING = "missing"  # asked for by the list of prompts, or made by another method of the run
    NOT_ASKED = "not asked for"  # a row that the list of prompts does not have
    DOUBLE = "double"  # a further seed, step or run of a prompt
    FAILED = "failed"  # a folder of an asset that is not whole
    STRANGE = "not of the layout"  # lies in the root, and no pattern names it
    NUM_VIEWS = "number of views"
    UNREADABLE = "unreadable"


class Excluded(NamedTuple):
    """Something that is left out. name: of the row, file or prompt."""

    name: str
    rule: Rule
    detail: str = ""


class Output(NamedTuple):
    """What a method has made of one prompt or object: a row.

    Attributes:
        key: what joins it to the rows of other methods: its prompt without case and punctuation.
        name: what the method calls it.
        prompt: "" if it is not known.
        paths: the files of its views in their order, or the single file or folder that holds them.
        picture: what it was made from, where there is one.
        config_digest: of an asset of im3d. cost: of it, in full.
    """

    key: str
    name: str
    prompt: str
    paths: tuple[Path, ...]
    picture: Path | None = None
    config_digest: str = ""
    cost: Cost = Cost()


@dataclass
class MethodOutputs:
    """The rows of a method by their keys.

    Attributes:
        name: of the method. layout: how its rows are read. root: where they are.
        excluded: what is left out. Whoever reads rows adds those that cannot be read.
    """

    name: str
    layout: Layout
    root: Path
    rows: dict[str, Output] = field(default_factory=dict)
    excluded: list[Excluded] = field(default_factory=list)

    @property
    def shows(self) -> Shows:
        return self.layout.shows

    @property
    def label(self) -> str:
        """What tables and result files call it: a method may have renders and views of its own."""
        return f"{self.name}, {self.shows}"

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of all rows: keys, prompts, files, and pictures that they were made from."""
        sha = hashlib.sha256()
        for row in self.rows.values():
            sha.update(f"{row.key}\n{row.prompt}\n".encode("utf-8", "backslashreplace"))
            for path in (*row.paths, *([row.picture] if row.picture else [])):
                for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                    if file.is_file():
                        with file.open("rb") as opened:
                            sha.update(
                                os.fsencode(file.name) + hashlib.file_digest(opened, "sha256").digest()
                            )
        return sha.hexdigest()

    @property
    def cost(self) -> Cost:
        """What an asset took: the mean of those that say it, or what the layout states."""
        stated = Cost(self.layout.network_calls, self.layout.minutes)
        told = zip(*(row.cost for row in self.rows.values()), strict=True)
        means = [fmean(known) if (known := [each for each in of if each]) else 0.0 for of in told]
        return Cost(*(mean or state for mean, state in zip(means or stated, stated, strict=True)))

    def exclude(self, row: Output, rule: Rule, detail: str) -> None:
        """Takes a row out, for a reason."""
        del self.rows[row.key]
        self.excluded.append(Excluded(row.name, rule, detail))

    def about(self) -> dict[str, Any]:
        """What a result file says of the method."""
        return {
            "name": self.label,
            "shows": str(self.shows),
            "kind": str(self.layout.kind),
            "path": list(self.layout.path),
            "root": str(self.root),
            "inputs_digest": self.digest,
            "config_digests": sorted({row.config_digest for row in self.rows.values() if row.config_digest}),
            "num_rows": len(self.rows),
            **{name: value or None for name, value in self.cost._asdict().items()},
            "excluded": [{**each._asdict(), "rule": str(each.rule)} for each in self.excluded],
        }

    def left_out(self) -> list[str]:
        """What is left out: a line for each rule, with why the first of its names is."""
        by_rule = defaultdict(list)
        for each in self.excluded:
            by_rule[each.rule].append(each)
        lines = []
        for rule, those in by_rule.items():
            line = f"{self.label}: left out, {rule}: {named([each.name for each in those], 'name')}"
            lines.append(line + (f"; {those[0].name}: {those[0].detail}" if those[0].detail else ""))
        return lines


# ---- Lists of prompts ----


@dataclass(frozen=True)
class Asked:
    """One entry of a list of prompts. names: the keys that stand for it, of its prompt and of its picture."""

    key: str
    prompt: str
    picture: Path | None
    names: frozenset[str]


def read_prompts(path: Path) -> list[Asked]:
    """The entries of a list of prompts. Raises UserError as `prompt_files.read` does, and for doubles."""
    entries = prompt_files.read(path, find_images=False)
    pictures = [Path(entry.images[0]) if entry.images else None for entry in entries]
    stems = [key_of(picture.stem.replace("_", " ")) if picture else "" for picture in pictures]
    keys = [
        key_of(each.prompt) if each.prompt.strip() else stem
        for each, stem in zip(entries, stems, strict=True)
    ]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise UserError(
            f"prompts {path}: {named(twice, 'prompt')} stand there more than once; leave one of each"
        )
    counts, asked = Counter(stems), list[Asked]()
    for entry, picture, stem, key in zip(entries, pictures, stems, keys, strict=True):
        tells = counts[stem] == 1 and stem not in keys  # pictures may all be called rgba.png
        names = frozenset({key, stem} if stem and tells else {key})
        there = picture if picture and picture.is_file() else None
        asked.append(Asked(key, entry.prompt.strip(), there, names))
    return asked


# ---- Finding ----


def find(source: Source, asked: Sequence[Asked] = ()) -> list[MethodOutputs]:
    """The outputs of a method: one for each thing that it shows, renders or synthesised views.

    asked: the list of prompts, unless the source names its own. Rows that it does not have are left out, and
        what it has and the method does not is named as missing.

    Raises UserError if there is no directory, or nothing in it.
    """
    if not source.root.is_dir():
        raise UserError(f"{source.name}: {source.root} is no directory; give the outputs of a method")
    asked = read_prompts(source.prompts) if source.prompts else asked
    try:
        layout = source.layout or by_convention(source)
        is_own = layout.kind == Kind.ASSETS
        found = _assets(source, layout) if is_own else [_files(source, layout, asked)]
    except OSError as error:
        raise UserError(f"{source.name}: {error.filename} cannot be read ({error.strerror})") from None
    for outputs in found:
        if asked:
            _join(outputs, asked)
    if not any(outputs.rows for outputs in found):
        pattern = " or ".join(layout.path) or "assets of im3d"
        said = "; ".join(found[0].left_out()[:1]) if found else ""
        raise UserError(
            f"{source.name}: nothing is left in {source.root} of {pattern}{said and f' ({said})'}"
        )
    return [outputs for outputs in found if outputs.rows]


CONVENTIONS = (
    Layout(Kind.IMAGES, ("{prompt}",)),
    Layout(Kind.VIDEO, tuple(f"{{prompt}}{suffix}" for suffix in VIDEOS)),
    Layout(Kind.VIDEO, ("{prompt}/turntable.mp4", "{prompt}/turntable.gif")),
    Layout(Kind.GAUSSIANS, tuple(f"{{prompt}}{suffix}" for suffix in (".ply", *SPLATS))),
    Layout(Kind.MESH, tuple(f"{{prompt}}{suffix}" for suffix in (*MESHES, ".ply"))),
    Layout(Kind.MESH, tuple(f"{{prompt}}/mesh{suffix}" for suffix in (*MESHES, ".ply"))),
    Layout(Kind.IMAGES, tuple(f"{{prompt}}{suffix}" for suffix in PICTURES)),
)
"""What is tried on a directory that no file describes and that is not of im3d."""


def by_convention(source: Source) -> Layout:
    """The layout that finds most rows, and of equal ones the first. Raises UserError if none finds any.

    Names that are all numbers are no prompts, but places in the list of prompts.
    """
    if assets.is_there(source.root):
        return Layout(Kind.ASSETS)
    found = [{match.fields["prompt"] for _, match in _matches(source.root, each)} for each in CONVENTIONS]
    most = max(found, key=len)
    if most:
        layout = CONVENTIONS[found.index(most)]
        field_name = "{index}" if all(name.isdecimal() and name.isascii() for name in most) else "{prompt}"
        return replace(layout, path=tuple(each.replace("{prompt}", field_name) for each in layout.path))
    raise UserError(
        f"{source.name}: {source.root} has no assets of im3d, folders of pictures, videos, meshes or splats;"
        " describe it by a YAML file, as docs/evaluate.md shows"
    )


def _matches(root: Path, layout: Layout) -> Iterator[tuple[int, Match]]:
    """What is there, and the number of the first pattern that names it."""
    seen = set[Path]()
    for number, pattern in enumerate(layout.path):
        patterns.check(pattern)
        for match in patterns.matches(root, pattern):
            if match.path not in seen and _is_of_kind(match, pattern, layout.kind):
                seen.add(match.path)
                yield number, match


def _is_of_kind(match: Match, pattern: str, kind: Kind) -> bool:
    path = match.path
    if kind == Kind.IMAGES and path.is_dir():
        return "{view}" not in pattern.rpartition("/")[2] and bool(pictures_in(path))
    if not path.is_file():
        return False
    if kind in (Kind.IMAGES, Kind.GRID):
        return path.suffix.lower() in PICTURES
    if path.suffix.lower() == ".ply":
        return _has_splats(path) == (kind == Kind.GAUSSIANS)
    return True


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder, in natural order: view 9 comes before view 10."""
    found = [each for each in folder.iterdir() if each.suffix.lower() in PICTURES and each.name[0] != "."]
    return sorted(found, key=lambda path: patterns.natural(path.name))


def _has_splats(path: Path) -> bool:
    """Whether a .ply holds Gaussians rather than a mesh."""
    with path.open("rb") as file:
        head = file.read(PLY_HEADER_BYTES)
    return b"property float f_dc_0" in head or b"packed_position" in head


class _Run(NamedTuple):
    """One of several things that a method has made of one prompt. pattern: which of the layout's names it."""

    pattern: int
    seed: int
    step: int
    path: str


def _files(source: Source, layout: Layout, asked: Sequence[Asked]) -> MethodOutputs:
    """The rows that the patterns of a layout find."""
    outputs = MethodOutputs(source.name, layout, source.root)
    by_row: dict[str, dict[_Run, list[Match]]] = defaultdict(lambda: defaultdict(list))
    used = set()
    for number, match in _matches(source.root, layout):
        used.add(match.path.relative_to(source.root).parts[0])
        run = _Run(number, match.number("seed"), match.number("step"), match.run)
        by_row[_identity(match)][run].append(match)
    _check_places(source, (match.fields for runs in by_row.values() for [match, *_] in runs.values()), asked)
    for runs in by_row.values():
        first, *others = _in_order(runs)
        row = _row(source.root, runs[first], layout, asked)
        if row.key in outputs.rows:
            outputs.excluded.append(Excluded(row.name, Rule.DOUBLE, f"of {outputs.rows[row.key].name}"))
            continue
        outputs.rows[row.key] = row
        outputs.excluded += [Excluded(shown(each.path), Rule.DOUBLE, f"of {row.name}") for each in others]
    outputs.excluded += _strange(outputs, used)
    return outputs


def _check_places(source: Source, rows: Iterable[dict[str, str]], asked: Sequence[Asked]) -> None:
    """Raises UserError for numbers that count the prompts from 1: all rows would have their neighbours'."""
    places = {int(fields["index"]) for fields in rows if not fields.keys() & {"name", "prompt"}}
    if asked and places and 0 not in places and max(places) >= len(asked):
        raise UserError(
            f"{source.name}: its numbers go from {min(places)} to {max(places)}, and those of {len(asked)}"
            f" prompts from 0 to {len(asked) - 1}; number the files from 0, or name them by their prompts"
        )


def _strange(outputs: MethodOutputs, used: set[str]) -> list[Excluded]:
    """What lies in the root but rows, files of their names (prompts, textures), pictures, descriptions."""
    stems = {Path(name).stem for name in used} | used
    pictures = {row.picture.name for row in outputs.rows.values() if row.picture}
    return [
        Excluded(shown(path.name), Rule.STRANGE)
        for path in sorted(outputs.root.iterdir())
        if not (path.name in used | pictures or path.stem in stems or path.suffix in SUFFIXES)
        and path.name[0] != "."
    ]


def _identity(match: Match) -> str:
    return "\0".join(f"{name}={match.fields[name]}" for name in patterns.IDENTITY if name in match.fields)


def _in_order(runs: Iterable[_Run]) -> list[_Run]:
    """The runs of a row; the first one is used. Of equal seeds and steps it is the last by its path."""
    newest = sorted(runs, key=lambda run: patterns.natural(run.path), reverse=True)
    return sorted(newest, key=lambda run: (run.pattern, run.seed, -run.step))


def _row(root: Path, matches: list[Match], layout: Layout, asked: Sequence[Asked]) -> Output:
    """A row of the files of one run."""
    fields, path = matches[0].fields, matches[0].path
    ordered = sorted(matches, key=lambda match: match.number("view"))
    paths = [match.path for match in ordered]
    if layout.kind == Kind.IMAGES and path.is_dir():
        paths = pictures_in(path)
    said = shown(fields.get("prompt") or fields.get("name") or "")
    text = " ".join(said.replace("_", " ").split())
    beside = _prompt_file(path)
    prompt = read_text(beside).strip() if beside.is_file() else text if "prompt" in fields else ""
    entry = _asked_for(fields, [key_of(prompt), key_of(text)], asked)
    name, own = said or f"number {int(fields['index'])}", _picture(root, layout, fields)
    if entry:
        return Output(entry.key, name, entry.prompt, tuple(paths), entry.picture or own)
    return Output(key_of(prompt or text or name), name, prompt, tuple(paths), own)


def shown(name: str) -> str:
    """The name of a file as text: one that is not UTF-8 has marks for what cannot be shown."""
    return name.encode("utf-8", "replace").decode()


def _prompt_file(path: Path) -> Path:
    """Where the prompt of a row may stand: NAME.txt beside NAME.mp4 or the folder NAME."""
    return path.with_name(f"{path.name if path.is_dir() else path.stem}.txt")


def _picture(root: Path, layout: Layout, fields: dict[str, str]) -> Path | None:
    """What a row was made from, if its layout says where that is, and it is there."""
    name = layout.picture
    for field_name, value in fields.items():
        name = name.replace(f"{{{field_name}}}", value)
    return root / name if name and (root / name).is_file() else None


def _asked_for(fields: dict[str, str], keys: Iterable[str], asked: Sequence[Asked]) -> Asked | None:
    """The entry of the list of prompts that a row is of."""
    if "prompt" not in fields and "name" not in fields:
        number = int(fields["index"])
        return asked[number] if number < len(asked) else None
    return next((each for key in keys for each in asked if key in each.names), None)


def _assets(source: Source, layout: Layout) -> list[MethodOutputs]:
    """What im3d has made: renders of assets, and the views of the last round where they were saved."""
    found = {
        shows: MethodOutputs(source.name, assets.layout_of(layout, shows), source.root) for shows in Shows
    }
    for asset in assets.read(source.root):
        for shows, outputs in found.items():
            if asset.problem:
                outputs.excluded.append(Excluded(asset.name, Rule.FAILED, asset.problem))
            elif paths := asset.pictures[shows]:
                key = key_of(asset.prompt or asset.name)
                if key in outputs.rows:
                    outputs.excluded.append(Excluded(asset.name, Rule.DOUBLE, f"of {outputs.rows[key].name}"))
                else:
                    about = asset.picture, asset.config_digest, asset.cost
                    row = Output(key, asset.name, asset.prompt, paths, *about)
                    # What an asset took is more than what its views did.
                    outputs.rows[key] = row if shows == Shows.RENDERS else row._replace(cost=Cost())
            elif shows == Shows.RENDERS:
                outputs.excluded.append(Excluded(asset.name, Rule.FAILED, "no images"))
    views, renders = found[Shows.VIEWS], found[Shows.RENDERS]
    if views.rows:  # views are saved on request; where some assets have them, the others lack them
        views.excluded += [
            Excluded(row.name, Rule.MISSING, "no views_N; make it with --save-views")
            for key, row in renders.rows.items()
            if key not in views.rows
        ]
    return [renders, views]


def _join(outputs: MethodOutputs, asked: Sequence[Asked]) -> None:
    """Brings rows to the order of a list of prompts, with the prompts and pictures that it has."""
    joined: dict[str, Output] = {}
    for entry in asked:
        row = next((row for key, row in outputs.rows.items() if key in entry.names), None)
        if row is None:
            outputs.excluded.append(Excluded(entry.prompt or entry.key, Rule.MISSING))
            continue
        del outputs.rows[row.key]
        picture = entry.picture or row.picture
        joined[entry.key] = row._replace(key=entry.key, prompt=entry.prompt or row.prompt, picture=picture)
    outputs.excluded += [Excluded(row.name, Rule.NOT_ASKED) for row in outputs.rows.values()]
    outputs.rows = joined


def name_missing(methods: Sequence[MethodOutputs]) -> None:
    """Names as missing what one method has and another has not, where no list of prompts tells."""
    for shows in Shows:
        alike = [each for each in methods if each.shows == shows]
        every = {key: row for each in alike for key, row in each.rows.items()}
        for each in alike:
            known = {key_of(out.name) for out in each.excluded}
            each.excluded += [
                Excluded(row.prompt or row.name, Rule.MISSING)
                for key, row in every.items()
                if key not in each.rows and key not in known
            ]
