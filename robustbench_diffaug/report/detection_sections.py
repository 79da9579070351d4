"""The part of a page that shows out-of-distribution detection: the paper's layout, then all scores and figures."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import isclose, nan
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from robustbench_diffaug.report import figures, tables
from robustbench_diffaug.report.cells import Cell, Row, Table, shaded
from robustbench_diffaug.report.sections import Legend, Panel, by_bench, cells_by, legend

__all__ = ["Detection", "Fold", "Histograms", "Settings", "detection"]

AVERAGED = ("ash", "msp", "react", "scale")  # the paper's Table 3
FIGURES = {
    "auroc": "AUROC",
    "fpr95_ood_positive": "FPR at 95 %, OOD positive",
    "fpr95_id_positive": "FPR at 95 %, ID positive",
    "aupr_in": "AUPR, ID positive",
    "aupr_out": "AUPR, OOD positive",
    "detection_error": "detection error",
    "auoscr": "AUOSCR",
}
SETS = {"near": "near", "far": "far", "near-fs": "near, full spectrum", "far-fs": "far, full spectrum"}
ENDS, SPECTRA = ("near", "far"), ("near-fs", "far-fs")
ACCURACIES = {"accuracy": ("ID accuracy", ENDS), "accuracy/csid": ("shifted ID accuracy", SPECTRA)}  # beside which sets
ROLES = {"id": "ID", "near": "near OOD", "far": "far OOD", "csid": "shifted ID"}
NUMBER = r"(?P<at>[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
NAMED = rf"(?P<gain>gain/)?(?P<figure>{'|'.join(FIGURES)})/(?P<score>[^/@]+)/(?P<set>.+)"
ROC = rf"roc/(?P<score>[^/@]+)/(?P<set>[^/@]+)@fpr={NUMBER}"
DENSITY = rf"density/(?P<score>[^/@]+)/(?P<role>{'|'.join(ROLES)})@s={NUMBER}"
SWEEP = rf"sweep/(?P<score>[^/@]+)@(?P<parameter>[^@=]+)={NUMBER}"
CHOSEN = r"chosen/(?P<score>[^/@]+)"
LISTED = 7  # points of a ROC curve that its table of numbers has

Cells: TypeAlias = Mapping[tuple[Hashable, ...], Cell]
"""By checkpoint and metric."""


class Settings(NamedTuple):
    """What a page needs to know of a bench besides its metrics.

    Attributes:
        averaged: The scores that are averaged; those of the paper if nothing is said.
        bases: The checkpoint that each is compared with, of those that are.
    """

    averaged: Sequence[str] = AVERAGED
    bases: Mapping[str, str] = {}


class Fold(NamedTuple):
    """Tables behind a summary, with their intervals in the open or not."""

    title: str
    tables: list[Table]
    intervals: bool = False


class Histogram(NamedTuple):
    """A checkpoint's scores of each role."""

    checkpoint: str
    svg: str


class Histograms(NamedTuple):
    """Those of all checkpoints, of one score, and which roles are in them."""

    score: str
    roles: list[tuple[str, str]]
    panels: list[Histogram]


class Detection(NamedTuple):
    """What the page shows of a bench; `bench` is its name where there are several, else empty."""

    bench: str
    boards: list[Table]
    gains: list[Table]
    scores: list[Table]
    legend: list[Legend]
    rocs: list[Panel]
    more_rocs: list[Panel]
    histograms: list[Histograms]
    folds: list[Fold]


class Column(NamedTuple):
    """A column of a table: the heading over several, its own, and the metric in it."""

    span: str
    heading: str
    metric: str


def _table(cells: Cells, caption: str, columns: Sequence[Column]) -> Table | None:
    """A row for each checkpoint and a column for each metric, of those that any cell has; None without one."""
    held = {metric for _, metric in cells}
    kept = [column for column in columns if column.metric in held]
    lines = [
        Row(str(checkpoint), "", [cells.get((checkpoint, column.metric)) for column in kept])
        for checkpoint in dict.fromkeys(checkpoint for checkpoint, _ in cells)
    ]
    filled = [line for line in lines if any(cell is not None for cell in line.cells)]
    spans = [(span, len(list(group))) for span, group in groupby(column.span for column in kept) if span]
    return Table(caption, "checkpoint", [column.heading for column in kept], filled, spans) if filled else None


def _present(made: Sequence[Table | None]) -> list[Table]:
    return [table for table in made if table is not None]


def _ordered(found: Sequence[str], first: Sequence[str], last: Sequence[str] = ()) -> list[str]:
    """The distinct names, some of them first and some last."""
    middle = [name for name in dict.fromkeys(found) if name not in first and name not in last]
    return [*(name for name in first if name in found), *middle, *(name for name in last if name in found)]


