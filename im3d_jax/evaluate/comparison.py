"""Paired differences of two result files, which must have measured the same thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from im3d_jax.evaluate import distance_differences, result_file
from im3d_jax.evaluate.outputs.names import key_of, named
from im3d_jax.evaluate.result_file import Bootstrap, Row
from recon_torch.errors import UserError, near, quoted


def check_alike(a: Mapping[str, Any], b: Mapping[str, Any], path_a: Path, path_b: Path) -> None:
    """Raises UserError that names the first thing in which two files were measured differently."""
    if a["command"] != b["command"]:
        raise UserError(
            f"{path_a} is of `im3d evaluate {a['command']}`, and {path_b} of `im3d evaluate {b['command']}`"
        )
    if different := next(_differences(a["protocol"], b["protocol"]), None):
        name, mine, other = different
        raise UserError(
            f"{path_a} and {path_b} were not measured alike: {name} is {quoted(mine)} in the first and"
            f" {quoted(other)} in the second; measure one of them again"
        )


def _differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, value, other value) of what differs, by the names of entries, such as "clip.sha256"."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, a, b


def paired(
    a: Mapping[str, Any], b: Mapping[str, Any], method_a: str = "", method_b: str = ""
) -> list[tuple[str, str]]:
    """The methods to compare: those that are named, else those of one name, else the only one of each.

    Raises UserError for an unknown name, and where none of these is there.
    """
    names = [[str(each["name"]) for each in found["methods"]] for found in (a, b)]
    for chosen, known, which in ((method_a, names[0], "A"), (method_b, names[1], "B")):
        if chosen and chosen not in known:
            there = ", ".join(map(repr, known))
            raise UserError(f"{which} has no method {quoted(chosen)}{near(chosen, known)}; it has {there}")
    left, right = [method_a] if method_a else names[0], [method_b] if method_b else names[1]
    if len(left) == len(right) == 1:
        return [(left[0], right[0])]
    if method_a or method_b:
        common = [(one, other) for one in left for other in right if one == other]
    else:
        common = [(name, name) for name in left if name in right]
    if not common:
        raise UserError(
            f"A has {', '.join(map(repr, left))}, B has {', '.join(map(repr, right))}; name one of each by"
            " --method-a and --method-b"
        )
    return common


def compare(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    pairs: Sequence[tuple[str, str]],
    bootstrap: Bootstrap,
    common: bool = False,
) -> dict[str, Any]:
    """The content of a result file whose rows are differences, A minus B, of each pair of methods.

    common: compare the rows that both have. Else a row that one lacks is an error.

    Raises UserError for rows that one of the two lacks, for other prompts, and if nothing is left.
    """
    if a["command"] == "distribution":
        return _of_distances(a, b, pairs)
    by_method = [result_file.by_method(result_file.rows_of(found)) for found in (a, b)]
    rows, about = [], []
    for first, second in pairs:
        left, right = by_method[0].get(first, []), by_method[1].get(second, [])
        about += _lacking(first, second, left, right, common)
        others = {row.key: row for row in right}
        both = [(row, others[row.key]) for row in left if row.key in others]
        if count := result_file.num_against_others(both):
            about.append(f"{count} rows of A and B were compared with different things, such as pictures")
        about += _other_views(a, b, first, second)
        rows += [_minus(*pair) for pair in both]
    if not any(value is not None for row in rows for value in row.scores.values()):
        raise UserError("A and B have no score of one name on one row; there is nothing to compare")
    digests = {name: [a[name], b[name]] for name in ("config_digest", "weights_digest")}
    methods = [{"name": _label(*pair), **digests} for pair in pairs]
    found = result_file.content(
        "compare", a["protocol"], rows, methods=methods, bootstrap=bootstrap, about=about, packages=("numpy",)
    )
    return {**found, "compared": a["command"], "differences": []}


def _of_distances(
    a: Mapping[str, Any], b: Mapping[str, Any], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Distances of distributions are of all rows at once."""
    try:
        made = [{each["method"]: each for each in found["distances"]} for found in (a, b)]
        differing = [
            each
            for first, second in pairs
            for each in distance_differences.differences(made[0][first], made[1][second])
        ]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(
            "the distances of A or B are damaged, or of an older version; measure again"
        ) from None
    if not differing:
        raise UserError("A and B have no distance of one name; there is nothing to compare")
    methods = [{"name": _label(*pair)} for pair in pairs]
    found = result_file.content("compare", a["protocol"], [], methods=methods, packages=("numpy",))
    return {**found, "compared": a["command"], "differences": differing}


def _label(first: str, second: str) -> str:
    return first if first == second else f"{first} minus {second}"


def _minus(one: Row, other: Row) -> Row:
    """The differences of the scores that both have."""
    if one.prompt and other.prompt and key_of(one.prompt) != key_of(other.prompt):
        raise UserError(
            f"row {quoted(one.key)} has the prompt {quoted(one.prompt)} in A and {quoted(other.prompt)} in B"
        )
    scores = {}
    for name in (each for each in one.scores if each in other.scores):
        left, right = one.scores[name], other.scores[name]
        scores[name] = None if left is None or right is None else left - right
    return Row(_label(one.method, other.method), one.key, one.prompt or other.prompt, scores)


def _other_views(a: Mapping[str, Any], b: Mapping[str, Any], first: str, second: str) -> list[str]:
    """A sentence on two methods whose rows have different numbers of views."""
    counts = [
        next((each.get("num_views") for each in found["methods"] if each["name"] == name), None)
        for found, name in ((a, first), (b, second))
    ]
    if None in counts or counts[0] == counts[1]:
        return []
    return [f"a row of {first} of A has {counts[0]} views, and one of {second} of B has {counts[1]}"]


def _lacking(first: str, second: str, left: Sequence[Row], right: Sequence[Row], common: bool) -> list[str]:
    """Sentences on rows that only one of two methods has. Raises UserError for them unless `common`."""
    said = []
    for name, mine, others in ((f"{first} of A", left, right), (f"{second} of B", right, left)):
        keys = {row.key for row in mine}
        lacks = [row.prompt or row.key for row in others if row.key not in keys]
        if lacks:
            said.append(f"{name} lacks {named(lacks, 'row')}")
    if said and not common:
        raise UserError(f"{'; '.join(said)}; give --common to compare the rows that both have")
    return said


def table(found: Mapping[str, Any]) -> str:
    """The differences as Markdown."""
    if found["compared"] == "distribution":
        return distance_differences.table(found["differences"])
    lines, by_method = [], result_file.by_method(result_file.rows_of(found))
    for each in found["summary"]:
        cells = ["-", "-", "-"]
        if each["num_rows"]:
            values = [row.scores[each["score"]] for row in by_method[each["method"]]]
            above = sum(value is not None and value > 0 for value in values) / each["num_rows"]
            low, high = each["interval"]
            cells = [f"{each['mean']:+.4g}", f"[{low:+.4g}, {high:+.4g}]", f"{above:.0%}"]
        lines.append([f"{each['method']}, {each['score']}", str(each["num_rows"]), *cells])
    header = ["A minus B", "rows", "mean", "95% interval", "rows above 0"]
    remarks = [f"- {line}" for line in found["about"]]
    return "\n".join([result_file.table(header, lines), *remarks])
