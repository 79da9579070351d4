"""Is one checkpoint better than another? Differences over the same samples, their tests, and many tests at once.

Two checkpoints see the same images under the same noise, so what they share cancels in the difference of a row, and
rows of one image, `clusters`, are one draw.

References:
    Adding error bars to evals: a statistical approach to language model evaluations (Miller, 2024),
        https://arxiv.org/abs/2411.00640
"""

from math import erfc, isinf, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.stats import LEVEL, Estimate, clustered_mean, exact_proportion, grouped, mask, rows

__all__ = ["clustered_z", "holm", "mcnemar", "paired_difference"]


def _pair(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both arrays, found to be of one shape."""
    first = rows("a", a)
    return first, rows("b", b, len(first))


def paired_difference(
    a: NDArray[Any],
    b: NDArray[Any],
    clusters: NDArray[Any] | None,
    key: int,
    level: float = LEVEL,
    resamples: int = 2000,
    bounded: bool = True,
) -> Estimate:
    """The mean of a - b over the rows, with a percentile interval of the bootstrap over clusters.

    Where all rows have the same difference v, as between a checkpoint and itself, the bootstrap has nothing to go by.
    The share of clusters that differ from v is then at most u, Clopper and Pearson's upper limit for none of n, and
    the interval is [v - u (v + 1), v + u (1 - v)]: for v = 0, [-u, u].

    Arguments:
        a: Numbers of one checkpoint, of shape (n,).
        b: Numbers of the other, of shape (n,), row by row of the same samples.
        clusters: Ids of integers or strings, of shape (n,); without them each row is a cluster.
        key: The stream of the resamples.
        level: The coverage, in ]0, 1[.
        resamples: Resamples, at least 2 / (1 - level) - 1.
        bounded: Whether differences are known to lie in [-1, 1], as those of decisions and probabilities do. If they
            do not (radii, losses), and all rows have one difference, the interval is (-inf, inf).

    Returns:
        The estimate, whose n is the number of clusters.

    Raises:
        ValueError: An array is empty, has a NaN, is of another shape, or a difference is beyond 1 though bounded.
    """
    first, second = _pair(a, b)
    difference = first - second
    if bounded and np.abs(difference).max() > 1:
        largest = np.abs(difference).max()
        raise ValueError(f"a and b differ by up to {largest:.6g}: pass bounded=False for values beyond [0, 1]")
    found = clustered_mean(difference, clusters, key, level, resamples)
    if not bounded or not isinf(found.low):
        return found
    value, share = found.value, exact_proportion(np.zeros(found.n, dtype=bool), level).high
    return Estimate(value, value - share * (value + 1), value + share * (1 - value), found.n)


def mcnemar(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The exact two-sided p-value of "a and b are right equally often", from the rows where only one of them is.

    p = min(1, 2 P(Binomial(m, 1/2) <= k)), with k of the m rows on which they differ in favour of the rarer side.
    Rows must be independent: for several rows of one sample take `clustered_z`.

    Arguments:
        a: Whether one checkpoint is right, of shape (n,).
        b: Whether the other is, of shape (n,).

    Returns:
        The p-value, 1 where they never differ.

    Raises:
        ValueError: An array is empty or not boolean, or the shapes differ.

    References:
        Note on the sampling error of the difference between correlated proportions or percentages (McNemar, 1947),
            https://doi.org/10.1007/BF02295996
    """
    from statsmodels.stats.contingency_tables import mcnemar as test  # heavy: a second

    first = mask("a", a)
    second = mask("b", b, len(first))
    table = np.bincount(2 * first + second, minlength=4).reshape(2, 2)
    return float(test(table, exact=True).pvalue)


def clustered_z(a: NDArray[Any], b: NDArray[Any], clusters: NDArray[Any] | None) -> float:
    """The two-sided p-value of "a and b have the same mean", by a z-test with a cluster-robust variance.

    With d = a - b over n rows in G clusters, z = mean(d) / s, where
    s^2 = G / (G - 1) sum_g (sum_{i in g} (d_i - mean(d)))^2 / n^2. It is asymptotic in G: thirty clusters or more.
    Where no cluster deviates from the mean, s = 0 says nothing; G equal signs then have the sign test's p = 2^(1 - G).

    Arguments:
        a: Numbers of one checkpoint, of shape (n,).
        b: Numbers of the other, of shape (n,), row by row of the same samples.
        clusters: Ids of integers or strings, of shape (n,); without them each row is a cluster.

    Returns:
        The p-value, 1 where a equals b, and for a single cluster.

    Raises:
        ValueError: An array is empty, has a NaN, or the shapes differ.

    References:
        Longitudinal data analysis using generalized linear models (Liang and Zeger, 1986),
            https://doi.org/10.1093/biomet/73.1.13
    """
    first, second = _pair(a, b)
    difference = first - second
    groups, count = grouped(clusters, len(difference))
    centre = float(difference.mean())
    residuals = np.bincount(groups, difference - centre)
    spread = float(np.sqrt((residuals**2).sum())) / len(difference)
    scale = float(np.abs(difference).max())
    if count == 1 or spread <= 1e-12 * scale:
        return 2.0 ** (1 - count) if abs(centre) > 1e-12 * scale else 1.0
    return erfc(abs(centre) / (spread * sqrt(count / (count - 1))) / sqrt(2))


def holm(p: NDArray[Any]) -> NDArray[np.float64]:
    """The p-values adjusted for their number by Holm's step-down, in their order.

    With p sorted upwards, adjusted_i = max_{j <= i} min(1, (n - j + 1) p_j). Rejecting what is at most alpha, any
    rejection is false with probability at most alpha, independent or not.

    Arguments:
        p: P-values in [0, 1], of shape (n,).

    Raises:
        ValueError: `p` is empty, has a NaN, or is beyond [0, 1].

    References:
        A simple sequentially rejective multiple test procedure (Holm, 1979), https://www.jstor.org/stable/4615733
    """
    from statsmodels.stats.multitest import multipletests  # heavy: a second

    found = rows("p", p, unit=True)
    return np.asarray(multipletests(found, method="holm")[1], dtype=np.float64)
