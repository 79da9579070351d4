"""Paired differences and tests against other implementations, and their error rates on simulated pairs."""

from math import inf, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from robustbench_diffaug.paired import clustered_z, holm, mcnemar, paired_difference
from robustbench_diffaug.rng import key, uniform
from robustbench_diffaug.stats import clustered_mean, exact_proportion

K = key("test")
CLUSTERS, ROWS = 80, 5
GROUPS = np.arange(CLUSTERS).repeat(ROWS)


def pairs(count: int, gain: float, name: str) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Two checkpoints on the same images, whose hardness all rows of a cluster and both checkpoints share.

    Each also has a liking for each image, so that differences too are correlated within a cluster.
    """
    found = []
    for u in uniform(key("pairs", name), range(count), (2 * ROWS + 3, CLUSTERS)):
        easy, own = u[0], u[1:3] - 0.5
        a = u[3 : 3 + ROWS] < 0.2 + gain + 0.5 * easy + 0.3 * own[0]
        b = u[3 + ROWS :] < 0.2 + 0.5 * easy + 0.3 * own[1]
        found.append((a.T.ravel(), b.T.ravel()))
    return found


def test_paired_difference_is_the_clustered_mean_of_differences() -> None:
    ((a, b),) = pairs(1, 0.1, "difference")
    found = paired_difference(a, b, GROUPS, K)
    assert found == clustered_mean(a.astype(float) - b, GROUPS, K)
    assert found.n == CLUSTERS
    mirrored = paired_difference(b, a, GROUPS, K)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert paired_difference(a, b, None, K).n == len(a)


def test_coverage_of_paired_difference() -> None:
    found = [paired_difference(a, b, GROUPS, key(K, i), resamples=400) for i, (a, b) in enumerate(pairs(300, 0.1, "c"))]
    assert np.mean([estimate.low <= 0.1 <= estimate.high for estimate in found]) >= 0.92


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_equal_rows_have_no_point_interval(n: int) -> None:
    a, groups = np.ones(2 * n), np.arange(n).repeat(2)
    share = exact_proportion(np.zeros(n, bool)).high
    assert paired_difference(a, a, groups, K, resamples=100) == pytest.approx((0, -share, share, n))
    assert paired_difference(a, 0 * a, groups, K, resamples=100) == pytest.approx((1, 1 - 2 * share, 1, n))
    radii = paired_difference(3 * a, a, groups, K, resamples=100, bounded=False)
    assert radii == (2, -inf, inf, n)


counts = st.tuples(*[st.integers(0, 40)] * 4).filter(lambda cells: sum(cells) > 0)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(counts)
def test_mcnemar_is_the_binomial_test_of_discordant_rows(cells: tuple[int, int, int, int]) -> None:
    a = np.array([False, False, True, True]).repeat(cells)
    b = np.array([False, True, False, True]).repeat(cells)
    discordant = cells[1] + cells[2]
    expected = binomtest(cells[1], discordant).pvalue if discordant else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(b, a) == mcnemar(a, b)


def test_clustered_z_is_its_formula() -> None:
    ((a, b),) = pairs(1, 0.05, "formula")
    difference = a.astype(float) - b
    sums = (difference - difference.mean()).reshape(CLUSTERS, ROWS).sum(axis=1)
    error = sqrt(CLUSTERS / (CLUSTERS - 1) * (sums**2).sum()) / len(difference)
    assert clustered_z(a, b, GROUPS) == pytest.approx(2 * norm.sf(abs(difference.mean()) / error))
    assert clustered_z(b, a, GROUPS.astype(str)) == pytest.approx(clustered_z(a, b, GROUPS))
    # With a row to a cluster it is the paired z-test.
    plain = abs(difference.mean()) / (difference.std(ddof=1) / sqrt(len(difference)))
    assert clustered_z(a, b, None) == pytest.approx(2 * norm.sf(plain))


def test_clustered_z_against_statsmodels() -> None:
    from statsmodels.regression.linear_model import OLS

    ((a, b),) = pairs(1, 0.05, "ols")
    fit = OLS(a.astype(float) - b, np.ones(len(a))).fit(
        cov_type="cluster", cov_kwds={"groups": GROUPS, "use_correction": False}
    )
    z = float(fit.tvalues[0]) * sqrt((CLUSTERS - 1) / CLUSTERS)
    assert clustered_z(a, b, GROUPS) == pytest.approx(2 * norm.sf(abs(z)))


def test_clustered_z_errs_one_time_in_twenty() -> None:
    sets = pairs(1500, 0.0, "null")
    clustered = np.mean([clustered_z(a, b, GROUPS) < 0.05 for a, b in sets])
    naive = np.mean([clustered_z(a, b, None) < 0.05 for a, b in sets])
    assert 0.035 <= clustered <= 0.07
    assert naive > clustered
    assert np.mean([clustered_z(a, b, GROUPS) < 0.05 for a, b in pairs(100, 0.15, "power")]) > 0.9


def test_clustered_z_without_variance() -> None:
    a = np.full(12, 0.1) * 3
    assert clustered_z(a, a, np.arange(12)) == 1
    assert clustered_z(a, a - 0.1, np.arange(12) // 2) == 2.0**-5  # six signs of six, from both sides
    assert clustered_z(a, a + np.arange(12), np.zeros(12)) == 1


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_holm_is_three_lines(n: int) -> None:
    p = np.round(uniform(key("holm", n), range(1), (n,))[0] ** 4, 3)  # rounded, for ties and zeros
    order = np.argsort(p, kind="stable")
    expected = np.empty(len(p))
    expected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    np.testing.assert_allclose(holm(p), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "test", [lambda a, b: paired_difference(a, b, None, K), mcnemar, lambda a, b: clustered_z(a, b, None)]
)
def test_pairs_that_do_not_fit_are_refused(test: object) -> None:
    assert callable(test)
    with pytest.raises(ValueError, match="a is empty"):
        test(np.array([]), np.array([]))
    with pytest.raises(ValueError, match="b has shape"):
        test(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="b has 1 NaN"):
        test(np.ones(2), np.array([1, np.nan]))


def test_errors_teach() -> None:
    with pytest.raises(ValueError, match="bounded=False"):
        paired_difference(np.array([3.0, 1.0]), np.ones(2), None, K)
    with pytest.raises(ValueError, match="a must be booleans"):
        mcnemar(np.array([0.5]), np.array([1.0]))
    with pytest.raises(ValueError, match="clusters has shape"):
        clustered_z(np.ones(2), np.ones(2), np.arange(3))
    with pytest.raises(ValueError, match="p is empty"):
        holm(np.array([]))
    with pytest.raises(ValueError, match="p has 1 NaN"):
        holm(np.array([0.1, np.nan]))
    with pytest.raises(ValueError, match="p must lie in"):
        holm(np.array([1.1]))