def _boards(cells: Cells, sets: Sequence[str], averaged: Sequence[str]) -> list[Table]:
    """The layout of the paper's Table 3 for AUROC, and for FPR in both conventions, of near, far and full spectra."""
    scores, made = [*averaged, "average"], []
    for number, name in enumerate(sets):
        auroc = [Column("", score, f"auroc/{score}/{name}") for score in scores]
        text = "AUROC" if number else "AUROC, and accuracy"
        accuracies = [Column("", text, metric) for metric, (text, beside) in ACCURACIES.items() if name in beside]
        made.append(_table(cells, f"{SETS[name]}: {text}", auroc if number else [*accuracies, *auroc]))
        rates = [
            Column(FIGURES[figure], score, f"{figure}/{score}/{name}")
            for figure in ("fpr95_ood_positive", "fpr95_id_positive")
            for score in scores
        ]
        text = "false positive rate at a true positive rate of 95 %, in both conventions; lower is better"
        made.append(_table(cells, f"{SETS[name]}: {text}", rates))
    return _present(made)


def _gains(cells: Cells, sets: Sequence[str], scores: Sequence[str], bases: Mapping[str, str]) -> list[Table]:
    """Paired differences to other checkpoints: a row per pair, a column per figure and score."""
    made = []
    for name in sets:
        columns = [Column(text, s, f"gain/{figure}/{s}/{name}") for figure, text in FIGURES.items() for s in scores]
        if table := _table(cells, f"{SETS.get(name, name)}: differences, in percentage points", columns):
            against = [
                row._replace(mode=f"against {bases[row.name]}" if row.name in bases else "") for row in table.rows
            ]
            made.append(table._replace(rows=against))
    return made


def _scores(cells: Cells, figure: str, sets: Sequence[str], scores: Sequence[str]) -> list[Table]:
    """A figure of every score, a table for each set of images."""
    text = FIGURES[figure]
    return _present([
        _table(cells, f"{text}: {SETS.get(name, name)}", [Column("", s, f"{figure}/{s}/{name}") for s in scores])
        for name in sets
    ])  # fmt: skip


def _folds(cells: Cells, sets: Sequence[str], scores: Sequence[str]) -> list[Fold]:
    """What of every score does not stand in the open: AUROC on each dataset, and the other figures."""
    return [
        Fold(
            f"Every score: {text}{' on each dataset' if figure == 'auroc' else ''}",
            _scores(cells, figure, [name for name in sets if figure != "auroc" or name not in ("near", "far")], scores),
        )
        for figure, text in FIGURES.items()
    ]


def _sweeps(swept: pd.DataFrame, chosen: pd.DataFrame) -> list[Table]:
    """AUROC on validation at each value of a hyper-parameter, the value taken being marked."""
    taken = {(str(r["checkpoint"]), str(r["score"])): float(r["value"]) for r in chosen.to_dict("records")}
    made = []
    for (score, parameter), rows in swept.groupby(["score", "parameter"], sort=False):
        cells = {
            key: replace(cell, chosen=isclose(float(str(key[1])), taken.get((str(key[0]), str(score)), nan)))
            for key, cell in cells_by(rows, "checkpoint", "at").items()
        }
        columns = [Column("", f"{float(at):g}", at) for at in sorted(rows["at"].unique(), key=float)]
        made.append(_table(cells, f"{score}: AUROC of ID against OOD validation images, by {parameter}", columns))
    return _present(made)


def _roc(rows: pd.DataFrame, score: str, name: str, prefix: str, styles: Mapping[str, int]) -> Panel:
    """A ROC curve of each checkpoint, and some of its points."""
    what = f"{score}: OOD images flagged, %, against ID images flagged: {SETS.get(name, name)}"
    points = sorted(rows["at"].unique(), key=float)
    listed = points[:: max(1, round(len(points) / LISTED))]
    columns = [Column("", f"{100 * float(at):.4g} %", at) for at in listed]
    numbers = _table(cells_by(rows[rows["at"].isin(listed)], "checkpoint", "at"), what, columns)
    assert numbers is not None, "a ROC curve has points"
    values = tables.wide(rows, ".*", "at", "checkpoint").loc[points]
    x, rank = np.array(points, dtype=np.float64), sorted(map(str, values.columns), key=styles.__getitem__)
    curves = [(values[checkpoint].to_numpy(dtype=np.float64), styles[checkpoint]) for checkpoint in rank]
    lines = [figures.Line(x, y, y, y, style) for y, style in curves]
    names = ", ".join(f"\u2068{checkpoint}\u2069" for checkpoint in rank)
    told = f"{len(lines)} curves: {names}. The table after it has some of the numbers, metrics.csv all."
    svg = figures.roc(lines, prefix, what, told)
    return Panel(score, SETS.get(name, name), "%", svg, numbers._replace(corner="checkpoint, ID flagged"))


