"""Figures of certificates by hand, against the published formulas, and by simulated coverage."""

from math import isnan, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from robustbench_diffaug import rng
from robustbench_diffaug.evaluators.certificates import certify, predict
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.evaluators.smoothing_metrics import ALL, band, lower, named
from robustbench_diffaug.records import Declared, Metric, Records
from robustbench_diffaug.stats import exact_proportion

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


def records(estimate: NDArray[np.int64], labels: NDArray[np.int64], select: NDArray[np.int64] | None = None) -> Records:
    """Votes of (image, level, class); the candidate is the top class where nothing else is said."""
    size = len(labels)
    columns = {
        "dataset": np.array(["d"] * size),
        "origin": np.array(["d"] * size),
        "sample": np.array([f"{row:04d}" for row in range(size)]),
        "label": labels,
        "select": estimate if select is None else select,
        "estimate": estimate,
    }
    return Records(columns, (Declared("d", "d", "clean", 0, size, 2 * size),), 3)


def drawn(size: int, levels: int = 2, *name: object) -> Records:
    """Images some of which are certified, some abstain, and some are wrong; 200 draws of three classes."""
    chance = rng.uniform(rng.key("drawn", *name), range(size), (levels, 2))
    top = np.floor(200 * (0.34 + 0.66 * chance[..., 0] ** 0.3)).astype(np.int64)
    other = np.floor((200 - top) * chance[..., 1]).astype(np.int64)
    labels = np.where(np.arange(size) % 5 == 0, 1, 0)
    return records(np.stack([top, other, 200 - top - other], axis=-1), labels)


def found(evaluator: Smoothing, rows: Records) -> dict[tuple[str, str], Metric]:
    return {(figure.group, figure.name): figure for figure in evaluator.metrics(rows)}


def evaluator(**more: object) -> Smoothing:
    return Smoothing.model_validate({"sigmas": (0.25, 0.5), "n0": 200, "n": 200, "radii": RADII} | more)


def test_names_are_few_and_regular() -> None:
    names = {name.partition("@")[0] for _, name in found(evaluator(), drawn(40))}
    assert names == {
        "certified", "certified-band", "certified-lower", "abstain", "acr", "smoothed/accuracy", "predict/accuracy",
        "predict/abstain", "certified-envelope", "sigma-envelope", "certified-selected", "sigma-selected",
        "certified-any",
    }  # fmt: skip
    alone = {group for group, _ in found(evaluator(sigmas=(0.5,)), drawn(40, 1))}
    assert alone == {"sigma=0.5"}


@pytest.mark.parametrize(
    ("radius", "name"),
    [(0.0, "0.00"), (0.5, "0.50"), (0.125, "0.125"), (1.0, "1.00"), (12.0, "12.00")]
    + [(1e-5, "1e-05"), (1 / 3, "0.3333333333333333"), (0.1234567, "0.1234567")],
)
def test_radii_in_names(radius: float, name: str) -> None:
    """Names tell radii apart, and `rdiff verify` takes the radius from them."""
    assert named(radius) == name
    assert float(name) == radius


def test_curves_against_the_definition() -> None:
    rows = drawn(60)
    figures = found(evaluator(), rows)
    for index, sigma in enumerate((0.25, 0.5)):
        group = f"sigma={sigma:g}"
        certified = certify(rows["select"][:, index], rows["estimate"][:, index], sigma, 0.001)
        right = certified.prediction == rows["label"]
        for radius in RADII:
            hits = right & (certified.radius >= radius)
            figure = figures[group, f"certified@{named(radius)}"]
            assert (figure.value, figure.low, figure.high, figure.n) == exact_proportion(hits)
            assert figures[group, f"certified-band@{named(radius)}"].value == figure.value
        assert figures[group, "smoothed/accuracy"].value == right.mean() == figures[group, "certified@0.00"].value
        assert figures[group, "abstain"].value == (certified.prediction == -1).mean()
        assert figures[group, "acr"].value == pytest.approx((right * certified.radius).mean())
    curve = [figures["sigma=0.5", f"certified@{named(radius)}"].value for radius in RADII]
    assert curve == sorted(curve, reverse=True)
    assert 0 < curve[2] < curve[0] < 1


