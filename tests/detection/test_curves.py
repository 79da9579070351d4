"""Figures of detection against OpenOOD's own numbers, scikit-learn, and definitions by brute force.

golden/openood-metrics.npz was made by running `openood/evaluators/metrics.py` of https://github.com/Jingkang50/OpenOOD
(commit 3c35632) on made-up scores, under scikit-learn 1.9.1. `<case>/openood` holds the FPR, AUROC, AUPR_IN and
AUPR_OUT of its `compute_all_metrics`, the FPR of its `fpr_recall`, its `ccr_fpr` at 0.1 and 0.01, and the accuracy.
"""

from math import inf, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from robustbench_diffaug.detection.curves import Figures, auoscr, figures, roc
from robustbench_diffaug.rng import key, normal, uniform

GOLDEN = np.load(Path(__file__).with_name("golden") / "openood-metrics.npz")
CASES = sorted({name.rsplit("/", 1)[0] for name in GOLDEN})

Array = NDArray[Any]
coarse = st.lists(st.integers(-4, 4), min_size=1, max_size=40).map(lambda values: np.array(values, dtype=float))


def sample(size: int, mean: float, *name: object) -> Array:
    """Normal scores around a mean."""
    return np.asarray(mean + normal(key("test_curves", *name), range(1), (size,))[0], dtype=float)


def points(inside: Array, outside: Array) -> Array:
    """The share of each sample that is flagged at every threshold, and at none."""
    thresholds = np.unique(np.r_[inside, outside])
    return np.array([[0, 0], *([np.mean(inside <= t), np.mean(outside <= t)] for t in thresholds)])


# --- the six figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_openood(case: str) -> None:
    found = figures(GOLDEN[f"{case}/inside"], GOLDEN[f"{case}/outside"])
    fpr, auroc, aupr_in, aupr_out, fpr_id = GOLDEN[f"{case}/openood"][:5]
    assert found[:5] == pytest.approx((auroc, aupr_in, aupr_out, fpr, fpr_id), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(coarse, coarse)
def test_figures_are_those_of_scikit_learn_with_ties(inside: Array, outside: Array) -> None:
    found = figures(inside, outside)
    known, scores = np.r_[np.ones(len(inside)), np.zeros(len(outside))], np.r_[inside, outside]
    areas, rates = [], []
    for positive, sign in ((known, 1), (1 - known, -1)):
        precision, recall, _ = precision_recall_curve(positive, sign * scores)
        false, true, _ = roc_curve(positive, sign * scores)
        areas.append(auc(recall, precision))
        rates.append(false[np.argmax(true >= 0.95)])
        assert found.auroc == pytest.approx(auc(false, true), abs=1e-12)
    assert (found.aupr_in, found.aupr_out) == pytest.approx(tuple(areas), abs=1e-12)
    assert (found.fpr95_id_positive, found.fpr95_ood_positive) == tuple(rates)


@settings(max_examples=30, deadline=None)
@given(coarse, coarse)
def test_detection_error_is_the_least_over_thresholds(inside: Array, outside: Array) -> None:
    flagged = points(inside, outside)
    errors = (flagged[:, 0] + 1 - flagged[:, 1]) / 2
    assert figures(inside, outside).detection_error == pytest.approx(errors.min(), abs=1e-12)


@st.composite
def rescaled(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """Two samples of whole numbers, and a value for each number, in order, as large as a float can be."""
    limit = draw(st.sampled_from([1.0, 1e6, 1e300]))
    values = draw(st.lists(st.floats(-limit, limit), min_size=9, max_size=9, unique=True))
    return draw(coarse), draw(coarse), np.sort(np.array(values))


@settings(max_examples=30, deadline=None)
@given(rescaled())
def test_only_the_order_of_scores_counts(case: tuple[Array, Array, Array]) -> None:
    inside, outside, values = case
    first, second = (values[part.astype(int) + 4] for part in (inside, outside))
    assert figures(first, second) == figures(inside, outside)


def test_scores_of_a_million_and_their_transforms() -> None:
    inside, outside = 1e6 * sample(300, 1, "in"), 1e6 * sample(200, 0, "out")
    plain = figures(inside, outside)
    for transform in (lambda x: x / 1e6, lambda x: x**3, np.arctan, lambda x: 1e294 * x, lambda x: np.exp(x / 1e6)):
        assert figures(transform(inside), transform(outside)) == plain


@settings(max_examples=30, deadline=None)
@given(coarse, coarse)
def test_exchanging_the_samples_exchanges_the_conventions(inside: Array, outside: Array) -> None:
    found, turned = figures(inside, outside), figures(-outside, -inside)
    assert turned == pytest.approx(
        Figures(
            found.auroc,
            found.aupr_out,
            found.aupr_in,
            found.fpr95_id_positive,
            found.fpr95_ood_positive,
            found.detection_error,
        )
    )


def test_separated_and_reversed_samples() -> None:
    low, high = np.arange(30.0), np.arange(40.0) + 100
    assert figures(high, low) == pytest.approx(Figures(1, 1, 1, 0, 0, 0))
    found = figures(low, high)
    assert (found.auroc, found.fpr95_ood_positive, found.fpr95_id_positive, found.detection_error) == (0, 1, 1, 0.5)


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([1, nan, inf], [0], "inside has 2 NaN or infinite entries, the first at row 1"),
        ([1], [0, 0, -inf], "outside has 1 NaN or infinite entries, the first at row 2"),
        ([1], [], "outside is empty"),
        ([[1]], [0], r"inside has shape \(1, 1\)"),
    ],
)
def test_bad_scores_are_named(inside: list[float], outside: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures(np.array(inside, dtype=float), np.array(outside, dtype=float))


# --- OSCR ------------------------------------------------------------------------------------------------------------


def oscr(inside: Array, correct: Array, outside: Array) -> tuple[Array, Array]:
    """FPR(t) and CCR(t) at every score t, from the highest on, as published: `>= t` for one, `> t` for the other."""
    thresholds = np.r_[inf, np.unique(np.r_[inside, outside])[::-1], -inf]
    false = np.array([np.mean(outside >= t) for t in thresholds])
    return false, np.array([np.mean(correct & (inside > t)) for t in thresholds])


@pytest.mark.parametrize("case", ["normal", "coarse", "unbalanced", "huge"])
def test_the_oracle_has_the_classification_rates_of_openood(case: str) -> None:
    inside, correct, outside = (GOLDEN[f"{case}/{name}"] for name in ("inside", "correct", "outside"))
    _, rates = oscr(inside, correct.astype(bool), outside)
    thresholds = np.r_[inf, np.unique(np.r_[inside, outside])[::-1], -inf]
    for place, rate in ((5, 0.1), (6, 0.01)):
        limit = np.sort(outside)[-int(np.ceil(rate * len(outside)))]
        assert rates[thresholds == limit] == pytest.approx(GOLDEN[f"{case}/openood"][place], abs=1e-12)


def test_auoscr_is_the_published_area_where_no_scores_tie() -> None:
    inside, outside = sample(150, 1, "oscr"), sample(110, 0, "oscr out")
    correct = uniform(key("oscr"), range(1), (150,))[0] < 0.7
    false, rates = oscr(inside, correct, outside)
    steps = np.diff(false)  # one image outside at a time, and the rate of what lies above it
    assert auoscr(inside, correct, outside) == pytest.approx((steps * rates[1:]).sum(), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30), coarse)
