"""Figures of out-of-distribution detection: what is read off the ROC, precision-recall and OSCR curves of a score.

Every function is pure. `inside` are scores of in-distribution images, of shape (n,), and `outside` those of others, of
shape (m,): finite numbers of any unit, higher for what looks in-distribution. Only their order counts. ValueError is
raised for an array that is empty, has a NaN or an infinity (its row is named) or is not of one dimension.

With A(t) and B(t) the shares of `inside` and `outside` at or below a threshold t, "out-of-distribution positive" flags
what is at or below t, so B is the true positive rate and A the false one; "in-distribution positive" accepts what is
at or above t. Scores that tie are flagged together. The figures are OpenOOD's, ties included.

References:
    OpenOOD v1.5: enhanced benchmark for out-of-distribution detection (Zhang et al., 2023),
        https://arxiv.org/abs/2306.09301
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.stats import LEVEL, Estimate, mask, rows

__all__ = ["SHARE", "Figures", "Order", "auoscr", "cumulated", "figures", "order", "read", "roc"]

Floats = NDArray[np.float64]
Scores = NDArray[Any]  # numbers, of shape (n,)

SHARE = 0.95  # of the positives that FPR@95 keeps


class Figures(NamedTuple):
    """Six figures of one score on one pair of samples, all in [0, 1].

    Arguments:
        auroc: The area under the ROC curve, P(inside higher) + P(they tie) / 2.
        aupr_in: The area under the precision-recall curve by trapezoids, with in-distribution images positive.
        aupr_out: The same with the others positive.
        fpr95_ood_positive: The share of `inside` that is flagged at the first threshold, from below, that flags 95 % of
            `outside`: OpenOOD's since v1.5.
        fpr95_id_positive: The share of `outside` that is accepted at the first threshold, from above, that accepts 95 %
            of `inside`: as in most papers before.
        detection_error: The least (P(inside is flagged) + P(outside is accepted)) / 2 over all thresholds.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95_ood_positive: float
    fpr95_id_positive: float
    detection_error: float


class Order(NamedTuple):
    """Each score's place among the `size` distinct ones of both samples, from 0 for the lowest."""

    inside: NDArray[np.intp]
    outside: NDArray[np.intp]
    size: int


def order(inside: Scores, outside: Scores) -> Order:
    """Both samples, sorted once."""
    first = rows("inside", inside)
    distinct, places = np.unique(np.concatenate([first, rows("outside", outside)]), return_inverse=True)
    return Order(places[: len(first)], places[len(first) :], len(distinct))


def cumulated(places: NDArray[np.intp], weights: Floats, size: int) -> Floats:
    """The weight at or below each place, with a 0 in front: of shape (resamples, 1 + size).

    Arguments:
        places: Of the rows, of shape (n,), in [0, size[.
        weights: How often each row counts in each resample, of shape (resamples, n).
        size: The number of places.
    """
    where = places + size * np.arange(len(weights))[:, None]
    counts = np.bincount(where.ravel(), weights.ravel(), minlength=size * len(weights))
    found = np.zeros((len(weights), size + 1))
    np.cumsum(counts.reshape(len(weights), size), axis=1, out=found[:, 1:])
    return found


def figures(inside: Scores, outside: Scores) -> Figures:
    """All six figures, from one sort.

    AUROC and AUPR are those of scikit-learn's `roc_curve` and `precision_recall_curve` with its `auc`, and so is the
    false positive rate, with one peculiarity: points of a ROC curve that lie between two equal steps are dropped, which
    matters where a tie of both samples meets the 95 %, and is kept here so that published figures are found again.

    Arguments:
        inside: Of shape (n,).
        outside: Of shape (m,).

    Raises:
        ValueError: See the module.

    References:
        Enhancing the reliability of out-of-distribution image detection in neural networks (Liang, Li and Srikant,
            2018), https://arxiv.org/abs/1706.02690
    """
    ranked = order(inside, outside)
    below = (cumulated(places, np.ones((1, len(places))), ranked.size) for places in ranked[:2])
    return Figures(*(float(found[0]) for found in read(*below)))


def read(inside: Floats, outside: Floats) -> tuple[Floats, ...]:
    """The figures, in the order of `Figures`, of `cumulated` rows; each of shape (resamples,)."""
    # Counted from above, what a threshold accepts.
    inside_above, outside_above = (found[:, -1:] - found[:, ::-1] for found in (inside, outside))
    pairs = inside[:, -1] * outside[:, -1]
    # Twice the count keeps half pairs whole: with whole weights it is exact below 2**53.
    twice = (np.diff(inside) * (outside[:, 1:] + outside[:, :-1])).sum(axis=1)
    error = inside / inside[:, -1:] - outside / outside[:, -1:]
    return (
        twice / (2 * pairs),
        _precision_recall(inside_above, outside_above),
        _precision_recall(outside, inside),
        _false_positives(outside, inside),
        _false_positives(inside_above, outside_above),
        (1 + error.min(axis=1)) / 2,
    )


def _precision_recall(true: Floats, false: Floats) -> Floats:
    """The area of each row: sum of (recall_i - recall_{i-1}) (precision_i + precision_{i-1}) / 2 from (0, 1) on."""
    found = true + false
    precision = np.divide(true, found, out=np.ones_like(true), where=found > 0)
    heights = precision[:, 1:] + precision[:, :-1]
    return np.asarray((np.diff(true) * heights).sum(axis=1) / (2 * true[:, -1]))


