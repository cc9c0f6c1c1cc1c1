"""Tables in Markdown of a result file: each method's scores with their intervals, and paired differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from im3d_jax.evaluate import result_file


class Column(NamedTuple):
    """A score as a table shows it. better: "higher" or "lower"."""

    title: str
    digits: int
    better: str = "higher"


def scores_section(found: Mapping[str, Any], columns: Mapping[str, Column]) -> str:
    """A row for each method: of each score that one of them has, mean, standard deviation and interval."""
    cells = {(each["method"], each["score"]): each for each in found["summary"]}
    shown = {name: column for name, column in columns.items() if any(score == name for _, score in cells)}
    lines = [
        [
            method["name"],
            str(method["num_rows"]),
            *(
                cell(cells.get((method["name"], name)), method["num_rows"], column.digits)
                for name, column in shown.items()
            ),
        ]
        for method in found["methods"]
    ]
    header = ["", "objects", *(_title(column) for column in shown.values())]
    said = "Mean ± standard deviation over objects [95% interval of the mean, by bootstrap over objects].\n"
    return "\n".join([result_file.table(header, lines), said])


def differences_section(found: Mapping[str, Any], columns: Mapping[str, Column]) -> str:
    """The first method less each other one, over the objects that both have; "" where there are none."""
    pairs: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for each in found["differences"]:
        if each["num_rows"]:
            pairs[f"{each['first']} less {each['second']}"][each["score"]] = each
    shown = [name for name in columns if any(name in cells for cells in pairs.values())]
    if not shown:
        return ""
    lines = [
        [
            pair,
            str(max(each["num_rows"] for each in cells.values())),
            *(difference(cells.get(name), columns[name].digits) for name in shown),
        ]
        for pair, cells in pairs.items()
    ]
    header = ["", "objects of both", *(_title(columns[name]) for name in shown)]
    return "\n".join(["## Paired differences\n", result_file.table(header, lines)])


def page(title: str, sections: Sequence[str], about: Sequence[str]) -> str:
    """The content of table.md."""
    return "\n".join(
        [f"# {title}\n", *(each for each in sections if each), *(f"- {line}" for line in about), ""]
    )


def _title(column: Column) -> str:
    return f"{column.title} {'↑' if column.better == 'higher' else '↓'}"


def cell(each: Mapping[str, Any] | None, num_rows: int, digits: int = 2) -> str:
    """Mean, deviation and interval of a `summary`; the number of rows where it is not that of all."""
    if each is None or each["mean"] is None:
        return "-"
    spread = "" if each["std"] is None else f" ± {each['std']:.{digits}f}"
    few = "" if each["num_rows"] == num_rows else f" ({each['num_rows']} of {num_rows} rows)"
    return f"{each['mean']:.{digits}f}{spread}{_interval(each, '', digits)}{few}"


def difference(each: Mapping[str, Any] | None, digits: int = 2) -> str:
    """Mean and interval of one of the `differences`."""
    if each is None or each["mean"] is None:
        return "-"
    return f"{each['mean']:+.{digits}f}{_interval(each, '+', digits)}"


def _interval(each: Mapping[str, Any], sign: str, digits: int) -> str:
    """The interval of a mean; of one row there is none to speak of."""
    low, high = each["interval"]
    return f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]" if each["num_rows"] > 1 else ""
