"""Estimates with their intervals: proportions, clustered means, AUROC, FPR at a TPR, and the calibration error.

Every function is pure. Its arguments mean the same everywhere, and arrays have one row per record, shape (n,), n >= 1:

    clusters: The id of each row's sample, integers or strings; None where each row is its own. The same image under
        15 corruptions and 5 severities is one draw from the population, so its rows are resampled together.
    key: The stream of the resamples, 128 bits.
    level: The coverage of the interval, in ]0, 1[.
    resamples: How many, at least 2 / (1 - level) - 1.
    weights: How often each row counts, at least 0 and not all 0; once each without them.

ValueError is raised for an array that is empty, has a NaN or an infinity, is out of its range, or is not of the shape
of the others; for a ROC curve with one class only; and for any other argument out of its range.

With C clusters a bootstrap resample draws C of them with replacement, and the interval is the percentile interval of
the statistic over R resamples: order statistics k and R + 1 - k, with k = floor((R + 1) (1 - level) / 2). Resample r
is draw r of the key, so a result depends on neither the memory at hand nor the number of threads.

Where all rows agree, the bootstrap says "no error". That is false, and such an interval is never returned: with no
deviating cluster among n, the share of deviating clusters is below u = 1 - ((1 - level) / 2)^(1 / n) (Clopper and
Pearson), and values known to lie in [0, 1] put their mean v within [v - u v, v + u (1 - v)]. Values of unknown range
give the only honest interval, (-inf, inf).

References:
    Bootstrapping clustered data (Field and Welsh, 2007), https://doi.org/10.1111/j.1467-9868.2007.00593.x
    The use of confidence or fiducial limits illustrated in the case of the binomial (Clopper and Pearson, 1934),
        https://doi.org/10.1093/biomet/26.4.404
"""

from collections.abc import Callable
from math import floor, inf, nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv, ndtri, stdtrit

from robustbench_diffaug.resamples import draws, sums_of_draws

__all__ = ["LEVEL", "Curve", "Estimate", "auroc", "binomial_lower", "bootstrap", "clustered_mean", "curve_estimates"]
__all__ += ["ece", "ece_estimate", "exact_proportion", "fpr_at_tpr", "grouped", "mask", "mean", "proportion", "rows"]
__all__ += ["unseen"]

Rows = NDArray[Any]  # one entry per row: booleans, numbers or ids, of shape (n,)
Floats = NDArray[np.float64]

LEVEL = 0.95
FEW = 10  # hits or misses, with fewer of which a bootstrap's interval is too narrow


class Estimate(NamedTuple):
    """A value and its two-sided interval, from the `n` samples or clusters it rests on."""

    value: float
    low: float
    high: float
    n: int


def rows(name: str, values: Rows, size: int | None = None, unit: bool = False) -> Floats:
    """The array as float64, once it is found to have one finite number per row; with `unit`, in [0, 1]."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or (size is not None and len(found) != size):
        expected = "(n,)" if size is None else f"({size},)"
        raise ValueError(f"{name} has shape {found.shape}, expected {expected}: one entry per row")
    if not len(found):
        raise ValueError(f"{name} is empty: there is no estimate from nothing; leave the cell out")
    if not np.isfinite(found).all():
        bad = np.flatnonzero(~np.isfinite(found))
        raise ValueError(f"{name} has {len(bad)} NaN or infinite entries, the first at row {bad[0]}: drop those rows")
    if unit and (found.min() < 0 or found.max() > 1):
        raise ValueError(f"{name} must lie in [0, 1], found {found.min():.6g} to {found.max():.6g}")
    return found


def mask(name: str, values: Rows, size: int | None = None) -> NDArray[np.bool_]:
    """The array as booleans, once each of its rows is found to be 0 or 1."""
    found = rows(name, values, size)
    if not ((found == 0) | (found == 1)).all():
        raise ValueError(f"{name} must be booleans: pass a comparison, such as predicted == label")
    return np.asarray(found == 1)


def grouped(clusters: Rows | None, size: int) -> tuple[NDArray[np.intp], int]:
    """Each row's cluster, numbered from 0 in the order of the ids, and the number of clusters."""
    if clusters is None:
        return np.arange(size), size
    if not size or np.shape(clusters) != (size,):
        raise ValueError(f"clusters has shape {np.shape(clusters)}, expected one id per row, of {size or 'some'} rows")
    found = np.asarray(clusters)
    if found.dtype.kind == "i" and found.min() >= 0 and found.max() < 2 * size:  # numbers already: none is looked for
        there = np.bincount(found) > 0
        return (np.cumsum(there) - 1)[found], int(there.sum())
    ids, groups = np.unique(found, return_inverse=True)
    if ids.dtype.kind == "f" and np.isnan(ids).any():
        raise ValueError("clusters has a NaN: each row needs the id of its sample")
    return groups, len(ids)


