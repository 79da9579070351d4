"""A comparison of two checkpoints as lines of text, and as a page that needs nothing else."""

from collections.abc import Iterator
from math import isinf, isnan
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from robustbench_diffaug.report.sections import unit_name

__all__ = ["Comparison", "Line", "lines", "page"]


class Comparison(NamedTuple):
    """Two checkpoints in all figures that both have.

    Arguments:
        a: Id, run folder and digest of the first.
        b: Those of the second.
        table: A row for each figure, with the columns of `compare.COLUMNS`.
        alpha: At most which p-value after Holm tells them apart.
    """

    a: tuple[str, str, str]
    b: tuple[str, str, str]
    table: pd.DataFrame
    alpha: float


class Line(NamedTuple):
    """A figure as it is shown.

    Arguments:
        bench: The bench.
        metric: The metric, with its group where that says more.
        unit: In which values are.
        a: The value of the first.
        b: That of the second.
        difference: a - b with its interval.
        p: The p-value.
        p_holm: After Holm.
        effect: The effect size with its interval.
        n: Images.
        needed: How many would be needed.
        test: The name of the test; empty where there is none.
        better: 'a' or 'b' where they are told apart, else empty.
    """

    bench: str
    metric: str
    unit: str
    a: str
    b: str
    difference: str
    p: str
    p_holm: str
    effect: str
    n: str
    needed: str
    test: str
    better: str


def _number(value: float, digits: int) -> str:
    if isnan(value):
        return "–"
    if isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text.replace("-", "−")


def _probability(value: float) -> str:
    if isnan(value):
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}".replace("-", "−") if value > 0 else "0"


def _line(row: Any, alpha: float) -> Line:
    scale, digits = (100.0, 2) if row.unit == "fraction" else (1.0, 4)
    a, b, gap, low, high = (
        _number(scale * value, digits) for value in (row.a_value, row.b_value, row.difference, row.low, row.high)
    )
    tested = bool(row.test)
    kind, ends = str(row.effect_kind), (row.effect, row.effect_low, row.effect_high)
    size, least, most = (_number(value, 2) for value in ends)
    group = "" if row.group in row.metric.split("/") or row.group == "corruptions" else f" [{row.group}]"
    better = ""
    if row.p_holm <= alpha and row.difference:
        better = "a" if (row.difference > 0) == (row.better == "higher") else "b"
    return Line(
        row.bench,
        f"{row.metric}{group}",
        "%" if row.unit == "fraction" else unit_name(row.unit),
        a,
        b,
        f"{gap} [{low}, {high}]" if tested else gap,
        _probability(row.p),
        _probability(row.p_holm),
        f"{kind} {size} [{least}, {most}]" if tested and not isnan(row.effect) else "–",
        f"{row.n:,}" if tested else "–",
        f"{row.n_needed:,}" if tested and not pd.isna(row.n_needed) else "–",
        str(row.test),
        better,
    )


def shown(found: Comparison) -> list[Line]:
    """All figures as they are shown, those that are tested before the others."""
    made = [_line(row, found.alpha) for row in found.table.itertuples()]
    return sorted(made, key=lambda line: not line.test)


def _plain(text: str) -> str:
    """A text without what a terminal would obey."""
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text)


HEADS = ("bench", "figure", "unit", "a", "b", "a − b", "p", "after Holm", "effect", "images", "needed", "better")


def lines(found: Comparison) -> Iterator[str]:
    """The tested figures as a table in plain text, and how many more there are."""
    for name, (id, root, _) in (("a", found.a), ("b", found.b)):
        yield f"{name}  {_plain(id)}  ({_plain(root)})"
    made = shown(found)
    rows = [HEADS, *((*line[:11], line.better) for line in made if line.test)]
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = (3, 4, 6, 7, 9, 10)
    for row in cells if len(cells) > 1 else ():
        told = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(told).rstrip()
    counted = [line.better for line in made if line.test]
    told_apart = len([better for better in counted if better])
    yield f"{told_apart} of {len(counted)} figures differ at p <= {found.alpha:g} after Holm"
    if len(made) > len(counted):
        yield f"{len(made) - len(counted)} more figures are no means over images and have no test"


def page(found: Comparison) -> str:
    """The page, self-contained, without scripts, the same for the same comparison."""
    environment = Environment(
        loader=PackageLoader("robustbench_diffaug", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = shown(found)
    context = {
        "a": found.a, "b": found.b, "alpha": found.alpha,
        "tested": [line for line in made if line.test], "others": [line for line in made if not line.test],
    }  # fmt: skip
    text = environment.get_template("compare.html.j2").render(context)
    return text.encode("utf-8", "replace").decode()  # a lone surrogate in a name must not break the writing of the file
