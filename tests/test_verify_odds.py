"""The mathematics of verification: binomial tails, the fewest votes, and the odds of missing a forgery."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from robustbench_diffaug.evaluators.certificates import certify
from robustbench_diffaug.verify import certificates, recheck
from robustbench_diffaug.verify.check import Check, guarded, judged


@given(st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_the_tail_is_the_exact_one_rounded_up(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    p = data.draw(st.floats(0, 1))
    exact = sum(comb(n, i) * Fraction(p) ** i * (1 - Fraction(p)) ** (n - i) for i in range(k, n + 1))
    found = Fraction(certificates.tail(k, n, p))
    assert exact <= found <= exact * (1 + Fraction(1, 10**38))


@given(st.sampled_from([20, 100, 1000, 10_000]), st.sampled_from([0.001, 0.05]), st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_the_fewest_votes_are_those_of_the_evaluator(n: int, alpha: float, radius: float) -> None:
    """Two paths to one number: the inverse beta function and the inverse normal, and the tail of the binomial."""
    counts = np.arange(n + 1)
    estimate = np.stack([counts, n - counts], axis=1)
    select = np.array([[1, 0]] * (n + 1))
    enough = certify(select, estimate, 0.5, alpha)
    certain = (enough.prediction == 0) & (enough.radius >= radius)
    least = int(np.argmax(certain)) if certain.any() else n + 1
    assert least in certificates.least_votes(n, alpha, 0.5, radius)


@given(st.integers(1, 300), st.data())
def test_the_probability_of_missing(total: int, data: st.DataObject) -> None:
    rechecked, forged = data.draw(st.integers(1, total)), data.draw(st.integers(0, total))
    expected = hypergeom.pmf(0, total, forged, rechecked)
    assert recheck.missed(total, rechecked, forged) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_an_evaluator_that_raises_damages_no_other_check() -> None:
    def fails() -> Check:
        raise KeyError("column")

    assert guarded("x", fails) == Check("x", "FAILED", "damaged: KeyError: 'column'")
    assert judged("x", "fine", [], ["no file"], 0) == Check("x", "not checked", "no file")


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.01", 0.01), (" 100% ", 1.0), ("1", 1.0)])
def test_shares(text: str, share: float) -> None:
    assert recheck.share_of(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-1", "x", "nan", "", "%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError, match="needed is a share above 0"):
        recheck.share_of(text)
