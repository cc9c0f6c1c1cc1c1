"""What a study asks: study.json, which is drawn once and never changes.

Items are the questions that count; checks are pairs of which one side is broken, so that whoever looks at
them knows the answer. Both have ids of one kind, so that no annotator can tell them apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from im3d_jax.study import FILES, SIDES, STUDY
from recon_torch.errors import UserError, quoted
from recon_torch.text_files import read_settings

FORMAT = "im3d study 1"


@dataclass(frozen=True)
class Question:
    """What is asked of pairs.

    Attributes:
        text: with a picture as reference; without_picture: with the prompt alone.
        hint: what to look at.
    """

    text: str
    without_picture: str
    hint: str


# Unspecified in the paper: the words of its two questions.
QUESTIONS = {
    "alignment": Question(
        "Which video shows the object in the picture better?",
        "Which video fits the description better?",
        "Compare shape, parts and colours. Ignore how sharp the videos are.",
    ),
    "quality": Question(
        "Which video shows the better 3D object?",
        "Which video shows the better 3D object?",
        "Look for a clean, sharp and solid object that makes sense from all sides.",
    ),
}


@dataclass(frozen=True)
class Prompt:
    """What a pair of videos was made from.

    Attributes:
        text: as annotators read it. picture: the reference's file, or "".
    """

    text: str
    picture: str = ""


@dataclass(frozen=True)
class Video:
    """A turntable. file: its name in the study; broken: whether it was spoilt for a check."""

    method: str
    prompt: str
    file: str
    sha256: str
    broken: bool = False


@dataclass(frozen=True)
class Item:
    """A question on a pair of videos, left and right; `correct` is the side that a check expects, or ""."""

    id: str
    prompt: str
    question: str
    left: str
    right: str
    correct: str = ""

    @property
    def is_check(self) -> bool:
        return bool(self.correct)


@dataclass(frozen=True)
class Study:
    """The content of study.json.

    Attributes:
        seed: of order, sides and checks.
        answers_per_item: how many annotators answer each item.
        check_every: one of so many questions to an annotator is a check; 0 for none.
        num_annotators: for how many tokens were made, among whom the items are shared.
        pairs: the methods that are compared.
        prompts: by their keys. videos: by their ids.
        items: those that count, in their order. checks: the others.
        left_out: sentences on what has no place in the study.
        versions: of what made it.
    """

    seed: int
    answers_per_item: int
    check_every: int
    num_annotators: int
    methods: list[str]
    pairs: list[list[str]]
    questions: dict[str, Question]
    prompts: dict[str, Prompt]
    videos: dict[str, Video]
    items: list[Item]
    checks: list[Item]
    left_out: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @cached_property
    def by_id(self) -> dict[str, Item]:
        """Items and checks."""
        return {item.id: item for item in [*self.items, *self.checks]}

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, by which answers know their study."""
        return hashlib.sha256(_text(self).encode()).hexdigest()

    @property
    def files(self) -> set[str]:
        """The names of all files that annotators see."""
        pictures = {prompt.picture for prompt in self.prompts.values()} - {""}
        return pictures | {video.file for video in self.videos.values()}

    @property
    def items_each(self) -> int:
        """How many items an annotator answers if all answer as many."""
        return -(-len(self.items) * self.answers_per_item // self.num_annotators)

    def methods_of(self, item: Item) -> tuple[str, str]:
        """The methods on the left and on the right."""
        return self.videos[item.left].method, self.videos[item.right].method

    def asked(self, item: Item) -> str:
        """The text of an item's question."""
        question = self.questions[item.question]
        return question.text if self.prompts[item.prompt].picture else question.without_picture


def _text(study: Study) -> str:
    return json.dumps({"format": FORMAT, **asdict(study)}, indent=1) + "\n"


def write(study: Study, path: Path) -> None:
    path.write_text(_text(study), encoding="utf-8")


def read(directory: Path) -> Study:
    """The study in a directory. Raises UserError where there is none, or where it is damaged."""
    path = directory / STUDY
    if not path.is_file():
        raise UserError(f"{directory} has no {STUDY}; give a directory that `im3d study new` made")
    told = read_settings(path)
    if told.pop("format", None) != FORMAT:
        raise UserError(f"{path} is no study of this version; make it anew with `im3d study new`")
    try:
        study = _study(told)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({quoted(str(error))}); make it anew") from None
    if wrong := next(_wrong(study), ""):
        raise UserError(f"{path} is damaged: {wrong}; make it anew")
    absent = sorted(name for name in study.files if not (directory / FILES / name).is_file())
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise UserError(f"{directory / FILES} lacks {absent[0]}{more}; copy the whole directory")
    return study


def _study(told: dict[str, Any]) -> Study:
    def named(kind: type, content: dict[str, Any]) -> dict[str, Any]:
        return {name: kind(**each) for name, each in content.items()}

    return Study(
        **told
        | {
            "questions": named(Question, told["questions"]),
            "prompts": named(Prompt, told["prompts"]),
            "videos": named(Video, told["videos"]),
            "items": [Item(**each) for each in told["items"]],
            "checks": [Item(**each) for each in told["checks"]],
        }
    )


def _wrong(study: Study) -> Iterator[str]:
    """What does not fit together in a study that somebody has edited."""
    every = [*study.items, *study.checks]
    if not study.items or len(study.by_id) < len(every):
        yield "items are missing, or two have one id"
    for number in (study.answers_per_item, study.num_annotators):
        if not isinstance(number, int) or number < 1:
            yield f"{quoted(number)} is no count"
    if study.checks and (not isinstance(study.check_every, int) or study.check_every < 2):
        yield f"check_every is {quoted(study.check_every)}"
    for item in every:
        known = item.prompt in study.prompts and item.question in study.questions
        if not known or not {item.left, item.right} <= study.videos.keys():
            yield f"item {quoted(item.id)} names what is not there"
    for items, expected in ((study.items, ("",)), (study.checks, SIDES)):
        for item in items:
            if item.correct not in expected:
                yield f"item {quoted(item.id)} expects {quoted(item.correct)}"
    for name in study.files:
        if Path(name).name != name or name.startswith("."):
            yield f"{quoted(name)} is no name of a file"
