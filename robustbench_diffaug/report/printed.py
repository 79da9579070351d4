"""What a report in Markdown or LaTeX says, before it is written in either: headings, paragraphs and tables of texts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import pandas as pd

from robustbench_diffaug.report import tables
from robustbench_diffaug.report.cells import MISSING, Cell, plain
from robustbench_diffaug.report.published import publication

__all__ = ["Block", "Grid", "Heading", "Line", "Name", "Text", "blocks", "cell_text", "published_grids", "spelled"]

CURVES = r"(density|roc|sweep)/.*|.*@(t|t<|s|fpr)=.*"
"""Metrics that are points of curves and histograms: hundreds, which charts show and `metrics.csv` holds."""


class Name(str):
    """A name that somebody chose, of a checkpoint, a bench or a metric: set apart, and harmless whatever it is."""


Text: TypeAlias = Sequence[str | Name]
"""Prose with names in it."""


class Heading(NamedTuple):
    """A heading; level 1 is the title."""

    level: int
    text: Text


class Line(NamedTuple):
    """A paragraph, or an item of a list."""

    text: Text
    item: bool = False


class Grid(NamedTuple):
    """A table.

    Arguments:
        title: What it shows.
        corner: The heading of the rows' names.
        columns: Headings.
        rows: The name of each row and its cells: a figure, and what stands behind it in small (an interval, or '').
        notes: Below the table.
        label: By which LaTeX refers to it; empty for a table that does not float, which then needs no title.
    """

    title: Text
    corner: str
    columns: Sequence[Text]
    rows: Sequence[tuple[Text, Sequence[tuple[str, str]]]]
    notes: Sequence[Text] = ()
    label: str = ""


Block: TypeAlias = Heading | Line | Grid


def spelled(text: str) -> str:
    r"""A text in which what does not print, or turns the direction of what follows, is spelled out: `\u202e`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell_text(cell: Cell | None, more: str = "") -> tuple[str, str]:
    """A figure and its interval as texts; a star behind it says that it is of a part of the samples."""
    if cell is None or cell.missing:
        return MISSING, ""
    interval = f"[{cell.interval.replace('–', ', ').replace(' to ', ', ')}]" if cell.interval else ""
    return cell.text + ("" if cell.complete else "*"), f"{interval} {more}".strip()


def blocks(
    metrics: pd.DataFrame, board: pd.DataFrame, manifest: Mapping[str, Any], published: pd.DataFrame
) -> Iterator[Block]:
    """All that a report says: the leaderboard, a table of each bench, and published figures.

    Arguments:
        metrics: All figures of the run.
        board: Its leaderboard.
        manifest: What is said of them.
        published: As `published.rows` gives them.
    """
    found = manifest.get("suite")
    suite: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    yield Heading(1, ("Report of ", Name(plain(suite.get("name") or "a run"))))
    about = [word for key in ("digest", "seed") if (value := suite.get(key)) not in (None, "")
             for word in (f", {key} ", Name(plain(value)))]  # fmt: skip
    yield Line(("Suite ", Name(plain(suite.get("name") or "")), *about, ". Intervals in brackets hold with 95 %."))
    yield from (Line(text, True) for text in _notices(manifest))
    if metrics.empty:
        yield Line(("This run has no metrics yet.",))
        return
    yield Heading(2, ("Leaderboard",))
    yield _leaderboard(metrics, board)
    for bench in metrics["bench"].unique():
        yield from _bench(metrics[metrics["bench"] == bench], str(bench))
    if len(published):
        yield Heading(2, ("Published figures",))
        yield Line(("Of other networks and runs on the same benchmark, as printed: neither ranked nor tested.",))
        yield from published_grids(published)


def _notices(manifest: Mapping[str, Any]) -> Iterator[Text]:
    """What failed, and what a reader must know before the figures."""
    for failure in _listed(manifest, "failures"):
        if isinstance(failure, Mapping):
            yield ("failed: ", *_between([plain(failure.get(k, "")) for k in ("bench", "checkpoint", "dataset")]),
                   f": {plain(failure.get('reason', ''))}")  # fmt: skip
    for key in ("notices", "remarks"):
        yield from ((plain(notice),) for notice in _listed(manifest, key))


def _between(names: Sequence[str]) -> Iterator[str | Name]:
    for number, name in enumerate(names):
        yield from (" / ", Name(name)) if number else (Name(name),)