def test_prediction_by_the_published_test() -> None:
    """PREDICT of Cohen et al., from its pseudo-code, with scipy's two-sided test."""
    rows = drawn(150, 1)["estimate"][:, 0]
    for alpha in (0.001, 0.05):
        answers = predict(rows, alpha)
        for votes, answer in zip(rows, answers, strict=True):
            second, top = np.sort(votes)[-2:]
            tied = binomtest(int(top), int(top + second), 0.5).pvalue > alpha
            assert answer == (-1 if tied else votes.argmax())
        assert 0 < (answers == -1).mean() < 1
    assert predict(np.array([[0, 0], [3, 3], [9, 0]]), 0.05).tolist() == [-1, -1, 0]
    figures = found(evaluator(sigmas=(0.5,)), drawn(150, 1))
    expected = predict(drawn(150, 1)["estimate"][:, 0], 0.001)
    assert figures["sigma=0.5", "predict/abstain"].value == (expected == -1).mean()
    assert figures["sigma=0.5", "predict/accuracy"].value == (expected == drawn(150, 1)["label"]).mean()
    # One vote vector is tested at 1/2 against two classes, the certificate against all: it abstains more often.
    assert figures["sigma=0.5", "abstain"].value >= figures["sigma=0.5", "predict/abstain"].value


# --- over several levels ---------------------------------------------------------------------------------------------


def test_the_envelope_is_the_best_of_each_radius_and_names_it() -> None:
    figures = found(evaluator(), drawn(80))
    winners = set()
    for radius in map(named, RADII):
        each = {sigma: figures[f"sigma={sigma:g}", f"certified@{radius}"] for sigma in (0.25, 0.5)}
        envelope, sigma = figures[ALL, f"certified-envelope@{radius}"], figures[ALL, f"sigma-envelope@{radius}"].value
        assert envelope.value == max(figure.value for figure in each.values()) == each[sigma].value
        assert envelope.low <= min(figure.low for figure in each.values() if figure.value == envelope.value)
        assert envelope.high >= max(figure.high for figure in each.values())
        winners.add(sigma)
    assert winners == {0.25, 0.5}


def test_selection_sees_one_half_and_is_measured_on_the_other() -> None:
    """At chance the envelope is too high, and the selected level is not."""
    truth, levels, envelope, selected = 0.5, 6, [], []
    sigmas = tuple(0.5 + step / 100 for step in range(levels))
    for trial in range(30):
        hits = rng.uniform(rng.key("half", trial), range(40), (levels,)) < truth
        rows = records(np.where(hits[..., None], [200, 0], [0, 200]), np.zeros(40, dtype=np.int64))
        figures = found(evaluator(sigmas=sigmas, radii=(0.5,)), Records(rows.columns, rows.declared, trial))
        envelope.append(figures[ALL, "certified-envelope@0.50"])
        selected.append(figures[ALL, "certified-selected@0.50"])
    error = sqrt(truth * (1 - truth) / (30 * 20))
    assert abs(np.mean([figure.value for figure in selected]) - truth) < 4 * error
    assert np.mean([figure.value for figure in envelope]) - truth > 4 * error
    assert {figure.n for figure in selected} == {20}
    for curve in (envelope, selected):  # and intervals of both cover
        assert np.mean([figure.low <= truth <= figure.high for figure in curve]) > 0.9


def test_the_half_does_not_depend_on_the_checkpoint_and_keeps_versions_together() -> None:
    rows = drawn(30)
    twice = {name: np.concatenate([column, column]) for name, column in rows.columns.items()}
    twice["dataset"] = np.array(["d"] * 30 + ["e"] * 30)
    both = Records(twice, (*rows.declared, Declared("e", "d", "clean", 0, 30, 60)), 3)
    figures = found(evaluator(), both)
    assert figures[ALL, "certified-selected@0.50"].n == 15  # images, each twice
    once = found(evaluator(), rows)
    for of, figure in figures.items():
        if not of[1].startswith(("certified-lower", "sigma-", "certified-selected")):
            assert figure.value == pytest.approx(once[of].value)
            assert (figure.n, once[of].n) == (30, 30)
            # Versions that say the same are no news: the interval is that of as many images.
            apart = 0.02 if of[1] == "acr" else 1e-9  # which has other resamples
            if not of[1].startswith("certified-band"):
                assert (figure.low, figure.high) == pytest.approx((once[of].low, once[of].high), abs=apart)
    other = Records(dict(rows.columns) | {"estimate": rows["estimate"][::-1]}, rows.declared, 3)
    assert {f.n for (_, name), f in found(evaluator(), other).items() if name.startswith("certified-selected")} == {15}
    one = drawn(1)
    assert not any(name.startswith("certified-selected") for _, name in found(evaluator(), one))


