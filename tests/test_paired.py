"""Paired differences and tests against other implementations, and their error rates on simulated pairs."""

from itertools import product
from math import inf, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, multinomial, ttest_rel
from scipy.stats import t as student

from robustbench_diffaug.paired import clustered_z, decided, discordant, holm, mcnemar, paired_difference, sums_of
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
    assert clustered_z(a, b, GROUPS) == pytest.approx(2 * student.sf(abs(difference.mean()) / error, CLUSTERS - 1))
    assert clustered_z(b, a, GROUPS.astype(str)) == pytest.approx(clustered_z(a, b, GROUPS))
    # With a row to a cluster it is the paired t-test.
    assert clustered_z(a, b, None) == pytest.approx(float(ttest_rel(a.astype(float), b.astype(float)).pvalue))


def test_clustered_z_against_statsmodels() -> None:
    from statsmodels.regression.linear_model import OLS

    ((a, b),) = pairs(1, 0.05, "ols")
    fit = OLS(a.astype(float) - b, np.ones(len(a))).fit(
        cov_type="cluster", cov_kwds={"groups": GROUPS, "use_correction": False}
    )
    z = float(fit.tvalues[0]) * sqrt((CLUSTERS - 1) / CLUSTERS)
    assert clustered_z(a, b, GROUPS) == pytest.approx(2 * student.sf(abs(z), CLUSTERS - 1))


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


@pytest.mark.parametrize("moved", [1, 2, 5, 9])
def test_clustered_z_is_no_surer_than_swapping_the_checkpoints_in_images(moved: int) -> None:
    """All ways of swapping a and b in the images that tell them apart: the exact test's least p-value."""
    a, b = np.zeros(400), np.zeros(400)
    a[:moved] = 1
    swaps = np.array(list(product((-1, 1), repeat=moved))).sum(axis=1)
    exact = float((np.abs(swaps) >= moved).mean())
    assert clustered_z(a, b, None) == exact == (1.0 if moved == 1 else binomtest(moved, moved).pvalue)


def boundless(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> tuple[float, float, float, int]:
    """Bonett and Price's interval as the paper has it, with p~ = (count + 1) / (n + 2)."""
    n, z = len(a), 1.959963984540054
    first, second = ((k + 1) / (n + 2) for k in (int((a & ~b).sum()), int((b & ~a).sum())))
    half = z * sqrt((first + second - (first - second) ** 2) / (n + 2))
    return float(a.mean() - b.mean()), first - second - half, first - second + half, n


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_interval_of_decisions_is_bonett_and_prices(gain: float) -> None:
    for a, b in pairs(20, gain, "decisions"):
        one, other = a[:60], b[:60]
        found = decided(60, *discordant(one, other)).estimate()
        assert found == pytest.approx(boundless(one, other))
        # The general formula over rows is the same where its kinds are not told apart.
        spelled = sums_of(one, other, None)._replace(decided=True)
        assert spelled.estimate() == pytest.approx(found) and spelled.error == pytest.approx(
            decided(60, *discordant(one, other)).error
        )


def test_interval_of_clusters_is_students() -> None:
    ((a, b),) = pairs(1, 0.05, "student")
    sums, error = sums_of(a, b, GROUPS), sums_of(a, b, GROUPS).error
    margin = float(student.ppf(0.975, CLUSTERS - 1)) * error
    assert sums.estimate() == pytest.approx((sums.value, sums.value - margin, sums.value + margin, CLUSTERS))
    assert clustered_z(a, b, GROUPS) == sums.pvalue()
    bootstrap = paired_difference(a, b, GROUPS, K)
    assert (bootstrap.low, bootstrap.high) == pytest.approx(sums.estimate()[1:3], abs=0.1 * margin)


@pytest.mark.parametrize("n", [1, 2, 50, 5000])
def test_no_difference_has_no_point_interval(n: int) -> None:
    a, groups = np.ones(2 * n), np.arange(n).repeat(2)
    share = exact_proportion(np.zeros(n, bool)).high
    for found in (sums_of(a, a, groups).estimate(), decided(n, 0, 0).estimate()):
        assert found.low <= 1e-9 - share and found.high >= share - 1e-9 and found.n == n
        assert found.low >= -1 and found.high <= 1
    apart = sums_of(a, 0 * a, groups).estimate()
    assert apart.value == 1 == apart.high and apart.low <= 1 - 2 * share
    assert sums_of(a, a, groups).estimate(inf)[1:3] == (-inf, inf)


RARE = [(50, 0.004), (50, 0.06), (50, 0.3), (500, 0.002), (500, 0.02), (500, 0.2), (5000, 0.001), (5000, 0.3)]


@pytest.mark.parametrize(("n", "share"), RARE)
@pytest.mark.parametrize("skew", [0.5, 1.0])
def test_coverage_of_decisions(n: int, share: float, skew: float) -> None:
    """Exactly, over all counts that matter: rows where only a is right are `skew` of those where they differ."""
    p, q = share * skew, share * (1 - skew)
    limits = [
        range(*(int(end) for end in (binom.ppf(1e-7, n, rate), binom.ppf(1 - 1e-7, n, rate) + 1))) for rate in (p, q)
    ]
    covered = total = 0.0
    for x in limits[0][:: max(1, len(limits[0]) // 25)]:
        for y in limits[1][:: max(1, len(limits[1]) // 25)]:
            weight = float(multinomial.pmf([x, y, n - x - y], n, [p, q, 1 - p - q])) if x + y <= n else 0.0
            found = decided(n, x, y).estimate() if weight > 1e-12 else None
            total += weight
            covered += weight if found and found.low <= p - q <= found.high else 0.0
    assert covered / total >= 0.93


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_holm_against_statsmodels(n: int) -> None:
    from statsmodels.stats.multitest import multipletests

    p = np.round(uniform(key("holm", n), range(1), (n,))[0] ** 4, 3)  # rounded, for ties and zeros
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], rtol=1e-12)
    assert (holm(p) >= p).all() and np.array_equal(holm(p[::-1]), holm(p)[::-1])


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