def _histograms(rows: pd.DataFrame, score: str, prefix: str) -> Histograms:
    """Small multiples: a histogram for each checkpoint, with the roles on top of each other."""
    roles = [role for role in ROLES if role in set(rows["role"])]
    rows = rows.assign(number=rows["at"].astype(float)).sort_values("number", kind="stable")
    panels = []
    for number, (checkpoint, part) in enumerate(rows.groupby("checkpoint", sort=False)):
        shares = tables.wide(part, ".*", "number", "role").fillna(0.0)
        found = {role: shares[role].to_numpy(dtype=np.float64) for role in roles if role in shares}
        title = f"Scores {score} of \u2068{checkpoint}\u2069 by role"
        svg = figures.histogram(shares.index.to_numpy(dtype=np.float64), found, f"{prefix}-{number}", title)
        panels.append(Histogram(str(checkpoint), svg))
    return Histograms(score, [(role, ROLES[role]) for role in roles], panels)


def _parts(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of a bench that the page shows, by what they are; a second row for one place is not among them."""
    named = tables.matching(rows, NAMED)
    swept, chosen = tables.matching(rows, SWEEP), tables.matching(rows, CHOSEN)
    accuracies = [metric for metric, (_, beside) in ACCURACIES.items() if named["set"].isin(beside).any()]
    return {
        "accuracy": rows[rows["metric"].isin(accuracies)].drop_duplicates(["checkpoint", "metric"]),
        "figures": named[named["gain"] == ""].drop_duplicates(["checkpoint", "metric"]),
        "gains": named[named["gain"] != ""].drop_duplicates(["checkpoint", "metric"]),
        "roc": tables.matching(rows, ROC).drop_duplicates(["checkpoint", "metric"]),
        "density": tables.matching(rows, DENSITY).drop_duplicates(["checkpoint", "metric"]),
        "sweeps": swept.drop_duplicates(["checkpoint", "metric"]),
        "chosen": chosen[chosen["score"].isin(swept["score"])],
    }


def _rocs(parts: pd.DataFrame, first: Sequence[str], number: int, styles: Mapping[str, int]) -> list[Panel]:
    """The ROC curves of a bench, a panel for each score and set, some scores first."""
    order = _ordered([*parts["score"]], first)
    curves = {(str(s), str(n)): part for (s, n), part in parts.groupby(["score", "set"], sort=False)}
    return [
        _roc(curves[score, name], score, name, f"roc-{number}-{k}", styles)
        for k, (score, name) in enumerate(sorted(curves, key=lambda key: order.index(key[0])))
    ]


def _bench(
    parts: Mapping[str, pd.DataFrame], bench: str, number: int, settings: Settings, styles: Mapping[str, int]
) -> Detection:
    """What the page shows of a bench."""
    averaged, bases = settings
    cells = cells_by(pd.concat([parts["accuracy"], parts["figures"]]), "checkpoint", "metric")
    gains = cells_by(parts["gains"], "checkpoint", "metric")
    scores = _ordered([*parts["figures"]["score"], *parts["gains"]["score"]], averaged, ["average"])
    sets, compared = (_ordered([*parts[which]["set"]], tuple(SETS)) for which in ("figures", "gains"))
    ends, spectra = ([name for name in sets if name in chosen] for chosen in (ENDS, SPECTRA))
    folds = [
        Fold("Full spectrum: ID images under covariate shift among ID", _boards(cells, spectra, averaged), True),
        *_folds(cells, sets, scores),
        Fold("Every score: differences between checkpoints", _gains(gains, compared, scores, bases), True),
        Fold("Hyper-parameters chosen on validation", _sweeps(parts["sweeps"], parts["chosen"])),
    ]
    panels = _rocs(parts["roc"], averaged, number, styles)
    return Detection(
        bench,
        _boards(cells, ends, averaged),
        _gains(gains, ENDS, [*averaged, "average"], bases),
        shaded(_scores(cells, "auroc", ends, scores)) if set(scores) - {*averaged, "average"} else [],
        legend({name: styles[name] for name in map(str, parts["roc"]["checkpoint"].unique())}, f"roc-line-{number}"),
        [panel for panel in panels if panel.title in averaged],
        [panel for panel in panels if panel.title not in averaged],
        [
            _histograms(part, str(score), f"histogram-{number}-{k}")
            for k, (score, part) in enumerate(parts["density"].groupby("score", sort=False))
        ],
        [fold for fold in folds if fold.tables],
    )


def detection(
    metrics: pd.DataFrame, used: set[Hashable], styles: Mapping[str, int], settings: Mapping[str, Settings]
) -> list[Detection]:
    """What there is of each bench of out-of-distribution detection.

    Arguments:
        metrics: The long form.
        used: Where the rows that are shown are noted.
        styles: The number of each checkpoint's line.
        settings: Of benches, by name.
    """
    made = []
    for number, (front, rows) in enumerate(by_bench(metrics)):
        parts = _parts(rows)
        if parts["figures"].empty:
            continue
        chosen = settings.get(str(rows["bench"].iloc[0]), Settings())
        made.append(_bench(parts, front.removesuffix(": "), number, chosen, styles))
        used |= {index for part in parts.values() for index in part.index}
    return made
