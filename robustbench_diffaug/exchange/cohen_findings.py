"""What cannot be true of a file of certificates, or cannot be known from it, in sentences.

A radius is `sigma * Phi^-1(p)`, with p the lower bound of k votes of n at alpha. So none is above that of n votes, and
near that ceiling few numbers are radii at all: what is printed shows whether n and alpha are the ones that are stated.

References:
    Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019), https://arxiv.org/abs/1902.02918
"""

from collections.abc import Iterator, Sequence
from math import ceil, exp, floor, log, log10

import numpy as np
from jaxtyping import Bool
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

from robustbench_diffaug import stats
from robustbench_diffaug.evaluators.certificates import radius_of
from robustbench_diffaug.exchange.cohen_rows import MOST_DRAWS, Protocol, Rows

__all__ = ["findings", "unattained"]

ALPHAS = (0.05, 0.01, 0.005, 0.0005, 0.0001)
DRAWS = (1_000, 10_000, 20_000, 50_000, 100_000)  # of more, almost any number that is printed is a radius
TINY = 1e-9  # relative; far less than a printed digit, and far more than rounding of the last bits


def findings(rows: Rows, protocol: Protocol, radii: Sequence[float]) -> tuple[str, ...]:
    """Sentences about a file, the gravest first; none where all is well.

    Arguments:
        rows: Of the file.
        protocol: How it is said, or assumed, to be made.
        radii: At which certified accuracy is given.
    """
    parts = (
        _too_large(rows, protocol),
        _no_votes(rows, protocol),
        _past(rows, protocol),
        _abstaining(rows),
        _column(rows),
        _rounded(rows, radii),
        _indices(rows),
        _times(rows),
    )
    return tuple(sentence for part in parts for sentence in part)


def unattained(rows: Rows, protocol: Protocol) -> Bool[np.ndarray, " n"]:
    """Which radii no number of votes gives, as they were printed (see `Rows`).

    Certificates alone are looked at; a radius of 0 is one of none.
    """
    some = (rows.predict >= 0) & (rows.radius > 0)
    printed, which = np.unique(np.stack([rows.below[some], rows.above[some]], axis=1), axis=0, return_inverse=True)
    below, above = printed[:, 0] * (1 - TINY), printed[:, 1] * (1 + TINY)
    # The fewest votes whose bound is p are those with P(Binomial(n, p) >= k) <= alpha; one more or less for rounding.
    fewest = binom.isf(protocol.risk, protocol.draws, ndtr(below / protocol.sigma)) + 1
    reached = np.zeros(len(below), dtype=bool)
    for step in (-1, 0, 1):
        votes = np.clip(fewest + step, 0, protocol.draws).astype(np.int64)
        radius = radius_of(stats.binomial_lower(votes, protocol.draws, protocol.risk), protocol.sigma)
        reached |= (radius >= below) & (radius <= above)
    found = np.zeros(len(some), dtype=bool)
    found[some] = ~reached[which.reshape(-1)]
    return found


def _said(protocol: Protocol) -> str:
    """The parameters, and which of them nobody has stated."""
    assumed = protocol.n is None or protocol.alpha is None
    text = f"n = {protocol.draws:,} and alpha = {protocol.risk:g}"
    return f"if {text} (certify.py's defaults where not given), " if assumed else f"with {text}, "


def _first(rows: Rows, where: Bool[np.ndarray, " n"]) -> str:
    """The place of the first of some rows."""
    index = int(np.argmax(where))
    return f"the first in line {rows.line[index]} (idx {rows.idx[index]})"


def _are(count: int, noun: str, plural: str) -> str:
    """'1 radius is', '2 radii are'."""
    return f"{count:,} {noun} is" if count == 1 else f"{count:,} {plural} are"


def _too_large(rows: Rows, protocol: Protocol) -> Iterator[str]:
    """Radii that are above the ceiling even if they were rounded up."""
    over = rows.below > protocol.ceiling
    if not over.any():
        return
    yield (
        f"{_said(protocol)}no radius is above {protocol.ceiling:.4f} = {protocol.ceiling / protocol.sigma:.4f} sigma, "
        f"and {_are(int(over.sum()), 'radius', 'radii')}, {_first(rows, over)}: {_explained(rows, protocol)}"
    )


def _explained(rows: Rows, protocol: Protocol) -> str:
    """Which alpha, or which n, would make the largest radius the ceiling, and whether the other radii fit."""
    top = int(np.argmax(rows.radius))
    largest = f"the largest is {rows.radius[top]:g} = {rows.radius[top] / protocol.sigma:.2f} sigma"
    # log Phi of the ceiling is log(alpha) / n; half a unit below and above what is printed.
    least, most = (
        float(log_ndtr(x / protocol.sigma)) for x in (rows.below[top], 2 * rows.radius[top] - rows.below[top])
    )
    if most == 0 or exp(protocol.draws * least) >= 0.5:
        return f"{largest}, which no alpha below 0.5 allows; is it another sigma?"
    alpha = _roundest(exp(protocol.draws * least), min(0.4999, exp(protocol.draws * most)))
    n = _roundest(log(protocol.risk) / least, log(protocol.risk) / most)
    ways = [f"alpha = {alpha:g} {_fit(rows, Protocol(protocol.sigma, protocol.draws, alpha))}"]
    if n <= MOST_DRAWS:
        ways.append(f"n = {n:,.0f} {_fit(rows, Protocol(protocol.sigma, round(n), protocol.risk))}")
    return f"{largest}; " + ", and ".join(ways)


