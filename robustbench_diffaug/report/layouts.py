"""The tables of the DiffAug paper, filled with what a run has measured."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, nan
from typing import Any, NamedTuple, TypeAlias

import pandas as pd

from robustbench_diffaug.component import suggest
from robustbench_diffaug.data.corruptions import VALIDATION
from robustbench_diffaug.report.cells import Cell
from robustbench_diffaug.report.paper_tables import LAYOUTS, PREFIX, TRAINED, Average, Column, Layout
from robustbench_diffaug.report.printed import Grid, Name, Text, cell_text, published_grids
from robustbench_diffaug.report.published import publication

__all__ = ["Filled", "filled", "named"]

TOLERANCE = 1e-9  # between a mean that the run has and that of its own columns


def named(word: str) -> str:
    """The name of a layout, given with or without its prefix.

    Raises:
        ValueError: If there is none.
    """
    name = word if word.startswith(PREFIX) else PREFIX + word
    if name not in LAYOUTS:
        raise ValueError(f"--layout {word}: no layout is called so{suggest(name, list(LAYOUTS))}")
    return name


@dataclass(frozen=True)
class Filled:
    """A layout with a run's figures.

    Arguments:
        grids: The table, and what was published of it on the same benchmark.
        frame: The same with ends of intervals, for CSV; fractions stay fractions.
    """

    grids: tuple[Grid, ...]
    frame: pd.DataFrame


class _Row(NamedTuple):
    """A row: a checkpoint, and what stands in front of its metrics."""

    checkpoint: str
    mode: str
    cells: dict[str, Cell]


class _Found(NamedTuple):
    """What a column takes: a metric of a bench, its cell of each checkpoint, and other benches with such figures."""

    bench: str
    metric: str
    cells: dict[str, Cell]
    others: tuple[str, ...]


_Taken: TypeAlias = Mapping[tuple[str, str], _Found]
"""What a column takes, by its key and the mode of rows."""


class _Figures:
    """The figures of a run by bench and metric."""

    def __init__(self, metrics: pd.DataFrame, manifest: Mapping[str, Any]) -> None:
        self.metrics = metrics
        self.keys: list[tuple[str, str]] = list(dict.fromkeys(zip(metrics["bench"], metrics["metric"], strict=True)))
        groups = metrics.groupby(["bench", "metric"])["group"].nunique(dropna=False)
        self.single = {key for key in self.keys if groups[key] == 1}
        self.severities: dict[str, set[int]] = {}
        self.corruptions: dict[str, set[str]] = {}
        datasets = manifest.get("datasets")
        for entry in datasets if isinstance(datasets, list | tuple) else ():
            if isinstance(entry, Mapping) and entry.get("severity") and entry.get("group") not in VALIDATION:
                bench = str(entry.get("bench"))
                self.severities.setdefault(bench, set()).add(int(entry["severity"]))
                self.corruptions.setdefault(bench, set()).add(str(entry.get("group")))

    def prefer(self, columns: Sequence[Column], modes: Iterable[str]) -> None:
        """Benches that fill more of these columns come first: columns of one bench are of the same images."""
        among = [{key[0] for key in self._having(column, mode)} for column in columns for mode in modes]
        filled = Counter(bench for benches in among for bench in benches)
        self.keys.sort(key=lambda key: -filled[key[0]])

    def _having(self, column: Column, mode: str) -> list[tuple[str, str]]:
        return [key for key in self.keys if key in self.single and self._is(column, mode, *key)]

    def find(self, column: Column, mode: str) -> _Found | None:
        """The first bench and metric that a column can be filled from, its rows having a mode."""
        found = self._having(column, mode)
        if not found:
            return None
        bench, metric = found[0]
        rows = self.metrics[(self.metrics["bench"] == bench) & (self.metrics["metric"] == metric)]
        records = [{str(k): v for k, v in record.items()} for record in rows.to_dict("records")]
        others = tuple(dict.fromkeys(str(other) for other, _ in found if other != bench))
        return _Found(str(bench), str(metric), {str(r["checkpoint"]): Cell.of(r) for r in records}, others)

    def _is(self, column: Column, mode: str, bench: str, metric: str) -> bool:
        wanted = [mode + column.metric]
        if column.severity:
            wanted = [f"{mode}{column.metric}@s{column.severity}"]
            wanted += [mode + column.metric] if self.severities.get(bench) == {column.severity} else []
        return any(re.fullmatch(pattern, str(metric)) for pattern in wanted)


def filled(name: str, metrics: pd.DataFrame, manifest: Mapping[str, Any], published: pd.DataFrame) -> Filled:
    """A layout with the figures of a run; what it has not measured is an en dash.

    Rows are the pairs of networks without and with DiffAug (`ID` and `ID+diffaug`) in the order of the suite, then the
    others that have any of the figures.

    Arguments:
        name: Of the layout.
        metrics: The figures of the run.
        manifest: That of the run.
        published: As `published.rows` gives them.

    Raises:
        ValueError: If there is no such layout, or the run has measured nothing of it.
    """
    layout, figures = LAYOUTS[name], _Figures(metrics, manifest)
    plain = [column for column in layout.columns if isinstance(column, Column)]
    modes = dict.fromkeys(("", layout.mode))
    figures.prefer(plain, modes)
    taken = {(column.key, mode): found for mode in modes for column in plain if (found := figures.find(column, mode))}
    own = {c.key: f for c in layout.columns if isinstance(c, Average) and (f := _own(figures, c))}
    if not taken:
        wanted = ", ".join(column.head for column in plain)
        raise ValueError(f"layout {name}: the run has measured none of {wanted}; the suite {layout.suite} does some")
    pairs, others = _rows(metrics)

    def row(checkpoint: str) -> _Row:
        mode = layout.mode if checkpoint.endswith(TRAINED) else ""
        cells = {c.key: f.cells[checkpoint] for c in plain if (f := taken.get((c.key, mode))) and checkpoint in f.cells}
        return _Row(checkpoint, mode, cells | _averages(layout, checkpoint, cells, own))

    made = [(row(one), row(other)) for one, other in pairs]
    made = [pair for pair in made if pair[0].cells or pair[1].cells]
    single = [one for one in map(row, others) if one.cells]
    lines = list(_lines(layout, made, single))
    notes = [*_notes(layout, figures, taken), *_remarks(layout, lines, single, made)]
    columns: list[Text] = [(f"{column.head}{_unit(column.key, lines)}",) for column in layout.columns]
    rows = [(line.title, [cell_text(line.cells.get(column.key)) for column in layout.columns]) for line in lines]
    grid = Grid((f"{layout.title}. As {_place(name)}, measured.",), "network", columns, rows, notes, name)
    beside = published[published["published"] == name]
    return Filled((grid, *published_grids(beside)), _frame(layout, lines, beside, taken))


def _place(name: str) -> str:
    known = publication(name).source
    return f"{known.place[0].lower()}{known.place[1:]} of DiffAug ({known.authors}, {known.year})"


def _rows(metrics: pd.DataFrame) -> tuple[list[tuple[str, str]], list[str]]:
    """The pairs of checkpoints, and those that are in none."""
    names = [str(name) for name in metrics["checkpoint"].unique()]
    pairs = [(name, name + TRAINED) for name in names if name + TRAINED in names]
    among = {name for pair in pairs for name in pair}
    return pairs, [name for name in names if name not in among]


def _own(figures: _Figures, column: Average) -> _Found | None:
    return figures.find(Column(column.key, column.head, column.metric), "") if column.metric else None


def _averages(layout: Layout, checkpoint: str, cells: Mapping[str, Cell], own: Mapping[str, _Found]) -> dict[str, Cell]:
    """The averages over columns of which every figure is there."""
    made = {}
    for column in layout.columns:
        if isinstance(column, Average) and all(key in cells and not cells[key].missing for key in column.over):
            among = [cells[key] for key in column.over]
            if column.alike and len({cell.n for cell in among}) > 1:
                continue
            mean = _mean(among)
            found = own[column.key].cells.get(checkpoint) if column.key in own else None
            made[column.key] = found if found and abs(found.value - mean.value) < TOLERANCE else mean
    return made


def _mean(cells: Sequence[Cell]) -> Cell:
    """The mean of figures, without an interval."""
    return _bare(fsum(cell.value for cell in cells) / len(cells), cells)


def _bare(value: float, cells: Sequence[Cell], metric: str = "") -> Cell:
    complete = all(cell.complete for cell in cells)
    return Cell(metric, value, nan, nan, nan, nan, cells[0].unit, cells[0].better, complete)


class _Line(NamedTuple):
    """A row as it is printed: of a network, or of a difference or an average."""

    title: Text
    name: str
    mode: str
    cells: Mapping[str, Cell]


def _lines(layout: Layout, pairs: Sequence[tuple[_Row, _Row]], single: Sequence[_Row]) -> Iterator[_Line]:
    """The rows, those of differences and averages among them."""
    for one, other in pairs:
        yield from (_line(row) for row in (one, other))
        if layout.differences:
            both = [c.key for c in layout.columns if c.key in one.cells and c.key in other.cells]
            gains = {
                key: _bare(other.cells[key].value - one.cells[key].value, (one.cells[key], other.cells[key]), "gain")
                for key in both
            }
            yield _Line(("difference",), f"{other.checkpoint} less {one.checkpoint}", "", gains)
    if layout.averages and pairs:
        sides = {"Avg": [row for pair in pairs for row in pair], "Avg (No-DiffAug)": [pair[0] for pair in pairs],
                 "Avg (DiffAug)": [pair[1] for pair in pairs]}  # fmt: skip
        for title, rows in sides.items():
            yield _Line((title,), title, "", _over_rows(layout, rows))
    yield from map(_line, single)


def _line(row: _Row) -> _Line:
    mode = row.mode.rstrip("/")
    return _Line((Name(row.checkpoint), f", {mode.upper()}" if mode else ""), row.checkpoint, mode, row.cells)


def _over_rows(layout: Layout, rows: Sequence[_Row]) -> dict[str, Cell]:
    """The mean of each column that every row has."""
    keys = [c.key for c in layout.columns if all(c.key in row.cells and not row.cells[c.key].missing for row in rows)]
    return {key: _mean([row.cells[key] for row in rows]) for key in keys}


def _unit(key: str, lines: Sequence[_Line]) -> str:
    """The unit of a column, if any row has it."""
    unit = next((line.cells[key].unit for line in lines if key in line.cells), "")
    shown = "%" if unit == "fraction" else unit
    return f" ({shown})" if shown else ""


def _notes(layout: Layout, figures: _Figures, taken: _Taken) -> Iterator[Text]:
    """Which metric of which bench each column takes, and of how many samples."""
    parts: list[str | Name] = ["Columns: "]
    heads = {column.key: column for column in layout.columns if isinstance(column, Column)}
    for number, ((key, mode), found) in enumerate(taken.items()):
        counts = sorted({cell.n for cell in found.cells.values() if isfinite(cell.n)})
        shown = " and ".join(f"{count:,.0f}" for count in counts)
        text = f"n = {shown}" if shown else "n unknown"
        if heads[key].severity:
            text += f", {len(figures.corruptions.get(found.bench, ()))} corruptions"
        front = "; " if number else ""
        head = heads[key].head + (f" with {mode.rstrip('/').upper()}" if mode else "")
        parts += [f"{front}{head} is ", Name(found.metric), " of bench ", Name(found.bench), f" ({text})"]
    missing = [
        column.head for key, column in heads.items() if not any((key, mode) in taken for mode in ("", layout.mode))
    ]
    parts.append(f". Not measured: {', '.join(missing)}." if missing else ".")
    yield parts
    others = list(dict.fromkeys(bench for found in taken.values() for bench in found.others))
    if others:
        named = [word for bench in others for word in (", ", Name(bench))][1:]
        yield ("Left out, since such figures are taken of one bench alone: those of ", *named, ".")


def _remarks(layout: Layout, lines: Sequence[_Line], single: Sequence[_Row], pairs: Sequence[object]) -> Iterator[Text]:
    averages = [c for c in layout.columns if isinstance(c, Average) and c.alike]
    for column in averages:
        if any(set(column.over) <= line.cells.keys() and column.key not in line.cells for line in lines):
            yield (f"{column.head} is left out where its columns are of different numbers of images.",)
    if layout.averages and single and pairs:
        yield ("Averages over rows are over the pairs alone.",)
    if any(not cell.complete for line in lines for cell in line.cells.values()):
        yield ("* from a part of the declared samples.",)


def _frame(layout: Layout, lines: Sequence[_Line], published: pd.DataFrame, taken: _Taken) -> pd.DataFrame:
    """A row for each of the table, with the ends of intervals; then published ones, in the columns of their metrics."""
    keys = [column.key for column in layout.columns]
    rows: list[dict[str, object]] = []
    for line in lines:
        row: dict[str, object] = {"network": line.name, "mode": line.mode, "source": "measured"}
        for key in keys:
            cell = line.cells.get(key)
            ends = (nan, nan, nan) if cell is None else (cell.value, cell.low, cell.high)
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), ends, strict=True))
        rows.append(row)
    of = {(found.bench, found.metric): key for (key, _), found in taken.items()}
    for network, figures in published.groupby("checkpoint", sort=False):
        row = {"network": network, "mode": "", "source": f"published, {figures['published'].iloc[0]}"}
        places = zip(figures["bench"], figures["metric"], figures["value"], strict=True)
        rows.append(row | {of[place]: value for *place_, value in places if (place := tuple(place_)) in of})
    return pd.DataFrame(rows, columns=pd.Index(["network", "mode", "source", *_ends(keys)]))


def _ends(keys: Sequence[str]) -> list[str]:
    return [name for key in keys for name in (key, f"{key}_low", f"{key}_high")]
