"""Intervals of detection figures against direct formulas, the jackknife, naive resampling, and simulated coverage."""

from collections.abc import Iterator
from math import log, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm, t

from robustbench_diffaug.detection import intervals
from robustbench_diffaug.detection.curves import Figures, auoscr, figures
from robustbench_diffaug.detection.intervals import Placements, average, placements, replicates
from robustbench_diffaug.rng import key, normal, uniform
from robustbench_diffaug.stats import Estimate

Array = NDArray[Any]
coarse = st.lists(st.integers(-4, 4), min_size=2, max_size=25).map(lambda values: np.array(values, dtype=float))


def sample(size: int, mean: float, *name: object) -> Array:
    """Normal scores around a mean."""
    return np.asarray(mean + normal(key("test_intervals", *name), range(1), (size,))[0], dtype=float)


def kernel(inside: Array, outside: Array) -> Array:
    """Which of each pair is higher, of shape (n, m): 1 for the one inside, 1/2 where they tie."""
    return np.asarray((inside[:, None] > outside) + 0.5 * (inside[:, None] == outside))


def half_width(error: float, free: float, level: float = 0.95) -> float:
    return error * float(t.ppf((1 + level) / 2, free))


def covers(found: Estimate, truth: float) -> bool:
    return found.low <= truth <= found.high


# --- placements ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(coarse, coarse, st.integers(0, 2**25 - 1))
def test_placements_are_the_means_of_the_kernel(inside: Array, outside: Array, bits: int) -> None:
    correct = np.array([bits >> i & 1 for i in range(len(inside))], dtype=bool)
    matrix = kernel(inside, outside)
    for right, found in (
        (np.ones(len(inside)), placements(inside, outside, "near")),
        (correct, placements(inside, outside, "near", correct)),
    ):
        pairs = matrix * right[:, None]
        assert found.value == pytest.approx(pairs.mean(), abs=1e-12)
        assert found.inside == pytest.approx(pairs.mean(axis=1), abs=1e-12)
        assert found.outside["near"] == pytest.approx(pairs.mean(axis=0), abs=1e-12)
    assert placements(inside, outside, "near").value == figures(inside, outside).auroc
    assert placements(inside, outside, "near", correct).value == auoscr(inside, correct, outside)


def test_differences_have_delongs_variance() -> None:
    scores = [(sample(60, 1, "a"), sample(80, 0, "a out"))]
    scores += [(scores[0][0] + sample(60, 0, "b"), 0.5 * scores[0][1] + sample(80, 0, "b out"))]
    scores += [(np.round(scores[0][0]), np.round(scores[0][1]))]
    # As published: the matrices S10 and S01 of the areas' structural components, and the contrast L S L'.
    kernels = np.stack([kernel(*pair) for pair in scores])
    first, second = np.cov(kernels.mean(axis=2)) / 60, np.cov(kernels.mean(axis=1)) / 80
    parts = [placements(*pair, "near") for pair in scores]
    for contrast in ((1, -1, 0), (-2, 1, 1), (0.5, 0.5, -1)):
        weights = np.array(contrast)
        one, other = weights @ first @ weights, weights @ second @ weights
        free = (one + other) ** 2 / (one**2 / 59 + other**2 / 79)
        found = parts[0] * contrast[0] + parts[1] * contrast[1] + parts[2] * contrast[2]
        value, error = float(weights @ kernels.mean(axis=(1, 2))), sqrt(one + other)
        limits = value - half_width(error, free), value + half_width(error, free)
        assert found.estimate() == pytest.approx((value, *limits, 140), abs=1e-12)
        assert found.pvalue() == pytest.approx(2 * t.sf(abs(value) / error, free))