def test_auoscr_counts_half_of_a_tie(known: list[tuple[int, bool]], outside: Array) -> None:
    inside, correct = (np.array(column) for column in zip(*known, strict=True))
    pairs = (inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)
    found = auoscr(inside, correct, outside)
    assert found == pytest.approx((pairs * correct[:, None]).mean(), abs=1e-12)
    assert auoscr(inside, np.ones(len(inside)), outside) == figures(inside, outside).auroc
    assert found <= min(correct.mean(), figures(inside, outside).auroc) + 1e-12


def test_auoscr_wants_one_boolean_for_each_image() -> None:
    with pytest.raises(ValueError, match=r"correct has shape \(1,\), expected \(2,\)"):
        auoscr(np.array([1.0, 2.0]), np.array([True]), np.array([0.0]))


# --- points to draw --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(coarse, coarse)
def test_roc_is_the_best_attainable_point(inside: Array, outside: Array) -> None:
    at = [0, 0.1, 1 / 3, 0.5, 0.95, 1]
    flagged = points(inside, outside)
    for rate, found in zip(at, roc(inside, [outside], at), strict=True):
        expected = flagged[flagged[:, 0] <= rate + 1e-9, 1].max()
        assert found.value == pytest.approx(expected, abs=1e-12)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high - found.low > 0.03
        assert found.n == len(outside)


def test_roc_has_wilsons_interval_and_the_mean_of_samples() -> None:
    inside, near = sample(200, 1, "roc"), [sample(100, 0, "roc", i) for i in range(2)]
    one, other, both = (roc(inside, samples, [0.2])[0] for samples in (near[:1], near[1:], near))
    p, n, z = one.value, 100, 1.959963984540054
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    assert (one.low, one.high) == pytest.approx((centre - half / (1 + z * z / n), centre + half / (1 + z * z / n)))
    assert both.value == pytest.approx((one.value + other.value) / 2)
    assert both.n == 200
    # Twice the images: shorter by the square root of two, roughly.
    assert (both.high - both.low) / (one.high - one.low) == pytest.approx(1 / sqrt(2), rel=0.1)


def test_roc_of_samples_of_unequal_size_is_as_uncertain_as_its_smallest() -> None:
    inside, small, large = np.arange(100.0), np.r_[np.zeros(10), np.full(10, 99.0)], np.zeros(10_000)
    found = roc(inside, [small, large], [0.5])[0]
    assert found.value == 0.75
    # Half the interval of 10 in 20, which is 0.40 wide; 10,000 further images do not make it 0.02.
    assert found.high - found.low == pytest.approx(0.40 / 2, rel=0.15)


@pytest.mark.parametrize(
    ("samples", "at", "message"),
    [([], [0.5], "one sample of other images at least"), ([[0.0]], [1.5], r"at must lie in \[0, 1\], found 1.5")],
)
def test_roc_says_what_is_wrong(samples: list[list[float]], at: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roc(np.array([1.0]), [np.array(part) for part in samples], at)
