"""Mechanical Turk, as in the paper (A.2): the files of a project, and its results.

A project has an HTML layout with variables such as ${left_1}, and a CSV file with a column for each variable
and a row for each HIT. Its results are a CSV file with the columns `Input.VARIABLE` and, as the layout's form
says, `Answer.choice_1.left`; older layouts give `Answer.choice_1`, or `Answer.taskAnswers` with JSON.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from im3d_jax.study import SIDES
from im3d_jax.study.plan import Item, Study
from im3d_jax.study.store import Answer
from recon_torch.errors import UserError, quoted
from recon_torch.text_files import read_text

HERE = Path(__file__).parent / "page"
VARIABLES = ("item", "question", "hint", "prompt", "picture", "left", "right")
WORKER, STATUS, SECONDS = "WorkerId", "AssignmentStatus", "WorkTimeInSeconds"
JSON_ANSWERS = "Answer.taskAnswers"


# ---- A project ----


def hits(study: Study, per_hit: int) -> list[list[Item]]:
    """The items of each HIT: `per_hit` of the study's in their order, and a check among them, if it has some.

    The checks come in turn.
    """
    rng, made = random.Random(f"{study.seed} mturk"), []
    for number, begin in enumerate(range(0, len(study.items), per_hit)):
        chosen = study.items[begin : begin + per_hit]
        if study.checks:
            chosen.insert(rng.randrange(len(chosen) + 1), study.checks[number % len(study.checks)])
        made.append(chosen)
    return made


def input_csv(study: Study, per_hit: int, url: str) -> str:
    """The input file.

    url: where the files of the study lie, for everybody to see.
    """
    count = _slots(study, per_hit)
    columns = [f"{name}_{number}" for number in range(1, count + 1) for name in VARIABLES]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["study", *columns], restval="", lineterminator="\r\n")
    writer.writeheader()
    for chosen in hits(study, per_hit):
        row = {"study": study.digest}
        for number, item in enumerate(chosen, 1):
            row |= {f"{name}_{number}": each for name, each in _variables(study, item, url).items()}
        writer.writerow(row)
    return text.getvalue()


def _slots(study: Study, per_hit: int) -> int:
    return min(per_hit, len(study.items)) + bool(study.checks)


def _variables(study: Study, item: Item, url: str) -> dict[str, str]:
    prompt, base = study.prompts[item.prompt], url.rstrip("/")
    is_shown = item.question == "alignment"  # as on the page: quality is asked without the reference
    return {
        "item": item.id,
        "question": _escaped(study.asked(item)),
        "hint": _escaped(study.questions[item.question].hint),
        "prompt": _escaped(prompt.text) if is_shown else "",
        "picture": f"{base}/{prompt.picture}" if prompt.picture and is_shown else "",
        "left": f"{base}/{study.videos[item.left].file}",
        "right": f"{base}/{study.videos[item.right].file}",
    }


def _escaped(text: str) -> str:
    """As HTML in ASCII: values are put into the layout as they are, and Mechanical Turk refuses emoji.

    Nor is any of it a variable, or a formula where somebody opens the file as a spreadsheet.
    """
    escaped = html.escape(text).replace("$", "&#36;")
    if escaped[:1] in ("=", "+", "-", "@"):
        escaped = f"&#{ord(escaped[0])};{escaped[1:]}"
    return escaped.encode("ascii", "xmlcharrefreplace").decode()


def template(study: Study, per_hit: int) -> str:
    """The HTML layout."""
    count = _slots(study, per_hit)
    item = (HERE / "mturk_item.html").read_text(encoding="utf-8")
    items = "".join(item.replace("NUMBER", str(number)) for number in range(1, count + 1))
    page = (HERE / "mturk.html").read_text(encoding="utf-8")
    return page.replace("COUNT", str(count)).replace("ITEMS\n", items)


# ---- Its results ----


class Results(NamedTuple):
    """What a results file holds. num_rejected: assignments left out; num_blank: questions left open."""

    answers: list[Answer]
    num_rejected: int
    num_blank: int


def read_results(path: Path, study: Study) -> Results:
    """Raises UserError, which names the line, for other columns, and for results of another study."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        columns = list(rows.fieldnames or [])
        slots = _slots_of(path, columns)
        answers, num_rejected, num_blank = [], 0, 0
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if row["Input.study"] != study.digest:
                raise UserError(f"{place}: is a result of another study")
            if row[STATUS] == "Rejected":
                num_rejected += 1
                continue
            found = list(_answers(place, row, slots, study))
            answers += [each for each in found if each is not None]
            num_blank += found.count(None)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: is no CSV ({error})") from None
    if not answers:
        raise UserError(f"{path} has no answers; give the results that Mechanical Turk has for a batch")
    return Results(answers, num_rejected, num_blank)


def _slots_of(path: Path, columns: list[str]) -> list[str]:
    """The numbers of the questions in a HIT."""
    slots = [each.rpartition("_")[2] for each in columns if each.startswith("Input.item_")]
    wanted = [WORKER, STATUS, "Input.study", *([] if slots else ["Input.item_1"])]
    absent = [each for each in wanted if each not in columns]
    if not absent and not any(each.startswith("Answer.") for each in columns):
        absent = ["Answer.choice_1.left"]
    if absent:
        raise UserError(
            f"{path} has no column {', '.join(absent)}; give the results that Mechanical Turk has for a batch"
        )
    return slots


def _answers(place: str, row: Mapping[str, Any], slots: list[str], study: Study) -> Iterator[Answer | None]:
    """An answer to each question of a HIT, or None."""
    told = _told(place, row)
    worker = row[WORKER]
    if not worker:
        raise UserError(f"{place}: has no {WORKER}")
    items = [slot for slot in slots if row[f"Input.item_{slot}"]]
    seconds = _seconds(row.get(SECONDS), len(items))
    for slot in items:
        item = row[f"Input.item_{slot}"]
        if item not in study.by_id:
            raise UserError(f"{place}: the study has no item {quoted(item, 40)}")
        choices = [side for side in SIDES if _is_chosen(told, f"choice_{slot}", side)]
        if len(choices) > 1:
            raise UserError(f"{place}: both sides of item {item} are chosen")
        yield Answer(worker, item, choices[0], seconds, "mturk") if choices else None


def _told(place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The form's fields, of which `Answer.taskAnswers` has all in JSON."""
    told = {
        name.removeprefix("Answer."): value
        for name, value in row.items()
        if name is not None and name.startswith("Answer.")
    }
    try:
        within = json.loads(row.get(JSON_ANSWERS) or "[{}]")[0]
        return told | dict(within)
    except (ValueError, TypeError, LookupError):
        raise UserError(f"{place}: {JSON_ANSWERS} is not the JSON of a form") from None


def _is_chosen(told: Mapping[str, Any], name: str, side: str) -> bool:
    value = told.get(name)
    if isinstance(value, dict):
        return value.get(side) is True
    return value == side or str(told.get(f"{name}.{side}")).lower() == "true"


def _seconds(text: str | None, count: int) -> float | None:
    """Of one question; Mechanical Turk tells those of the HIT."""
    try:
        seconds = max(float(text or ""), 0.0) / max(count, 1)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None