def test_shares_have_their_interval_on_the_logits_scale() -> None:
    inside, outside = sample(60, 1.5, "logit"), sample(80, 0, "logit out")
    matrix = kernel(inside, outside)
    one, other = matrix.mean(axis=1).var(ddof=1) / 60, matrix.mean(axis=0).var(ddof=1) / 80
    free = (one + other) ** 2 / (one**2 / 59 + other**2 / 79)
    area = matrix.mean()
    margin = half_width(sqrt(one + other), free, 0.9) / (area * (1 - area))
    found = placements(inside, outside, "near").estimate(0.9)
    assert found == pytest.approx((area, expit(logit(area) - margin), expit(logit(area) + margin), 140))


def jackknife(values: list[float]) -> float:
    """The variance of a statistic from its values with one unit left out."""
    return (len(values) - 1) / len(values) * float(((np.array(values) - np.mean(values)) ** 2).sum())


def test_the_mean_over_samples_has_the_jackknifes_variance() -> None:
    inside, near = sample(50, 1.2, "mean"), {name: sample(20 + 10 * i, 0.4 * i, name) for i, name in enumerate("abc")}

    def mean(known: Array, others: dict[str, Array]) -> float:
        return float(np.mean([figures(known, other).auroc for other in others.values()]))

    variance = jackknife([mean(np.delete(inside, i), near) for i in range(50)])
    for name, part in near.items():
        variance += jackknife([mean(inside, near | {name: np.delete(part, i)}) for i in range(len(part))])
    found = average([placements(inside, part, name) for name, part in near.items()])
    gain = found - found * 0.5  # half of it, as a difference
    spread = (gain.estimate().high - gain.value) / half_width(1, gain._spread()[1])
    assert spread == pytest.approx(sqrt(variance) / 2, rel=1e-9)
    assert found.value == pytest.approx(mean(inside, near))
    assert found.n == 50 + 20 + 30 + 40


def test_versions_of_an_image_are_one_draw() -> None:
    images, outside = sample(40, 1, "image"), sample(60, 0, "other")
    clusters = np.r_[np.arange(40), np.arange(40)]
    versions = np.r_[images, images - 0.5]  # the same image, corrupted
    found = placements(versions, outside, "near", clusters=clusters)
    assert found.n == 100
    left_out = [figures(versions[clusters != i], outside).auroc for i in range(40)]
    left_out_outside = [figures(versions, np.delete(outside, i)).auroc for i in range(60)]
    assert found._spread()[0] == pytest.approx(sqrt(jackknife(left_out) + jackknife(left_out_outside)), rel=1e-9)
    # Copies add nothing: as if they were not there, for names of any kind.
    copies = placements(np.r_[images, images], outside, "near", clusters=np.array([f"i{i}" for i in clusters]))
    assert copies.estimate() == pytest.approx(placements(images, outside, "near").estimate())
    assert copies.estimate()[:3] != pytest.approx(placements(np.r_[images, images], outside, "near").estimate()[:3])


@pytest.mark.parametrize(("size", "other", "area"), [(50, 50, 0.6), (50, 50, 0.8), (50, 500, 0.8), (500, 500, 0.95)])
def test_areas_are_covered(size: int, other: int, area: float, full: bool) -> None:
    mean, runs = sqrt(2) * norm.ppf(area), 4000 if full else 300
    stream = normal(key("coverage", size, other), range(runs), (size + other,)).astype(float)
    found = [placements(row[:size] + mean, row[size:], "near").estimate() for row in stream]
    rate = np.mean([covers(one, area) for one in found])
    assert (0.93 if full else 0.92) <= rate < 0.985


def near_and_versions() -> Iterator[tuple[Placements, Placements, Placements]]:
    """A near mean, a gain of it, and one over images with their versions; of true areas 0.8, 0 and 0.8."""
    mean = sqrt(2) * norm.ppf(0.8)
    stream = normal(key("near"), range(200), (3 * 60 + 4 * 80,)).astype(float)
    for row in stream:
        images, noise, noise2 = row[:180].reshape(3, 60)
        outside = row[180:].reshape(4, 80)
        score = [placements(images + mean, part, name) for name, part in zip("ab", outside, strict=False)]
        # Another score of the same images: half of it is its own noise.
        mixed = [
            placements(sqrt(0.5) * (images + noise) + mean, sqrt(0.5) * (part + own), name)
            for name, part, own in zip("ab", outside[:2], outside[2:], strict=True)
        ]
        versions = np.r_[images, sqrt(0.9) * images + sqrt(0.1) * noise2] + mean
        doubled = placements(versions, outside[0], "a", clusters=np.tile(np.arange(60), 2))
        yield average(score), average(mixed) - average(score), doubled


