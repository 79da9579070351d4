"""The overview of a page: a row for each checkpoint, a column for each measure, axis by axis, and published rows."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from math import isfinite, isnan
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit

import pandas as pd

from robustbench_diffaug.report.axes import Measure
from robustbench_diffaug.report.cells import Cell
from robustbench_diffaug.report.marks import KINDS, Mark
from robustbench_diffaug.report.sections import cells_by

__all__ = ["Bar", "Board", "Heading", "Place", "Printed", "Sign", "Source", "bars", "board", "printed", "sources"]

Bar: TypeAlias = tuple[float, float, float]
"""Where an interval starts and ends and has its value, in percent of what all intervals of a measure span."""


class Sign(NamedTuple):
    """A mark in a row: how it looks, and what it is called."""

    sign: str
    kind: str


class Place(NamedTuple):
    """A checkpoint's cell of the overview; `order` is the first key that a column is sorted by."""

    cell: Cell | None
    rank: str
    order: int
    bar: Bar | None
    sign: Sign | None = None

    @property
    def first(self) -> bool:
        """Whether it may be the best."""
        return re.match(r"1(\D|$)", self.rank) is not None


class Heading(NamedTuple):
    """A column of the overview."""

    name: str
    unit: str
    better: str
    samples: str
    ranked: bool


class Line(NamedTuple):
    """A row of the overview."""

    checkpoint: str
    signs: list[Sign]
    places: list[Place]
    source: str = ""


class Board(NamedTuple):
    """The overview: rows sorted by the first column, best first; published ones beneath, which have no ranks.

    Attributes:
        axes: The title of each axis, and how many columns it has.
        headings: The columns.
        rows: A row for each checkpoint.
        published: A row for each published name.
    """

    axes: list[tuple[str, int]]
    headings: list[Heading]
    rows: list[Line]
    published: list[Line]


class Source(NamedTuple):
    """A publication that figures are from; `href` is empty if it is no address of the web."""

    text: str
    href: str


class Printed(NamedTuple):
    """A published figure."""

    checkpoint: str
    bench: str
    metric: str
    group: str
    cell: Cell
    source: Source
    note: str


def bars(cells: Sequence[Cell]) -> Callable[[Cell], Bar | None]:
    """Finds the bar of a cell among those of its measure."""
    ends = [end for cell in cells for end in (cell.low, cell.high, cell.value) if isfinite(end)]
    least, span = min(ends, default=0.0), (max(ends, default=0.0) - min(ends, default=0.0)) or 1.0

    def place(end: float) -> float:
        return round(100 * min(1.0, max(0.0, (end - least) / span)), 1)

    def bar(cell: Cell) -> Bar | None:
        known = not any(isnan(end) for end in (cell.low, cell.high, cell.value))
        return (place(cell.low), place(cell.high), place(cell.value)) if known else None

    return bar


def _order(cell: Cell | None) -> int:
    """0 for a complete value, 1 for a partial one, 2 for none."""
    return 2 if cell is None or cell.missing else 0 if cell.complete else 1


def _sign(mark: Mark | None) -> Sign | None:
    return Sign(KINDS[mark.kind].sign, mark.kind) if mark else None


def _heading(measure: Measure, cells: Sequence[Cell]) -> Heading:
    samples = {cell.samples for cell in cells}
    said = samples.pop() if len(samples) == 1 else ""
    return Heading(measure.name, cells[0].unit_name, cells[0].better, said, bool(measure.ranks))


def board(
    found: Sequence[Measure], checkpoints: Sequence[str], marks: Mapping[tuple[str, str], Mark], more: Sequence[Printed]
) -> Board | None:
    """The overview, or None without a measure.

    Arguments:
        found: The measures, those of an axis side by side.
        checkpoints: The rows.
        marks: By bench and checkpoint.
        more: Published figures.
    """
    headings: list[Heading] = []
    columns: list[dict[str, Place]] = []
    for measure in found:
        cells = {str(key[0]): cell for key, cell in cells_by(measure.rows, "checkpoint").items()}
        bar, bench = bars(list(cells.values())), measure.key[0]
        headings.append(_heading(measure, list(cells.values())))
        columns.append({
            name: Place(cell, measure.ranks.get(name, ""), _order(cell), bar(cell), _sign(marks.get((bench, name))))
            for name, cell in cells.items()
        })  # fmt: skip
    if not columns:
        return None
    nothing = Place(None, "", 2, None)

    def key(checkpoint: str) -> tuple[int, float]:
        place = columns[0].get(checkpoint, nothing)
        value = place.cell.value if place.cell and place.order < 2 else 0.0
        return place.order, -value if headings[0].better == "higher" else value

    rows = [
        Line(name, _signs(name, marks), [column.get(name, nothing) for column in columns])
        for name in sorted(checkpoints, key=key)
    ]
    axes = [(title, len(list(group))) for title, group in groupby(measure.axis for measure in found)]
    return Board(axes, headings, rows, _published(found, more))


def _signs(checkpoint: str, marks: Mapping[tuple[str, str], Mark]) -> list[Sign]:
    """The marks of a row, each kind once."""
    kinds = {mark.kind for (_, name), mark in marks.items() if name == checkpoint}
    return [Sign(kind.sign, name) for name, kind in KINDS.items() if name in kinds]


def _published(found: Sequence[Measure], more: Sequence[Printed]) -> list[Line]:
    """A row for each published name and source that has a figure of any measure."""
    columns = {measure.key: number for number, measure in enumerate(found)}
    placed: dict[tuple[str, Source], dict[int, Cell]] = {}
    for entry in more:
        number = columns.get((entry.bench, entry.metric, entry.group))
        if number is not None:
            placed.setdefault((entry.checkpoint, entry.source), {}).setdefault(number, entry.cell)
    nothing = Place(None, "", 2, None)
    return [
        Line(
            name,
            [Sign(KINDS["published"].sign, "published")],
            [Place(cells[n], "", 0, None) if n in cells else nothing for n in range(len(found))],
            source.text,
        )
        for (name, source), cells in placed.items()
    ]


def _source(record: Mapping[str, object]) -> Source:
    """Where a figure is from; an address of another kind than the web's is text alone, as it may run something."""
    link = next((str(record[key]) for key in ("link", "url") if _told(record.get(key))), "")
    text = str(record["source"]) if _told(record.get("source")) else link or "no source"
    return Source(text, link if _web(link) else "")


def _web(link: str) -> bool:
    try:
        parts = urlsplit(link)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _told(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def printed(published: pd.DataFrame | None) -> list[Printed]:
    """The published figures, in their order.

    Arguments:
        published: In the long form of metrics, with the columns `source`, `link` (or `url`) and `note` too, which may
            be missing or empty.
    """
    if published is None or published.empty:
        return []
    made = []
    for record in published.to_dict("records"):
        known = {str(key): value for key, value in record.items()}
        note = next((str(known[key]) for key in ("note", "head") if _told(known.get(key))), "")
        name, bench, metric, group = (str(known[key]) for key in ("checkpoint", "bench", "metric", "group"))
        made.append(Printed(name, bench, metric, group, Cell.of(known), _source(known), note))
    return [entry for entry in made if not entry.cell.missing]


def sources(more: Sequence[Printed]) -> list[tuple[Source, list[Printed]]]:
    """The published figures by where they are from."""
    found: dict[Source, list[Printed]] = {}
    for entry in more:
        found.setdefault(entry.source, []).append(entry)
    return list(found.items())
