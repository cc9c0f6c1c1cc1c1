"""`im3d dataset select`: which rendered objects a data set takes, by rules and by CLIP (Sec. 3.1)."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from im3d_jax.commands.dataset.progress import check_flags, progress
from im3d_jax.data import building, views
from im3d_jax.data.clip import Clip
from im3d_jax.data.measured import Measured, MeasuredFile
from im3d_jax.data.selection import Candidate, Measures, Rule, Thresholds, Verdict, measure, select
from recon_torch import outputs
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import replacing, write_json
from recon_torch.outputs import Kind
from recon_torch.ranges import BatchSize, Flag, NumViews, Share, real, whole
from recon_torch.views.images import contact_sheet, to_uint8, write_image
from recon_torch.views.resizing import resize

DESCRIPTION = """Selects the rendered objects that are worth training on.

    im3d dataset select --views data/views --out selected
    im3d dataset select --views data/views --model models/clip-vit-base-patch32 --keep 0.5 --out selected
    im3d dataset build --views data/views --selection selected/selection.json --out data/turntables

Rules leave out objects that are empty, faint on white, as thin as a sheet, or near-duplicates of another.
With --model, a CLIP from a local directory in the layout of transformers, every object gets a score: 100
times the cosine between its caption and a view, in the mean over some views. --keep takes the best share of
the objects that the rules leave, --min-score those above a threshold; without either, all of them are kept.

