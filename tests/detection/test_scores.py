"""Scores against closed forms and other libraries, their bounds on what they are given, and chunks that do not show."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from sklearn.covariance import EmpiricalCovariance

from robustbench_diffaug.detection.passes import Unsuited, percentile
from robustbench_diffaug.detection.rows import Chunks, Rows, Source
from robustbench_diffaug.detection.scores import SCORES, score_of
from robustbench_diffaug.rng import key, normal

CLASSES, WIDTH = 5, 12


def gaussian(name: object, *shape: int) -> NDArray[Any]:
    drawn: NDArray[Any] = normal(key("scores", name), range(1), shape)[0]
    return drawn


WEIGHT, BIAS = gaussian("weight", CLASSES, WIDTH), gaussian("bias", CLASSES)


def made(name: object, count: int, known: bool = True) -> Rows:
    """Features of a ReLU that tell classes apart well, and the logits of the last layer."""
    labels = np.arange(count) % CLASSES
    features = np.maximum(2 * WEIGHT[labels] * known + gaussian(name, count, WIDTH), 0)
    return Rows((features @ WEIGHT.T + BIAS).astype(np.float32), features, labels if known else labels * 0 - 1)


FIT, VAL, TEST = made("fit", 150), made("val", 60), made("test", 40)


def exact(rows: Rows) -> NDArray[np.float64]:
    """The features in float64."""
    assert rows.features is not None
    return rows.features.astype(np.float64)


def cut(rows: Rows, *ends: int) -> Chunks:
    """Reads the rows in chunks that end there, read-only as recorded ones are."""

    def read() -> Iterator[Rows]:
        for start, end in pairwise((0, *ends, len(rows.labels))):
            parts = [None if array is None else array[start:end].copy() for array in rows]
            for part in parts:
                if part is not None:
                    part.setflags(write=False)
            yield Rows(*parts)  # type: ignore[arg-type]

    return read


def source(fit: Rows = FIT, val: Rows = VAL) -> Source:
    return Source(cut(fit), cut(val), WEIGHT, BIAS, key=3)


def value(name: str) -> float | None:
    """A value that these few rows admit."""
    return {"knn": 9.0, "nnguide": 4.0, "vim": 5.0}.get(name)


def scored(name: str, given: Source, rows: Rows = TEST) -> NDArray[np.float64]:
    return SCORES[name].fit(given, value(name))(rows)


logits = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.floats(-30, 30, width=32))


@settings(deadline=None, max_examples=40)
@given(logits)
def test_scores_of_logits_are_their_formulas(array: NDArray[np.float32]) -> None:
    exact = torch.tensor(array, dtype=torch.float64)
    expected = {
        "msp": exact.softmax(1).amax(1).numpy(),
        "maxlogit": array.max(1),
        "energy": exact.logsumexp(1).numpy(),
        "entropy": -entropy(exact.softmax(1).numpy(), axis=1),
    }
    rows = Rows(array, None, np.zeros(len(array), np.int64))
    found = {name: SCORES[name].fit(Source(), None)(rows) for name in expected}
    for name, numbers in expected.items():
        np.testing.assert_allclose(found[name], numbers, rtol=1e-9, atol=1e-6 if name == "msp" else 1e-9)
    np.testing.assert_allclose(SCORES["energy"].fit(Source(), 5.0)(rows), 5 * (exact / 5).logsumexp(1).numpy())
    classes = array.shape[1]
    assert (
        (found["energy"] >= found["maxlogit"]) & (found["energy"] <= found["maxlogit"] + np.log(classes) + 1e-9)
    ).all()
    assert (found["entropy"] <= 1e-12).all() and (found["entropy"] >= -np.log(classes) - 1e-9).all()
    moved = rows._replace(logits=(array + np.float32(8)))
    np.testing.assert_allclose(SCORES["energy"].fit(Source(), None)(moved), found["energy"] + 8, atol=1e-4)
    np.testing.assert_allclose(SCORES["entropy"].fit(Source(), None)(moved), found["entropy"], atol=1e-3)


@settings(deadline=None, max_examples=50)
@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=20),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-2, 2),
    ),
    st.floats(0, 100),
    st.integers(0, 20),
)
def test_percentiles_of_chunks_are_numpys(array: NDArray[np.float32], percent: float, end: int) -> None:
    rows = Rows(array, array, np.zeros(len(array), np.int64))
    expected = np.percentile(array.astype(np.float64), percent)
    size = np.abs(array).max().astype(np.float64)
    assert percentile(cut(rows, min(end, len(array))), percent, "x") == pytest.approx(
        expected, rel=1e-12, abs=1e-12 * size
    )


@pytest.mark.parametrize("name", SCORES)
def test_chunks_do_not_show(name: str) -> None:
    whole = source()
    pieces = Source(cut(FIT, 1, 1, 64, 149), cut(VAL, 17, 18), WEIGHT, BIAS, key=3)
    expected = scored(name, whole)
    assert np.isfinite(expected).all() and np.ptp(expected) > 1e-3
    scorer = SCORES[name].fit(pieces, value(name))
    found = np.concatenate([scorer(rows) for rows in cut(TEST, 1, 7, 7)()])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(scored(name, whole), expected)


@pytest.mark.parametrize("name", SCORES)
def test_needs_are_all_that_is_read(name: str) -> None:
    score = SCORES[name]
    parts: dict[str, dict[str, Any]] = {
        "fit": {"fit": cut(FIT)},
        "val": {"val": cut(VAL)},
        "head": {"weight": WEIGHT, "bias": BIAS},
    }
    wanted: dict[str, Any] = {}
    for need in score.needs - {"features"}:
        wanted |= parts[need]
    rows = TEST if "features" in score.needs else TEST._replace(features=None)
    np.testing.assert_array_equal(score.fit(Source(**wanted, key=3), value(name))(rows), scored(name, source()))
    for need in score.needs - {"features"}:
        left = {field: part for field, part in wanted.items() if field not in parts[need]}
        with pytest.raises(ValueError, match=f"^{name if name != 'ash' else 'ash-b'} (is fitted to|needs)"):
            score.fit(Source(**left), value(name))
    if "features" in score.needs:
        with pytest.raises(ValueError, match="needs the input of the last layer"):
            score.fit(source(), value(name))(TEST._replace(features=None))


def test_names_defaults_and_sweeps_are_openoods() -> None:
    assert all(name == score.name for name, score in SCORES.items())
    assert {name: score.default for name, score in SCORES.items() if score.default is not None} == {
        "energy": 1, "gen": 0.1, "react": 90, "ash": 90, "ash-b": 90, "ash-p": 90, "ash-s": 90, "scale": 85, "dice": 90,
        "knn": 50, "nnguide": 100,
    }  # fmt: skip
    assert SCORES["knn"].sweep == (50, 100, 200, 500, 1000) and SCORES["react"].sweep == (85, 90, 95, 99)
    assert SCORES["ash"].sweep == SCORES["scale"].sweep == (65, 70, 75, 80, 85, 90, 95)
    assert {name for name in SCORES if SCORES[name].nonnegative} == {"react", "ash", "ash-b", "ash-p", "ash-s", "scale"}
    assert all(bool(score.parameter) or not score.sweep for score in SCORES.values())
    assert score_of("knn") is SCORES["knn"]
    with pytest.raises(ValueError, match="no score 'enrgy'; did you mean energy"):
        score_of("enrgy")


@pytest.mark.parametrize("name", ["mds", "rmds"])
def test_mahalanobis_is_scikit_learns(name: str) -> None:
    features, test = exact(FIT), exact(TEST)
    means = np.stack([features[FIT.labels == label].mean(0) for label in range(CLASSES)])
    within = EmpiricalCovariance(assume_centered=True).fit(features - means[FIT.labels]).precision_
    distances = cdist(test, means, "mahalanobis", VI=within).min(1) ** 2
    background = EmpiricalCovariance().fit(features).mahalanobis(test)
    expected = -distances + (background if name == "rmds" else 0)
    np.testing.assert_allclose(scored(name, source()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mds", "rmds"])
def test_mahalanobis_of_dependent_features_is_that_without_them(name: str) -> None:
    def widened(rows: Rows) -> Rows:
        features = rows.features
        assert features is not None
        more = np.concatenate([features, np.zeros_like(features[:, :1]), 4 * features[:, :2]], 1)
        return rows._replace(features=more)

    found = scored(name, source(widened(FIT)), widened(TEST))
    # A copy four times as large shares the variance of its original; the distance is the same.
    np.testing.assert_allclose(found, scored(name, source()), rtol=1e-6, atol=1e-6)


def test_neighbours_are_those_of_a_full_search() -> None:
    fit, test = exact(FIT), exact(TEST)
    fit, test = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (fit, test))
    ranked = np.sort(cdist(test, fit, "sqeuclidean"), axis=1)
    for k in (1, 2, 20, len(fit)):
        np.testing.assert_allclose(SCORES["knn"].fit(source(), k)(TEST), -ranked[:, k - 1], rtol=1e-9)
    itself = SCORES["knn"].fit(source(), 1)(FIT)
    np.testing.assert_array_equal(itself, 0.0)


def test_blocks_of_neighbours_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored("knn", source())
    monkeypatch.setattr("robustbench_diffaug.detection.distance_scores.PAIRS", 3 * len(FIT.labels))
    np.testing.assert_allclose(scored("knn", source()), expected, rtol=1e-12)
    assert len(scored("knn", source(), Rows(*(array[:0] for array in TEST)))) == 0  # type: ignore[index]


def test_shaping_keeps_what_it_promises() -> None:
    def shaped(name: str, percent: float) -> NDArray[np.float64]:
        return SCORES[name].fit(source(), percent)(TEST)

    plain = SCORES["energy"].fit(source(), 1.0)(TEST)
    np.testing.assert_allclose(shaped("ash-p", 0), plain, rtol=1e-5)
    np.testing.assert_allclose(SCORES["react"].fit(source(val=TEST), 100.0)(TEST), plain, rtol=1e-5)
    np.testing.assert_allclose(shaped("ash-s", 0), shaped("scale", 0), rtol=1e-12)
    features = TEST.features
    assert features is not None
    grown = TEST._replace(features=features * 3)
    for name in ("ash-s", "scale", "ash-p", "ash-b"):  # all are homogeneous: without a bias 3 z has 3 times the logits
        free = Source(weight=WEIGHT[:1], bias=BIAS[:1] * 0)
        once, thrice = (SCORES[name].fit(free, 50.0)(rows) for rows in (TEST, grown))
        np.testing.assert_allclose(thrice, 3 * once, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_features_that_are_all_zero_have_a_score(name: str) -> None:
    dead = TEST._replace(features=np.zeros((40, WIDTH), np.float32), logits=np.tile(BIAS, (40, 1)))
    found = scored(name, source(), dead)
    assert np.isfinite(found).all() and np.ptp(found) == 0
    if name in ("ash", "ash-p", "ash-s", "scale", "dice", "react"):
        np.testing.assert_allclose(found, SCORES["energy"].fit(source(), 1.0)(dead), rtol=1e-6)


def test_matching_is_infinite_where_a_class_is_impossible() -> None:
    """A class that is never predicted is matched by its own corner alone; others by their means."""
    sure = np.array([[0, 900, 0], [900, 0, 0]], np.float32)
    given = Source(val=lambda: iter([Rows(sure, None, np.zeros(2, np.int64))]))
    rows = Rows(np.array([[0, 900, 0], [0, 0, 900], [2, 2, 0]], np.float32), None, np.zeros(3, np.int64))
    np.testing.assert_array_equal(SCORES["klm"].fit(given, None)(rows), [0, 0, -np.inf])


def test_the_guide_is_drawn_by_its_key() -> None:
    drawn = [scored("nnguide", Source(cut(FIT), key=number)) for number in (3, 4)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    everything = SCORES["nnguide"].fit(source(), 150.0)(TEST)
    directions = [exact(rows) / np.linalg.norm(exact(rows), axis=1, keepdims=True) for rows in (TEST, FIT)]
    energies = [np.log(np.exp(rows.logits.astype(np.float64)).sum(1)) for rows in (TEST, FIT)]
    expected = (directions[0] @ (directions[1] * energies[1][:, None]).T).mean(1) * energies[0]
    np.testing.assert_allclose(everything, expected, rtol=1e-5)


BAD = [
    ("mds", FIT._replace(labels=np.full(150, -1)), None, r"^mds: a fit image has label -1; .* classes are 0 to 4$"),
    ("rmds", FIT._replace(labels=FIT.labels + 1), None, r"^rmds: a fit image has label 5; "),
    ("mds", FIT._replace(labels=FIT.labels % 3), None, r"^mds needs fit images of all 5 classes, and class 3 "),
    ("she", FIT._replace(logits=-FIT.logits), None, r"^she needs correctly classified fit images of all 5 classes, "),
    ("temperature", FIT, None, r"^temperature: a val image has label -1; "),
    ("gen", FIT, 0.0, r"^gen: gamma is 0; it is above 0$"),
    ("energy", FIT, -1.0, r"^energy: temperature is -1; "),
    ("scale", FIT, 99.0, r"^scale: percentile 99 leaves none of 12 features: take a smaller one$"),
    ("react", FIT, 101.0, r"^react: percentile is 101; it is a percentage, from 0 to 100$"),
    ("knn", FIT, 2.5, r"^knn: k is 2.5; it is a whole number, at least 1$"),
    ("nnguide", FIT, 0.0, r"^nnguide: k is 0; "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fit", "value", "message"), BAD, ids=[case[3][1:25] for case in BAD])
def test_what_cannot_be_fitted_says_so(name: str, fit: Rows, value: float | None, message: str) -> None:
    val = VAL._replace(labels=VAL.labels * 0 - 1)
    with pytest.raises(ValueError, match=message) as caught:
        SCORES[name].fit(source(fit, val), value)
    assert not isinstance(caught.value, Unsuited)


def test_values_that_these_arrays_do_not_admit_are_told_apart() -> None:
    flat = np.zeros((150, WIDTH), np.float32)
    flat[:, :3] = gaussian("flat", 150, 3)
    narrow = Source(cut(FIT._replace(features=flat)), None, WEIGHT, BIAS * 0)
    for origin, name, number in (
        (source(), "knn", 151.0),
        (source(), "nnguide", 151.0),
        (source(), "vim", 12.0),
        (narrow, "vim", 3.0),
    ):
        with pytest.raises(Unsuited, match=f"^{name}: .*: take a (smaller|dim below)"):
            SCORES[name].fit(origin, number)
    np.testing.assert_array_equal(SCORES["vim"].fit(source(), None)(TEST), SCORES["vim"].fit(source(), 6.0)(TEST))
    with pytest.raises(ValueError, match="features have 12 entries, and 11 were expected"):
        SCORES["react"].fit(Source(val=cut(VAL), weight=WEIGHT[:, 1:], bias=BIAS), 90.0)(TEST)


@pytest.mark.parametrize("name", ["msp", "energy", "knn", "mds", "rmds", "vim", "klm", "scale"])
def test_known_classes_score_higher(name: str) -> None:
    far = made("far", 40, known=False)
    assert np.median(scored(name, source())) > np.median(scored(name, source(), far))