def _listed(manifest: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = manifest.get(key)
    return found if isinstance(found, list | tuple) else ()


def _unit(unit: str, signed: bool = False) -> str:
    return ("points" if signed else "%") if unit == "fraction" else unit


def _leaderboard(metrics: pd.DataFrame, board: pd.DataFrame) -> Grid:
    """The headline figures, a row for each checkpoint, with the places that intervals or tests leave open."""
    columns, cells = list[Text](), list[dict[str, tuple[str, str]]]()
    ranks = board.set_index("checkpoint")
    for name, chosen in tables.headlines(metrics):
        found = {str(record["checkpoint"]): Cell.of(record) for record in _records(chosen)}
        first = next(iter(found.values()))
        sign = "↑" if first.better == "higher" else "↓"
        columns.append((Name(name), f" ({_unit(first.unit, first.signed)}) {sign}"))
        places = {c: str(ranks.loc[c, f"{name}_rank"]) for c in found}
        cells.append({c: cell_text(cell, f"#{places[c]}" if places[c] else "") for c, cell in found.items()})
    names = [str(name) for name in board["checkpoint"]]
    lines = [((Name(n),), [column.get(n, (MISSING, "")) for column in cells]) for n in names]
    notes: list[Text] = [("↑ higher is better, ↓ lower is better; the numbers behind # are the places left open.",)]
    notes += [("* from a part of the declared samples, and not ranked.",)] if _partial(cells) else []
    return Grid(("Headline figures",), "checkpoint", columns, lines, notes, "leaderboard")


def _partial(cells: Sequence[Mapping[str, tuple[str, str]]]) -> bool:
    return any(text.endswith("*") for column in cells for text, _ in column.values())


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in record.items()} for record in rows.to_dict("records")]


def _bench(rows: pd.DataFrame, bench: str) -> Iterator[Block]:
    """A row for each metric and group of a bench, a column for each checkpoint; without the points of curves."""
    yield Heading(2, ("Bench ", Name(bench), " (", Name(str(rows["evaluator"].iloc[0])), ")"))
    drawn = rows["metric"].astype(str).str.fullmatch(CURVES)
    shown = rows[~drawn]
    keys = shown[["metric", "group"]].drop_duplicates()
    groups = keys["metric"].value_counts()
    checkpoints = [str(name) for name in rows["checkpoint"].unique()]
    cells = {(r["metric"], r["group"], r["checkpoint"]): Cell.of(r) for r in _records(shown)}
    lines = []
    for metric, group in keys.itertuples(index=False):
        row = [cells.get((metric, group, name)) for name in checkpoints]
        first = next(cell for cell in row if cell is not None)
        of = (" ", Name(group)) if groups[metric] > 1 else ()
        text = (Name(metric), *of, f" ({_unit(first.unit, first.signed)})")
        lines.append((text, [cell_text(cell) for cell in row]))
    notes: list[Text] = []
    if any(text.endswith("*") for _, row in lines for text, _ in row):
        notes.append(("* from a part of the declared samples.",))
    if left := rows.loc[drawn, "metric"].nunique():
        notes.append((f"{left:,} metrics that are points of curves are in metrics.csv.",))
    if lines:
        yield Grid((), "metric", [(Name(n),) for n in checkpoints], lines, notes)
    else:
        yield from (Line(note) for note in notes)


def published_grids(published: pd.DataFrame) -> Iterator[Grid]:
    """A table for each published one: its rows, with the columns that the run has measured too."""
    for name, rows in published.groupby("published", sort=False):
        known = publication(str(name))
        heads = list(dict.fromkeys(rows["head"]))
        units = rows.drop_duplicates("head").set_index("head")["unit"]
        found = {(row["checkpoint"], row["head"]): row["printed"] for row in _records(rows)}
        lines = [
            ((Name(line),), [(found.get((line, head), MISSING), "") for head in heads])
            for line in dict.fromkeys(rows["checkpoint"])
        ]
        taken = rows.drop_duplicates("head")[["head", "metric", "bench"]].itertuples(index=False)
        notes: list[Text] = [(f"{known.source.text}, {known.source.url}.",), *((note,) for note in known.remarks)]
        notes.append(_join([(f"{head}: ", Name(metric), " of bench ", Name(bench)) for head, metric, bench in taken]))
        columns: list[Text] = [(f"{head} ({_unit(str(units[head]))})",) for head in heads]
        yield Grid((f"{known.title}. ", "Published."), "published", columns, lines, notes, f"published-{name}")


def _join(texts: Sequence[Text]) -> Text:
    """Texts with semicolons between, and a full stop."""
    parts: list[str | Name] = []
    for number, text in enumerate(texts):
        parts += ["; ", *text] if number else text
    return [*parts, "."]
