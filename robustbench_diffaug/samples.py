"""How far made samples are from real ones, in the feature space of some network: distances, and shares of neighbours.

What it says is about that network's features: figures of different networks cannot be compared, and only the Frechet
distance of one Inception network's features is the FID of the literature.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.stats import LEVEL, Estimate

__all__ = [
    "Neighbourhoods",
    "frechet",
    "frechet_difference",
    "frechet_estimate",
    "neighbourhoods",
    "score",
    "score_estimate",
]

Floats: TypeAlias = NDArray[np.float64]
BLOCK = 2**22  # distances held at once


class Neighbourhoods(NamedTuple):
    """Which samples lie among those of the other set; means over the rows are the four figures.

    Arguments:
        precision: Whether a made sample lies in the ball of a real one.
        recall: Whether a real sample lies in the ball of a made one.
        density: How many balls of real samples a made one lies in, by their expected number k.
        coverage: Whether there is a made sample in the ball of a real one.
    """

    precision: NDArray[np.bool_]
    recall: NDArray[np.bool_]
    density: Floats
    coverage: NDArray[np.bool_]


def frechet(
    first: NDArray[Any],
    second: NDArray[Any],
    weights: tuple[NDArray[Any] | None, NDArray[Any] | None] = (None, None),
) -> float:
    """The squared Frechet distance of the Gaussians fitted to two sets of features.

    d^2 = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^(1/2) S2 S1^(1/2))^(1/2)), with unbiased covariances.

    From finite sets it is too large, by an amount that falls as 1 / n: compare sets of one size only.

    Arguments:
        first: Features, of shape (n, d).
        second: Features, of shape (m, d).
        weights: How often each row counts, whole numbers.

    Raises:
        ValueError: If a set has no two rows, a NaN, or another number of features.

    References:
        GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017),
            https://arxiv.org/abs/1706.08500
        Effectively Unbiased FID and Inception Score and where to find them (Chong and Forsyth, 2020),
            https://arxiv.org/abs/1911.07023
    """
    a, b = _pair(first, second)
    (mean, covariance), (other_mean, other_covariance) = _moments(a, weights[0]), _moments(b, weights[1])
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other_covariance @ root), 0)).sum()
    squared = ((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * shared
    return max(0.0, float(squared))


def frechet_estimate(
    real: NDArray[Any], made: NDArray[Any], key: int, level: float = LEVEL, resamples: int = 200
) -> Estimate:
    """`frechet` with an interval that allows for its bias.

    Resamples add as much bias again as the samples had. So with v the distance and q a quantile of its replicates, rows
    of each set drawn apart, the limits are those of the basic bootstrap, 2 v - q, which lie about the distance without
    its bias, widened to hold v.

    Arguments:
        real: Features, of shape (n, d).
        made: Features, of shape (m, d).
        key: The stream of the resamples.
        level: The coverage, in ]0, 1[.
        resamples: Of the bootstrap.

    Returns:
        The estimate, whose n is the number of made samples.

    Raises:
        ValueError: As `frechet`.
    """
    value = frechet(real, made)
    replicates = [frechet(real, made, pair) for pair in _both(key, len(real), len(made), resamples)]
    low, high = _basic(value, replicates, level)
    return Estimate(value, max(0.0, low), high, len(made))


def frechet_difference(
    real: NDArray[Any],
    made: tuple[NDArray[Any], NDArray[Any]],
    key: int,
    level: float = LEVEL,
    resamples: int = 200,
) -> Estimate:
    """The distance of one made set to the real one less that of another, rows of both made sets being pairs.

    In a resample both have the same rows, and the same real ones, so that what they share cancels. The interval is that
    of the basic bootstrap, widened to hold the value.

    Arguments:
        real: Features, of shape (n, d).
        made: Two sets of features, of shape (m, d), row by row of the same labels and noise.
        key: The stream of the resamples.
        level: The coverage, in ]0, 1[.
        resamples: Of the bootstrap.

    Raises:
        ValueError: As `frechet`, or if the made sets have not one number of rows.
    """
    one, other = made
    if len(one) != len(other):
        raise ValueError(f"the made sets have {len(one)} and {len(other)} rows; needed are pairs")
    value = frechet(real, one) - frechet(real, other)
    pairs = _both(key, len(real), len(one), resamples)
    replicates = [frechet(real, one, pair) - frechet(real, other, pair) for pair in pairs]
    return Estimate(value, *_basic(value, replicates, level), len(one))


def neighbourhoods(real: NDArray[Any], made: NDArray[Any], neighbours: int) -> Neighbourhoods:
    """Which samples lie in the balls of the other set's.

    The ball of a sample reaches to the k-th nearest other of its own set, its edge included.

    Arguments:
        real: Features, of shape (n, d), more than k rows.
        made: Features, of shape (m, d), more than k rows.
        neighbours: k; published are 3 for precision and recall, 5 for density and coverage.

    Raises:
        ValueError: If a set has too few rows, a NaN, or another number of features.

    References:
        Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019),
            https://arxiv.org/abs/1904.06991
        Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020),
            https://arxiv.org/abs/2002.09797
    """
    a, b = _pair(real, made)
    if min(len(a), len(b)) <= neighbours:
        raise ValueError(f"{len(a)} real and {len(b)} made samples have no {neighbours} neighbours each; give more")
    real_radii, made_radii = _radii(a, neighbours), _radii(b, neighbours)
    balls, inside = np.zeros(len(b)), np.zeros(len(a), dtype=bool)
    covered = np.zeros(len(a), dtype=bool)
    for rows, distances in _distances(a, b):
        within = distances <= real_radii[rows, None]
        balls += within.sum(axis=0)
        covered[rows] = within.any(axis=1)
        inside[rows] = (distances <= made_radii).any(axis=1)
    return Neighbourhoods(balls > 0, inside, balls / neighbours, covered)


def score(probabilities: NDArray[Any], weights: NDArray[Any] | None = None) -> float:
    """The inception score's formula with the probabilities of any classifier: exp(mean KL(p(y|x) || mean p(y|x))).

    It is 1 where all samples look alike to the classifier, and at most the number of classes. From finite sets it is
    too small, since the entropy of the mean is.

    Arguments:
        probabilities: Of shape (n, k), rows that add up to 1.
        weights: How often each row counts.

    Raises:
        ValueError: If a row is no distribution.

    References:
        Improved Techniques for Training GANs (Salimans et al., 2016), https://arxiv.org/abs/1606.03498
    """
    from scipy.special import entr

    found = np.asarray(probabilities, dtype=np.float64)
    if found.ndim != 2 or not len(found) or not (found >= 0).all() or np.abs(found.sum(axis=1) - 1).max() > 1e-4:
        raise ValueError("probabilities must be rows that are at least 0 and add up to 1")
    counts = np.ones(len(found)) if weights is None else np.asarray(weights, dtype=np.float64)
    share = counts / counts.sum()
    information = entr(share @ found).sum() - share @ entr(found).sum(axis=1)
    return float(np.exp(max(0.0, information)))


def score_estimate(probabilities: NDArray[Any], key: int, level: float = LEVEL, resamples: int = 200) -> Estimate:
    """`score` with an interval: the basic bootstrap's, which allows for the bias, widened to hold the value.

    Arguments:
        probabilities: Of shape (n, k), rows that add up to 1.
        key: The stream of the resamples.
        level: The coverage, in ]0, 1[.
        resamples: Of the bootstrap.

    Raises:
        ValueError: As `score`.
    """
    value = score(probabilities)
    replicates = [score(probabilities, weights) for weights in _drawn(key, len(probabilities), resamples)]
    low, high = _basic(value, replicates, level)
    return Estimate(value, max(1.0, low), high, len(probabilities))


def _pair(first: NDArray[Any], second: NDArray[Any]) -> tuple[Floats, Floats]:
    """Both sets as float64, found to be of the same features."""
    found = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    for rows in found:
        if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] != found[0].shape[-1]:
            raise ValueError(f"features have shapes {found[0].shape} and {found[1].shape}, expected (n, d) and (m, d)")
        if not np.isfinite(rows).all():
            raise ValueError("features have NaN or infinite entries: drop those rows")
    return found


def _moments(rows: Floats, weights: NDArray[Any] | None) -> tuple[Floats, Floats]:
    """The mean and the unbiased covariance of rows that count so often."""
    mean: Floats = np.average(rows, axis=0, weights=weights)
    centred = rows - mean
    counted = centred if weights is None else centred * np.asarray(weights)[:, None]
    total = len(rows) if weights is None else float(np.sum(weights))
    return mean, centred.T @ counted / (total - 1)


def _distances(first: Floats, second: Floats) -> Iterator[tuple[slice, Floats]]:
    """Euclidean distances of some rows of the first set after others to all of the second."""
    from scipy.spatial.distance import cdist

    step = max(1, BLOCK // len(second))
    for start in range(0, len(first), step):
        yield slice(start, start + step), cdist(first[start : start + step], second)


def _radii(rows: Floats, neighbours: int) -> Floats:
    """The distance of each row to its k-th nearest other one; the nearest of all is the row itself."""
    return np.concatenate([np.partition(part, neighbours, axis=1)[:, neighbours] for _, part in _distances(rows, rows)])


def _drawn(key: int, size: int, resamples: int, name: str = "rows") -> Iterator[NDArray[np.intp]]:
    """How often each row of a set is drawn in a resample; sets of other names are drawn apart."""
    from robustbench_diffaug import rng  # loads torch

    stream = rng.key(key, name)
    for draw in range(resamples):
        numbers = rng.uniform(stream, range(draw, draw + 1), (size,))[0]
        yield np.bincount((numbers * size).astype(np.intp), minlength=size)


def _both(key: int, real: int, made: int, resamples: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """How often each row of two sets is drawn."""
    return zip(_drawn(key, real, resamples, "real"), _drawn(key, made, resamples, "made"), strict=True)


def _basic(value: float, replicates: list[float], level: float) -> tuple[float, float]:
    """The basic bootstrap's limits, widened to hold the value."""
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return min(value, 2 * value - float(high)), max(value, 2 * value - float(low))
