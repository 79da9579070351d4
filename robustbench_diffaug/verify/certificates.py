"""Certificates from votes once more, by another path than the one that made them.

`radius >= r` at level alpha says that no class probability below `Phi(r / sigma)` gives the votes with more than alpha:
`P(Binomial(n, Phi(r / sigma)) >= k) <= alpha`. The tail is summed in decimal arithmetic and its remainder bounded from
above, so no inverse of a distribution function is needed and every rounding goes up.
"""

from collections.abc import Iterator
from decimal import ROUND_UP, Context, Decimal, localcontext
from functools import lru_cache
from math import comb, erfc, sqrt

import numpy as np
import pandas as pd
from scipy.stats import beta, binom, norm

from robustbench_diffaug.engine import cells
from robustbench_diffaug.evaluators.certificates import certify
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.recorded import Recorded
from robustbench_diffaug.records import Records
from robustbench_diffaug.report import tables
from robustbench_diffaug.suite import Bench
from robustbench_diffaug.verify.check import Check, judged

__all__ = ["certificates", "least_votes", "tail"]

DIGITS = 50
NEGLIGIBLE = Decimal(10) ** -40
BORDER = Decimal(10) ** -9  # of alpha: a tail as near as that may be rounded to either side


@lru_cache(maxsize=4096)
def tail(k: int, n: int, p: float) -> Decimal:
    """P(Binomial(n, p) >= k), rounded up in about the fortieth digit.

    From the mean on the terms `C(n, i) p^i (1 - p)^(n - i)` fall ever faster, so what is left out is less than a
    geometric series.

    Arguments:
        k: Hits, in [0, n].
        n: Draws.
        p: Probability of a hit, in [0, 1].
    """
    if k <= 0 or p >= 1:
        return Decimal(1)
    if p <= 0:
        return Decimal(0)
    probability = Decimal(p)
    with localcontext(Context(prec=DIGITS, rounding=ROUND_UP, Emin=-(10**9), Emax=10**9)):
        odds = probability / (1 - probability)
        term = Decimal(comb(n, k)) * probability**k * (1 - probability) ** (n - k)
        total = Decimal(0)
        for i in range(k, n + 1):
            total += term
            ratio = Decimal(n - i) / (i + 1) * odds
            if ratio < 1 and term * ratio / (1 - ratio) < total * NEGLIGIBLE:
                return total * (1 + NEGLIGIBLE)
            term *= ratio
        return total * (1 + NEGLIGIBLE)


def normal(z: float) -> float:
    """Phi(z), by the complementary error function."""
    return 1 - erfc(z / sqrt(2)) / 2


@lru_cache(maxsize=4096)
def least_votes(n: int, alpha: float, sigma: float, radius: float) -> tuple[int, int]:
    """The fewest votes that certify a radius: by the tail, and if a tail at the border of alpha counts too.

    Returns:
        Both; n + 1 where even n votes do not.
    """
    p, level = normal(radius / sigma), Decimal(alpha)
    least = int(binom.isf(alpha, n, p)) + 1  # a guess, which the exact tails put right
    while least <= n and tail(least, n, p) > level:
        least += 1
    while least > 0 and tail(least - 1, n, p) <= level:
        least -= 1
    return least, least - 1 if least and tail(least - 1, n, p) <= level * (1 + BORDER) else least


def certificates(run: Recorded) -> Check:
    """Votes, and every radius and figure that rests on them."""
    wrong, counted, radii = list[str](), 0, 0
    figures = _figures(run)
    benches = [bench for bench in run.bare.benches if isinstance(bench.evaluator, Smoothing)]
    for bench in benches:
        columns = zip(*(row for _, row in cells(run.bare, bench)), strict=True)
        for row in columns:
            found = run.archive.read(row)
            if not len(found):
                continue
            where, counted = f"{bench.name} / {row[0].checkpoint.id}", counted + len(found)
            odd = list(_odd(bench, found))
            wrong += [f"{where}: {line}" for line in odd]
            if odd:
                continue
            name = row[0].checkpoint.id
            name = f"'{name}" if name.startswith(tables.FORMULA_STARTS) else name  # as `tables.to_csv` has it
            mine = figures[(figures["bench"] == bench.name) & (figures["checkpoint"] == name)]
            for index in range(len(_smoothing(bench).sigmas)):
                radii += len(found)
                wrong += [f"{where}: {line}" for line in _level(_smoothing(bench), found, index, mine)]
    if not benches:
        return Check("certificates", "not checked", "no bench certifies anything")
    return judged("certificates", f"votes of {counted:,} rows add up, and {radii:,} radii are sound", wrong)


def _smoothing(bench: Bench) -> Smoothing:
    assert isinstance(bench.evaluator, Smoothing)
    return bench.evaluator


def _figures(run: Recorded) -> pd.DataFrame:
    """The figures of the file, not those of the records, as text: the names of checkpoints may be numbers."""
    if not (run.root / "metrics.csv").is_file():  # a share has none; where there should be some, `tables` says so
        return pd.DataFrame(
            {name: pd.Series(dtype=str) for name in ("bench", "checkpoint", "group", "metric", "value")}
        )
    return pd.read_csv(run.root / "metrics.csv", dtype=str, keep_default_na=False)


