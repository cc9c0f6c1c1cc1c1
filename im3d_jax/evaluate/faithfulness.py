"""How well views fit the prompt and the picture that they were made from, by a CLIP (Table 1).

A score is 100 times the cosine of two embeddings, in the mean over the views of a row: of view and prompt
("clip_text"), of view and picture ("clip_image"). Pictures are over white.

Unspecified in the paper: the CLIP, and which views are scored. The result names both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from im3d_jax.data.clip import Clip
from im3d_jax.evaluate import published, result_file, tables
from im3d_jax.evaluate.outputs import pictures, reading
from im3d_jax.evaluate.outputs.finding import MethodOutputs, Output
from im3d_jax.evaluate.outputs.names import named
from im3d_jax.evaluate.result_file import Row
from im3d_jax.stages import Show, progress
from recon_torch.errors import UserError
from recon_torch.views.images import read_image, to_uint8

TEXT, IMAGE = "clip_text", "clip_image"
COLUMNS = {TEXT: "CLIP (text)", IMAGE: "CLIP (image)"}


@runtime_checkable
class Embedder(Protocol):
    """What is needed of a `data.clip.Clip`: unit vectors of pictures and captions in one space."""

    max_tokens: int

    def embed_pictures(self, pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[np.ndarray, "B d"]: ...

    def embed_captions(
        self, captions: Sequence[str]
    ) -> tuple[Float[np.ndarray, "B d"], Bool[np.ndarray, " B"]]: ...


@dataclass
class Scorer:
    """Scores rows, and remembers what of them could not be scored.

    Attributes:
        pictures: references by the keys of rows, in place of what the rows were made from.
        batch_size: how many pictures the CLIP sees at once.
        notes: on what lacks, by what it is: the names of rows.
    """

    clip: Embedder
    pictures: Mapping[str, Path]
    batch_size: int = 64
    notes: dict[str, list[str]] = field(default_factory=dict)
    _references: dict[Path, Float[np.ndarray, " d"] | None] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def __call__(self, label: str, row: Output, views: UInt8[np.ndarray, "K H W C"]) -> Row:
        """The scores of one row; None for a score that it has nothing to be compared with."""
        embedded = self._embed(list(pictures.over_white(views)))
        text, reference = self._text(label, row), self._reference(label, row)
        scores = {
            name: None if other is None else float(100 * (embedded @ other).mean())
            for name, other in ((TEXT, text), (IMAGE, reference))
        }
        against = "" if reference is None else hashlib.sha256(reference.tobytes()).hexdigest()[:16]
        return Row(label, row.key, row.prompt, scores, against)

    def _embed(self, pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[np.ndarray, "B d"]:
        starts = range(0, len(pictures), self.batch_size)
        return np.concatenate([self.clip.embed_pictures(pictures[i : i + self.batch_size]) for i in starts])

    def _text(self, label: str, row: Output) -> Float[np.ndarray, " d"] | None:
        if not row.prompt:
            self._note(f"{label}: without a prompt, so without {COLUMNS[TEXT]}", row)
            return None
        vectors, cut_off = self.clip.embed_captions([row.prompt])
        if cut_off[0]:
            self._note(f"{label}: cut off after the {self.clip.max_tokens} tokens that this CLIP reads", row)
        return vectors[0]

    def _reference(self, label: str, row: Output) -> Float[np.ndarray, " d"] | None:
        path = self.pictures.get(row.key) or row.picture
        self._seen.add(row.key)
        if self.pictures and row.picture and row.key not in self.pictures:
            self._note(f"{label}: not in --pictures, so compared with what it was made from", row)
        if path is None:
            self._note(f"{label}: without a picture, so without {COLUMNS[IMAGE]}", row)
            return None
        if path not in self._references:
            try:
                picture = pictures.over_white(to_uint8(read_image(path)))
            except UserError:
                self._references[path] = None
            else:
                self._references[path] = self._embed([picture])[0]
        if self._references[path] is None:
            self._note(f"{label}: its picture cannot be read, so without {COLUMNS[IMAGE]}", row)
        return self._references[path]

    def _note(self, what: str, row: Output) -> None:
        self.notes.setdefault(what, []).append(row.prompt or row.name)

    def about(self) -> list[str]:
        """Sentences on what lacks."""
        said = [f"{what}: {named(names, 'row')}" for what, names in self.notes.items()]
        if strange := sorted(self.pictures.keys() - self._seen):
            said.append(f"--pictures has {named(strange, 'picture')} of no row")
        return said


def measure(
    methods: Sequence[MethodOutputs], scorer: Scorer, num_views: int = 0, show: Show = progress
) -> Iterator[Row]:
    """The rows of all methods. What cannot be read is moved to what a method leaves out.

    num_views: so many views of each row, evenly spaced; 0 takes all.
    """
    with show("score views", sum(len(outputs.rows) for outputs in methods)) as bar:
        for outputs in methods:
            for row, views in reading.read_all(outputs, num_views):
                yield scorer(outputs.label, row, views)
                bar.update()


def other_pictures(found: Mapping[str, Any]) -> list[str]:
    """Sentences on methods whose rows were compared with different pictures of one prompt."""
    return [
        f"{each['first']} and {each['second']} have other pictures for {each['num_against_others']} of their"
        f" rows, so {COLUMNS[IMAGE]} does not measure the same; --pictures or --prompts can name them"
        for each in found["differences"]
        if each["score"] == IMAGE and each["num_against_others"]
    ]


def protocol(clip: Clip, num_views: int) -> dict[str, Any]:
    """What decides what the numbers mean."""
    return {
        "score": "100 times the cosine, mean over views, over white",
        "views": num_views or "all of each row",
        "clip": clip.about(),
    }


def table(found: Mapping[str, Any]) -> str:
    """The content of table.md: a row for each method, as Table 1 has them, then those of the paper."""
    cells = {(each["method"], each["score"]): each for each in found["summary"]}
    lines = []
    for method in found["methods"]:
        name, count = method["name"], method["num_rows"]
        scores = [tables.cell(cells.get((name, score)), count) for score in COLUMNS]
        minutes = f"{method['minutes']:.1f}" if method.get("minutes") else ""
        lines.append([name, str(count), str(method.get("num_views", "")), *scores, minutes])
    for row in published.of("Table 1"):
        scores = [f"{score:.2f}" for score in row[2:4]]
        lines.append([f"{row.method} ({row.table}, as published)", "", "", *scores, f"{row.minutes:.0f}"])
    parts = [
        "# Faithfulness (Table 1)\n",
        result_file.table(["", "rows", "views of each", *COLUMNS.values(), "minutes"], lines),
        "Mean ± standard deviation over rows [95% interval of the mean, by bootstrap over rows].\n",
    ]
    if found["differences"]:
        differences = [
            [
                f"{each['first']} minus {each['second']}, {COLUMNS[each['score']]}",
                str(each["num_rows"]),
                tables.difference(each),
            ]
            for each in found["differences"]
        ]
        parts += ["## Paired differences\n", result_file.table(["", "rows of both", "mean"], differences)]
    calls = [
        [method["name"], f"{method['network_calls']:,.1f}".removesuffix(".0")]
        for method in found["methods"]
        if method.get("network_calls")
    ]
    calls += [[f"{row.method} (as published)", f"{row.network_calls:,}"] for row in published.of("Table 4")]
    parts += [
        "## Calls of the 2D network for one asset (Table 4)\n",
        result_file.table(["", "calls"], calls),
    ]
    parts += [*(f"- {line}" for line in found["about"]), ""]
    return "\n".join(parts)