def test_means_gains_and_versions_are_covered() -> None:
    found = list(near_and_versions())
    for part, truth in zip(zip(*found, strict=True), (0.8, 0, 0.8), strict=True):
        rate = np.mean([covers(one.estimate(), truth) for one in part])
        assert 0.925 <= rate <= 0.98
        errors = np.array([one._spread()[0] for one in part])
        assert np.std([one.value for one in part]) == pytest.approx(sqrt((errors**2).mean()), rel=0.1)
    # A test at 5 % rejects a gain that is none in about 5 %, and where the interval leaves 0 out.
    pvalues = np.array([gain.pvalue() for _, gain, _ in found])
    assert 0.02 <= (pvalues < 0.05).mean() <= 0.075
    assert ((pvalues < 0.05) == [not covers(gain.estimate(), 0) for _, gain, _ in found]).all()
    # The versions' rows, taken for images of their own, are too sure.
    naive = [Placements(one.value, one.span, one.inside, one.outside, np.arange(120)) for *_, one in found]
    assert np.mean([covers(one.estimate(), 0.8) for one in naive]) < 0.925


def test_no_interval_is_a_point() -> None:
    low, high = np.arange(30.0), np.arange(40.0) + 100
    share = 1 - 0.025 ** (1 / 30)
    best, worst = placements(high, low, "near"), placements(low, np.arange(30.0) + 100, "near")
    assert best.estimate() == pytest.approx((1, 1 - share, 1, 70))
    assert worst.estimate()[:3] == pytest.approx((0, 0, share))
    assert placements(np.zeros(40), np.zeros(30), "near").estimate()[:3] == pytest.approx(
        (0.5, *(0.5 + d * share / 2 for d in (-1, 1)))
    )
    assert (best - best).estimate()[:3] == pytest.approx((0, -share, share))
    assert (best - best).pvalue() == 1
    one = placements(np.array([2.0]), sample(100, 0, "one"), "near").estimate()
    assert (one.low, one.high) == pytest.approx((0.025 * one.value, 1 - 0.025 * (1 - one.value)))


def test_opposite_scores_have_the_sign_tests_pvalue() -> None:
    low, high = np.arange(10.0), np.arange(10.0) + 100
    gain = placements(high, low, "near") - placements(low, high, "near")
    assert gain.value == 1
    assert gain.pvalue() == pytest.approx(2**-9)
    assert (gain * -1).pvalue() == pytest.approx(2**-9)
    for level in (0.9, 0.99, 0.999):
        assert (gain.estimate(level).low > 0) == (gain.pvalue() < 1 - level)


def test_what_is_not_of_the_same_images_is_not_paired() -> None:
    one = placements(np.arange(9.0), np.arange(5.0), "near")
    with pytest.raises(ValueError, match="5 and 4 images of near: they cannot be paired"):
        one - placements(np.arange(9.0), np.arange(4.0), "near")
    for other in (np.arange(8.0), np.arange(9.0)):
        with pytest.raises(ValueError, match="different images inside: they cannot be paired"):
            one + placements(other, np.arange(5.0), "near", clusters=np.zeros(len(other)))
    with pytest.raises(ValueError, match=r"values in \[0, 1\] are no difference"):
        one.pvalue()
    with pytest.raises(ValueError, match="level must lie in"):
        one.estimate(1.5)
    with pytest.raises(ValueError, match="no figures to average"):
        average([])


# --- replicates ------------------------------------------------------------------------------------------------------