def _false_positives(true: Floats, false: Floats) -> Floats:
    """The false positive rate of each row at the first point of its ROC curve with a true one of 95 %."""
    at = np.argmax(true / true[:, -1:] >= SHARE, axis=1)
    every = np.arange(len(true))
    for row in np.flatnonzero(false[every, at] > false[every, at - 1]):
        at[row] = _corner(true[row], false[row], int(at[row]))
    return np.asarray(false[every, at] / false[:, -1])


def _corner(true: Floats, false: Floats, at: int) -> int:
    """The next point, from `at` on, that scikit-learn keeps: the first, the last, or one between unequal steps."""
    steps = np.stack([np.diff(true), np.diff(false)])
    real = np.flatnonzero(steps.any(axis=0))  # a resample leaves scores out
    step = int(np.searchsorted(real, at - 1))
    while 0 < step < len(real) - 1 and (steps[:, real[step]] == steps[:, real[step + 1]]).all():
        step += 1
    return int(real[step]) + 1


def auoscr(inside: Scores, correct: Scores, outside: Scores) -> float:
    """The area under the open-set classification rate curve, P(correct and higher than outside) + P(and tie) / 2.

    The curve is that of CCR(t), the share of `inside` that is classified correctly and accepted at t, against the
    share of `outside` accepted at t. It is at most the accuracy and the AUROC, and equals the AUROC where all are
    correct. Published definitions differ where scores tie (strictly above t for the one, at or above t for the
    other); trapezoids between distinct thresholds count half of a tie, as AUROC does.

    Arguments:
        inside: Of shape (n,).
        correct: Whether the prediction for each of them is right, of shape (n,).
        outside: Of shape (m,).

    Raises:
        ValueError: See the module; or `correct` is not one boolean a row.

    References:
        Reducing network agnostophobia (Dhamija, Günther and Boult, 2018), https://arxiv.org/abs/1811.04110
    """
    ranked = order(inside, outside)
    right = mask("correct", correct, len(ranked.inside)).astype(np.float64)
    accepted = right.sum() - cumulated(ranked.inside, right[None], ranked.size)[0]
    others = np.bincount(ranked.outside, minlength=ranked.size)
    pairs = len(ranked.inside) * len(ranked.outside)
    return float((others * (accepted[1:] + accepted[:-1])).sum() / (2 * pairs))


def roc(inside: Scores, outside: Sequence[Scores], at: Sequence[float], level: float = LEVEL) -> list[Estimate]:
    """Points of a ROC curve to draw: the share of `outside` caught while at most a share x of `inside` is flagged.

    Caught is what lies below the (floor(x n) + 1)-th lowest score of `inside`: an operating point that can be had,
    where the AUROC draws a line through ties. Of several samples the value is the unweighted mean of their shares.

    The intervals are Wilson's, pointwise, with the spread of `outside` alone: they leave out that the threshold was
    estimated from `inside`, and do not hold for the whole curve at once. For several samples n is the effective number
    D^2 / sum_d 1 / n_d, or p (1 - p) over the mean's variance where that is less.

    Arguments:
        inside: Of shape (n,).
        outside: One sample or several, each of shape (m,).
        at: False positive rates x, in [0, 1].
        level: The coverage, in ]0, 1[.

    Raises:
        ValueError: See the module; or there is no sample, or a rate is out of its range.

    References:
        Probable inference, the law of succession, and statistical inference (Wilson, 1927),
            https://doi.org/10.1080/01621459.1927.10502953
    """
    known, samples = np.sort(rows("inside", inside)), [np.sort(rows("outside", sample)) for sample in outside]
    rates = rows("at", np.asarray(at), unit=True)
    if not samples:
        raise ValueError("outside is empty: a ROC curve needs one sample of other images at least")
    # 0.07 x 100 is 7, whatever its rounding.
    allowed = np.floor(rates * len(known) + 1e-9).astype(np.intp)
    limits = np.append(known, np.inf)[allowed]
    caught = np.stack([np.searchsorted(sample, limits, side="left") / len(sample) for sample in samples])
    return _wilson(caught, np.array([len(sample) for sample in samples]), level)


def _wilson(shares: Floats, sizes: NDArray[np.intp], level: float) -> list[Estimate]:
    """The means over samples, the first axis, of shares of these sizes, with Wilson's intervals."""
    from statsmodels.stats.proportion import proportion_confint  # heavy: a second

    mean = shares.mean(axis=0)
    variance = (shares * (1 - shares) / sizes[:, None]).sum(axis=0) / len(sizes) ** 2
    most = np.full(len(mean), len(sizes) ** 2 / (1 / sizes).sum())
    effective = np.minimum(most, np.divide(mean * (1 - mean), variance, out=most.copy(), where=variance > 0))
    low, high = proportion_confint(mean * effective, effective, alpha=1 - level, method="wilson")
    # Rounding can put the limit of all, or of none, 1e-17 on the wrong side of the value.
    limits = zip(mean, np.clip(low, 0, mean), np.clip(high, mean, 1), strict=True)
    return [Estimate(float(p), float(a), float(b), int(sizes.sum())) for p, a, b in limits]
