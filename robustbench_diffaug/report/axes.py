"""The measures of an overview: what of a run is compared at a glance, by the axis of robustness that it is on."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from robustbench_diffaug.report import tables

__all__ = ["AXES", "Axis", "Measure", "axis_of", "measures"]


class Axis(NamedTuple):
    """A kind of robustness; `pattern` finds the names of its metrics."""

    title: str
    pattern: str


AXES = (  # the first whose pattern fits
    Axis("OOD detection", r"(gain/)?(auroc|fpr95_(ood|id)_positive|aupr_(in|out)|detection_error|auoscr)/.+"),
    Axis("Certified", r"(certified|sigma)[-@].+|acr|(predict/)?abstain|(smoothed|predict)/accuracy"),
    Axis("Alignment", r"(.+/)?((pag|gradient|generated)_[a-z_]+|jacobian_norm)@t=.+"),
    Axis("Diffused images", r"(.+/)?((accuracy|entropy|entropy_gap|nll|ece)@t.+|entropy/.+|random-time/.+)"),
    Axis("Generation", r"(gain/)?(agreement|score|frechet|precision|recall|density|coverage)(@scale=|/real).*"),
    Axis("Denoisers", r"jacobian_.+|trace_gap@.+|denoising_error@.+|effective_rank@.+|.+-rms(@.+)?|toy-distance/.+"),
    Axis("Ensemble and adaptation", r"(de|dda)(-se)?(\[[^\]]*\])?/.+"),
    Axis("Clean", r"accuracy(/(clean|mnist|cifar10|cifar100|imagenet))?"),
    Axis("Shift", r"accuracy/.+|(relative-)?mce/.+"),
)
ORDER = (
    "Clean", "Shift", "Ensemble and adaptation", "Certified", "OOD detection", "Alignment", "Diffused images",
    "Generation", "Denoisers", "Other",
)  # fmt: skip
RADII = (0.5, 1.0, 1.5, 2.0)  # at which papers compare certificates
TIME = 300  # of a schedule of 1,000, near which figures against t are taken
SHOWN = (  # what an overview has besides headlines: a metric, or one of a family at the number nearest to TIME
    (r"(?!de\[)[^/@]+/gain/mean", False),
    (r"[^/@]+/accuracy/mean", False),
    (r"entropy/(early|late)", False),
    (r"(pag_cosine|pag_class_cosine|jacobian_asymmetry)@t=(?P<at>\d+)", True),
)


class Measure(NamedTuple):
    """A column of the overview.

    Attributes:
        name: Its heading.
        axis: The title of its axis.
        rows: Its rows of metrics, one for each checkpoint that has it.
        ranks: The rank texts of checkpoints, as the leaderboard has them; empty for what is not ranked.
    """

    name: str
    axis: str
    rows: pd.DataFrame
    ranks: Mapping[str, str]

    @property
    def key(self) -> tuple[str, str, str]:
        """Its bench, metric and group."""
        first = self.rows.iloc[0]
        return str(first["bench"]), str(first["metric"]), str(first["group"])


def axis_of(metric: str) -> str:
    """The title of the axis that a metric is on."""
    return next((axis.title for axis in AXES if re.fullmatch(axis.pattern, metric)), "Other")


def _radii(metrics: pd.DataFrame) -> pd.DataFrame:
    """Certified accuracies at the radii that are compared, where any checkpoint has one above 0."""
    found = tables.matching(metrics, r"certified@(?P<at>\d+(?:\.\d+)?)")
    found = found[found["at"].astype(float).isin(RADII)]
    return found[found.groupby(["bench", "metric", "group"])["value"].transform("max") > 0]


def _nearest(found: pd.DataFrame) -> pd.DataFrame:
    """Of each family of a bench and group, the metric at the number nearest to TIME, the smaller of two."""
    if found.empty:
        return found
    distance = (found["at"].astype(float) - TIME).abs()
    best = distance.groupby([found["bench"], found["group"], found["metric"].str.partition("@")[0]]).transform("min")
    kept = found[distance == best]
    family = kept["metric"].str.partition("@")[0]
    least = kept["at"].astype(float).groupby([kept["bench"], kept["group"], family]).transform("min")
    return kept[kept["at"].astype(float) == least]


def _more(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of an overview that are no headlines."""
    rest = metrics[~metrics["headline"].astype(bool)]
    parts = [_radii(rest)]
    for pattern, nearest in SHOWN:
        found = tables.matching(rest, pattern)
        parts.append(_nearest(found) if nearest else found)
    chosen = sorted({index for part in parts for index in part.index})
    return metrics.loc[chosen]


def _named(metrics: pd.DataFrame, taken: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """What is no headline, each measure with a name that no other has."""
    rows = _more(metrics)
    groups = metrics.groupby("metric")["group"].nunique()
    keys = list(dict.fromkeys(zip(rows["bench"], rows["metric"], rows["group"], strict=True)))
    names = [f"{metric}[{group}]" if groups[metric] > 1 else str(metric) for _, metric, group in keys]
    found = []
    for (bench, metric, group), name in zip(keys, names, strict=True):
        chosen = rows[(rows["bench"] == bench) & (rows["metric"] == metric) & (rows["group"] == group)]
        found.append((f"{bench}:{name}" if names.count(name) > 1 or name in taken else name, chosen))
    return found


def measures(metrics: pd.DataFrame, pairs: pd.DataFrame | None = None) -> list[Measure]:
    """The columns of the overview: headlines with their ranks, and some figures of other axes, axis by axis.

    Arguments:
        metrics: The long form that `tables` describes, its index unique.
        pairs: The tests of checkpoints in pairs.

    Raises:
        ValueError: If a checkpoint has two values for one measure.
    """
    board = tables.leaderboard(metrics, pairs)
    made = []
    for name, rows in tables.headlines(metrics):
        ranks = dict(zip(board["checkpoint"].astype(str), board[f"{name}_rank"].astype(str), strict=True))
        made.append(Measure(name, axis_of(str(rows["metric"].iloc[0])), rows, ranks))
    for name, rows in _named(metrics, [measure.name for measure in made]):
        made.append(Measure(name, axis_of(str(rows["metric"].iloc[0])), rows, {}))
    return sorted(made, key=lambda measure: ORDER.index(measure.axis))