def naive(inside: Array, outside: Array, name: str, stream: int, clusters: Array, resamples: int) -> Array:
    """The figures of resamples made row by row, of shape (figures, resamples)."""
    ids, rows = np.unique(clusters), []
    for r in range(resamples):
        known = uniform(key(stream, "inside"), range(r, r + 1), (len(ids),))[0]
        other = uniform(key(stream, "outside", name), range(r, r + 1), (len(outside),))[0]
        drawn = [inside[clusters == ids[int(x * len(ids))]] for x in known]
        rows.append(figures(np.concatenate(drawn), outside[(other * len(outside)).astype(int)]))
    return np.array(rows).T


@pytest.mark.parametrize(("decimals", "versions"), [(9, 1), (0, 1), (1, 3)])
def test_replicates_are_the_figures_of_resamples(decimals: int, versions: int) -> None:
    inside, outside = sample(90, 1, "boot"), np.round(sample(70, 0, "boot out"), decimals)
    inside, clusters = np.round(inside, decimals), np.arange(90) // versions
    found = replicates(inside, outside, "near", 5, clusters, resamples=40, level=0.9)
    expected = naive(inside, outside, "near", 5, clusters, 40)
    plain = figures(inside, outside)
    assert list(found) == list(Figures._fields)
    for figure, row, value in zip(found, expected, plain, strict=True):
        one = found[figure]
        assert one.value == value
        if figure == "detection_error":  # that of one threshold, no less than the least of all
            assert (one.draws >= row - 1e-12).all()
            assert one.shift == pytest.approx(max(0, value - row.mean()))
            continue
        assert one.draws == pytest.approx(row, abs=1e-12)
        limits = np.sort(row)[[1, -2]]  # the second and the last but one of 40, for 90 %
        assert one.estimate()[1:3] == pytest.approx((min(limits[0], value), max(limits[1], value)), abs=1e-12)
        assert one.estimate().n == 90 // versions + 70


def test_replicates_of_the_detection_error_keep_the_threshold() -> None:
    inside, outside = sample(80, 1, "error"), sample(60, 0, "error out")
    found = replicates(inside, outside, "near", 7, resamples=60)["detection_error"]
    errors = {x: (np.mean(inside <= x) + np.mean(outside > x)) / 2 for x in np.r_[inside, outside]}
    best = min(sorted(errors), key=lambda x: errors[x])
    for r in range(60):
        known = inside[(uniform(key(7, "inside"), range(r, r + 1), (80,))[0] * 80).astype(int)]
        other = outside[(uniform(key(7, "outside", "near"), range(r, r + 1), (60,))[0] * 60).astype(int)]
        assert found.draws[r] == pytest.approx((np.mean(known <= best) + np.mean(other > best)) / 2)
    ordered = np.sort(found.draws)
    assert found.estimate()[:3] == pytest.approx((errors[best], ordered[0], ordered[-1] + found.shift))
    assert found.shift > 0


def test_replicates_depend_on_neither_blocks_nor_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = sample(50, 1, "block"), np.round(sample(30, 0, "block out"), 1)
    whole = replicates(inside, outside, "near", 3, resamples=50)
    monkeypatch.setattr(intervals, "BLOCK", 170)
    parts = replicates(inside, outside, "near", 3, resamples=50)
    for figure in whole:
        assert (whole[figure].draws == parts[figure].draws).all()
        assert whole[figure].estimate() == parts[figure].estimate()
    assert (replicates(inside, outside, "far", 3, resamples=50)["auroc"].draws != whole["auroc"].draws).any()


def test_means_and_gains_of_replicates_are_paired() -> None:
    inside, near = sample(100, 1, "gain"), {name: sample(80, 0, name) for name in "ab"}
    parts = [replicates(inside, part, name, 3, resamples=99) for name, part in near.items()]
    # A checkpoint that differs from the other by a transform has the same order, and a gain of 0 on every resample.
    others = [replicates(2 * inside + 1, 2 * part + 1, name, 3, resamples=99) for name, part in near.items()]
    for figure in Figures._fields:
        mean = average([part[figure] for part in parts])
        assert mean.value == pytest.approx(np.mean([part[figure].value for part in parts]))
        assert mean.draws == pytest.approx(np.mean([part[figure].draws for part in parts], axis=0))
        assert mean.estimate().n == 100 + 80 + 80
        gain = average([other[figure] for other in others]) - mean
        assert (gain.draws == 0).all()
        found = gain.estimate()
        assert found.low < found.value == 0 < found.high
        assert found.high - found.low < 1
    delong = average([placements(inside, part, name) for name, part in near.items()]).estimate()
    found = average([part["auroc"] for part in parts]).estimate()
    assert found.high - found.low == pytest.approx(delong.high - delong.low, rel=0.25)


