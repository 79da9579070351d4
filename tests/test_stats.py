"""Estimates and intervals against closed forms, other implementations, and simulated coverage."""

import subprocess
import sys
from itertools import pairwise
from math import fsum, inf, isnan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import roc_auc_score, roc_curve

from robustbench_diffaug import resamples, stats
from robustbench_diffaug.rng import key, normal, uniform
from robustbench_diffaug.stats import (
    Estimate,
    auroc,
    bootstrap,
    clustered_mean,
    curve_estimates,
    ece,
    ece_estimate,
    exact_proportion,
    fpr_at_tpr,
    mean,
    proportion,
)

K = key("test")


def draws(count: int, *name: object) -> NDArray[np.float64]:
    """That many uniforms of a stream of their own."""
    return np.asarray(uniform(key("test_stats", *name), range(1), (count,))[0])


def hits(k: int, n: int) -> NDArray[np.bool_]:
    return np.arange(n) < k


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


# --- resamples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e12])
def test_resampled_sums_are_the_true_ones_whatever_the_order(scale: float) -> None:
    whole, real = (draws(300, "whole") * 9).astype(int), scale * (draws(300, "real") - 0.4)
    columns = np.stack([whole.astype(float), real, np.zeros(300)], axis=1)
    found = resamples.sums_of_draws(K, columns, 40, 0.95)
    drawn = [row for block in resamples.draws(K, 300, 40, 0.95) for row in block]
    assert found[:, 0].tolist() == [whole[row].sum() for row in drawn]
    assert found[:, 1].tolist() == pytest.approx([fsum(real[row]) for row in drawn], rel=1e-15)
    backwards = resamples.sums_of_draws(K, columns[:, ::-1].copy(), 40, 0.95)
    assert np.array_equal(found, backwards[:, ::-1])


def test_resamples_that_are_remembered_give_the_same() -> None:
    values, clusters = draws(400, "remembered"), np.arange(400) // 2
    fresh = clustered_mean(values, clusters, K), ece_estimate(values, values > 0.5, K, clusters)
    with resamples.remembering():
        for _ in range(2):
            assert (clustered_mean(values, clusters, K), ece_estimate(values, values > 0.5, K, clusters)) == fresh


def test_clusters_may_be_numbers_with_gaps() -> None:
    numbers = np.array([7, 0, 7, 3, 0, 3])
    groups, count = stats.grouped(numbers, 6)
    assert (groups.tolist(), count) == ([2, 0, 2, 1, 0, 1], 3)
    assert stats.grouped(numbers - 10, 6)[0].tolist() == groups.tolist()


# --- means -----------------------------------------------------------------------------------------------------------


