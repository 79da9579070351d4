"""What figures rest on: one number for each image or version of one, so that two checkpoints can be tested in pairs.

A figure that is a mean over rows has `Outcomes`, a mean of areas under ROC curves has `Areas`, and a figure that is
neither (a calibration error, a false positive rate, a Frechet distance) has no test here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.detection.intervals import Placements, average, placements
from robustbench_diffaug.paired import Sums, decided
from robustbench_diffaug.records import Declared, Records
from robustbench_diffaug.stats import grouped

__all__ = ["Areas", "Basis", "Deferred", "Key", "Outcomes", "Rows"]

Names: TypeAlias = NDArray[Any]  # "dataset/sample" of each row, of shape (n,)
SEPARATOR = "/"


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What one figure of one checkpoint is the mean of.

    Arguments:
        samples: Names of the rows, "dataset/sample", each once, of shape (n,).
        values: What the figure is the mean of, of shape (n,); a hit is 1.0.
        clusters: The id of the image that each row is a version of, of shape (n,); it need not mean anything to another
            checkpoint, whose rows are found by their names.
        binary: Whether values are 0 and 1, one row a cluster: tested by McNemar's exact test. Others are tested by the
            z-test clustered by image.
        width: The largest possible value less the smallest, inf where there is none. It bounds what is said of images
            that were not seen where all that were seen agree.
    """

    samples: Names
    values: NDArray[np.float64]
    clusters: NDArray[Any]
    binary: bool
    width: float = 1.0

    @cached_property
    def _summed(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each image the sum of its rows, and their number."""
        groups, _ = grouped(self.clusters, len(self.values))
        sums, sizes = np.bincount(groups, self.values), np.bincount(groups)
        return sums.astype(np.float64), sizes.astype(np.float64)

    @cached_property
    def mean(self) -> float:
        """The figure: the mean over rows, added up by image as `stats.clustered_mean` does."""
        return float(self._summed[0].sum() / len(self.values))

    def minus(self, other: "Outcomes") -> Sums:
        """The differences to another checkpoint, row by row of the same samples.

        Arguments:
            other: Its outcomes on the very rows of these.

        Raises:
            ValueError: If there are other rows, or other images behind them.
        """
        if len(self.values) != len(other.values):
            raise ValueError(f"outcomes of {len(self.values)} and {len(other.values)} rows cannot be compared")
        if self.binary and other.binary:
            gap = self.values - other.values
            return decided(len(gap), int((gap > 0).sum()), int((gap < 0).sum()))
        (mine, sizes), (theirs, others) = self._summed, other._summed
        if not np.array_equal(sizes, others):
            raise ValueError("outcomes are of other images under the same names")
        return Sums(mine - theirs, sizes, np.ones_like(sizes))

    def on(self, rows: NDArray[np.intp]) -> "Outcomes":
        """Those of some rows."""
        return replace(self, samples=self.samples[rows], values=self.values[rows], clusters=self.clusters[rows])


@dataclass(frozen=True, eq=False)
class Areas:
    """What a figure is made of that is a mean of areas under ROC curves, over scores and samples outside.

    Arguments:
        samples: Names of the rows, "dataset/sample", each once, of shape (n,).
        scores: Scores of each row, higher for what looks in-distribution, one array of shape (n,) for each.
        parts: The number of the sample that each row is of, of shape (n,): 0 is inside, k is `outside[k - 1]`.
        outside: Names of the samples outside.
        clusters: The id of the image that each row is a version of, of shape (n,); None where each is its own.
        correct: Whether the prediction for each row is right, of shape (n,), for AUOSCR; None for AUROC.
    """

    samples: Names
    scores: tuple[NDArray[np.float64], ...]
    parts: NDArray[np.intp]
    outside: tuple[str, ...]
    clusters: NDArray[Any] | None = None
    correct: NDArray[np.bool_] | None = None

    @cached_property
    def placements(self) -> Placements:
        """The figure as DeLong's placements, which can be subtracted.

        Raises:
            ValueError: If there are no rows inside, or none of a sample outside.
        """
        inside = self.parts == 0
        right, clusters = (None if column is None else column[inside] for column in (self.correct, self.clusters))
        each = []
        for column in self.scores:
            rows = [(name, column[self.parts == number]) for number, name in enumerate(self.outside, 1)]
            each.append(average([placements(column[inside], found, name, right, clusters) for name, found in rows]))
        return average(each)

    @property
    def mean(self) -> float:
        """The figure."""
        return self.placements.value

    def on(self, rows: NDArray[np.intp]) -> "Areas":
        """Those of some rows."""
        return Areas(
            self.samples[rows],
            tuple(column[rows] for column in self.scores),
            self.parts[rows],
            self.outside,
            None if self.clusters is None else self.clusters[rows],
            None if self.correct is None else self.correct[rows],
        )


Basis: TypeAlias = Outcomes | Areas
"""What a figure rests on."""

Key: TypeAlias = tuple[str, str]
"""A metric and its group."""


class Deferred(Mapping[Key, Basis]):
    """Bases that are made when they are asked for, and not kept: a board needs those of few figures.

    Arguments:
        made: What makes each one.
    """

    def __init__(self, made: Mapping[Key, Callable[[], Basis]]) -> None:
        self._made = dict(made)

    def __getitem__(self, key: Key) -> Basis:
        return self._made[key]()

    def __contains__(self, key: object) -> bool:  # what a mapping has of its own would make the basis
        return key in self._made

    def __iter__(self) -> Iterator[Key]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


class _Index(NamedTuple):
    """What the columns that name rows say, by number.

    Arguments:
        names: Of the rows.
        images: The number of the image of each row.
        datasets: Their names.
        places: The number of the dataset of each row.
    """

    names: Names
    images: NDArray[np.intp]
    datasets: list[str]
    places: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of records with their names and images, told once for all figures that rest on them.

    Arguments:
        records: The rows.
    """

    records: Records
    kept: dict[bytes, tuple[Names, NDArray[np.intp], bool]] = field(default_factory=dict)

    @cached_property
    def _index(self) -> _Index:
        datasets, places = self.records.datasets
        names = np.char.add(np.char.add(self.records["dataset"], SEPARATOR), self.records["sample"])
        return _Index(names, self.records.images, list(datasets), places)

    def of(self, keep: Callable[[Declared], bool]) -> NDArray[np.bool_]:
        """Which rows are of the datasets that a predicate keeps."""
        kept = {dataset.name for dataset in self.records.declared if keep(dataset)}
        _, _, datasets, places = self._index
        return np.array([name in kept for name in datasets], dtype=bool)[places]

    def _part(self, kept: NDArray[np.bool_] | None) -> tuple[Names, NDArray[np.intp], bool]:
        """Names and images of some rows, and whether no image is there twice; the same arrays for the same rows."""
        names, images, _, _ = self._index
        place = b"" if kept is None else np.packbits(kept).tobytes()
        if place not in self.kept:
            found = (names, images) if kept is None else (names[kept], images[kept])
            self.kept[place] = (*found, bool(np.bincount(found[1]).max(initial=0) <= 1))
        return self.kept[place]

    def outcomes(self, values: NDArray[Any], kept: NDArray[np.bool_] | None = None, width: float = 1.0) -> Outcomes:
        """The outcomes of a figure that is the mean of values over these rows, or some of them.

        Arguments:
            values: Of all rows, of shape (n,); booleans are hits.
            kept: Which rows count, of shape (n,); all by default.
            width: As of `Outcomes`.
        """
        names, images, single = self._part(kept)
        chosen = values if kept is None else values[kept]
        return Outcomes(names, chosen.astype(np.float64), images, values.dtype == np.bool_ and single, width)

    def areas(
        self,
        scores: Sequence[NDArray[np.float64]],
        inside: NDArray[np.bool_],
        outside: Sequence[str],
        correct: NDArray[np.bool_] | None = None,
        versions: bool = False,
    ) -> Areas:
        """What a figure is made of that is the mean of areas over scores and datasets outside.

        Arguments:
            scores: Of all rows, one array of shape (n,) for each.
            inside: Which rows are in-distribution, of shape (n,).
            outside: Names of the datasets outside.
            correct: Whether each prediction is right, of shape (n,), for AUOSCR.
            versions: Whether rows inside may be versions of one image.
        """
        _, _, datasets, places = self._index
        numbers = np.array([outside.index(name) + 1 if name in outside else -1 for name in datasets])[places]
        numbers[inside] = 0
        kept = numbers >= 0
        names, images, _ = self._part(kept)
        clusters = images if versions else None
        right = None if correct is None else correct[kept]
        return Areas(names, tuple(column[kept] for column in scores), numbers[kept], tuple(outside), clusters, right)
