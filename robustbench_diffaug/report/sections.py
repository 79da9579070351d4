"""The parts of a page that show metrics: each a view of some rows, and a note of which rows it has shown."""

import re
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from robustbench_diffaug.report import figures, tables
from robustbench_diffaug.report.axes import axis_of
from robustbench_diffaug.report.cells import Cell, Row, Table, shaded, unit_name

__all__ = [
    "Group", "Legend", "Panel", "by_bench", "cells_by", "curves", "legend", "others", "shifts", "smoothing",
    "unit_name",
]  # fmt: skip

# `de/accuracy/fog@s5`: the mode before it, the dataset, and the severity. At random times images
# are diffused, not shifted.
SHIFT = r"(?:(?P<mode>(?!.*random-time)[^@]+)/)?accuracy/(?P<shift>[^/@]+)(?:@s(?P<severity>\d+))?"
# `accuracy@t=50`, `de/accuracy@t<=50`, `certified@0.25`: what is plotted, and against what number.
CURVE = r"(?P<family>[^@]+@(?:(?P<variable>[A-Za-z_]+)<?=)?)(?P<at>\d+(?:\.\d+)?)"
TITLES = {
    "accuracy@t=": "Accuracy on images diffused to t and denoised",
    "de/accuracy@t=": "Accuracy of the ensemble at t",
    "de/accuracy@t<=": "Accuracy of the DiffAug-Ensemble of times up to t",
    "entropy@t=": "Entropy on images diffused to t and denoised",
    "entropy_gap@t=": "What entropy lacks to ln K, on images diffused to t and denoised",
    "ece@t=": "Calibration error on images diffused to t and denoised",
    "nll@t=": "Negative log-likelihood on images diffused to t and denoised",
    "gain/accuracy@t=": "Paired difference of accuracy on images diffused to t and denoised",
    "gain/entropy@t=": "Paired difference of entropy on images diffused to t and denoised",
    "noisy/accuracy@t=": "Accuracy on images diffused to t",
    "noisy/entropy@t=": "Entropy on images diffused to t",
    "noisy/entropy_gap@t=": "What entropy lacks to ln K, on images diffused to t",
    "noisy/ece@t=": "Calibration error on images diffused to t",
    "noisy/nll@t=": "Negative log-likelihood on images diffused to t",
    "noisy/gain/accuracy@t=": "Paired difference of accuracy on images diffused to t",
    "noisy/gain/entropy@t=": "Paired difference of entropy on images diffused to t",
    "denoised-rms@t=": "What diffusing to t and denoising changes",
    "mixed-rms@lambda=": "What denoising with a share of the class-conditional score changes",
    "gradient_norm@t=": "Norm of the gradient of log p(y | x) at images diffused to t",
    "jacobian_norm@t=": "Norm of the logits' Jacobian at images diffused to t",
    "pag_cosine@t=": "Cosine of the gradient at images diffused to t and the denoiser's direction",
    "chain/pag_cosine@t=": "Cosine of the gradient through the denoiser and the denoiser's direction",
    "denoised/pag_cosine@t=": "Cosine of the gradient at denoised images and the denoiser's direction",
    "pag_class_cosine@t=": "Cosine of the gradient at images diffused to t and the difference of class means",
    "chain/pag_class_cosine@t=": "Cosine of the gradient through the denoiser and the difference of class means",
    "gradient_sparsity@t=": "Sparsity of the gradient at images diffused to t",
    "gradient_variation@t=": "Total variation of the gradient at images diffused to t, relative to the image's",
    "generated_accuracy@t=": "Accuracy of another classifier on images after steps along the gradient",
    "generated_confidence@t=": "Probability of the class that another classifier gives after steps along the gradient",
    "agreement@scale=": "Share of drawn images that an independent classifier takes for the class asked for",
    "frechet@scale=": "Frechet distance of features, drawn images against real ones",
    "jacobian_trace@t=": "Trace of the denoiser's Jacobian",
    "denoising_error@t=": "Normalised denoising error",
    "trace_gap@t=": "Trace of the Jacobian less the normalised error",
    "jacobian_asymmetry@t=": "Asymmetry of the denoiser's Jacobian",
    "jacobian_smallest@t=": "Smallest eigenvalue of the Jacobian's symmetric part",
    "jacobian_largest@t=": "Largest singular value of the denoiser's Jacobian",
    "effective_rank@t=": "Effective rank of the denoiser's Jacobian",
    "certified@": "Certified accuracy",
    "certified-band@": "Certified accuracy, with a band for the whole curve",
    "certified-envelope@": "Certified accuracy at the best noise level of each radius",
    "certified-selected@": "Certified accuracy, the noise level chosen on other images",
    "certified-any@": "Certified accuracy at any of the noise levels, each at its share of alpha",
}
TABLES = {
    "certificates": r"certified@.+|abstain|acr|smoothed/accuracy|predict/.+",
    "lower bounds of certified accuracies": r"certified-lower@.+",
    "certificates over the noise levels": r"(certified|sigma)-(envelope|selected|any)@.+",
}