def correlated(clusters: int, rows: int, *name: object) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Hits of probability 1/2, `rows` to a cluster, that agree four times in five within it."""
    own = uniform(key("correlated", *name), range(clusters), (2 * rows + 1,))
    shared = own[:, rows:-1] < 0.8
    return np.where(shared, own[:, -1:] < 0.5, own[:, :rows] < 0.5).astype(float).ravel(), np.arange(clusters).repeat(
        rows
    )


def test_interval_has_the_cluster_robust_width() -> None:
    sizes = 1 + np.arange(400) % 7
    groups = np.arange(400).repeat(sizes)
    values = normal(key("width"), range(1), (400,))[0].astype(float)[groups] + draws(len(groups), "width")
    found = clustered_mean(values, groups, K)
    residuals = np.bincount(groups, values - values.mean())
    error = sqrt(400 / 399 * (residuals**2).sum()) / len(values)
    assert found.value == pytest.approx(values.mean())
    assert found.n == 400
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.high - found.low > 1.5 * np.subtract(*mean(values, K)[2:0:-1])


def test_coverage_on_correlated_rows() -> None:
    sets = [correlated(60, 10, i) for i in range(300)]
    clustered = [clustered_mean(values, groups, key(K, i), resamples=400) for i, (values, groups) in enumerate(sets)]
    naive = [proportion(values == 1) for values, _ in sets]
    assert np.mean([covers(found, 0.5) for found in clustered]) >= 0.92
    assert np.mean([covers(found, 0.5) for found in naive]) < 0.7


def test_coverage_of_a_mean() -> None:
    sets = normal(key("mean"), range(300), (50,)) ** 2
    assert np.mean([covers(mean(values, key(K, i), resamples=400), 1) for i, values in enumerate(sets)]) >= 0.88


def test_mean_is_clustered_by_row_and_clusters_have_any_ids() -> None:
    values, groups = correlated(40, 3, "ids")
    assert mean(values, K) == clustered_mean(values, np.arange(120), K)
    names = np.array([f"image-{group:03}" for group in groups])
    expected = clustered_mean(values, groups, K)
    assert clustered_mean(values, names, K) == expected
    assert clustered_mean(values, names.astype(object), K) == expected
    order = np.argsort(draws(120, "order"))
    assert clustered_mean(values[order], groups[order], K) == expected


def test_results_are_a_function_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    values, groups = draws(900, "blocks"), np.arange(900) % 101
    expected = clustered_mean(values, groups, K)
    limits = bootstrap(lambda weights: float(weights @ values), groups, K, resamples=100)
    assert clustered_mean(values, groups, K) == expected
    assert clustered_mean(values, groups, K + 1) != expected
    for block in (1, 101, 1000, 1 << 30):
        monkeypatch.setattr(resamples, "BLOCK", block)
        assert clustered_mean(values, groups, K) == expected
        assert bootstrap(lambda weights: float(weights @ values), groups, K, resamples=100) == limits


@pytest.mark.parametrize("n", [1, 2, 30, 4000])
def test_rows_that_agree_have_no_point_interval(n: int) -> None:
    groups = np.arange(n).repeat(3)
    for value, k in ((0.0, 0), (1.0, n)):
        found = clustered_mean(np.full(3 * n, value), groups, K, bounded=True, resamples=100)
        assert found == pytest.approx(exact_proportion(hits(k, n)))
    middle = clustered_mean(np.full(3 * n, 0.1), groups, K, bounded=True, resamples=100)
    share = exact_proportion(hits(0, n)).high
    assert middle == pytest.approx((0.1, 0.1 - 0.1 * share, 0.1 + 0.9 * share, n))
    for value in (0.0, 0.1, 1e9):
        found = mean(np.full(n, value), K, resamples=100)
        assert (found.low, found.high, found.n) == (-inf, inf, n)
        assert found.value == pytest.approx(value)


def test_nearly_certain_rows_stay_within_bounds() -> None:
    found = clustered_mean(hits(999, 1000), None, K, bounded=True)
    assert found.low < 0.999 < found.high <= 1


def test_a_uniform_never_rounds_up_to_the_number_of_clusters() -> None:
    clusters = np.concatenate([np.arange(1, 100_000), 2 ** np.arange(40), 2 ** np.arange(1, 40) - 1])
    assert ((1 - 2.0**-53) * clusters < clusters).all()


# --- bootstrap -------------------------------------------------------------------------------------------------------


def test_bootstrap_of_the_mean_is_clustered_mean() -> None:
    values, groups = correlated(50, 4, "bootstrap")
    found = clustered_mean(values, groups, K, resamples=1000)
    low, high = bootstrap(lambda weights: float((weights * values).sum() / weights.sum()), groups, K)
    assert (low, high) == pytest.approx((found.low, found.high))


def test_bootstrap_weights_are_multinomial_counts_of_clusters() -> None:
    seen: list[NDArray[np.float64]] = []
    groups = np.array([2, 0, 1, 0, 2, 2])

    def statistic(weights: NDArray[np.float64]) -> float:
        seen.append(weights)
        return 0.0

    bootstrap(statistic, groups, K)
    weights = np.array(seen)[:, [1, 2, 0]]
    assert (weights.sum(axis=1) == 3).all()
    assert all((row[groups == group] == row[groups == group][0]).all() for row in seen for group in range(3))
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.1)
    np.testing.assert_allclose(weights.var(axis=0), 2 / 3, atol=0.1)


def test_undefined_resamples_count_on_both_sides() -> None:
    replicates = iter([*range(96), *[float("nan")] * 3])
    assert bootstrap(lambda _: next(replicates), np.arange(5), K, level=0.9, resamples=99) == (1, 94)
    replicates = iter([*range(50), *[float("nan")] * 49])
    assert bootstrap(lambda _: next(replicates), np.arange(5), K, level=0.9, resamples=99) == (-inf, inf)


@pytest.mark.parametrize(("resamples", "rank"), [(39, 1), (1000, 25), (1999, 50), (2000, 50)])
def test_limits_are_the_exact_order_statistics(resamples: int, rank: int) -> None:
    shuffled = iter(1 + np.argsort(draws(resamples, "ranks")))
    limits = bootstrap(lambda _: float(next(shuffled)), np.arange(2), K, resamples=resamples)
    assert limits == (rank, resamples + 1 - rank)


def test_too_few_resamples_for_a_level() -> None:
    with pytest.raises(ValueError, match="38 resamples"):
        bootstrap(lambda _: 0.0, np.arange(2), K, resamples=38)
    with pytest.raises(ValueError, match="level"):
        bootstrap(lambda _: 0.0, np.arange(2), K, level=1.0)


# --- calibration -----------------------------------------------------------------------------------------------------


def naive_ece(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int) -> float:
    total = 0.0
    edges = np.linspace(0, 1, bins + 1)
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high) | ((confidence == 0) & (low == 0))
        if inside.any():
            total += inside.sum() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(total / len(confidence))


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_matches_a_loop(bins: int) -> None:
    confidence = np.concatenate([draws(300, "confidence"), np.linspace(0, 1, 31), np.linspace(0, 1, bins + 1)])
    correct = draws(len(confidence), "correct") < confidence**2
    assert ece(confidence, correct, bins) == pytest.approx(naive_ece(confidence, correct, bins), abs=1e-12)
    weights = (4 * draws(len(confidence), "weights")).astype(int)
    repeated = ece(confidence.repeat(weights), correct.repeat(weights), bins)
    assert ece(confidence, correct, bins, weights) == pytest.approx(repeated, abs=1e-12)


def test_ece_of_known_networks() -> None:
    assert ece(np.array([1.0, 1.0]), np.array([True, True])) == 0
    assert ece(np.array([1.0, 0.0]), np.array([False, True])) == 1
    assert ece(np.full(10, 0.8), hits(8, 10)) == pytest.approx(0)


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.15])
def test_coverage_of_ece(shift: float) -> None:
    """The accuracy is the confidence less the shift, so in every bin the true gap is the shift."""
    found = []
    for u in uniform(key("ece", shift), range(100), (2, 400)):
        confidence = 0.5 + 0.5 * u[0] ** 0.5
        found.append(ece_estimate(confidence, u[1] < confidence - shift, K, resamples=199))
    assert np.mean([covers(estimate, shift) for estimate in found]) >= 0.9
    assert all(estimate.low <= estimate.value <= estimate.high for estimate in found)


def test_ece_estimate_is_never_a_point() -> None:
    certain = ece_estimate(np.ones(50), hits(50, 50), K)
    assert certain == pytest.approx((0, 0, exact_proportion(hits(0, 50)).high, 50))
    repeated = ece_estimate(np.full(50, 0.9), hits(50, 50), K, np.arange(50) // 5)
    assert repeated.n == 10
    assert repeated.value == pytest.approx(0.1)
    assert repeated.low < repeated.value < repeated.high


# --- ranking ---------------------------------------------------------------------------------------------------------

scored = st.lists(st.tuples(st.integers(-(10**6), 10**6), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({positive for _, positive in rows}) == 2
)
tied = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(1, 3)), min_size=2, max_size=60).filter(
    lambda rows: len({positive for _, positive, _ in rows}) == 2
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(scored, st.floats(0.01, 1))
def test_ranking_measures_see_only_the_order(rows: list[tuple[int, bool]], tpr: float) -> None:
    scores, positive = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])
    area, rate = auroc(scores, positive), fpr_at_tpr(scores, positive, tpr)
    # A sigmoid in float64 would merge these scores; the cube of an integer below 2**20 does not lose one in 60 rows.
    for same in (scores**3, scores * 1e-300, np.unique(scores, return_inverse=True)[1], np.arctan(scores)):
        assert auroc(same, positive) == area
        assert fpr_at_tpr(same, positive, tpr) == rate
    assert auroc(-scores, positive) == pytest.approx(1 - area, abs=1e-15)
    assert auroc(scores, ~positive) == pytest.approx(1 - area, abs=1e-15)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(tied, st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_ranking_measures_against_oracles(rows: list[tuple[int, bool, int]], tpr: float) -> None:
    scores, positive, weights = (np.array(column) for column in zip(*rows, strict=True))
    up, down = scores[positive], scores[~positive]
    assert auroc(scores, positive) == mannwhitneyu(up, down).statistic / (len(up) * len(down))
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    false_rate, true_rate, _ = roc_curve(positive, scores, drop_intermediate=False)
    assert fpr_at_tpr(scores, positive, tpr) == false_rate[np.argmax(true_rate >= tpr)]
    repeated = scores.repeat(weights), positive.repeat(weights)
    assert auroc(scores, positive, weights) == auroc(*repeated)
    assert fpr_at_tpr(scores, positive, tpr, weights) == fpr_at_tpr(*repeated, tpr)


def test_fpr_at_known_thresholds() -> None:
    positive = hits(20, 40)
    scores = np.concatenate([np.arange(20.0), np.arange(20) - 10.5])
    assert fpr_at_tpr(scores, positive) == 8 / 20  # 19 of 20 positives score at least 1, and so do 8 negatives
    assert fpr_at_tpr(np.zeros(40), positive) == 1
    assert fpr_at_tpr(positive.astype(float), positive) == 0
    assert isnan(auroc(scores, positive, weights=positive))
    assert isnan(fpr_at_tpr(scores, positive, weights=~positive))


def test_coverage_of_curves() -> None:
    truth = norm.cdf(1 / sqrt(2)), norm.sf(norm.ppf(0.2) + 1)
    found = []
    for i, noise in enumerate(normal(key("curve"), range(80), (200,)).astype(float)):
        positive = hits(100, 200)
        found.append(curve_estimates(noise + positive, positive, key(K, i), tpr=0.8, resamples=199))
    assert np.mean([covers(curve.auroc, truth[0]) for curve in found]) >= 0.9
    assert np.mean([covers(curve.fpr, truth[1]) for curve in found]) >= 0.88


def test_curve_estimates_agree_with_the_general_bootstrap() -> None:
    positive, groups = draws(120, "positive") < 0.4, np.arange(120) // 3
    scores = np.round(draws(120, "scores") + 0.3 * positive, 1)
    found = curve_estimates(scores, positive, K, groups, resamples=200)
    area = bootstrap(lambda weights: auroc(scores, positive, weights), groups, K, resamples=200)
    rate = bootstrap(lambda weights: fpr_at_tpr(scores, positive, 0.95, weights), groups, K, resamples=200)
    assert found.auroc == (auroc(scores, positive), *area, 40)
    assert found.fpr == (fpr_at_tpr(scores, positive), *rate, 40)


def test_separated_and_rare_classes_are_bounded() -> None:
    positive = hits(30, 130)
    found = curve_estimates(positive * 1e6, positive, K, resamples=100)
    assert found.auroc == pytest.approx((1, exact_proportion(hits(30, 30)).low, 1, 130))
    assert found.fpr == pytest.approx((0, 0, exact_proportion(hits(0, 100)).high, 130))
    # One positive is in only 63 % of the resamples, so nothing is known.
    rare = curve_estimates(draws(50, "rare"), hits(1, 50), K, resamples=200)
    assert (rare.auroc.low, rare.auroc.high, rare.fpr.low, rare.fpr.high) == (0, 1, 0, 1)
    alone = curve_estimates(np.array([0.0, 1.0]), np.array([False, True]), K, np.zeros(2), resamples=100)
    assert alone.auroc == (1, 0, 1, 1)


# --- what is refused -------------------------------------------------------------------------------------------------

half = np.array([0.5, 0.25])
both = np.array([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion(np.array([], bool)), "hits is empty"),
        (lambda: exact_proportion(np.array([0.0, np.nan])), "hits has 1 NaN .* row 1"),
        (lambda: proportion(half), "hits must be booleans"),
        (lambda: proportion(both.reshape(1, 2)), r"hits has shape \(1, 2\)"),
        (lambda: mean(np.array([]), K), "values is empty"),
        (lambda: mean(np.array([1.0, np.inf]), K), "values has 1 NaN or infinite"),
        (lambda: mean(np.array([1.5]), K, bounded=True), "values must lie in"),
        (lambda: clustered_mean(half, np.arange(3), K), "clusters has shape"),
        (lambda: clustered_mean(half, np.array([1.0, np.nan]), K), "clusters has a NaN"),
        (lambda: bootstrap(lambda _: 0.0, np.array([]), K), "clusters has shape"),
        (lambda: ece(half * 3, both), "confidence must lie in"),
        (lambda: ece(half, np.array([True])), "correct has shape"),
        (lambda: ece(half, both, bins=0), "bins must be"),
        (lambda: ece(half, both, weights=np.zeros(2)), "weights must be"),
        (lambda: auroc(half, both, weights=np.array([1, -1])), "weights must be"),
        (lambda: auroc(np.array([np.nan, 1]), both), "scores has 1 NaN"),
        (lambda: auroc(np.array([np.inf, 1]), both), "scores has 1 NaN or infinite"),
        (lambda: auroc(half, ~both & both), "positive=False: a ROC curve needs both"),
        (lambda: fpr_at_tpr(half, both, tpr=0.0), "tpr must lie in"),
        (lambda: curve_estimates(half, both | True, K), "a ROC curve needs both"),
    ],
)
def test_errors_teach(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


def test_import_is_light() -> None:
    code = (
        "import sys, robustbench_diffaug.stats; print({'torch', 'statsmodels', 'sklearn', 'pandas'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
