"""What a page prints in a cell: numbers as people read them, next to the number as it is."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan, nan
from typing import Any, NamedTuple

__all__ = ["Cell", "Digest", "Link", "Row", "Table", "flat", "plain", "shaded", "table_of", "unit_name"]

MISSING = "–"
DIGITS = {"fraction": 1, "percent": 1, "nats": 2, "pixels": 3}
UNITS = {"fraction": "%", "pixels": "l2 radius"}


def _number(value: float, unit: str, signed: bool = False) -> str:
    """A number in its unit, without the unit: fractions in percent, and a true minus sign."""
    if isnan(value):
        return MISSING
    shown = 100 * value if unit == "fraction" else value
    if not isfinite(value):
        text = "∞" if value > 0 else "-∞"
    elif unit == "count":
        text = f"{shown:,.10g}"
    elif unit in DIGITS:
        rounded = round(shown, DIGITS[unit]) + 0.0  # + 0.0: no minus zero
        text = f"{rounded:{'+' if signed and rounded else ''}.{DIGITS[unit]}f}"
    else:
        text = f"{shown:.4g}"
    return text.replace("-", "−")


def unit_name(unit: str) -> str:
    """A unit as a page prints it."""
    return UNITS.get(unit, unit)


@dataclass(frozen=True)
class Cell:
    """One metric of one checkpoint."""

    metric: str
    value: float
    low: float
    high: float
    n: float
    n_available: float
    unit: str
    better: str
    complete: bool
    shade: float | None = None
    chosen: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Cell":
        """The cell of a row of metrics."""
        value, low, high, n, available = (
            nan if record[key] is None else float(record[key]) for key in ("value", "low", "high", "n", "n_available")
        )
        metric, unit, better = (str(record[key]) for key in ("metric", "unit", "better"))
        return cls(metric, value, low, high, n, available, unit, better, bool(record["complete"]))

    @property
    def signed(self) -> bool:
        """Whether it is a difference, which is written with its sign."""
        return "gain" in self.metric.split("/")

    @property
    def unit_name(self) -> str:
        """Its unit as a page prints it; a difference of percentages is in points."""
        return "percentage points" if self.signed and self.unit == "fraction" else unit_name(self.unit)

    @property
    def missing(self) -> bool:
        """Whether there is no value."""
        return isnan(self.value)

    @property
    def data(self) -> str:
        """The value in full: what it reads back as is equal to it."""
        return "" if self.missing else repr(self.value)

    @property
    def text(self) -> str:
        """The value, rounded for people."""
        return _number(self.value, self.unit, self.signed)

    @property
    def interval(self) -> str:
        """The interval, rounded likewise, or nothing."""
        if isnan(self.low) or isnan(self.high):
            return ""
        low, high = (_number(end, self.unit, self.signed) for end in (self.low, self.high))
        return f"{low} to {high}" if self.signed or self.low < 0 else f"{low}–{high}"

    @property
    def samples(self) -> str:
        """How many samples it rests on, of how many there are."""
        if isnan(self.n):
            return ""
        least = f"n = {self.n:,.0f}"
        return least if isnan(self.n_available) or self.n_available == self.n else f"{least} of {self.n_available:,.0f}"

    @property
    def note(self) -> str:
        """Interval and samples, for a tooltip."""
        return ", ".join(part for part in (self.interval, self.samples, "" if self.complete else "partial") if part)


class Digest(NamedTuple):
    """A digest, of which tables show the beginning."""

    digest: str


class Link(NamedTuple):
    """A text that leads to a file beside the page."""

    text: str
    href: str


class Row(NamedTuple):
    """A row's name, what tells it from rows of the same name, and its cells."""

    name: str
    mode: str
    cells: Sequence[Cell | Digest | Link | str | None]


class Table(NamedTuple):
    """A table of a page; spans are headings over several columns, each with how many it covers."""

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]
    spans: Sequence[tuple[str, int]] = ()


def shaded(tables: Sequence[Table]) -> list[Table]:
    """The tables with each cell's shade, from 0 for their smallest value to 1 for their largest."""
    values = [cell.value for table in tables for row in table.rows for cell in row.cells if isinstance(cell, Cell)]
    finite = [value for value in values if isfinite(value)]
    least, span = min(finite, default=0.0), (max(finite, default=0.0) - min(finite, default=0.0)) or inf

    def shade(cell: Cell | Digest | Link | str | None) -> Cell | Digest | Link | str | None:
        if not isinstance(cell, Cell) or not isfinite(cell.value):
            return cell
        return replace(cell, shade=round((cell.value - least) / span, 3))

    return [
        table._replace(rows=[row._replace(cells=[shade(cell) for cell in row.cells]) for row in table.rows])
        for table in tables
    ]


def plain(value: object) -> str:
    """A value of a manifest as a text."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and not any(isinstance(part, dict | list | tuple) for part in value):
        return ", ".join(plain(part) for part in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested mappings, each with its dotted name."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, plain(value)


def table_of(entries: object, caption: str, name: str) -> Table | None:
    """A table of mappings, one a row, with a column for each key that any has; `name` is the key of the row's name."""
    rows = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list | tuple) else []
    columns = list(dict.fromkeys(str(key) for row in rows for key in row if key != name))

    def cell(row: Mapping[str, Any], key: str) -> Digest | str | None:
        if key not in row:
            return None
        return Digest(plain(row[key])) if key in ("sha256", "digest") and row[key] else plain(row[key])

    made = [Row(plain(row.get(name, "")), "", [cell(row, key) for key in columns]) for row in rows]
    return Table(caption, name, columns, made) if rows else None