def _weights(weights: Rows | None, size: int) -> Floats:
    """The weights, ones without them."""
    found = np.ones(size) if weights is None else rows("weights", weights, size)
    if found.min() < 0 or not found.any():
        raise ValueError("weights must be at least 0, and not all of them 0")
    return found


def _hits(hits: Rows, level: float, method: str) -> Estimate:
    """The share of hits and statsmodels' interval for it."""
    from statsmodels.stats.proportion import proportion_confint  # heavy: a second

    found = mask("hits", hits)
    value = float(found.mean())
    low, high = proportion_confint(int(found.sum()), len(found), alpha=1 - level, method=method)
    # Rounding can put the limit of all hits, or of none, 1e-17 on the wrong side of the value.
    return Estimate(value, max(0.0, min(float(low), value)), min(1.0, max(float(high), value)), len(found))


def proportion(hits: Rows, level: float = LEVEL) -> Estimate:
    """The share of hits (booleans), with Wilson's interval: right on average over the true share, and never empty.

    References:
        Probable inference, the law of succession, and statistical inference (Wilson, 1927),
            https://doi.org/10.1080/01621459.1927.10502953
    """
    return _hits(hits, level, "wilson")


def exact_proportion(hits: Rows, level: float = LEVEL) -> Estimate:
    """The share of hits (booleans), with Clopper and Pearson's interval: at least `level` whatever the true share."""
    return _hits(hits, level, "beta")


def binomial_lower(k: Rows | int, n: int, alpha: float) -> Floats:
    """A lower bound on p from k hits in n draws that fails with probability at most alpha, Clopper and Pearson's.

    The bound is the p at which P(Binomial(n, p) >= k) = I_p(k, n - k + 1) = alpha, rounded down: the tail at the
    returned p is at most alpha, and the bound is lower than the true one by about 1e-12 p (1 - p). Zero for no hits.

    Arguments:
        k: Hits, integers in [0, n], of any shape.
        n: Draws, at least 1.
        alpha: The probability of failure, in ]0, 1[.

    Raises:
        ValueError: k, n or alpha is out of its range.

    References:
        Certified adversarial robustness via randomized smoothing (Cohen et al., 2019), https://arxiv.org/abs/1902.02918
    """
    hits = np.asarray(k)
    if hits.dtype.kind not in "iu" or n < 1 or not 0 < alpha < 1:
        raise ValueError(f"need integer hits, n >= 1 and alpha in ]0, 1[, found {hits.dtype} hits, {n=}, {alpha=}")
    if hits.size and (hits.min() < 0 or hits.max() > n):
        raise ValueError(f"hits must lie in [0, {n}], found {hits.min()} to {hits.max()}")
    shape = np.maximum(hits, 1.0), n - np.maximum(hits, 1.0) + 1
    # The inverse is good to 1e-13. A certificate must not rest on the last digits, and 1e-12 costs no radius.
    bound, above, margin = np.asarray(betaincinv(*shape, alpha), dtype=np.float64), np.array(True), 1e-12
    while above.any():
        below = np.minimum(bound - margin * bound * (1 - bound), np.nextafter(bound, 0))
        bound, margin = np.where(above, below, bound), 2 * margin
        above = betainc(*shape, bound) > alpha
    return np.where(hits == 0, 0.0, bound)