--out gets selection.json (the names that are kept), scores.csv (every object, with what was measured, and the
rule by which it is left out), sheet.png (the best and the worst objects, and some that each rule leaves out),
and a file of measurements, so that the command goes on where it stopped and other thresholds cost no time.
"""

SHEET_VIEWS, SHEET_PX = 4, 96

SELECTION = Kind(
    "dataset select",
    (r"selection\.json", r"scores\.csv", r"sheet\.png", r"measured-[0-9a-f]{12}\.jsonl"),
    grows=True,
)
"""What the command writes into --out."""


class Loaded(NamedTuple):
    """An object that was read. pictures: the views for CLIP; problem: why it could not be read, or ""."""

    name: str
    source: str = ""
    caption: str = ""
    mesh: str = ""
    measures: Measures | None = None
    pictures: list[np.ndarray] | None = None
    problem: str = ""


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    directories = views.find_objects(flags.views)
    with outputs.opened(flags.out, SELECTION):
        _select(directories, flags)


def _select(directories: list[Path], flags: Namespace) -> None:
    clip = Clip(flags.model) if flags.model else None
    candidates, captions = _candidates(directories, clip, flags)
    limits = Thresholds(**{name: getattr(flags, name) for name in Thresholds._fields})
    verdicts = select(candidates, limits, needs_caption=clip is not None)
    rows = list(zip(candidates, verdicts, strict=True))
    if clip:
        rows.sort(key=lambda row: -(row[0].score or 0.0))
    counts = Counter(str(verdict.rule) if verdict.rule else "kept" for verdict in verdicts)
    settings = {**limits._asdict(), "model": clip and clip.path.resolve().name}
    settings |= {"model_sha256": clip and clip.digest, "views_per_object": flags.views_per_object}
    _write_table(flags.out / "scores.csv", rows, captions)
    _write_sheet(flags.out / "sheet.png", rows, flags)
    names = sorted(candidate.name for candidate, verdict in rows if verdict.rule is None)
    if not names:
        raise UserError(f"no object is left of {len(rows)}; {flags.out / 'scores.csv'} says why")
    write_json(flags.out / "selection.json", {"names": names, "counts": counts, "settings": settings})
    others = ", ".join(f"{counts[rule]} {rule}" for rule in Rule if counts[rule])
    print(
        f"{flags.out}: {counts['kept']} of {len(rows)} objects are kept" + (f"; {others}" if others else "")
    )


# ---- Measuring ----


def _candidates(
    directories: list[Path], clip: Clip | None, flags: Namespace
) -> tuple[list[Candidate], dict[str, tuple[str, bool]]]:
    """The objects with what is measured of them; their captions, and whether CLIP cut these off."""
    setting = json.dumps([1, clip.digest if clip else "", flags.views_per_object if clip else 0])
    cache = flags.out / f"measured-{hashlib.sha256(setting.encode()).hexdigest()[:12]}.jsonl"
    candidates, captions = [], {}
    with MeasuredFile(cache) as file:

        def load(directory: Path) -> Loaded:
            return _load(directory, file.found, clip is not None, flags)

        loaded = progress(building.read_ahead(directories, load), len(directories))
        for each, measured in _measured(loaded, clip, file, flags):
            candidates.append(_as_candidate(each, measured))
            captions[each.name] = each.caption, measured is not None and measured.cut_off
    cut = [name for name, (_, is_cut) in captions.items() if is_cut]
    if cut and clip:
        many = f"{len(cut)} captions are longer than the {clip.max_tokens} tokens that CLIP reads"
        print(f"im3d: {many}, and are cut off, as that of {cut[0]}", file=sys.stderr)
    return candidates, captions


def _load(directory: Path, found: Mapping[str, Measured], with_pictures: bool, flags: Namespace) -> Loaded:
    """Reads and measures an object, unless what was measured before is of the same source."""
    name = directory.relative_to(flags.views).as_posix()
    try:
        metadata = views.read_metadata(directory)
        source = views.source_digest(directory, name)
        known = Loaded(name, source, metadata.get("caption", ""), str(metadata.get("mesh_sha256", "")))
        if name in found and found[name].source == source:
            return known
        rgb, alpha = views.read_views(directory)
    except (views.Unfit, UserError) as error:
        return Loaded(name, problem=str(error))
    count = min(flags.views_per_object, len(rgb))
    chosen = [at * len(rgb) // count for at in range(count)]
    pictures = list(to_uint8(rgb[chosen])) if with_pictures else None
    return known._replace(measures=measure(rgb, alpha), pictures=pictures)


def _measured(
    loaded: Iterator[Loaded], clip: Clip | None, file: MeasuredFile, flags: Namespace
) -> Iterator[tuple[Loaded, Measured | None]]:
    """The objects with their lines, of which new ones are added to the file; None for what is unreadable."""
    together = max(1, flags.batch_size // flags.views_per_object)
    while chunk := list(itertools.islice(loaded, together)):
        new = [each for each in chunk if each.measures]
        for each, scored in zip(new, _scored(new, clip), strict=True):
            assert each.measures is not None
            file.add(Measured(each.name, each.source, each.measures, *scored))
        for each in chunk:
            yield each, None if each.problem else file.found[each.name]


def _scored(
    objects: Sequence[Loaded], clip: Clip | None
) -> list[tuple[float | None, Float[np.ndarray, " d"] | None, bool]]:
    """(score, embedding, whether the caption was cut off) of each object, as `Measured` has them."""
    if clip is None or not objects:
        return [(None, None, False) for _ in objects]
    pictures = [picture for each in objects for picture in each.pictures or []]
    vectors = iter(clip.embed_pictures(pictures))
    texts, cut_off = clip.embed_captions([each.caption for each in objects])
    made: list[tuple[float | None, Float[np.ndarray, " d"] | None, bool]] = []
    for each, text, cut in zip(objects, texts, cut_off, strict=True):
        mean = np.mean(list(itertools.islice(vectors, len(each.pictures or []))), axis=0)
        score = float(100 * mean @ text) if each.caption else None
        made.append((score, mean / max(float(np.linalg.norm(mean)), 1e-9), bool(cut)))
    return made


def _as_candidate(each: Loaded, measured: Measured | None) -> Candidate:
    if measured is None:
        return Candidate(each.name, None, problem=each.problem)
    score, embedding = measured.score, measured.embedding
    return Candidate(each.name, measured.measures, bool(each.caption), each.mesh, score, embedding)


# ---- Results ----


def _write_table(
    path: Path, rows: Sequence[tuple[Candidate, Verdict]], captions: Mapping[str, tuple[str, bool]]
) -> None:
    """Writes scores.csv: every object, the best ones first if they have scores."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        columns = ["name", "kept", "rule", "detail", "score", "coverage", "thinnest", "contrast"]
        table.writerow([*columns, "caption", "caption_cut_off"])
        for candidate, (rule, detail) in rows:
            measures, score = candidate.measures, candidate.score
            shown: list[Any] = ["" if score is None else f"{score:.3f}"]
            shown += [f"{value:.4f}" for value in measures[:3]] if measures else [""] * 3
            caption, cut_off = captions[candidate.name]
            is_kept, is_cut = ("yes" if each else "no" for each in (rule is None, cut_off))
            table.writerow([candidate.name, is_kept, rule or "", detail, *shown, caption, is_cut])