def _odd(bench: Bench, found: Records) -> Iterator[str]:
    """Rows whose votes are none: of other shape or sum, negative, or of noise weaker than what is certified."""
    evaluator = _smoothing(bench)
    for name, draws in (("select", evaluator.n0), ("estimate", evaluator.n)):
        votes = found.columns.get(name)
        if votes is None or votes.ndim != 3 or votes.shape[1] != len(evaluator.sigmas) or votes.dtype.kind not in "iu":
            yield f"column {name} holds no votes at {len(evaluator.sigmas)} levels"
            return
        sums = votes.astype(np.int64).sum(axis=2)
        for row, level in np.argwhere((sums != draws) | (votes < 0).any(axis=2))[:20]:
            at = f"{found['dataset'][row]}, sample {found['sample'][row]}, sigma {evaluator.sigmas[level]:g}"
            what = f"add up to {sums[row, level]}, not {draws}" if sums[row, level] != draws else "are negative"
            yield f"{at}: the votes of {name} {what}"
    levels = found.columns.get("level")
    if levels is None or levels.shape != (len(found), len(evaluator.sigmas)):
        yield f"column level holds no noise of {len(evaluator.sigmas)} levels"
        return
    for row, level in np.argwhere(~(levels >= np.array(evaluator.sigmas)))[:20]:
        at = f"{found['dataset'][row]}, sample {found['sample'][row]}"
        yield f"{at}: noise of {levels[row, level]:g} certifies no sigma of {evaluator.sigmas[level]:g}"


def _level(evaluator: Smoothing, found: Records, index: int, figures: pd.DataFrame) -> Iterator[str]:
    """What is wrong with the radii at one level, and with the figures that are made of them."""
    sigma, alpha, n = evaluator.sigmas[index], evaluator.alpha, evaluator.n
    select, estimate = found["select"][:, index], found["estimate"][:, index]
    candidate = select.argmax(axis=1)
    votes = np.take_along_axis(estimate, candidate[:, None], axis=1)[:, 0].astype(np.int64)
    made = certify(select, estimate, sigma, alpha)
    yield from _unsound(made.radius, made.prediction, votes, candidate, found, (sigma, alpha, n))
    right = candidate == found["label"]
    at = figures[figures["group"] == f"sigma={sigma:g}"]
    for radius, value in _claims(at, r"certified@(?P<r>[0-9.e+-]+)"):
        strict, lenient = least_votes(n, alpha, sigma, radius)
        low, high = (float(np.mean(right & (votes >= least))) for least in (strict, lenient))
        if not low - 1e-12 <= value <= high + 1e-12:
            yield f"sigma {sigma:g}: certified@{radius:g} is {value}, the votes prove {low}"
    least = least_votes(n, alpha, sigma, 0.0)[0]
    for _, value in _claims(at, r"abstain(?P<r>)"):
        if abs(value - float(np.mean(votes < least))) > 1e-12:
            yield f"sigma {sigma:g}: abstain is {value}, the votes say {float(np.mean(votes < least))}"
    exact = np.where(right & (votes >= least), sigma * norm.ppf(beta.ppf(alpha, votes, n - votes + 1)), 0.0)
    for _, value in _claims(at, r"acr(?P<r>)"):
        mean = float(np.mean(np.maximum(exact, 0.0)))
        if not mean * (1 - 1e-8) - 1e-11 <= value <= mean * (1 + 1e-9) + 1e-12:
            yield f"sigma {sigma:g}: acr is {value}, the votes prove {mean}"


def _claims(figures: pd.DataFrame, pattern: str) -> Iterator[tuple[float, float]]:
    """The radius that a metric's name says, and its value, of the metrics that a pattern matches."""
    for _, row in tables.matching(figures, pattern).iterrows():
        yield float(row["r"] or 0), float(row["value"])


def _unsound(
    radius: np.ndarray,
    prediction: np.ndarray,
    votes: np.ndarray,
    candidate: np.ndarray,
    found: Records,
    about: tuple[float, float, int],
) -> Iterator[str]:
    """Radii that the votes do not prove: the tail at `Phi(radius / sigma)` must be at most alpha."""
    sigma, alpha, n = about
    least = least_votes(n, alpha, sigma, 0.0)[0]
    for row in np.flatnonzero((prediction >= 0) != (votes >= least)):
        at = f"sample {found['sample'][row]}, sigma {sigma:g}"
        yield f"{at}: {votes[row]} of {n} votes, and the prediction is {prediction[row]}"
    for count in np.unique(votes[prediction >= 0]):
        rows = np.flatnonzero((votes == count) & (prediction >= 0))
        largest = rows[np.argmax(radius[rows])]
        if tail(int(count), n, normal(float(radius[largest]) / sigma)) > Decimal(alpha):
            at = f"sample {found['sample'][largest]}, sigma {sigma:g}"
            yield f"{at}: radius {radius[largest]} is more than {count} of {n} votes prove"
        if (prediction[rows] != candidate[rows]).any():
            yield f"sample {found['sample'][rows[0]]}, sigma {sigma:g}: the class is not that of most votes"