def _limits(replicates: Floats, level: float) -> tuple[float, float]:
    """The percentile interval; a replicate that is NaN might be anything, so it is both the lowest and the highest."""
    rank = floor((len(replicates) + 1) * (1 - level) / 2 + 1e-9)  # 40 x 0.025 is 1, whatever its rounding
    low, high = (np.sort(np.where(np.isnan(replicates), limit, replicates)) for limit in (-inf, inf))
    return float(low[rank - 1]), float(high[-rank])


def unseen(n: int, level: float) -> float:
    """The largest share u of deviating clusters that n clusters without one do not exclude."""
    return 1 - ((1 - level) / 2) ** (1 / n) if n else 1.0


def _within_unit(value: float, low: float, high: float, n: int, level: float) -> tuple[float, float]:
    """The limits around the value, in [0, 1], and never at one point: see the module."""
    low, high = max(0.0, min(low, value)), min(1.0, max(high, value))
    if high - low > 1e-12:
        return low, high
    share = unseen(n, level)
    return value - share * value, value + share * (1 - value)


def mean(values: Rows, key: int, level: float = LEVEL, resamples: int = 2000, bounded: bool = False) -> Estimate:
    """The mean of independent rows, with a bootstrap interval: `clustered_mean` where each row is its own cluster."""
    return clustered_mean(values, None, key, level, resamples, bounded)


def clustered_mean(
    values: Rows, clusters: Rows | None, key: int, level: float = LEVEL, resamples: int = 2000, bounded: bool = False
) -> Estimate:
    """The mean over all rows, with a percentile interval of the bootstrap over clusters; n counts the clusters.

    A replicate is the ratio of the sum to the number of rows, over the clusters drawn. `values` are numbers, and
    `bounded` says that they must lie in [0, 1], which bounds the mean of rows that all agree. Without it, values
    that vary between no clusters, or are all of one cluster, give (-inf, inf).

    With fewer than ten clusters' worth of hits, or of misses, and a spread that rests on c < 10 clusters, the bootstrap
    is too narrow (84 % for one hit in a hundred, 32 clusters of 15), and the interval reaches at least as far as
    Wilson's of an effective number of rows: mean (1 - mean) / variance, times (z / t)^2 with Student's t of c degrees,
    and no fewer than there are clusters.

    References:
        Comparative study of confidence intervals for proportions in complex sample surveys (Franco et al., 2019),
            https://pmc.ncbi.nlm.nih.gov/articles/PMC6690503
    """
    found = rows("values", values, unit=bounded)
    groups, count = grouped(clusters, len(found))
    sums, sizes = np.bincount(groups, found), np.bincount(groups).astype(np.float64)
    alike = bool((sizes == sizes[0]).all())
    drawn = sums_of_draws(key, np.stack([sums] if alike else [sums, sizes], axis=1), resamples, level)
    value = float(sums.sum() / sizes.sum())
    low, high = _limits(drawn[:, 0] / (count * sizes[0] if alike else drawn[:, 1]), level)
    if bounded:
        squares = (sums - value * sizes) ** 2
        total, fourth = float(squares.sum()), float(squares @ squares)
        if high - low > 1e-12 and total**2 < FEW * fourth and count * min(value, 1 - value) < FEW:
            from statsmodels.stats.proportion import proportion_confint  # heavy: a second

            tail = (1 + level) / 2
            variance = total / sizes.sum() ** 2 * count / (count - 1)
            narrower = (ndtri(tail) / stdtrit(total**2 / fourth, tail)) ** 2
            worth = max(count, min(value * (1 - value) / variance, len(found)) * narrower)
            least, most = proportion_confint(value * worth, worth, alpha=1 - level, method="wilson")
            low, high = min(low, float(least)), max(high, float(most))
        low, high = _within_unit(value, low, high, count, level)
    elif high - low <= 1e-12 * np.abs(found).max():
        low, high = -inf, inf
    return Estimate(value, min(low, value), max(high, value), count)


