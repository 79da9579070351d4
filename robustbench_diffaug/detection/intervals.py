"""Intervals of the figures of out-of-distribution detection, of their means over samples and scores, and differences.

A figure, and how it would vary with the images, is a value that can be added, subtracted and multiplied by a number:
`average([near1, near2])` is the near mean, `average` over scores the mean of scores, `b - a` the gain of a checkpoint.
What is combined must stand on the same images in the same order, and says so by the names of its samples: shared images
then cancel, or add up, as they do in the figures. There are two kinds.

*Placements*, for areas that are means over pairs of images (AUROC, AUOSCR), DeLong's: the placement of an image is the
share of the other sample that it is on the right side of. With V the placements of n images inside and W_d those of
the m_d images of sample d outside, each already multiplied by its coefficient, and S^2 the sample variance,

    variance = S^2(V) / n + sum_d S^2(W_d) / m_d.

Versions of one image inside are one cluster g of G, for which S^2(V) / n becomes
G / (G - 1) sum_g (sum_{i in g} (V_i - mean(V)))^2 / n^2. A quantile of Student's t with Welch's degrees of freedom
takes the place of the normal one, and a sum without a negative coefficient has its interval on the logit's scale.

*Replicates*, for all else: the figure on resamples of the images, inside and each sample outside apart (by cluster
inside), with the percentile interval. Resample r is draw r of streams named by the key and the samples, so every score
and checkpoint sees the same ones, and no result depends on how many are read at once.

Where nothing varies both kinds would say "no error". `stats.unseen` bounds the share of images that none of n showed.

References:
    Comparing the areas under two or more correlated receiver operating characteristic curves: a nonparametric approach
        (DeLong, DeLong and Clarke-Pearson, 1988), https://doi.org/10.2307/2531595
    Nonparametric analysis of clustered ROC curve data (Obuchowski, 1997), https://doi.org/10.2307/2533958
    Confidence intervals for the area under the ROC curve: an evaluation (Qin and Hotilovac, 2008),
        https://doi.org/10.1177/0962280207087173
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, stdtr, stdtrit

from robustbench_diffaug import rng
from robustbench_diffaug.detection.curves import Figures, cumulated, order, read
from robustbench_diffaug.stats import LEVEL, Estimate, grouped, mask, unseen

__all__ = ["RESAMPLES", "Placements", "Replicates", "average", "placements", "replicates"]

Floats = NDArray[np.float64]
Scores = NDArray[Any]  # numbers, of shape (n,)
Part = TypeVar("Part", "Placements", "Replicates")

RESAMPLES = 200
BLOCK = 1 << 16  # weights held at once: 0.5 MB an array, which stays in cache; no result depends on it
NOTHING = 1e-12  # a spread that is rounding
FEW = 10  # images, from fewer of which no spread can be told
UNPAIRED = "they cannot be paired; take those that all have"


@dataclass(frozen=True, eq=False)
class Placements:
    """A linear combination of areas, and what each image adds to it.

    Arguments:
        value: The combination.
        span: Its least and largest possible values, from the signs of its coefficients.
        inside: Placements of the images inside, of shape (n,), whose mean is the value.
        outside: Those of each sample outside by name, of shape (m,), whose means add up to the value.
        clusters: Numbers from 0 of the images that the rows inside are versions of, of shape (n,).
    """

    value: float
    span: tuple[float, float]
    inside: Floats
    outside: Mapping[str, Floats]
    clusters: NDArray[np.intp]

    def __add__(self, other: "Placements") -> "Placements":
        if not np.array_equal(self.clusters, other.clusters):
            raise ValueError(f"these figures are of different images inside: {UNPAIRED}")
        _check_paired(self._sizes, other._sizes)
        names = {**self.outside, **other.outside}
        return Placements(
            self.value + other.value,
            (self.span[0] + other.span[0], self.span[1] + other.span[1]),
            self.inside + other.inside,
            {name: np.asarray(self.outside.get(name, 0) + other.outside.get(name, 0)) for name in names},
            self.clusters,
        )

    def __mul__(self, factor: float | int) -> "Placements":
        low, high = sorted(factor * limit for limit in self.span)
        outside = {name: factor * part for name, part in self.outside.items()}
        return Placements(factor * self.value, (low, high), factor * self.inside, outside, self.clusters)

    def __sub__(self, other: "Placements") -> "Placements":
        return self + other * -1.0

    @property
    def n(self) -> int:
        """The number of independent images, inside and outside."""
        return self._count + sum(self._sizes.values())

    @property
    def _count(self) -> int:
        """The number of clusters."""
        return int(self.clusters.max()) + 1

    @property
    def _trials(self) -> int:
        """How many images can be drawn from every sample at once, disjoint: each such draw estimates the value."""
        return min(self._count, *self._sizes.values())

    @property
    def _sizes(self) -> dict[str, int]:
        """The number of images of each sample outside."""
        return {name: len(part) for name, part in self.outside.items()}

    @property
    def error(self) -> float:
        """The standard error; 0 where it cannot be told."""
        return self._spread()[0]

    def _spread(self) -> tuple[float, float]:
        """The standard error and Welch's degrees of freedom; 0 error where it cannot be told."""
        if self._trials == 1:
            return 0.0, 1.0
        sums = np.bincount(self.clusters, self.inside - self.inside.mean())
        count = len(sums)
        parts = [(count / (count - 1) * float(sums @ sums) / len(self.inside) ** 2, count - 1)]
        parts += [(float(part.var(ddof=1)) / len(part), len(part) - 1) for part in self.outside.values()]
        variance = sum(part for part, _ in parts)
        if variance <= NOTHING**2:
            return 0.0, 1.0
        return sqrt(variance), variance**2 / sum(part**2 / free for part, free in parts)

    def estimate(self, level: float = LEVEL) -> Estimate:
        """The value with its interval, in its span.

        Without spread, as for samples that a score separates, m disjoint draws of one image from every sample are m
        trials that all gave v, m the size of the smallest; with u the unseen share of m and [a, b] the span, the
        interval is [v - u (v - a), v + u (b - v)]. With fewer than ten misplaced images, or rightly placed ones, inside
        or outside, the interval reaches at least as far as that; of a difference images count whose placements differ.

        Simulated 95 % intervals of one area hold it in 93 to 98 %, whether 0.01 or 50 misplaced images are expected.

        Arguments:
            level: The coverage, in ]0, 1[.

        Raises:
            ValueError: The level is out of its range.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in ]0, 1[, found {level}")
        value, (least, most) = self.value, self.span
        error, free = self._spread()
        share = unseen(self._trials, level) if not error or self._few() else 0.0
        low, high = value - share * (value - least), value + share * (most - value)
        if not error:
            return Estimate(value, low, high, self.n)
        margin = float(stdtrit(free, (1 + level) / 2)) * error
        if least < 0:
            return Estimate(value, max(least, min(low, value - margin)), min(most, max(high, value + margin)), self.n)
        part = value / most
        centre, width = log(part / (1 - part)), margin / (most * part * (1 - part))
        ends = [most * float(expit(centre + side)) for side in (-width, width)]
        return Estimate(value, min(low, ends[0]), max(high, ends[1]), self.n)

    def _few(self) -> bool:
        """Whether fewer than ten images of a kind, inside or outside, are what the spread is told from.

        Of a difference the kind is those whose placement differs, else those that are not at an end of what it can be.
        """
        tops = (0.0,) if self.span[0] < 0 else (0.0, 1.0)  # shares of the largest placement
        for top in tops:
            odd = self.clusters[np.abs(self.inside - top * self.span[1]) > NOTHING]
            parts = [np.abs(part - top * np.abs(part).max()) > NOTHING for part in self.outside.values()]
            if min(len(np.unique(odd)), sum(int(part.sum()) for part in parts)) < FEW:
                return True
        return False

    def pvalue(self) -> float:
        """The two-sided p-value of a difference being 0, by the statistic value / error.

        Without spread it is the level at which the interval of `estimate` reaches 0: for two areas of 0 and 1 that is
        the sign test's 2^(1 - m), and for equal ones 1.

        Raises:
            ValueError: No coefficient is negative, or none is positive: that is no difference.
        """
        value, (least, most) = self.value, self.span
        if least >= 0 or most <= 0:
            raise ValueError(f"values in [{least:g}, {most:g}] are no difference: subtract one figure from another")
        error, free = self._spread()
        if error:
            return 2 * float(stdtr(free, -abs(value) / error))
        limit = least if value > 0 else most
        return min(1.0, 2 * (limit / (limit - value)) ** self._trials) if abs(value) > NOTHING else 1.0


def placements(
    inside: Scores, outside: Scores, name: str, correct: Scores | None = None, clusters: Scores | None = None
) -> Placements:
    """The AUROC of one sample outside, or its AUOSCR where `correct` is given, with the placements of its images.

    Arguments:
        inside: Scores of in-distribution images, of shape (n,), higher for those.
        outside: Scores of the others, of shape (m,).
        name: Of the sample outside. Figures are paired by it: the same name means the same images in the same order.
        correct: Whether the prediction for each image inside is right, of shape (n,).
        clusters: The id of the image that each row inside is a version of, of shape (n,); its own without them.

    Raises:
        ValueError: An array is empty, not finite or not of the shape of the others.
    """
    ranked = order(inside, outside)
    n, m = len(ranked.inside), len(ranked.outside)
    right = np.ones(n) if correct is None else mask("correct", correct, n).astype(np.float64)
    below = cumulated(ranked.outside, np.ones((1, m)), ranked.size)[0]
    above = right.sum() - cumulated(ranked.inside, right[None], ranked.size)[0]
    # Twice the counts: half pairs are whole.
    first = right * (below[:-1] + below[1:])[ranked.inside]
    second = (above[:-1] + above[1:])[ranked.outside]
    groups, _ = grouped(clusters, n)
    value = float(first.sum()) / (2 * n * m)
    return Placements(value, (0.0, 1.0), first / (2 * m), {name: second / (2 * n)}, groups)


@dataclass(frozen=True, eq=False)
class Replicates:
    """A linear combination of figures, and its values on resamples.

    Arguments:
        value: The combination.
        span: Its least and largest possible values, from the signs of its coefficients.
        draws: Its values, of shape (resamples,).
        shift: By how much the figures, being the least of many, are expected to be too low.
        reach: What it might be where no resample differs.
        inside: The number of independent images inside.
        outside: That of each sample outside by name.
        key: The stream of the resamples.
        level: The coverage of the interval.
    """

    value: float
    span: tuple[float, float]
    draws: Floats
    shift: float
    reach: tuple[float, float]
    inside: int
    outside: Mapping[str, int]
    key: int
    level: float

    def __add__(self, other: "Replicates") -> "Replicates":
        if (self.key, self.level, len(self.draws)) != (other.key, other.level, len(other.draws)):
            raise ValueError("these figures are of different resamples: pass one key, level and number for all")
        if self.inside != other.inside:
            raise ValueError(f"these figures are of {self.inside} and {other.inside} images inside: {UNPAIRED}")
        _check_paired(self.outside, other.outside)
        return Replicates(
            self.value + other.value,
            (self.span[0] + other.span[0], self.span[1] + other.span[1]),
            self.draws + other.draws,
            self.shift + other.shift,
            (self.reach[0] + other.reach[0], self.reach[1] + other.reach[1]),
            self.inside,
            {**self.outside, **other.outside},
            self.key,
            self.level,
        )

    def __mul__(self, factor: float | int) -> "Replicates":
        first, last = sorted(factor * limit for limit in self.span)
        low, high = sorted(factor * limit for limit in self.reach)
        scaled = factor * self.value, (first, last), factor * self.draws, factor * self.shift, (low, high)
        return Replicates(*scaled, self.inside, self.outside, self.key, self.level)

    def __sub__(self, other: "Replicates") -> "Replicates":
        return self + other * -1.0

    def estimate(self) -> Estimate:
        """The value with its percentile interval, order statistics k and R + 1 - k, k = floor((R + 1) (1 - level) / 2).

        A shift is added where it widens, and the interval cut to the span.

        Where no resample differs it is what the figures would be if the images that were not seen, at most a share
        `unseen` of each sample, lay where they help most, or harm most.
        """
        ordered = np.sort(self.draws)
        rank = int((len(ordered) + 1) * (1 - self.level) / 2 + 1e-9)  # 40 x 0.025 is 1, whatever its rounding
        low, high = float(ordered[rank - 1]), float(ordered[-rank])
        if ordered[-1] - ordered[0] <= NOTHING:
            low, high = self.reach
        # The sample's own threshold may be worse than chance on a resample, and the shift comes on top of that.
        low = max(self.span[0], low + min(0.0, self.shift))
        high = min(self.span[1], high + max(0.0, self.shift))
        size = self.inside + sum(self.outside.values())
        return Estimate(self.value, min(low, self.value), max(high, self.value), size)


def replicates(
    inside: Scores,
    outside: Scores,
    name: str,
    key: int,
    clusters: Scores | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> dict[str, Replicates]:
    """All `Figures` of one sample outside, by name, with their values on resamples.

    The detection error is the least over all thresholds, so its resamples are too low by more than the sample is:
    their percentile interval holds the truth in 80 to 87 % where 95 % were asked for. The replicates here are those of
    the error at the sample's own best threshold, whose mean is right, and the interval reaches further up by how much
    lower the least error of a resample is on average (93 to 97 % for 500 images inside and 300 outside).

    Arguments:
        inside: Scores of in-distribution images, of shape (n,), higher for those.
        outside: Scores of the others, of shape (m,).
        name: Of the sample outside. Figures are paired by it: the same name means the same images in the same order.
        key: The stream of the resamples, which should depend on nothing but the run and its datasets.
        clusters: The id of the image that each row inside is a version of, of shape (n,); its own without them.
        level: The coverage, in ]0, 1[.
        resamples: How many, at least 2 / (1 - level) - 1.

    Raises:
        ValueError: An array is empty, not finite or not of the shape of the others; or there are too few resamples.
    """
    if not 0 < level < 1 or (resamples + 1) * (1 - level) / 2 < 1 - 1e-9:
        raise ValueError(f"{resamples} resamples have no interval at {level=}: take 200, and a level in ]0, 1[")
    ranked = order(inside, outside)
    groups, count = grouped(clusters, len(ranked.inside))
    size = len(ranked.outside)
    first, second = rng.key(key, "inside"), rng.key(key, "outside", name)

    def curves(known: Floats, other: Floats) -> tuple[Floats, Floats]:
        return cumulated(ranked.inside, known[:, groups], ranked.size), cumulated(ranked.outside, other, ranked.size)

    whole = curves(np.ones((1, count)), np.ones((1, size)))
    best, blocks = int(np.argmin(_errors(*whole))), []
    step = max(1, BLOCK // (len(groups) + size))
    for start in range(0, resamples, step):
        draws = range(start, min(start + step, resamples))
        drawn = curves(_drawn(first, draws, count), _drawn(second, draws, size))
        blocks.append(np.stack([*read(*drawn), _errors(*drawn)[:, best]]))
    values, (*columns, fixed) = [float(value[0]) for value in read(*whole)], np.concatenate(blocks, axis=1)
    shifts = [0.0] * (len(values) - 1) + [max(0.0, values[-1] - float(columns[-1].mean()))]
    reach = _reach(*whole, *(unseen(images, (1 + level) / 2) for images in (count, size)))
    # Chance is the largest detection error: every threshold beyond the scores has it.
    spans = [(0.0, 1.0)] * (len(values) - 1) + [(0.0, 0.5)]
    parts = zip(values, spans, [*columns[:-1], fixed], shifts, reach, strict=True)
    found = [Replicates(*part, count, {name: size}, key, level) for part in parts]
    return dict(zip(Figures._fields, found, strict=True))


def average(parts: Sequence[Part]) -> Part:
    """The unweighted mean of figures: over samples outside, over scores, or over both.

    Raises:
        ValueError: There is none, or they are not of the same images.
    """
    if not parts:
        raise ValueError("there are no figures to average")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total * (1 / len(parts))


def _check_paired(first: Mapping[str, int], second: Mapping[str, int]) -> None:
    """ValueError where samples of one name have other numbers of images."""
    for name in first.keys() & second.keys():
        if first[name] != second[name]:
            raise ValueError(f"these figures are of {first[name]} and {second[name]} images of {name}: {UNPAIRED}")


def _errors(inside: Floats, outside: Floats) -> Floats:
    """The detection error of each resample at every threshold."""
    return (1 + inside / inside[:, -1:] - outside / outside[:, -1:]) / 2


def _drawn(stream: int, draws: range, size: int) -> Floats:
    """How often each of `size` images was drawn in these resamples, of shape (resamples, size)."""
    # A uniform is at most 1 - 2**-53, so its product with the size never rounds up to it.
    drawn = (rng.uniform(stream, draws, (size,)) * size).astype(np.intp) + size * np.arange(len(draws))[:, None]
    counts = np.bincount(drawn.ravel(), minlength=size * len(draws))
    return counts.reshape(len(draws), size).astype(np.float64)


def _reach(inside: Floats, outside: Floats, known: float, other: float) -> list[tuple[float, float]]:
    """Each figure's limits where a share `known` of what is inside, and `other` of what is outside, was not seen."""
    worst = _parted(inside, outside, known, other)
    best = _parted(outside, inside, other, known)[::-1]
    found = np.stack([read(inside, outside), read(*worst), read(*best)])[..., 0]
    return list(zip(found.min(axis=0).tolist(), found.max(axis=0).tolist(), strict=True))


def _parted(first: Floats, second: Floats, below: float, above: float) -> tuple[Floats, Floats]:
    """`cumulated` rows with a share of the first moved below all places, and one of the second above them."""
    nothing, all_first, all_second = np.zeros((len(first), 1)), first[:, -1:], second[:, -1:]
    lowered = np.hstack([nothing, below * all_first + (1 - below) * first, all_first])
    return lowered, np.hstack([nothing, (1 - above) * second, all_second])
