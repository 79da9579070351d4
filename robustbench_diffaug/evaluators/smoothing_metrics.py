"""Figures of certificates, from votes alone: of each noise level, and of all of them with and without paying for that.

The certificate of an image may be wrong, with probability at most alpha: that is the Monte-Carlo error, of the noise.
The images are a sample: that is the error of the test set, which intervals are about. `certified-lower` is about the
first and has no interval, and every other figure is about the second.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from math import log, sqrt

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.special import betaincinv
from scipy.stats import binom

from robustbench_diffaug import rng, stats
from robustbench_diffaug.evaluators.certificates import ABSTAIN, Certificates, certify, predict, reach
from robustbench_diffaug.outcomes import Basis, Deferred, Key, Outcomes, Rows
from robustbench_diffaug.records import Metric, Records
from robustbench_diffaug.stats import LEVEL, Estimate

__all__ = ["ALL", "band", "figures", "lower", "named", "outcomes", "scores"]

ALL = "all sigmas"
"""The group of figures that are of no single noise level."""

Scores = Float[np.ndarray, " n"]
"""The certified radius of each image that is certified with its own class, and -1 for the others."""


def figures(
    records: Records, sigmas: Sequence[float], radii: Sequence[float], alpha: float, rho: float
) -> Iterator[Metric]:
    """All metrics of one checkpoint.

    Arguments:
        records: With the columns `select` and `estimate`, votes of (image, level, class).
        sigmas: The levels, as in the records.
        radii: Of certified accuracy.
        alpha: The probability that a certificate is wrong, in (0, 1/2).
        rho: The probability that `certified-lower` is wrong, in (0, 1).
    """
    for index, sigma in enumerate(sigmas):
        yield from _of_level(records, index, sigma, radii, alpha, rho)
    if len(sigmas) > 1:
        found = {sigma: scores(records, index, sigma, alpha) for index, sigma in enumerate(sigmas)}
        shared = {sigma: scores(records, index, sigma, alpha / len(sigmas)) for index, sigma in enumerate(sigmas)}
        half = _half(records)
        for radius in radii:
            yield from _envelope(records, found, radius)
        for radius in radii:
            yield from _selected(records, found, radius, half)
        for radius in radii:
            anywhere = np.max(list(shared.values()), axis=0) >= radius
            yield records.metric(f"certified-any@{named(radius)}", ALL, _share(records, anywhere))


def scores(records: Records, index: int, sigma: float, alpha: float) -> Scores:
    """The certified radius of each image where the class is right, and -1 where it is not, or there is none."""
    found = _certified(records, index, sigma, alpha)
    return np.where(found.prediction == records["label"], found.radius, -1.0)


def _of_level(
    records: Records, index: int, sigma: float, radii: Sequence[float], alpha: float, rho: float
) -> Iterator[Metric]:
    group = f"sigma={sigma:g}"
    votes = records["estimate"][:, index]
    certified = certify(records["select"][:, index], votes, sigma, alpha)
    found = np.where(certified.prediction == records["label"], certified.radius, -1.0)
    for radius in radii:
        estimate = _share(records, found >= radius)
        yield records.metric(f"certified@{named(radius)}", group, estimate, headline=radius == sigma)
    for radius in radii:
        yield records.metric(f"certified-band@{named(radius)}", group, band(found >= radius, _images(records)))
    for radius in radii:
        bound = Estimate(lower(found >= radius, alpha, rho), np.nan, np.nan, len(found))
        yield records.metric(f"certified-lower@{named(radius)}", group, bound)
    abstains = _share(records, certified.prediction == ABSTAIN)
    yield records.metric("abstain", group, abstains, better="lower")
    yield records.metric("smoothed/accuracy", group, _share(records, found >= 0))
    predicted = predict(votes, alpha)
    yield records.metric("predict/accuracy", group, _share(records, predicted == records["label"]))
    abstains = _share(records, predicted == ABSTAIN)
    yield records.metric("predict/abstain", group, abstains, better="lower")
    most = reach(int(votes[0].sum()), sigma, alpha)
    radius_shares, key = np.clip(found / most, 0.0, 1.0), records.key("acr", group)
    share = stats.clustered_mean(radius_shares, _images(records), key, bounded=True)
    mean = Estimate(share.value * most, share.low * most, share.high * most, share.n)
    yield records.metric("acr", group, mean, unit="pixels", headline=True)


def outcomes(records: Records, sigmas: Sequence[float], radii: Sequence[float], alpha: float) -> Deferred:
    """What the figures of single noise levels, and `certified-any`, are means of.

    The figures of a level that is chosen by these very images, or by half of them, have none.

    Arguments:
        records: Of one checkpoint.
        sigmas: The levels, as in the records.
        radii: Of certified accuracy.
        alpha: The probability that a certificate is wrong, in (0, 1/2).
    """
    rows, made = Rows(records), dict[Key, Callable[[], Basis]]()
    at = cache(lambda index, share: scores(records, index, sigmas[index], share))

    def certified(index: int, radius: float) -> Outcomes:
        return rows.outcomes(at(index, alpha) >= radius)

    def anywhere(radius: float) -> Outcomes:
        found = [at(index, alpha / len(sigmas)) >= radius for index in range(len(sigmas))]
        return rows.outcomes(np.any(found, axis=0))

    def abstains(index: int) -> Outcomes:
        return rows.outcomes(_certified(records, index, sigmas[index], alpha).prediction == ABSTAIN)

    def predicted(index: int, what: Shaped[np.ndarray, " n"] | int) -> Outcomes:
        return rows.outcomes(predict(records["estimate"][:, index], alpha) == what)

    def reached(index: int) -> Outcomes:
        most = reach(int(records["estimate"][0, index].sum()), sigmas[index], alpha)
        return rows.outcomes(np.clip(at(index, alpha), 0.0, most), width=most)

    for index, sigma in enumerate(sigmas):
        group = f"sigma={sigma:g}"
        for radius in radii:
            made[f"certified@{named(radius)}", group] = partial(certified, index, radius)
        made["smoothed/accuracy", group] = partial(certified, index, 0.0)
        made["abstain", group] = partial(abstains, index)
        made["predict/accuracy", group] = partial(predicted, index, records["label"])
        made["predict/abstain", group] = partial(predicted, index, ABSTAIN)
        made["acr", group] = partial(reached, index)
    for radius in radii if len(sigmas) > 1 else ():
        made[f"certified-any@{named(radius)}", ALL] = partial(anywhere, radius)
    return Deferred(made)


def _certified(records: Records, index: int, sigma: float, alpha: float) -> Certificates:
    return certify(records["select"][:, index], records["estimate"][:, index], sigma, alpha)


def _images(records: Records) -> Shaped[np.ndarray, " n"] | None:
    """A name of the image behind each row, where some rows are versions of one image; else None."""
    if len({dataset.origin for dataset in records.declared}) == len(records.declared):
        return None
    names = records.clusters()
    return None if len(np.unique(names)) == len(names) else names


def _share(
    records: Records, hits: Bool[np.ndarray, " n"], level: float = LEVEL, rows: Bool[np.ndarray, " m"] | None = None
) -> Estimate:
    """The share of hits with Clopper and Pearson's interval, in which versions of one image count as one image.

    With c images the interval is that of `c share` hits, a whole number or not: the mean of an image's versions varies
    no more than a single row does.

    Arguments:
        records: All rows.
        hits: Of those that are chosen.
        level: Of the interval.
        rows: Which are chosen; all by default.
    """
    images = _images(records)
    if images is None:
        return stats.exact_proportion(hits, level)
    count = len(np.unique(images if rows is None else images[rows]))
    share, tail = float(hits.mean()), (1 - level) / 2
    low = betaincinv(count * share, count * (1 - share) + 1, tail) if share > 0 else 0.0
    high = betaincinv(count * share + 1, count * (1 - share), 1 - tail) if share < 1 else 1.0
    return Estimate(share, float(low), float(high), count)


def band(hits: Bool[np.ndarray, " n"], images: Shaped[np.ndarray, " n"] | None = None) -> Estimate:
    """The share of hits, with an interval that holds at all radii together: half its width is `sqrt(ln(2/d) / (2 n))`.

    Certified accuracy is one minus the distribution function of an image's score, so that the inequality of Dvoretzky,
    Kiefer and Wolfowitz, with Massart's constant, holds for all of the curve at once with probability 1 - d. Where rows
    are up to m versions of one image, the j-th versions are independent rows, and each of the m parts of the curve has
    such a band at d / m; the width is their mean by the number of rows.

    Arguments:
        hits: Of each row.
        images: A name of the image behind each row; each row is its own without it.

    References:
        The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality (Massart, 1990),
        https://doi.org/10.1214/aop/1176990746
    """
    value, n = float(hits.mean()), len(hits)
    versions = np.ones(n, np.int64) if images is None else np.unique(images, return_counts=True)[1]
    parts = [int((versions > number).sum()) for number in range(versions.max())]
    half = sum(part / n * sqrt(log(2 * len(parts) / (1 - LEVEL)) / (2 * part)) for part in parts)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), parts[0])


def lower(hits: Bool[np.ndarray, " n"], alpha: float, rho: float) -> float:
    """What the certified accuracy of these images is at least, with probability 1 - rho over the noise of all of them.

    Each certificate is wrong with probability at most alpha, independently. So the number of wrong ones is at most the
    quantile `q = min {q: P(Binomial(n, alpha) > q) <= rho}`, at all radii together, and the bound is `share - q / n`.
    Cohen et al. bound `q / n` by Bernstein's inequality, `alpha + sqrt(2 alpha (1 - alpha) ln(1/rho) / n) +
    ln(1/rho) / (3 n)`; their script leaves out the 2 below the root, and then it is no bound for large n.

    Arguments:
        hits: Of each image, whether it is certified at some radius.
        alpha: In (0, 1/2).
        rho: In (0, 1).

    References:
        Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019),
        https://arxiv.org/abs/1902.02918
    """
    wrong = float(binom.isf(rho, len(hits), alpha))
    while binom.sf(wrong, len(hits), alpha) > rho:  # a quantile that rounding has put one too low
        wrong += 1
    return float(max(0.0, (int(hits.sum()) - wrong) / len(hits)))


def _envelope(records: Records, found: Mapping[float, Scores], radius: float) -> Iterator[Metric]:
    """The best level of each radius, as papers print it: its interval holds for all levels together (Bonferroni)."""
    level = 1 - (1 - LEVEL) / len(found)
    each = {sigma: _share(records, score >= radius, level) for sigma, score in found.items()}
    best = max(each, key=lambda sigma: each[sigma].value)
    low, high = (max(getattr(estimate, end) for estimate in each.values()) for end in ("low", "high"))
    estimate = Estimate(each[best].value, low, high, each[best].n)
    yield records.metric(f"certified-envelope@{named(radius)}", ALL, estimate)
    yield _sigma(records, "envelope", radius, best, len(records))


def _selected(
    records: Records, found: Mapping[float, Scores], radius: float, half: Bool[np.ndarray, " n"]
) -> Iterator[Metric]:
    """The level that is best on one half of the images, measured on the other."""
    if half.all() or not half.any():
        return
    best = max(found, key=lambda sigma: int((found[sigma][half] >= radius).sum()))
    estimate = _share(records, found[best][~half] >= radius, rows=~half)
    yield records.metric(f"certified-selected@{named(radius)}", ALL, estimate)
    yield _sigma(records, "selected", radius, best, int(half.sum()))


def _sigma(records: Records, rule: str, radius: float, sigma: float, count: int) -> Metric:
    """The level that a rule takes at a radius; no interval, and neither way is better."""
    estimate = Estimate(sigma, np.nan, np.nan, count)
    return records.metric(f"sigma-{rule}@{named(radius)}", ALL, estimate, unit="pixels")


def _half(records: Records) -> Bool[np.ndarray, " n"]:
    """Half of the images, at random but the same for every checkpoint; versions of an image are in the same half."""
    names, image = np.unique(records.clusters(), return_inverse=True)
    order = rng.permutation(records.key("certified-selected"), len(names))
    chosen = np.zeros(len(names), dtype=bool)
    chosen[order[: len(names) // 2]] = True
    return np.asarray(chosen[image])


def named(number: float) -> str:
    """A number as names have it, with at least two decimals, and as many as tell it from others: 0.50, 0.125."""
    text = f"{number:g}" if float(f"{number:g}") == number else repr(float(number))
    return text if len(text.partition(".")[2]) >= 2 or "e" in text else f"{number:.2f}"
