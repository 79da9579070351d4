"""Figures of made samples against their definitions written out, closed forms, and what they must not depend on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.linalg import sqrtm

from robustbench_diffaug import rng
from robustbench_diffaug.samples import (
    frechet,
    frechet_difference,
    frechet_estimate,
    neighbourhoods,
    score,
    score_estimate,
)


def normals(name: object, *shape: int) -> np.ndarray:
    drawn: np.ndarray = rng.normal(rng.key("test", "samples", name), range(1), shape)[0].astype(np.float64)
    return drawn


def with_moments(name: str, mean: np.ndarray, deviation: np.ndarray, count: int = 50) -> np.ndarray:
    """Rows of exactly this mean, these standard deviations and no correlation."""
    rows = normals(name, count, len(mean))
    rows -= rows.mean(axis=0)
    whitened = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
    found: np.ndarray = mean + whitened * deviation
    return found


def test_frechet_of_diagonal_gaussians_is_closed_form() -> None:
    means, deviations = (np.array([0.0, 1, 2]), np.array([1.0, 1, 5])), (np.array([1.0, 2, 0.5]), np.array([2.0, 1, 3]))
    one, other = (with_moments(str(place), means[place], deviations[place]) for place in (0, 1))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, other) == pytest.approx(frechet(other, one), rel=1e-9)


@pytest.mark.parametrize("count", [8, 60])  # fewer rows than features, whose covariance is singular, and more
def test_frechet_is_that_of_the_matrix_square_root(count: int) -> None:
    mixing = normals("mixing", 12, 12)
    real, made = normals("real", 90, 12) @ mixing, normals("made", count, 12) @ mixing.T + 0.5
    first, second = np.cov(real.T), np.cov(made.T)
    root = sqrtm(first @ second).real
    expected = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet(real, made) == pytest.approx(expected, rel=1e-5)


def test_weights_are_repeated_rows() -> None:
    real, made = normals("real", 30, 3), normals("made", 20, 3) * 2
    weights = np.arange(30) % 3, np.arange(20) % 4
    repeated = frechet(np.repeat(real, weights[0], axis=0), np.repeat(made, weights[1], axis=0))
    assert frechet(real, made, weights) == pytest.approx(repeated, rel=1e-9)
    shares = np.abs(normals("shares", 20, 4))
    shares /= shares.sum(axis=1, keepdims=True)
    assert score(shares, weights[1]) == pytest.approx(score(np.repeat(shares, weights[1], axis=0)), rel=1e-9)


def test_the_interval_covers_the_distance_and_the_plain_value_is_too_large() -> None:
    truth, repeats = 4 * 0.3**2 + 4 * 0.2**2, 20  # means 0.3 apart, deviations 1 and 1.2, four features
    found = []
    for repeat in range(repeats):
        real, made = normals(f"a{repeat}", 120, 4), 0.3 + 1.2 * normals(f"b{repeat}", 120, 4)
        found.append(frechet_estimate(real, made, repeat, resamples=60))
    assert all(estimate.low <= estimate.value <= estimate.high and estimate.n == 120 for estimate in found)
    assert sum(estimate.low <= truth <= estimate.high for estimate in found) >= 0.85 * repeats
    assert np.mean([estimate.value for estimate in found]) > truth


def test_a_paired_difference_is_narrower_than_what_it_is_the_difference_of() -> None:
    real, noise = normals("real", 150, 4), normals("made", 150, 4)
    near, far = noise + 0.1, noise + 0.4
    found = frechet_difference(real, (far, near), 1, resamples=100)
    assert found.value == pytest.approx(frechet(real, far) - frechet(real, near))
    alone = frechet_estimate(real, far, 1, resamples=100)
    assert 0 < found.low <= found.value <= found.high
    assert found.high - found.low < alone.high - alone.low
    same = frechet_difference(real, (near, near), 1, resamples=100)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="needed are pairs"):
        frechet_difference(real, (near, far[:10]), 1)


def by_definition(real: np.ndarray, made: np.ndarray, k: int) -> tuple[list[bool], list[bool], list[float], list[bool]]:
    """Equations of the two papers, one pair of samples after another."""

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.sqrt(sum((a - b) ** 2 for a, b in zip(one.tolist(), other.tolist(), strict=True))))

    def radius(rows: np.ndarray, place: int) -> float:
        return sorted(distance(rows[place], row) for other, row in enumerate(rows) if other != place)[k - 1]

    real_radii = [radius(real, place) for place in range(len(real))]
    made_radii = [radius(made, place) for place in range(len(made))]
    precision = [any(distance(x, y) <= r for x, r in zip(real, real_radii, strict=True)) for y in made]
    recall = [any(distance(x, y) <= r for y, r in zip(made, made_radii, strict=True)) for x in real]
    density = [sum(distance(x, y) <= r for x, r in zip(real, real_radii, strict=True)) / k for y in made]
    coverage = [any(distance(x, y) <= r for y in made) for x, r in zip(real, real_radii, strict=True)]
    return precision, recall, density, coverage


points = st.integers(4, 14).flatmap(lambda count: arrays(np.int64, (count, 2), elements=st.integers(-3, 3)))


@settings(max_examples=60, deadline=None)
@given(real=points, made=points, k=st.integers(1, 3))
def test_neighbourhoods_are_the_definitions_ties_included(real: np.ndarray, made: np.ndarray, k: int) -> None:
    found = neighbourhoods(real, made, k)
    for values, expected in zip(found, by_definition(real, made, k), strict=True):
        assert values.tolist() == expected


def test_neighbourhoods_of_equal_near_and_far_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    real = normals("real", 60, 5)
    assert [float(values.mean()) for values in neighbourhoods(real, real, 5)[:2]] == [1, 1]
    assert neighbourhoods(real, real, 5).density.mean() == pytest.approx(6 / 5)  # k others and the sample itself
    assert [float(values.mean()) for values in neighbourhoods(real, real + 100, 5)] == [0, 0, 0, 0]
    half = np.concatenate([real[:30], real[:30] + 1e-3])  # half of the real ones twice: precise, but not all covered
    found = neighbourhoods(real, half, 5)
    assert found.precision.mean() == 1
    assert found.recall.mean() < 1
    whole = neighbourhoods(real, half, 3)
    monkeypatch.setattr("robustbench_diffaug.samples.BLOCK", 7 * 60)
    assert all(map(np.array_equal, whole, neighbourhoods(real, half, 3)))


def test_the_score_of_sure_and_of_blind_classifiers() -> None:
    assert score(np.eye(7)[np.arange(70) % 7]) == pytest.approx(7)
    assert score(np.full((9, 4), 0.25)) == pytest.approx(1)
    assert score(np.tile([[0.7, 0.2, 0.1]], (9, 1))) == pytest.approx(1)
    shares = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    marginal = shares.mean(axis=0)
    expected = np.exp(np.mean([sum(p * np.log(p / m) for p, m in zip(row, marginal, strict=True)) for row in shares]))
    assert score(shares) == pytest.approx(expected, rel=1e-12)
    found = score_estimate(np.repeat(shares, 30, axis=0), 3, resamples=100)
    assert 1 <= found.low < found.value < found.high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet(np.zeros((5, 2)), np.zeros((5, 3))), r"shapes \(5, 2\) and \(5, 3\)"),
        (lambda: frechet(np.zeros((1, 2)), np.zeros((5, 2))), "expected"),
        (lambda: frechet(np.full((5, 2), np.nan), np.zeros((5, 2))), "NaN or infinite"),
        (lambda: neighbourhoods(np.zeros((5, 2)), np.zeros((9, 2)), 5), "have no 5 neighbours"),
        (lambda: score(np.array([[0.5, 0.6]])), "add up to 1"),
        (lambda: score(np.zeros((0, 3))), "add up to 1"),
    ],
)
def test_what_cannot_be_computed_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
