"""Draws a study from the outputs of methods: pairs, sides, order and checks, all from one seed."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from im3d_jax.evaluate.outputs.names import named
from im3d_jax.stages import Show, silent
from im3d_jax.study import LEFT, RIGHT, media
from im3d_jax.study.plan import QUESTIONS, Item, Prompt, Study, Video
from im3d_jax.study.sources import Source, Turntable
from recon_torch.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How a study is drawn.

    Attributes:
        all_pairs: whether every two methods are compared, and not the first one with each other.
        check_share: of the questions to an annotator that are checks, in [0, 0.5].
        skip_unreadable: whether a video that cannot be read counts as missing, and is no error.
    """

    seed: int = 0
    answers_per_item: int = 5
    num_annotators: int = 10
    check_share: float = 0.1
    all_pairs: bool = False
    skip_unreadable: bool = False


def draw(
    sources: Sequence[Source],
    pictures: dict[str, Path],
    settings: Settings,
    folder: Path,
    show: Show = silent,
) -> Study:
    """The study, whose files are written into a folder.

    Args:
        sources: the methods, the first of which is compared with the others.
        pictures: references by the keys of their prompts, before those that the first methods have.
        show: shows how many videos are encoded.

    Raises:
        UserError: there are not two methods, a pair of them has no prompt in common, a file cannot be read,
            or there are fewer annotators than answers to an item.
    """
    _check(sources, settings)
    pairs = list(combinations(sources, 2)) if settings.all_pairs else [(sources[0], x) for x in sources[1:]]
    rng = random.Random(f"im3d study {settings.seed}")
    videos, left_out = _write_videos(sources, pairs, settings, folder, rng, show)
    items = _draw_items(pairs, videos, rng)
    prompts = {key: _prompt(key, sources, pictures, folder, rng) for key in _keys(items)}
    checks = _draw_checks(items, videos, sources, settings, folder, rng)
    items, checks = _numbered(items, checks, rng)
    if strange := sorted(pictures.keys() - prompts.keys()):
        left_out.append(f"--pictures has {named(strange, 'picture')} of no prompt of the study")
    used = {side for item in [*items, *checks] for side in (item.left, item.right)}
    return Study(
        seed=settings.seed,
        answers_per_item=settings.answers_per_item,
        check_every=round(1 / settings.check_share) if checks else 0,
        num_annotators=settings.num_annotators,
        methods=[source.name for source in sources],
        pairs=[[first.name, second.name] for first, second in pairs],
        questions=QUESTIONS,
        prompts=prompts,
        videos={name: video for name, video in videos.items() if name in used},
        items=items,
        checks=checks,
        left_out=[*(line for source in sources for line in source.left_out), *left_out],
    )


def _check(sources: Sequence[Source], settings: Settings) -> None:
    names = [source.name for source in sources]
    if len(names) < 2:
        raise UserError("a study compares two methods or more; give NAME=DIR of each")
    if len(set(names)) < len(names):
        raise UserError(
            f"two methods are called {max(names, key=names.count)!r}; give each a name of its own"
        )
    if settings.num_annotators < settings.answers_per_item:
        wanted, there = settings.answers_per_item, settings.num_annotators
        raise UserError(
            f"{wanted} answers to each question need as many annotators, and {there} are too few; "
            f"give --annotators {wanted}, or fewer --answers"
        )


# ---- The files ----


def _write_videos(
    sources: Sequence[Source],
    pairs: Sequence[tuple[Source, Source]],
    settings: Settings,
    folder: Path,
    rng: random.Random,
    show: Show,
) -> tuple[dict[str, Video], list[str]]:
    """(the videos of all methods by random names, sentences on those that are missing)."""
    every = sorted({key for source in sources for key in source.turntables})
    shared = {key for a, b in pairs for key in a.turntables.keys() & b.turntables.keys()}
    wanted = [(source, key) for source in sources for key in sorted(source.turntables.keys() & shared)]
    videos: dict[str, Video] = {}
    unreadable: list[tuple[str, str]] = []
    with show("videos", len(wanted)) as bar:
        for source, key in wanted:
            name = f"{rng.getrandbits(64):016x}"
            try:
                media.write_video(source.turntables[key], folder / f"{name}.mp4")
            except UserError as error:
                if not settings.skip_unreadable:
                    raise UserError(f"{error}, or leave such out by --skip-unreadable") from None
                unreadable.append((source.name, key))
            else:
                videos[name] = _video(source.name, key, folder / f"{name}.mp4")
            bar.update()
    left_out = []
    for source in sources:
        missing = [key for key in every if key not in source.turntables]
        damaged = [key for name, key in unreadable if name == source.name]
        if missing:
            left_out.append(f"{source.name} lacks {named(missing, 'prompt')} of {len(every)}")
        if damaged:
            left_out.append(f"{source.name} has {named(damaged, 'video')} that cannot be read")
    return videos, left_out