def _fit(rows: Rows, protocol: Protocol) -> str:
    """How many radii a protocol leaves unexplained."""
    count = int(unattained(rows, protocol).sum())
    return f"would leave {count:,} that no number of votes gives" if count else "would explain all"


def _roundest(low: float, high: float) -> float:
    """The number of fewest digits between two positive ones, the least of them."""
    power = floor(log10(high))
    while True:
        multiple = ceil(low / 10.0**power * (1 - TINY))
        if multiple * 10.0**power <= high * (1 + TINY):
            return float(f"{multiple}e{power}")
        power -= 1


def _no_votes(rows: Rows, protocol: Protocol) -> Iterator[str]:
    """Radii below the ceiling that no number of votes gives, and which usual parameters would explain all radii."""
    over = rows.below > protocol.ceiling
    odd = unattained(rows, protocol) & ~over
    if not odd.any():
        return
    sentence = f"{_said(protocol)}no number of votes gives {odd.sum():,} of the {'other ' if over.any() else ''}radii"
    other = {f"alpha = {alpha:g}": Protocol(protocol.sigma, protocol.draws, alpha) for alpha in ALPHAS}
    other |= {f"n = {n:,}": Protocol(protocol.sigma, n, protocol.risk) for n in DRAWS}
    fitting = [] if over.any() else [name for name, way in other.items() if not unattained(rows, way).any()]
    more = f"; {' or '.join(fitting)} would explain all" if fitting else ""
    yield f"{sentence}, {_first(rows, odd)}{more}"


def _past(rows: Rows, protocol: Protocol) -> Iterator[str]:
    """Radii that rounding has put above the ceiling, where no other radius says that this is not the ceiling."""
    past = rows.radius > protocol.ceiling * (1 + TINY)
    if past.any() and not (rows.below > protocol.ceiling).any():
        yield (
            f"{_said(protocol)}{_are(int(past.sum()), 'radius', 'radii')} larger than what was proved, since "
            f"{protocol.ceiling:.4f}, the largest there is, was rounded up, {_first(rows, past)}"
        )


def _abstaining(rows: Rows) -> Iterator[str]:
    """Radii without a class."""
    odd = (rows.predict < 0) & (rows.radius > 0)
    if odd.any():
        yield f"{_are(int(odd.sum()), 'radius', 'radii')} above 0 where no class is certified, {_first(rows, odd)}"


def _column(rows: Rows) -> Iterator[str]:
    """What is in the column `correct`, if not whether predict is label."""
    odd = rows.correct != rows.right
    if not odd.any():
        return
    if (rows.correct == np.cumsum(rows.right)).all():
        yield (
            "the column correct is a running total, as DDS's certify.py writes it, and no 0 or 1: analyze.py gives "
            "wrong accuracies of it; here it is computed again from predict and label"
        )
    else:
        yield (
            f"the column correct is not 1 where predict is label, or not 0 elsewhere, {odd.sum():,} times, "
            f"{_first(rows, odd)}; here it is computed again"
        )


def _rounded(rows: Rows, radii: Sequence[float]) -> Iterator[str]:
    """Certificates that count at a radius for their last digit, which may have been rounded up."""
    counts = {
        radius: int((rows.right & (rows.radius >= radius) & (rows.below < radius)).sum())
        for radius in radii
        if radius > 0
    }
    if any(counts.values()):
        named = ", ".join(f"{count} at {radius:g}" for radius, count in counts.items() if count)
        yield (
            f"of the {len(rows.idx):,} certificates some count at a radius by the last digit printed alone: {named}; "
            "where that is rounded to the nearest, as certify.py has it, half of such are larger than what was proved"
        )


def _indices(rows: Rows) -> Iterator[str]:
    """Images that are there twice, out of order, or left out."""
    values, counts = np.unique(rows.idx, return_counts=True)
    if len(values) < len(rows.idx):
        twice = np.isin(rows.idx, values[counts > 1])
        many = _are(int((counts > 1).sum()), "image", "images")
        yield f"{many} there more than once, counted so, {_first(rows, twice)}"
    if (np.diff(rows.idx) < 0).any():
        yield "the rows are not in the order of idx"
    steps, kinds = np.diff(values), np.unique(np.diff(values), return_counts=True)
    if len(kinds[0]) < 2:
        return
    usual = int(kinds[0][kinds[1].argmax()])
    gaps = (steps > usual) & (steps % usual == 0)
    if gaps.any():
        left = int((steps[gaps] // usual - 1).sum())
        first = values[:-1][gaps][0] + usual
        yield f"idx goes up by {usual}, but for {left:,} left out, the first of them {first}"
    if (uneven := steps % usual != 0).any():
        yield f"idx goes up by {usual}, but not after {values[:-1][uneven][0]}"


def _times(rows: Rows) -> Iterator[str]:
    """Times that are not written as certify.py writes them."""
    if not rows.clock.all():
        many = "all" if not rows.clock.any() else f"{(~rows.clock).sum():,} of the"
        yield f"{many} times are in seconds, and certify.py writes h:mm:ss: another version of it, or another tool"