def bootstrap(
    statistic: Callable[[Floats], float], clusters: Rows, key: int, level: float = LEVEL, resamples: int = 1000
) -> tuple[float, float]:
    """The percentile interval of any statistic that takes a weight for each row, resampling whole clusters.

    `statistic` maps weights of shape (n,), how often each row was drawn, to a number. It is NaN where the resample does
    not define it (no positives, say). Such a resample might be anything, so it counts on both sides, and more of them
    than a tail holds make both limits infinite.
    """
    groups, count = grouped(clusters, len(clusters))
    replicates = [
        float(statistic(np.bincount(drawn, minlength=count)[groups].astype(np.float64)))
        for block in draws(key, count, resamples, level)
        for drawn in block
    ]
    return _limits(np.array(replicates), level)


def _bins(confidence: Rows, correct: Rows, bins: int) -> tuple[NDArray[np.intp], Floats]:
    """Each row's bin, and its gap `correct - confidence`."""
    found = rows("confidence", confidence, unit=True)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, found {bins}")
    edges = np.linspace(0, 1, bins + 1)[1:-1]  # bins are ]low, high], as in the paper
    return np.searchsorted(edges, found, side="left"), mask("correct", correct, len(found)) - found


def _ece(where: NDArray[np.intp], gap: Floats, weights: Floats) -> float:
    """The calibration error of binned rows."""
    return float(np.abs(np.bincount(where, weights * gap)).sum() / weights.sum())


def ece(confidence: Rows, correct: Rows, bins: int = 15, weights: Rows | None = None) -> float:
    """The expected calibration error over equal-width bins ](m - 1) / M, m / M], the first of which has 0 too.

    ECE = sum_m (n_m / n) |accuracy_m - confidence_m|.

    Arguments:
        confidence: The probability of the predicted class, in [0, 1], of shape (n,).
        correct: Whether the prediction is right, of shape (n,).
        bins: M, at least 1.
        weights: How often each row counts, of shape (n,).

    References:
        On calibration of modern neural networks (Guo, Pleiss, Sun and Weinberger, 2017),
            https://arxiv.org/abs/1706.04599
    """
    where, gap = _bins(confidence, correct, bins)
    return _ece(where, gap, _weights(weights, len(gap)))


def ece_estimate(
    confidence: Rows,
    correct: Rows,
    key: int,
    clusters: Rows | None = None,
    bins: int = 15,
    level: float = LEVEL,
    resamples: int = 1000,
) -> Estimate:
    """`ece` with a bootstrap interval that allows for its bias.

    By chance the binned error of a calibrated network is positive, and that of its resamples larger still: their
    percentile interval excludes 0 (0 of 150 simulated intervals covered the truth). So with v the error, q a quantile
    of its replicates, and q0 one of those of its noise T = sum_m (n_m / n) |gap*_m - gap_m|, the limits are

        low = max(0, v - q0((1 + level) / 2)),    since |v - truth| <= T by the triangle inequality,
        high = max(v, 2 v - q((1 - level) / 2)),  the basic bootstrap limit.
    """
    where, gap = _bins(confidence, correct, bins)
    groups, count = grouped(clusters, len(gap))
    value = _ece(where, gap, np.ones(len(gap)))
    noise = gap - (np.bincount(where, gap) / np.maximum(np.bincount(where), 1))[where]
    sizes = np.bincount(groups).astype(np.float64)
    places, within = np.unique(where, return_inverse=True)
    at, cells = groups * len(places) + within, count * len(places)
    parts = [np.bincount(at, each, minlength=cells).reshape(count, -1) for each in (gap, noise)]
    drawn = sums_of_draws(key, np.concatenate([*parts, sizes[:, None]], axis=1), resamples, level, fine=False)
    errors = np.abs(drawn[:, :-1]).reshape(resamples, 2, -1).sum(axis=2) / drawn[:, -1:]
    (least, _), (_, chance) = (_limits(errors[:, index], level) for index in (0, 1))
    low, high = value - chance, max(value, 2 * value - least)
    if high - low <= 1e-9:  # but for rounding
        # A share u of unseen clusters moves the summed gaps by at most u, and takes u of the ones that are there.
        margin = unseen(count, level) * (1 + value)
        low, high = value - margin, value + margin
    return Estimate(value, max(0.0, low), min(1.0, high), count)


