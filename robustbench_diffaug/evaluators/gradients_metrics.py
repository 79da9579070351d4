"""Figures of gradients against t, differences between checkpoints, remarks and pictures, from records."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf, sqrt
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from robustbench_diffaug import stats
from robustbench_diffaug.outcomes import Basis, Deferred, Key, Outcomes, Rows
from robustbench_diffaug.paired import paired_difference
from robustbench_diffaug.records import Better, Metric, Picture, Records, shared

__all__ = ["gains", "metrics", "notices", "outcomes", "pictures"]

SHOWN = 8  # samples of a picture
HEADLINE = 300  # the time of the paper's Fig. 3
PREFIXES = {"image": "", "denoised": "denoised/", "chain": "chain/"}
WHERE = {"image": "gradient", "denoised": "gradient at D(x_t)", "chain": "gradient through D"}


class Figure(NamedTuple):
    """What is made of a column.

    Arguments:
        name: Of the metric.
        column: Of the records, after 'image_', 'denoised_' or 'chain_'.
        better: Which way is better.
        unit: Of the metric.
        bounded: Whether each row is in [0, 1].
        root: Whether it is the root of the mean of the column.
    """

    name: str
    column: str
    better: Better
    unit: str
    bounded: bool = False
    root: bool = False


FIGURES = (
    Figure("gradient_norm", "gradient_norm", "lower", "nats per pixel"),
    Figure("jacobian_norm", "jacobian_square", "lower", "logits per pixel", root=True),
    Figure("pag_cosine", "pag_cosine", "higher", "cosine"),
    Figure("pag_class_cosine", "pag_class_cosine", "higher", "cosine"),
    Figure("gradient_sparsity", "gradient_sparsity", "higher", "of 1"),
    Figure("gradient_variation", "gradient_variation", "lower", "times the image's"),
    Figure("generated_accuracy", "generated", "higher", "fraction", bounded=True),
    Figure("generated_confidence", "generated_confidence", "higher", "fraction", bounded=True),
)

WIDTHS = {"cosine": 2.0, "of 1": 1.0}
"""How far figures of a unit can be apart."""


def metrics(records: Records, times: Sequence[int]) -> Iterator[Metric]:
    """Every figure at every time, by the group of the dataset; rows without a value are left out.

    Arguments:
        records: Of one checkpoint.
        times: Those of the columns.
    """
    for group, severity in dict.fromkeys((dataset.group, dataset.severity) for dataset in records.declared):
        rows = _part(records, group, severity)
        label = f"{group}@s{severity}" if severity else group
        for through, figure, index, t in _places(rows, times):
            values = rows[f"{through}_{figure.column}"][:, index].astype(np.float64)
            kept = np.isfinite(values)
            if kept.any():
                name = f"{PREFIXES[through]}{figure.name}@t={t}"
                estimate = _mean(values[kept], rows.clusters()[kept], rows.key("gradients", t), figure)
                yield rows.metric(name, label, estimate, figure.better, figure.unit, _leads(through, figure, t, times))


def _part(records: Records, group: str, severity: int) -> Records:
    """The rows of a group, of one severity."""
    return records.of(lambda dataset: (dataset.group, dataset.severity) == (group, severity))


def _places(rows: Records, times: Sequence[int]) -> Iterator[tuple[str, Figure, int, int]]:
    """What there is a column of: the gradient, the figure, the position of the time, and the time."""
    if not len(rows):
        return
    for through in PREFIXES:
        for figure in FIGURES:
            if f"{through}_{figure.column}" in rows.columns:
                for index, t in enumerate(times):
                    yield through, figure, index, t


def _leads(through: str, figure: Figure, t: int, times: Sequence[int]) -> bool:
    """Whether it belongs on the leaderboard: the norm at the image, and the alignment at Fig. 3's time, or near it."""
    if figure.name == "gradient_norm":
        return through == "image" and t == 0
    nearest = min(times, key=lambda time: (time == 0, abs(time - HEADLINE)))
    return (through, figure.name, t) == ("chain", "pag_cosine", nearest)


def _mean(
    values: Float[np.ndarray, " n"], clusters: Shaped[np.ndarray, " n"], key: int, figure: Figure
) -> stats.Estimate:
    """The mean, or its root, with a bootstrap interval."""
    found = stats.clustered_mean(values, clusters, key, bounded=figure.bounded)
    if not figure.root:
        return found
    return stats.Estimate(sqrt(found.value), sqrt(max(0.0, found.low)), sqrt(max(0.0, found.high)), found.n)


