"""Proportions and the bound of certificates against closed forms, other implementations, and simulated coverage."""

from math import sqrt

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta, binom, binomtest, norm
from statsmodels.stats.proportion import proportion_confint

from robustbench_diffaug.rng import key, uniform
from robustbench_diffaug.stats import Estimate, binomial_lower, exact_proportion, proportion


def hits(k: int, n: int) -> NDArray[np.bool_]:
    return np.arange(n) < k


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (499, 500), (1, 3000), (1500, 3000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_proportions_match_their_formulas(k: int, n: int, level: float) -> None:
    share, z = k / n, norm.isf((1 - level) / 2)
    centre, half = share + z**2 / (2 * n), z * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    wilson = proportion(hits(k, n), level)
    assert wilson == pytest.approx((share, (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n), n))
    exact = exact_proportion(hits(k, n), level)
    oracle = binomtest(k, n).proportion_ci(level, "exact")
    assert exact == pytest.approx((share, oracle.low, oracle.high, n), abs=1e-10)
    for found in (wilson, exact):
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.low < found.high


def test_coverage_of_proportions() -> None:
    for share in (0.03, 0.5, 0.9):
        sets = uniform(key("coverage", share), range(300), (80,)) < share
        assert np.mean([covers(proportion(found), share) for found in sets]) >= 0.92
        assert np.mean([covers(exact_proportion(found), share) for found in sets]) >= 0.94


def upper_tail(k: int, n: int, p: float) -> mpmath.mpf:
    """P(Binomial(n, p) >= k), each term from the one before it, in 30 digits."""
    with mpmath.workdps(30):
        odds = mpmath.mpf(p) / (1 - mpmath.mpf(p))
        log_choose = mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1)
        term = mpmath.exp(log_choose + k * mpmath.log(p) + (n - k) * mpmath.log1p(-mpmath.mpf(p)))
        total = mpmath.mpf(0)
        for i in range(k, n + 1):
            total += term
            term *= odds * (n - i) / (i + 1)
            if term < total * mpmath.mpf(10) ** -25:  # terms fall from the start, since k exceeds the mean n p
                break
        return total


def test_binomial_lower_is_sound_and_tight() -> None:
    for u, v, w in uniform(key("triples"), range(300), (3,)):
        n = int(10 ** (4.5 * u))
        k, alpha = 1 + int(v**0.5 * n), float(10 ** (-7 * w - 0.2))
        bound = float(binomial_lower(k, n, alpha))
        assert 0 < bound < 1
        assert upper_tail(k, n, bound) <= alpha
        assert upper_tail(k, n, bound * (1 + 1e-9)) > alpha  # so the true bound is less than 1e-9 of it above
        assert binom.sf(k - 1, n, bound) <= alpha


def test_binomial_lower_is_vectorised_clopper_pearson() -> None:
    k = np.arange(1001).reshape(7, 143)
    found = binomial_lower(k, 1000, 0.001)
    np.testing.assert_allclose(found, proportion_confint(k, 1000, alpha=0.002, method="beta")[0], rtol=1e-9)
    np.testing.assert_allclose(found[k > 0], beta.ppf(0.001, k[k > 0], 1001 - k[k > 0]), rtol=1e-9)
    assert found.flat[0] == 0
    assert (np.diff(found.ravel()) > 0).all()
    for n in (1, 10, 100_000):
        assert 0.001 ** (1 / n) * (1 - 1e-9) <= binomial_lower(n, n, 0.001) < 0.001 ** (1 / n)


@pytest.mark.parametrize(("k", "n", "alpha"), [(-1, 5, 0.1), (6, 5, 0.1), (1, 0, 0.1), (1, 5, 0.0), (1, 5, 1.0)])
def test_binomial_lower_refuses(k: int, n: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha|hits"):
        binomial_lower(k, n, alpha)
    with pytest.raises(ValueError, match="integer"):
        binomial_lower(np.array([0.5]), 5, 0.1)