def _write_sheet(path: Path, rows: Sequence[tuple[Candidate, Verdict]], flags: Namespace) -> None:
    """Draws some objects of both ends of the scores, and some that each rule leaves out."""
    scored = [row for row in rows if row[0].score is not None and row[1].rule in (None, Rule.LOW_SCORE)]
    ends = scored or [row for row in rows if row[1].rule is None]
    count = flags.sheet_objects
    shown = [("best" if scored else "kept", row) for row in ends[:count]]
    shown += [("worst", row) for row in ends[count:][-count:]] if scored else []
    for rule in Rule:
        left_out = [row for row in rows if row[1].rule == rule and rule != Rule.LOW_SCORE]
        shown += [(str(rule), row) for row in left_out[:count] if row[0].measures]
    pictures, labels = [], []
    for label, (candidate, _) in shown:
        try:
            rgb = views.read_pictures(flags.views / candidate.name, SHEET_VIEWS)
        except views.Unfit:  # it was removed since it was measured
            continue
        pictures.append(np.stack([resize(picture, SHEET_PX, SHEET_PX) for picture in rgb]))
        score = "" if candidate.score is None else f" {candidate.score:.1f}"
        labels.append(f"{label}{score}  {candidate.name[-28:]}")
    if pictures:
        write_image(path, contact_sheet(pictures, labels))


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("dataset select", DESCRIPTION)
    default = Thresholds()
    # fmt: off
    add = parser.add_argument
    add("--views", type=Path, required=True, metavar="DIR", help="holds a directory of views for each object")
    add("--out", type=Path, required=True, metavar="DIR", help="gets the selection, a table and a sheet")
    add("--model", type=Path, metavar="DIR", help="a CLIP's directory; without it, the rules decide alone")
    add("--views-per-object", type=Flag(NumViews), default=4, metavar="N",
        help="how many views of each object CLIP sees, evenly spaced (4)")
    add("--batch-size", type=Flag(BatchSize), default=64, metavar="N",
        help="pictures that CLIP sees at once (64)")
    add("--sheet-objects", type=whole(1, 1000), default=8, metavar="N",
        help="how many objects the sheet shows of each end and of each rule (8)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--keep", type=Flag(Share), default=default.keep, metavar="SHARE",
        help="the share to keep of the objects that the rules leave, from 0 to 1")
    add("--min-score", type=real(0, 100), default=default.score, dest="score", metavar="S",
        help="the least score of an object that is kept")
    add = parser.add_argument_group("rules", "A threshold of 0 turns its rule off.").add_argument
    add("--min-coverage", type=Flag(Share), default=default.coverage, dest="coverage", metavar="SHARE",
        help="an object is empty that covers less of its pictures than this, in the mean (%(default)s)")
    add("--min-contrast", type=Flag(Share), default=default.contrast, dest="contrast", metavar="C",
        help="an object is faint if what it covers differs less from white, in the mean (%(default)s)")
    add("--min-thinnest", type=Flag(Share), default=default.thinnest, dest="thinnest", metavar="SHARE",
        help="an object is a sheet if it covers less in one view, as a share of another (%(default)s)")
    add("--min-distance", type=Flag(Share), default=default.distance, dest="distance", metavar="D",
        help="objects are duplicates if four small views differ by less than this share (%(default)s)")
    add("--max-cosine", type=Flag(Share), default=default.cosine, dest="cosine", metavar="C",
        help="with --model, objects are duplicates if their embeddings have a larger cosine (%(default)s)")
    # fmt: on
    flags = parser.parse_args(argv)
    check_flags(
        {
            "--keep and --min-score need a --model": bool(flags.model or not (flags.keep or flags.score)),
        }
    )
    return flags