def _classes(scores: Rows, positive: Rows) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Each row's rank among the distinct scores, from 0, and its class, both of which must occur."""
    found = rows("scores", scores)
    classes = mask("positive", positive, len(found))
    if classes.all() or not classes.any():
        raise ValueError(f"all {len(found)} rows are of one class, positive={classes[0]}: a ROC curve needs both")
    return np.unique(found, return_inverse=True)[1], classes


def _auroc(levels: NDArray[np.intp], positive: NDArray[np.bool_], weights: Floats) -> float:
    """The area of ranked rows."""
    up, down = np.bincount(levels, weights * positive), np.bincount(levels, weights * ~positive)
    pairs = float(up.sum() * down.sum())
    # Twice the count keeps half pairs whole: with whole weights every number here is exact below 2**53.
    return float((up * (2 * down.cumsum() - down)).sum()) / (2 * pairs) if pairs else nan


def _fpr(levels: NDArray[np.intp], positive: NDArray[np.bool_], weights: Floats, tpr: float) -> float:
    """The false positive rate of ranked rows."""
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in ]0, 1], found {tpr}")
    up = np.bincount(levels, weights * positive)[::-1].cumsum()
    down = np.bincount(levels, weights * ~positive)[::-1].cumsum()
    return float(down[np.argmax(up / up[-1] >= tpr)] / down[-1]) if up[-1] and down[-1] else nan


def auroc(scores: Rows, positive: Rows, weights: Rows | None = None) -> float:
    """The area under the ROC curve, P(positive scores higher) + P(they tie) / 2, from ranks: exact, ties included.

    Arguments:
        scores: Higher for what looks positive, of shape (n,), in any units: only their order counts.
        positive: Which rows are positive, of shape (n,), not all and not none.
        weights: How often each row counts, of shape (n,). The area is NaN where they leave a class out.

    Raises:
        ValueError: A score is NaN or infinite, only one class is there, or the shapes differ.

    References:
        The meaning and use of the area under a receiver operating characteristic curve (Hanley and McNeil, 1982),
            https://doi.org/10.1148/radiology.143.1.7063747
    """
    levels, classes = _classes(scores, positive)
    return _auroc(levels, classes, _weights(weights, len(classes)))


def fpr_at_tpr(scores: Rows, positive: Rows, tpr: float = 0.95, weights: Rows | None = None) -> float:
    """The share of negatives at or above the highest score that keeps at least `tpr`, in ]0, 1], of the positives.

    Rows that tie are kept or dropped together. The other arguments, and what is raised, are those of `auroc`.

    References:
        Enhancing the reliability of out-of-distribution image detection in neural networks (Liang, Li and Srikant,
            2018), https://arxiv.org/abs/1706.02690
    """
    levels, classes = _classes(scores, positive)
    return _fpr(levels, classes, _weights(weights, len(classes)), tpr)


class Curve(NamedTuple):
    """What is read off one ROC curve: its area, and its false positive rate at a true positive rate."""

    auroc: Estimate
    fpr: Estimate


def curve_estimates(
    scores: Rows,
    positive: Rows,
    key: int,
    clusters: Rows | None = None,
    tpr: float = 0.95,
    level: float = LEVEL,
    resamples: int = 1000,
) -> Curve:
    """`auroc` and `fpr_at_tpr` with their bootstrap intervals; the scores are ranked once for all resamples.

    Where every resample agrees, as for classes that the scores separate, the module's bound holds with n = m: for the
    area m disjoint pairs of clusters, m those of the rarer class, are m trials of "the positive scores higher"; for
    the rate m is the number of clusters with a negative.
    """
    levels, classes = _classes(scores, positive)
    groups, count = grouped(clusters, len(classes))
    negatives = len(np.unique(groups[~classes]))
    pairs = min(len(np.unique(groups[classes])), negatives, count // 2)

    def estimate(statistic: Callable[[Floats], float], trials: int) -> Estimate:
        value = statistic(np.ones(len(classes)))
        low, high = bootstrap(statistic, groups, key, level, resamples)
        return Estimate(value, *_within_unit(value, low, high, trials, level), count)

    return Curve(
        auroc=estimate(lambda weights: _auroc(levels, classes, weights), pairs),
        fpr=estimate(lambda weights: _fpr(levels, classes, weights, tpr), negatives),
    )