def outcomes(records: Records, times: Sequence[int]) -> Deferred:
    """What figures are means of: all of `metrics` but the roots of means.

    Arguments:
        records: Of one checkpoint.
        times: Those of the columns.
    """
    rows, made = Rows(records), dict[Key, Callable[[], Basis]]()

    def mean(column: str, index: int, group: str, severity: int, width: float) -> Outcomes:
        kept = rows.of(lambda dataset: (dataset.group, dataset.severity) == (group, severity))
        values = records[column][:, index].astype(np.float64)
        return rows.outcomes(values, kept & np.isfinite(values), width)

    for group, severity in dict.fromkeys((dataset.group, dataset.severity) for dataset in records.declared):
        part, label = _part(records, group, severity), f"{group}@s{severity}" if severity else group
        for through, figure, index, t in _places(part, times):
            column = f"{through}_{figure.column}"
            if not figure.root and np.isfinite(part[column][:, index]).any():
                width = 1.0 if figure.bounded else WIDTHS.get(figure.unit, inf)
                basis = partial(mean, column, index, group, severity, width)
                made[f"{PREFIXES[through]}{figure.name}@t={t}", label] = basis
    return Deferred(made)


def gains(records: Records, base: Records, times: Sequence[int]) -> Iterator[Metric]:
    """What a checkpoint has more than another, on the images of which both have a value.

    Arguments:
        records: Of the checkpoint.
        base: Of the other.
        times: Those of the columns.
    """
    for group, severity in dict.fromkeys((dataset.group, dataset.severity) for dataset in records.declared):
        pair = [_part(each, group, severity) for each in (records, base)]
        if not all(map(len, pair)):
            continue
        mine, others = shared(*pair)
        label = f"{group}@s{severity}" if severity else group
        for through, figure, index, t in _places(pair[0], times):
            column = f"{through}_{figure.column}"
            if column not in pair[1].columns:
                continue
            ours, theirs = (
                each[column][rows, index].astype(np.float64) for each, rows in zip(pair, (mine, others), strict=True)
            )
            kept = np.isfinite(ours) & np.isfinite(theirs)
            if kept.any():
                clusters = pair[0].clusters()[mine][kept]
                estimate = _difference(ours[kept], theirs[kept], clusters, pair[0].key("gradients", t), figure)
                name = f"gain/{PREFIXES[through]}{figure.name}@t={t}"
                yield pair[0].metric(name, label, estimate, figure.better, figure.unit)


def _difference(
    ours: Float[np.ndarray, " n"],
    theirs: Float[np.ndarray, " n"],
    clusters: Shaped[np.ndarray, " n"],
    key: int,
    figure: Figure,
) -> stats.Estimate:
    """The difference of two means, or of their roots, over the same images."""
    if not figure.root:
        return paired_difference(ours, theirs, clusters, key, bounded=figure.bounded)

    def statistic(weights: Float[np.ndarray, " n"]) -> float:
        return sqrt(weights @ ours / weights.sum()) - sqrt(weights @ theirs / weights.sum())

    value = statistic(np.ones_like(ours))
    low, high = stats.bootstrap(statistic, clusters, key)
    if high - low <= 1e-12 * sqrt(max(ours.max(), theirs.max())):  # nothing varies, which says nothing of others
        low, high = -inf, inf
    return stats.Estimate(value, min(low, value), max(high, value), len(np.unique(clusters)))


def notices(records: Records, times: Sequence[int]) -> Iterator[str]:
    """Gradients that are exactly 0.

    Arguments:
        records: Of one checkpoint.
        times: Those of the columns.
    """
    for through, figure, index, t in _places(records, times):
        if figure.name == "gradient_norm":
            zeros = int((records[f"{through}_{figure.column}"][:, index] == 0).sum())
            if zeros:
                yield (
                    f"the {WHERE[through]} at t = {t} is 0 for {zeros} of {len(records)} images, which are left out of "
                    "its cosines, sparsity and variation"
                )


def pictures(records: Records, times: Sequence[int]) -> Iterator[Picture]:
    """At each time a grid: a row for each of the first samples; the image, x_t, D(x_t), and the gradients.

    Arguments:
        records: Of one checkpoint.
        times: Those of the columns.
    """
    if "noisy_picture" not in records.columns or records["noisy_picture"].shape[2] not in (1, 3):
        return
    chosen = slice(0, SHOWN)
    down = tuple(
        f"{sample} (class {label})"
        for sample, label in zip(records["sample"][chosen], records["label"][chosen], strict=True)
    )
    for index, t in enumerate(times):
        shown: dict[str, np.ndarray[Any, Any]] = {"image": records["clean_picture"][chosen, index]}
        if t:
            shown |= {"x_t": records["noisy_picture"][chosen, index], "D(x_t)": records["twin_picture"][chosen, index]}
        for through, words in WHERE.items():
            column = f"{through}_picture"
            if column in records.columns and (t or through == "image"):
                shown[words] = records[column][chosen, index]
        grid = np.stack(list(shown.values()), axis=1)  # samples, columns, c, h, w
        yield Picture(
            f"gradients-t{t}",
            f"Gradients of log p(y | x) at t = {t}",
            "Each gradient from its smallest value, black, to its largest, white, channel by channel; where it is 0 it "
            "has some grey of its own.",
            np.ascontiguousarray(grid.transpose(0, 1, 3, 4, 2)),
            down,
            tuple(shown),
        )
