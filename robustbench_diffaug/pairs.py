"""Checkpoints tested in pairs on the samples that both have, and the places that these tests leave open."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isclose
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustbench_diffaug import paired
from robustbench_diffaug.outcomes import Areas, Basis, Key, Outcomes
from robustbench_diffaug.records import Metric
from robustbench_diffaug.stats import LEVEL, Estimate

__all__ = ["ALPHA", "COLUMNS", "MOST", "PairTest", "Pairs", "common", "difference", "places"]

COLUMNS = "bench metric group a b n a_value b_value difference low high p p_holm test".split()
MOST = 10
"""The headline metrics that are tested: the first that can be, in the order of the benches."""
ALPHA = 0.05
"""The probability of any false difference among all pairs of one metric."""
CLOSE = 1e-9  # of the mean of outcomes to the figure, relative

Place: TypeAlias = tuple[str, str, str]
"""A bench, a metric and its group."""


class PairTest(NamedTuple):
    """Two checkpoints on the samples that both have.

    Arguments:
        n: Independent images, of versions of one image as one.
        a: The figure of the first.
        b: That of the second.
        difference: a - b, with its interval.
        p: The two-sided p-value of there being none.
        test: Its name.
        error: The standard error of the difference; 0 where it cannot be told.
        discordant: On how many images only the first is right, and only the second; None where a hit is no outcome.
    """

    n: int
    a: float
    b: float
    difference: Estimate
    p: float
    test: str
    error: float
    discordant: tuple[int, int] | None = None


def common(a: Basis, b: Basis) -> tuple[Basis, Basis] | None:
    """Both, cut down to the rows that both have, in one order; None where there are none.

    Raises:
        ValueError: If a row is there twice.
    """
    if a.samples is b.samples or np.array_equal(a.samples, b.samples):
        return (a, b) if len(a.samples) else None
    for basis in (a, b):
        names, counts = np.unique(basis.samples, return_counts=True)
        if counts.max(initial=0) > 1:
            raise ValueError(f"sample {names[counts.argmax()]} is there {counts.max()} times")
    _, mine, theirs = np.intersect1d(a.samples, b.samples, assume_unique=True, return_indices=True)
    order = np.argsort(mine, kind="stable")
    return (a.on(mine[order]), b.on(theirs[order])) if len(mine) else None


def difference(a: Basis, b: Basis, level: float = LEVEL) -> PairTest | None:
    """The test of two checkpoints in one figure; None where they share no samples, or too few for the figure.

    Decisions with one row an image have McNemar's exact test, other means the z-test clustered by image, and areas
    DeLong's test.

    Arguments:
        a: What the figure of the first rests on.
        b: That of the second.
        level: Of the interval.

    Raises:
        ValueError: If the figures are of different kinds.
    """
    if isinstance(a, Areas) != isinstance(b, Areas):
        raise ValueError("a mean and an area cannot be compared")
    pair = common(a, b)
    if pair is None:
        return None
    first, second = pair
    if isinstance(first, Areas) and isinstance(second, Areas):
        return _areas(first, second, level)
    assert isinstance(first, Outcomes) and isinstance(second, Outcomes)
    return _means(first, second, level)


def _areas(a: Areas, b: Areas, level: float) -> PairTest | None:
    if a.outside != b.outside or set(np.unique(a.parts).tolist()) != set(range(len(a.outside) + 1)):
        return None
    gap = a.placements - b.placements
    values = a.placements.value, b.placements.value
    return PairTest(gap.n, *values, gap.estimate(level), gap.pvalue(), "DeLong", gap.error)


def _means(a: Outcomes, b: Outcomes, level: float) -> PairTest:
    gap = a.minus(b)
    told = gap.n, a.mean, b.mean, gap.estimate(max(a.width, b.width), level)
    if not (a.binary and b.binary):
        return PairTest(*told, gap.pvalue(), "z clustered by image", gap.error)
    only_a, _, only_b = (int(count) for count in gap.counts)
    return PairTest(*told, paired.mcnemar_of(only_a, only_b), "McNemar exact", gap.error, (only_a, only_b))


@dataclass
class Pairs:
    """Collects what the headline figures of a run rest on, a checkpoint at a time, and tests all pairs at the end.

    Names of samples are kept once for all checkpoints that have the same.

    Arguments:
        held: Value and basis of each figure, by place and checkpoint.
        names: The arrays of names that are kept.
    """

    held: dict[Place, dict[str, tuple[float, Basis]]] = field(default_factory=dict)
    names: list[NDArray[Any]] = field(default_factory=list)

    def add(self, bench: str, checkpoint: str, figures: Iterable[Metric], bases: Mapping[Key, Basis]) -> None:
        """Adds the headline figures of one checkpoint in one bench.

        Arguments:
            bench: Its name.
            checkpoint: Its id.
            figures: All of the checkpoint.
            bases: What they rest on.

        Raises:
            ValueError: If a basis is of another number than its figure.
        """
        for figure in figures:
            place, key = (bench, figure.name, figure.group), (figure.name, figure.group)
            if not figure.headline or key not in bases or (place not in self.held and len(self.held) >= MOST):
                continue
            basis = self._shared(bases[key])
            if not isclose(basis.mean, figure.value, rel_tol=CLOSE, abs_tol=1e-12):
                raise ValueError(
                    f"the outcomes of {figure.name} have the mean {basis.mean:.9g}, and its value is {figure.value:.9g}"
                )
            self.held.setdefault(place, {})[checkpoint] = figure.value, basis

    def _shared(self, basis: Basis) -> Basis:
        """The same, with an array of names that is already there if there is one."""
        for names in self.names:
            if names is basis.samples or np.array_equal(names, basis.samples):
                return replace(basis, samples=names)
        self.names.append(basis.samples)
        return basis

    def table(self) -> pd.DataFrame:
        """All pairs of checkpoints with a common sample, metric by metric, with the columns `COLUMNS`."""
        rows = [row for place, bases in self.held.items() for row in _family(place, bases)]
        return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def _family(place: Place, bases: Mapping[str, tuple[float, Basis]]) -> list[dict[str, Any]]:
    """The pairs of one metric; p-values are adjusted for their number by Holm."""
    rows = []
    for (a, (a_value, one)), (b, (b_value, other)) in combinations(bases.items(), 2):
        found = difference(one, other)
        if found is None:
            continue
        # The figure itself where it is of all samples: sums in another order have other last digits.
        pair = ((a_value, found.a), (b_value, found.b))
        values = [own if isclose(own, mean, rel_tol=CLOSE) else mean for own, mean in pair]
        named = dict(zip(("bench", "metric", "group"), place, strict=True)) | {"a": a, "b": b, "n": found.n}
        _, low, high, _ = found.difference
        told = (*values, found.difference.value, low, high, found.p, found.test)
        rows.append(named | dict(zip((*COLUMNS[6:12], "test"), told, strict=True)))
    if rows:
        adjusted = paired.holm(np.array([row["p"] for row in rows]))
        rows = [row | {"p_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]
    return rows


def places(pairs: pd.DataFrame, checkpoints: Sequence[str], better: str) -> list[tuple[int, int]] | None:
    """The best and the worst place of each checkpoint that the tests of one metric allow; None where a pair has none.

    With m checkpoints that are significantly better, and k that are not significantly worse (itself among them), the
    places are m + 1 to k.

    Arguments:
        pairs: The rows of `Pairs.table` of one metric.
        checkpoints: Those to be ranked.
        better: "higher" or "lower".
    """
    number = {checkpoint: place for place, checkpoint in enumerate(checkpoints)}
    size = len(checkpoints)
    tested, beats = np.eye(size, dtype=bool), np.zeros((size, size), dtype=bool)
    sign = 1 if better == "higher" else -1
    for a, b, gap, p in zip(pairs["a"], pairs["b"], pairs["difference"], pairs["p_holm"], strict=True):
        if a not in number or b not in number:
            continue
        one, other = number[a], number[b]
        tested[one, other] = tested[other, one] = True
        if p <= ALPHA and gap:
            winner, loser = (one, other) if sign * gap > 0 else (other, one)
            beats[winner, loser] = True
    if not tested.all():
        return None
    return [(1 + int(m), int(k)) for m, k in zip(beats.sum(axis=0), (~beats).sum(axis=1), strict=True)]