def _video(method: str, key: str, path: Path, broken: bool = False) -> Video:
    return Video(method, key, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), broken)


def _prompt(
    key: str, sources: Sequence[Source], pictures: dict[str, Path], folder: Path, rng: random.Random
) -> Prompt:
    """The text and the picture of the first method that has them."""
    found: list[Turntable] = [each.turntables[key] for each in sources if key in each.turntables]
    picture = pictures.get(key) or next((each.picture for each in found if each.picture), None)
    if picture is None:
        return Prompt(found[0].text)
    name = f"{rng.getrandbits(64):016x}.png"
    media.write_picture(picture, folder / name)
    return Prompt(found[0].text, name)


# ---- The items ----


def _draw_items(
    pairs: Sequence[tuple[Source, Source]], videos: dict[str, Video], rng: random.Random
) -> list[Item]:
    """In random order. Of each pair and question, each method stands on the left half of the time."""
    names = {(video.method, video.prompt): name for name, video in videos.items()}
    items = []
    for first, second in pairs:
        keys = [
            key
            for key in sorted(first.turntables)
            if (first.name, key) in names and (second.name, key) in names
        ]
        if not keys:
            raise UserError(
                f"{first.name} and {second.name} have no prompt in common, such as "
                f"{_example(first)} and {_example(second)}; name their videos alike"
            )
        for question in QUESTIONS:
            for key, is_first_left in zip(keys, _halves(len(keys), rng), strict=True):
                one, other = names[first.name, key], names[second.name, key]
                left, right = (one, other) if is_first_left else (other, one)
                items.append(Item("", key, question, left, right))
    rng.shuffle(items)
    return items


def _halves(count: int, rng: random.Random) -> list[bool]:
    """As many True as False in random order; an odd one is drawn."""
    drawn = [True, False] * (count // 2) + [rng.random() < 0.5] * (count % 2)
    rng.shuffle(drawn)
    return drawn


def _example(source: Source) -> str:
    return repr(next(iter(source.turntables.values())).text[:60])


def _keys(items: Sequence[Item]) -> list[str]:
    return sorted({item.prompt for item in items})


def _draw_checks(
    items: Sequence[Item],
    videos: dict[str, Video],
    sources: Sequence[Source],
    settings: Settings,
    folder: Path,
    rng: random.Random,
) -> list[Item]:
    """Pairs of a video and the same video spoilt, which are added to `videos`.

    There are enough for an annotator who answers every item, as far as the methods have videos.
    """
    if not settings.check_share:
        return []
    names = sorted({side for item in items for side in (item.left, item.right)})
    count = min(math.ceil(len(items) * settings.check_share / (1 - settings.check_share)), len(names))
    turntables = {source.name: source.turntables for source in sources}
    chosen, checks = rng.sample(names, count), []
    for name, correct in zip(chosen, _halves(count, rng), strict=True):
        whole, spoilt = videos[name], f"{rng.getrandbits(64):016x}"
        path = folder / f"{spoilt}.mp4"
        media.write_broken(turntables[whole.method][whole.prompt], path, rng.randrange(2**31))
        videos[spoilt] = _video(whole.method, whole.prompt, path, broken=True)
        question = rng.choice(list(QUESTIONS))
        left, right = (name, spoilt) if correct else (spoilt, name)
        checks.append(Item("", whole.prompt, question, left, right, LEFT if correct else RIGHT))
    return checks


def _numbered(
    items: Sequence[Item], checks: Sequence[Item], rng: random.Random
) -> tuple[list[Item], list[Item]]:
    """Both with ids, which do not tell one from the other."""
    numbers = list(range(1, len(items) + len(checks) + 1))
    is_check = set(rng.sample(numbers, len(checks)))
    of_items = [f"q{number:05d}" for number in numbers if number not in is_check]
    of_checks = [f"q{number:05d}" for number in sorted(is_check)]
    return (
        [replace(item, id=each) for item, each in zip(items, of_items, strict=True)],
        [replace(item, id=each) for item, each in zip(checks, of_checks, strict=True)],
    )