class Panel(NamedTuple):
    """A chart, its legend being the page's, with the numbers in it."""

    title: str
    detail: str
    unit: str
    svg: str
    numbers: Table


class Legend(NamedTuple):
    """The line of a checkpoint in charts."""

    checkpoint: str
    svg: str


class Group(NamedTuple):
    """Panels of one axis of robustness that share their horizontal axis."""

    title: str
    variable: str
    panels: list[Panel]


def cells_by(rows: pd.DataFrame, *keys: str) -> dict[tuple[Hashable, ...], Cell]:
    """The cell of each row, by the values of the given columns."""
    records: list[dict[Hashable, Any]] = rows.to_dict("records")
    return {tuple(record[key] for key in keys): Cell.of({str(k): v for k, v in record.items()}) for record in records}


def _grid(found: pd.DataFrame, caption: str, column: str) -> Table:
    """A table with a row per checkpoint and mode, and a column per value of a column."""
    cells = cells_by(found, "checkpoint", "mode", column)
    rows = list(dict.fromkeys((c, m) for c in found["checkpoint"].unique() for m in found["mode"].unique()))
    held = {key[:2] for key in cells}
    columns = list(found[column].unique())
    return Table(
        caption, "checkpoint", [str(name) for name in columns],
        [Row(str(c), str(m), [cells.get((c, m, name)) for name in columns]) for c, m in rows if (c, m) in held],
    )  # fmt: skip