def test_any_level_at_a_share_of_alpha() -> None:
    rows = drawn(80)
    figures = found(evaluator(), rows)
    each = [certify(rows["select"][:, i], rows["estimate"][:, i], s, 0.0005) for i, s in enumerate((0.25, 0.5))]
    for radius in RADII:
        hits = np.any([(c.prediction == rows["label"]) & (c.radius >= radius) for c in each], axis=0)
        assert figures[ALL, f"certified-any@{named(radius)}"].value == hits.mean()
    halved = found(evaluator(alpha=0.0005), rows)
    best = max(halved[f"sigma={sigma}", "certified@0.50"].value for sigma in (0.25, 0.5))
    assert figures[ALL, "certified-any@0.50"].value >= best


# --- Monte-Carlo error, and the whole curve ---------------------------------------------------------------------------


@given(st.integers(1, 3000), st.floats(1e-4, 0.4), st.floats(1e-4, 0.5), st.floats(0, 1))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_the_lower_bound_is_exact_and_within_bernsteins(n: int, alpha: float, rho: float, share: float) -> None:
    hits = np.arange(n) < round(share * n)
    bound = lower(hits, alpha, rho)
    wrong = hits.mean() - bound if bound else None
    bernstein = alpha + sqrt(2 * alpha * (1 - alpha) * log(1 / rho) / n) + log(1 / rho) / (3 * n)
    assert bound >= max(0.0, hits.mean() - bernstein) - 1e-12
    if wrong is not None:
        assert binom.sf(round(wrong * n), n, alpha) <= rho
        assert wrong < 1 / (2 * n) or binom.sf(round(wrong * n) - 1, n, alpha) > rho


def test_the_published_script_is_no_bound_for_many_images() -> None:
    """HighProbAccuracy of locuslab/smoothing, code/analyze.py, has no 2 below the root."""
    n, alpha, rho = 10**7, 0.001, 0.001
    script = alpha + sqrt(alpha * (1 - alpha) * log(1 / rho) / n) + log(1 / rho) / (3 * n)
    assert binom.sf(int(script * n), n, alpha) > 2 * rho
    assert lower(np.ones(10**5, dtype=bool), alpha, rho) < 1 - alpha


def test_the_band_holds_along_the_whole_curve() -> None:
    """Simulated: radii uniform on [0, 1], of 60 images; it is no wider than it must be."""
    outside = pointwise = 0
    grid = np.linspace(0, 1, 101)
    for trial in range(200):
        radii = rng.uniform(rng.key("band", trial), range(1), (60,))[0]
        bands = [band(radii >= radius) for radius in grid]
        outside += any(not found.low <= 1 - radius <= found.high for found, radius in zip(bands, grid, strict=True))
        shares = np.array([found.value for found in bands])
        error = 1.96 * np.sqrt(np.maximum(shares * (1 - shares), 1e-9) / 60)
        pointwise += bool((np.abs(shares - (1 - grid)) > error + 1e-9).any())
    assert outside <= binom.isf(1e-4, 200, 0.05)
    assert outside > 0
    assert pointwise > 60  # which is why a band is needed
    assert band(np.arange(50) < 20).high - 0.4 == pytest.approx(sqrt(log(40) / 100))
    versions = np.concatenate([np.arange(50), np.arange(50)])
    assert band(versions < 20, versions).high - 0.4 == pytest.approx(sqrt(log(80) / 100))


def test_what_has_no_interval_says_so() -> None:
    for (_, name), figure in found(evaluator(), drawn(40)).items():
        if name.startswith(("certified-lower", "sigma-")):
            assert isnan(figure.low)
            assert isnan(figure.high)
        else:
            assert figure.low <= figure.value <= figure.high


def test_votes_of_different_numbers_of_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="votes are of 3 to 4 draws"):
        certify(np.array([[1, 0], [1, 0]]), np.array([[3, 0], [4, 0]]), 0.5, 0.001)
