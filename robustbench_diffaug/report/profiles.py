"""A card for each checkpoint: its measures on all axes, where it is first or last, and what it trades for what."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import isfinite
from typing import NamedTuple

from robustbench_diffaug.report.axes import Measure
from robustbench_diffaug.report.cells import Cell
from robustbench_diffaug.report.overview import Bar, Place, bars
from robustbench_diffaug.report.scatter import Point, Scatter
from robustbench_diffaug.report.sections import cells_by

__all__ = ["Line", "Profile", "Profiles", "Trade", "profiles"]

TRADES = 3  # charts of a card
PREFERRED = ("Clean", "Shift", "Certified", "OOD detection", "Alignment")  # axes whose trade is told first
MEANS = "accuracy/mean"  # what stands for an axis before any other


class Line(NamedTuple):
    """A measure of a card; `axis` is told in the first line of each."""

    axis: str
    name: str
    unit: str
    place: Place


class Trade(NamedTuple):
    """A chart of two measures in which the checkpoint is marked."""

    across: str
    up: str
    svg: str


class Profile(NamedTuple):
    """A card.

    Attributes:
        number: Of the checkpoint, for links to it.
        checkpoint: Whose it is.
        about: What the manifest says it is.
        said: In how many measures it may be first, and may be last.
        lines: Its measures.
        trades: Its charts.
    """

    number: int
    checkpoint: str
    about: str
    said: str
    lines: list[Line]
    trades: list[Trade]


class Profiles(NamedTuple):
    """The cards, and the drawings that they share, as inner SVG."""

    shared: str
    cards: list[Profile]


class _Column(NamedTuple):
    """A measure and its cells and bars by checkpoint."""

    measure: Measure
    cells: Mapping[str, Cell]
    bars: Mapping[str, Bar | None]


class _Pair(NamedTuple):
    """Two measures, one of them across and one up, and their chart."""

    across: _Column
    up: _Column
    scatter: Scatter


def _column(measure: Measure) -> _Column:
    cells = {str(key[0]): cell for key, cell in cells_by(measure.rows, "checkpoint").items()}
    bar = bars(list(cells.values()))
    return _Column(measure, cells, {name: bar(cell) for name, cell in cells.items()})


def _point(across: Cell | None, up: Cell | None) -> Point | None:
    """A point of a chart; None where a value is missing."""
    if across is None or up is None or not isfinite(across.value) or not isfinite(up.value):
        return None
    return Point(across.value, up.value, (across.low, across.high), (up.low, up.high))


def _stands(columns: Sequence[_Column]) -> list[_Column]:
    """The measure that stands for each axis: a ranked one if there is any, the mean over corruptions before others."""
    found: dict[str, _Column] = {}
    for column in sorted(columns, key=lambda c: (not c.measure.ranks, c.measure.key[1] != MEANS)):
        found.setdefault(column.measure.axis, column)
    order = [*PREFERRED, *(axis for axis in found if axis not in PREFERRED)]
    return [found[axis] for axis in order if axis in found]


def _pairs(columns: Sequence[_Column]) -> list[_Pair]:
    """Of one axis against another, those that two checkpoints at least have both; each axis goes up once."""
    made: list[_Pair] = []
    taken: set[str] = set()
    for across, up in combinations(_stands(columns), 2):
        points = [_point(cell, up.cells.get(name)) for name, cell in across.cells.items()]
        there = [point for point in points if point is not None]
        if up.measure.axis in taken or len(there) < 2:
            continue
        taken.add(up.measure.axis)
        scale = (_percent(across), _percent(up))
        made.append(_Pair(across, up, Scatter(there, scale, f"trade-{len(made)}")))
    return made[:TRADES]


def _percent(column: _Column) -> float:
    return 100.0 if next(iter(column.cells.values())).unit == "fraction" else 1.0


def _said(lines: Sequence[Line]) -> str:
    """How many of its ranks begin with the first place."""
    ranked = [line for line in lines if line.place.rank]
    if not ranked:
        return ""
    best = [line.name for line in ranked if line.place.first]
    if not best:
        return f"Others are better in all {len(ranked)} ranked measures."
    return f"No other is shown to be better in {len(best)} of {len(ranked)} ranked measures."


def _about(manifest: Mapping[str, object], checkpoint: str) -> str:
    """Kind, architecture and size of a checkpoint, as far as the manifest tells."""
    entries = manifest.get("checkpoints")
    listed = entries if isinstance(entries, list | tuple) else []
    found = next((e for e in listed if isinstance(e, Mapping) and e.get("id") == checkpoint), {})
    told = [str(found[key]) for key in ("kind", "arch") if found.get(key)]
    count = found.get("parameters")
    if isinstance(count, int) and count > 0:
        told.append(f"{count:,} parameters")
    return ", ".join(told)


def _name(column: _Column) -> str:
    cell = next(iter(column.cells.values()))
    return f"{column.measure.name}, {cell.unit_name}"


def profiles(found: Sequence[Measure], checkpoints: Sequence[str], manifest: Mapping[str, object]) -> Profiles:
    """The cards of the checkpoints that have a measure.

    Arguments:
        found: The measures of the overview.
        checkpoints: Whose cards, in their order.
        manifest: Of the run.
    """
    columns = [_column(measure) for measure in found]
    pairs = _pairs(columns)
    cards = []
    for number, name in enumerate(checkpoints):
        lines: list[Line] = []
        seen = ""
        for measure, cells, drawn in columns:
            if name not in cells or cells[name].missing:
                continue
            place = Place(cells[name], measure.ranks.get(name, ""), 0, drawn[name])
            lines.append(Line("" if measure.axis == seen else measure.axis, measure.name, cells[name].unit_name, place))
            seen = measure.axis
        if lines:
            trades = _trades(pairs, name, number)
            cards.append(Profile(number, name, _about(manifest, name), _said(lines), lines, trades))
    return Profiles("".join(pair.scatter.symbol for pair in pairs), cards)


def _trades(pairs: Sequence[_Pair], checkpoint: str, number: int) -> list[Trade]:
    """The charts of a card."""
    made = []
    for across, up, scatter in pairs:
        x, y = across.cells.get(checkpoint), up.cells.get(checkpoint)
        point = _point(x, y)
        if x is None or y is None or point is None:
            continue
        title = f"{_name(up)}, against {_name(across)}"
        told = f"\u2068{checkpoint}\u2069 among {len(scatter.points)} checkpoints: {y.text} against {x.text}."
        made.append(Trade(_name(across), _name(up), scatter.marking(point, number, title, told)))
    return made
