"""mCE against its definition written out, and the published baselines against what was published of them."""

from math import nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustbench_diffaug.baselines import BASELINES, Baseline, Errors, corruption_errors, mce, published, relative_mce
from robustbench_diffaug.data.corruptions import COMMON

SEVERITIES = (1, 2, 3, 4, 5)


def own(name: str) -> dict[str, dict[int, float]]:
    """The errors of a baseline; where only their mean is known, that at each severity."""
    found = {}
    for corruption, row in BASELINES[name].errors:
        found[corruption] = dict(zip(SEVERITIES, row * (5 if len(row) == 1 else 1), strict=True))
    return found


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_of_the_baselines_own_errors_both_are_100(name: str) -> None:
    baseline = BASELINES[name]
    assert 100 * mce(own(name), baseline) == pytest.approx(100, abs=1e-11)
    assert baseline.clean is not None
    assert 100 * relative_mce(own(name), baseline.clean, baseline) == pytest.approx(100, abs=1e-11)
    assert corruption_errors(own(name), baseline) == pytest.approx(dict.fromkeys(COMMON, 1.0), abs=1e-13)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_they_are_of_the_common_corruptions_and_say_where_they_are_from(name: str) -> None:
    baseline = BASELINES[name]
    assert published(name) is baseline
    assert baseline.name == name
    assert baseline.corruptions == COMMON
    assert baseline.severities == SEVERITIES
    assert "https://" in baseline.source
    assert baseline.clean_source
    assert hash(baseline)


def test_alexnet_has_the_published_clean_error() -> None:
    """From torchvision 0.28, AlexNet_Weights.IMAGENET1K_V1 (56.522 %), the network of ImageNet-C's code; RobustBench
    78fcc9e, model_info/imagenet/corruptions/AlexNet.json (clean_acc 56.24)."""
    assert BASELINES["hendrycks-alexnet"].clean == pytest.approx(1 - 0.56522, abs=5e-5)
    assert BASELINES["robustbench-alexnet"].clean == pytest.approx(1 - 0.5624, abs=1e-12)


def test_both_alexnets_are_the_same_network() -> None:
    """RobustBench's 5,000 images are a sample of Hendrycks' 50,000: its errors are within 5 standard errors."""
    first, second = BASELINES["hendrycks-alexnet"], BASELINES["robustbench-alexnet"]
    for corruption in COMMON:
        assert abs(first.error(corruption) - second.error(corruption)) < 5 * (0.25 / 5000) ** 0.5


def test_robustbenchs_alexnet_has_its_published_mean() -> None:
    """From RobustBench 78fcc9e, model_info/imagenet/corruptions/AlexNet.json: corruptions_acc 21.12."""
    baseline = BASELINES["robustbench-alexnet"]
    mean = float(np.mean([error for _, row in baseline.errors for error in row]))
    assert round(100 * (1 - mean), 2) == 21.12


shares = st.floats(0, 1)
tables = st.lists(st.lists(shares, min_size=3, max_size=3), min_size=2, max_size=2)


def errors_of(table: list[list[float]]) -> dict[str, dict[int, float]]:
    return {name: dict(zip((2, 4, 5), row, strict=True)) for name, row in zip(("fog", "snow"), table, strict=True)}


@given(tables, st.lists(st.lists(st.floats(0.4, 1), min_size=3, max_size=3), min_size=2, max_size=2), shares)
def test_they_equal_their_definitions(table: list[list[float]], base: list[list[float]], clean: float) -> None:
    baseline = Baseline.of("mine", errors_of(base), 0.3)
    above, below = np.array(table), np.array(base)
    ratios = above.sum(axis=1) / below.sum(axis=1)
    assert mce(errors_of(table), baseline) == pytest.approx(ratios.mean(), abs=1e-12)
    assert list(corruption_errors(errors_of(table), baseline).values()) == pytest.approx(list(ratios), abs=1e-12)
    relative = ((above - clean).sum(axis=1) / (below - 0.3).sum(axis=1)).mean()
    assert relative_mce(errors_of(table), clean, baseline) == pytest.approx(relative, rel=1e-9, abs=1e-9)