@settings(max_examples=15, deadline=None)
@given(coarse, coarse)
@example(np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0]))  # resamples worse than chance at the best threshold
def test_no_interval_of_resamples_is_a_point(inside: Array, outside: Array) -> None:
    for one in replicates(inside, outside, "near", 1, resamples=39).values():
        found = one.estimate()
        assert 0 <= found.low <= found.value <= found.high <= 1 + 1e-9
        if np.ptp(one.draws) < 1e-12:
            assert found.high - found.low > 1e-3


def test_separated_samples_are_bounded_by_what_was_not_seen() -> None:
    low, high = np.arange(3000.0), np.arange(2000.0) + 5000
    found = {figure: one.estimate() for figure, one in replicates(high, low, "near", 1, resamples=40).items()}
    inside, outside = (1 - 0.0125 ** (1 / n) for n in (2000, 3000))
    assert found["auroc"][:3] == pytest.approx((1, (1 - inside) * (1 - outside), 1))
    assert found["fpr95_ood_positive"][:3] == pytest.approx((0, 0, inside))
    assert found["fpr95_id_positive"][:3] == pytest.approx((0, 0, outside))
    assert found["detection_error"][:3] == pytest.approx((0, 0, (inside + outside) / 2))
    # From the top: what was not seen outside, most of what is inside, the rest of each. With r the recall and c the
    # images outside for each inside, precision is r / (r + c), and a trapezoid joins the last two points.
    c, seen = 1.5 * outside, 1 - inside
    area = seen - c * log((seen + c) / c) + inside * (seen / (seen + 1.5) + 1 / 2.5) / 2
    assert found["aupr_in"].low == pytest.approx(area, abs=2e-4)


@pytest.mark.parametrize(("size", "other", "mean"), [(300, 200, 1.2), (200, 200, 2.0)])
def test_figures_are_covered(size: int, other: int, mean: float, full: bool) -> None:
    runs = 1000 if full else 50
    stream = normal(key("bootstrap", size), range(runs), (size + other,)).astype(float)
    # Two normal samples of equal width: exact rates, and the least error half-way.
    rate, error = norm.cdf(norm.ppf(0.95) - mean), norm.cdf(-mean / 2)
    truth = {"auroc": norm.cdf(mean / sqrt(2)), "fpr95_ood_positive": rate, "fpr95_id_positive": rate}
    covered = dict.fromkeys([*truth, "detection_error"], 0)
    for i, row in enumerate(stream):
        found = replicates(row[:size] + mean, row[size:], "near", i, resamples=100)
        for figure in covered:
            covered[figure] += covers(found[figure].estimate(), {**truth, "detection_error": error}[figure])
    for figure, count in covered.items():
        assert count / runs >= (0.92 if full else 0.86), figure


def test_resamples_are_checked() -> None:
    inside, outside = np.arange(9.0), np.arange(5.0)
    with pytest.raises(ValueError, match="30 resamples have no interval"):
        replicates(inside, outside, "near", 1, resamples=30)
    one = replicates(inside, outside, "near", 1, resamples=40)["auroc"]
    for other, message in (
        (replicates(inside, outside, "near", 2, resamples=40), "of different resamples"),
        (replicates(inside, outside[1:], "near", 1, resamples=40), "5 and 4 images of near"),
        (replicates(inside[1:], outside, "near", 1, resamples=40), "9 and 8 images inside"),
    ):
        with pytest.raises(ValueError, match=message):
            one - other["auroc"]
