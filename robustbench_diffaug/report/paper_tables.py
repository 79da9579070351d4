"""The layouts of the DiffAug paper's tables: which figures stand in which column."""

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["LAYOUTS", "PREFIX", "TRAINED", "Average", "Column", "Layout"]

PREFIX = "diffaug-"
TRAINED = "+diffaug"
"""What the ids of networks that are trained with DiffAug end in, after that of the one without."""


class Column(NamedTuple):
    """A column of a layout.

    Arguments:
        key: Of the column in CSV.
        head: Its heading.
        metric: A regular expression of the metric of the plain network; the mode of a row stands in front of it.
        severity: Of the corruptions that a mean is over; 0 where it is no such mean.
    """

    key: str
    head: str
    metric: str
    severity: int = 0


class Average(NamedTuple):
    """A column that is the mean of others.

    Arguments:
        key: Of the column in CSV.
        head: Its heading.
        over: Keys of the columns.
        metric: Of the run's own mean, which has an interval; it is taken where it is of the same columns.
        alike: Whether the columns must be of equally many images, since they are of the same ones.
    """

    key: str
    head: str
    over: tuple[str, ...]
    metric: str = ""
    alike: bool = False


class Layout(NamedTuple):
    """A table.

    Arguments:
        title: What it shows.
        columns: In their order.
        mode: In front of the metrics of networks that are trained with DiffAug; empty for the plain network.
        averages: Whether there are averages over the rows of pairs.
        differences: Whether a row below each pair says what the second has more.
        suite: A bundled suite that measures some of it.
    """

    title: str
    columns: tuple[Column | Average, ...]
    mode: str = ""
    averages: bool = False
    differences: bool = False
    suite: str = ""


def _modes(key: str, head: str, metric: str, severity: int) -> tuple[Column | Average, ...]:
    modes = (("dda", "DDA", "dda/"), ("dda-se", "DDA-SE", "dda-se/"), ("de", "DE", "de/"), ("default", "Default", ""))
    each = [Column(f"{key}_{mode}", f"{head}: {shown}", prefix + metric, severity) for mode, shown, prefix in modes]
    return (*each, Average(f"{key}_average", f"{head}: Avg", tuple(column.key for column in each), alike=True))


def _sets() -> tuple[Column | Average, ...]:
    others = ("r", "s", "sketch", "a", "d")
    heads = {"r": "R", "s": "S", "sketch": "Sketch", "a": "A", "d": "D"}
    each = [
        Column("c", "C(5)", "accuracy/mean", 5),
        *(Column(key, heads[key], f"accuracy/imagenet[-_]{key}") for key in others),
    ]
    return (*each, Average("average", "Avg", ("c", *others)))


SCORES = (("ash", "ASH"), ("msp", "MSP"), ("react", "ReAct"), ("scale", "SCALE"))
LAYOUTS: Mapping[str, Layout] = {
    "diffaug-table1": Layout(
        "Accuracy in four modes on corrupted (C, severity 5) and clean images (Test)",
        (*_modes("c", "C", "accuracy/mean", 5), *_modes("test", "Test", "accuracy/clean", 0)),
        averages=True,
        suite="shift",
    ),
    "diffaug-table2": Layout(
        "Accuracy on shifted sets, of plain networks and of the DiffAug ensemble of networks trained with it",
        _sets(),
        mode="de/",
        differences=True,
        suite="imagenet-rsa",
    ),
    "diffaug-table3": Layout(
        "AUROC on near-OOD sets",
        (
            *(Column(score, head, f"auroc/{score}/near") for score, head in SCORES),
            Average("average", "Avg", tuple(score for score, _ in SCORES), "auroc/average/near"),
        ),
        suite="ood",
    ),
    "diffaug-table4": Layout(
        "Classifiers of noisy images: accuracy at one random time of each image, and the images that they guide to",
        (
            Column("accuracy", "accuracy", "noisy/random-time/accuracy/[^/]+"),
            Column("frechet", "Frechet distance", r"frechet@scale=(?!0$).+"),
            Column("score", "score (IS)", r"score@scale=(?!0$).+"),
            Column("precision", "precision", r"precision@scale=(?!0$).+"),
            Column("recall", "recall", r"recall@scale=(?!0$).+"),
            Column("density", "density", r"density@scale=(?!0$).+"),
            Column("coverage", "coverage", r"coverage@scale=(?!0$).+"),
        ),
        suite="analyses",
    ),
    "diffaug-table13": Layout(
        "Certified accuracy by l2 radius, the best noise level at each radius",
        tuple(
            Column(f"r{r:.2f}", f"r = {r:.1f}", rf"certified(-envelope)?@{r:.2f}")
            for r in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
        ),
        suite="certify",
    ),
}