@given(tables)
def test_what_the_baseline_lacks_changes_nothing(table: list[list[float]]) -> None:
    baseline = Baseline.of("mine", errors_of([[0.5, 0.6, 0.7], [0.3, 0.3, 0.9]]))
    more = {name: row | {1: 0.5} for name, row in errors_of(table).items()} | {"spatter": {5: 0.1}}
    assert mce(more, baseline) == mce(errors_of(table), baseline)


def test_a_mean_alone_is_as_good_as_the_errors() -> None:
    whole = Baseline(name="b", errors=(("fog", (0.2, 0.4, 0.9)),), severities=(1, 3, 5), clean=0.1)
    mean = Baseline(name="b", errors=(("fog", (0.5,)),), severities=(1, 3, 5), clean=0.1)
    errors = {"fog": {1: 0.1, 3: 0.2, 5: 0.3}}
    assert mce(errors, whole) == pytest.approx(0.4, abs=1e-15)
    assert mce(errors, mean) == pytest.approx(0.4, abs=1e-15)
    assert relative_mce(errors, 0.1, mean) == pytest.approx(0.25, abs=1e-15)


def without(corruption: str, severity: int | None = None) -> dict[str, dict[int, float]]:
    errors = own("robustbench-alexnet")
    if severity is None:
        del errors[corruption]
    else:
        del errors[corruption][severity]
    return errors


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (without("fog", 3), "is a mean over 75 accuracies, and 1 are missing: fog@s3; measure"),
        (without("fog"), "is a mean over 75 accuracies, and 5 are missing: fog@s1, fog@s2, fog@s3, ...; measure"),
        ({}, "and 75 are missing: gaussian_noise@s1, gaussian_noise@s2"),
        (own("robustbench-alexnet") | {"fog": dict.fromkeys(SEVERITIES, 50.0)}, "an error is 50, .* in .0, 1.; divide"),
        (own("robustbench-alexnet") | {"fog": dict.fromkeys(SEVERITIES, nan)}, "an error is nan"),
    ],
)
def test_nothing_is_filled_in(errors: Errors, message: str) -> None:
    baseline = BASELINES["robustbench-alexnet"]
    with pytest.raises(ValueError, match=message) as caught:
        mce(errors, baseline)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        relative_mce(errors, 0.2, baseline)


def test_the_relative_one_needs_clean_errors() -> None:
    errors = errors_of([[0.5, 0.6, 0.7], [0.5, 0.6, 0.7]])
    with pytest.raises(ValueError, match="the baseline mine has no error on clean images"):
        relative_mce(errors, 0.1, Baseline.of("mine", errors))
    with pytest.raises(ValueError, match="an error is 10,"):
        relative_mce(errors, 10.0, Baseline.of("mine", errors, 0.1))


def test_a_baseline_without_errors_is_none() -> None:
    errors = errors_of([[0.5, 0.6, 0.7], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="the baseline mine makes no error under snow"):
        mce(errors, Baseline.of("mine", errors))
    with pytest.raises(ValueError, match="makes no more errors than on clean images under snow"):
        relative_mce(errors, 0.1, Baseline.of("mine", errors, 0.2))
    with pytest.raises(ValueError, match="fog at severities 2 only"):
        Baseline.of("mine", {"snow": {1: 0.5, 2: 0.5}, "fog": {2: 0.5}})
    with pytest.raises(ValueError, match=r"an error is 1\.5,"):
        Baseline.of("mine", {"snow": {1: 1.5}})
    with pytest.raises(ValueError, match="has no errors"):
        Baseline.of("mine", {})
    with pytest.raises(ValueError, match="has 2 errors of fog"):
        Baseline(name="mine", errors=(("fog", (0.1, 0.2)),))


def test_names_are_suggested() -> None:
    with pytest.raises(ValueError, match="'hendrycks-alexnt'; did you mean hendrycks-alexnet"):
        published("hendrycks-alexnt")
    with pytest.raises(ValueError, match="robustbench-alexnet has no error of frog; did you mean fog"):
        BASELINES["robustbench-alexnet"].error("frog")