def by_bench(metrics: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each bench, with what a caption puts in front where there are several."""
    benches = list(metrics["bench"].unique())
    return [(f"{bench}: " if len(benches) > 1 else "", metrics[metrics["bench"] == bench]) for bench in benches]


def shifts(metrics: pd.DataFrame, used: set[Hashable]) -> list[Table]:
    """Heat tables of the accuracy under each corruption, one per severity, and one of everything else."""
    made = []
    for front, rows in by_bench(tables.matching(metrics, SHIFT)):
        severe = rows[rows["severity"] != ""]
        severities = sorted(severe["severity"].unique(), key=int)
        means = rows[(rows["severity"] == "") & rows["shift"].isin(severe["shift"])]
        rest = rows.drop(index=severe.index.union(means.index))
        parts = [(rest, "clean images, other datasets, and means over corruptions")]
        parts += [(severe[severe["severity"] == s], f"corruptions at severity {s}") for s in severities]
        if len(severities) > 1:  # the mean over one severity is that severity
            parts.append((means, "corruptions, mean over severities"))
        made += [_grid(part, f"{front}{text}", "shift") for part, text in parts if len(part)]
        if len(severities) == 1:
            used |= set(means.index)
        used |= {index for part, _ in parts for index in part.index}
    return shaded(made)


def legend(styles: Mapping[str, int], prefix: str) -> list[Legend]:
    """The line of each checkpoint, its ids beginning with `prefix`."""
    return [Legend(name, figures.swatch(style, f"{prefix}-{style}")) for name, style in styles.items()]


def _lines(rows: pd.DataFrame, styles: Mapping[str, int]) -> list[figures.Line]:
    """The curves of one panel."""
    sorted_rows = rows.assign(number=rows["at"].astype(float)).sort_values("number", kind="stable")
    value, low, high = (tables.wide(sorted_rows, ".*", "number", "checkpoint", of) for of in ("value", "low", "high"))
    x = value.index.to_numpy(dtype=np.float64)
    if str(rows["family"].iloc[0]).startswith("certified"):  # all are 0 beyond some radius: once is enough to see it
        x = x[: len(x) - int((value.fillna(0) != 0).any(axis=1).to_numpy()[::-1].argmax()) + 1]

    def line(checkpoint: str) -> figures.Line:
        y, least, most = (part[checkpoint].to_numpy(dtype=np.float64)[: len(x)] for part in (value, low, high))
        return figures.Line(x, y, least, most, styles[checkpoint])

    return [line(checkpoint) for checkpoint in sorted(map(str, value.columns), key=styles.__getitem__)]


def _uniform(metrics: pd.DataFrame, family: str, bench: str, group: str) -> pd.DataFrame:
    """The rows that say what the entropy of a uniform prediction is, ln K, for a family of entropies."""
    name = family.replace("entropy@t=", "entropy/uniform")
    return metrics[(metrics["metric"] == name) & (metrics["bench"] == bench) & (metrics["group"] == group)]


def _panel(
    rows: pd.DataFrame, family: str, detail: str, prefix: str, styles: dict[str, int], limit: float | None
) -> Panel:
    """A chart of one family of metrics, with the entropy ln K of a uniform prediction if given, and its numbers."""
    unit, lines = str(rows["unit"].iloc[0]), _lines(rows, styles)
    percent = unit == "fraction"
    scale = 100.0 if percent else 1.0
    title = TITLES.get(family, family) + (f" (ln K = {limit:.4g} nats)" if limit is not None else "")
    variable = str(rows["variable"].iloc[0])
    tops = [float(part[np.isfinite(part)].max(initial=limit or 0.0)) for line in lines for part in (line.y, line.high)]
    lows = [float(part[np.isfinite(part)].min(initial=0.0)) for line in lines for part in (line.y, line.low)]
    top = None if min(lows) < 0 else 100.0 if percent and max(tops) <= 1 else 1.05 * scale * max(tops) or None
    axis = figures.Axis(variable or "l2 radius", scale, top, family.startswith("certified"), limit, "ln K")
    what = f"{title}, {unit_name(unit)}, against {axis.across}: {detail}"
    ordered = rows.assign(mode="", number=rows["at"].astype(float)).sort_values("number", kind="stable")
    numbers = _grid(ordered, what, "at")
    rank = sorted(numbers.rows, key=lambda row: styles[row.name])
    names = ", ".join(f"\u2068{row.name}\u2069" for row in rank)  # isolated: a name may hold bidirectional marks
    svg = figures.chart(lines, axis, prefix, what, f"{len(lines)} curves: {names}. The table after it has the numbers.")
    return Panel(title, detail, unit_name(unit), svg, numbers._replace(rows=rank, corner=f"checkpoint, {axis.across}"))


def curves(metrics: pd.DataFrame, used: set[Hashable], styles: dict[str, int]) -> list[Group]:
    """Charts of all metrics named after a number, `<name>@<variable>=<number>` or `<name>@<number>`, by variable."""
    found = tables.matching(metrics, CURVE)
    banded = set(found.loc[found["family"] == "certified-band@", ["bench", "group"]].itertuples(index=False, name=None))
    keys = ["variable", "family", "bench", "group"]
    benches = found.groupby("variable")["bench"].nunique()
    made: dict[tuple[str, str], list[Panel]] = {}
    for number, (key, rows) in enumerate(found.groupby(keys, sort=False)):
        variable, family, bench, group = (str(part) for part in key)
        if rows["at"].nunique() < 2 or family == "certified-lower@" or family.startswith("sigma-"):
            continue
        if family == "certified@" and (bench, group) in banded:
            continue  # the same curve, whose figures stand in the table of certificates
        used |= set(rows.index)
        detail = f"{bench}, {group}" if benches[variable] > 1 else group
        uniform = _uniform(metrics, family, bench, group)
        used |= set(uniform.index)
        limit = float(uniform["value"].iloc[0]) if uniform["value"].nunique() == 1 else None
        panel = _panel(rows, family, detail, f"chart-{number}", styles, limit)
        made.setdefault((axis_of(str(rows["metric"].iloc[0])), variable), []).append(panel)
    return [Group(title, variable, panels) for (title, variable), panels in made.items()]


def smoothing(metrics: pd.DataFrame, used: set[Hashable]) -> list[Table]:
    """Tables of certificates: for each noise level the radius on average, abstentions, and certified accuracies."""
    made = []
    for caption, pattern in TABLES.items():
        for front, rows in by_bench(tables.matching(metrics, pattern)):
            used |= set(rows.index)
            # Noise levels are groups. Rows of one level stand together: checkpoints are compared within it.
            cells = cells_by(rows, "group", "checkpoint", "metric")
            pairs = [(g, c) for g in rows["group"].unique() for c in metrics["checkpoint"].unique()]
            names = sorted(rows["metric"].unique(), key=_certificate_order)
            held = {key[:2] for key in cells}
            grid = [(c, g, [cells.get((g, c, name)) for name in names]) for g, c in pairs if (g, c) in held]
            lines = [Row(str(c), str(g), row) for c, g, row in grid]
            made.append(Table(f"{front}{caption}", "checkpoint", [str(name) for name in names], lines))
    return made


def _certificate_order(name: str) -> tuple[int, float, str]:
    """acr, abstain and the like, then what there is at each radius."""
    radius = re.fullmatch(r"[a-z-]+@(\d+(?:\.\d+)?)", name)
    return (2, float(radius[1]), name) if radius else (int(name != "acr"), 0.0, name)


def others(metrics: pd.DataFrame, used: set[Hashable]) -> list[Table]:
    """What no other part has shown: a row per metric and group, a column per checkpoint."""
    made = []
    for front, rows in by_bench(metrics.drop(index=list(used))):
        cells = cells_by(rows, "metric", "group", "checkpoint")
        pairs = dict.fromkeys(key[:2] for key in cells)
        checkpoints = list(rows["checkpoint"].unique())
        grid = [(str(m), str(g), [cells.get((m, g, c)) for c in checkpoints]) for m, g in pairs]
        lines = [Row(metric, f"{group}, {next(c for c in row if c).unit_name}", row) for metric, group, row in grid]
        made.append(Table(f"{front}other metrics", "metric", [str(c) for c in checkpoints], lines))
    return made
