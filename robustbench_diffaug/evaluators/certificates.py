"""What votes prove: the certificate, its radius rounded down, and the prediction that may abstain."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import betainc, ndtri

from robustbench_diffaug import stats

__all__ = ["ABSTAIN", "Certificates", "certify", "predict", "radius_of", "reach"]

ABSTAIN = -1
"""The prediction where there is none."""


class Certificates(NamedTuple):
    """What votes prove.

    Arguments:
        prediction: The class certified, -1 where it abstains.
        radius: The certified l2 radius in [0, 1] pixel units, 0 where it abstains.
    """

    prediction: Int[np.ndarray, " n"]
    radius: Float[np.ndarray, " n"]


def radius_of(p_low: Float[np.ndarray, "*n"], sigma: float) -> Float[np.ndarray, "*n"]:
    """`sigma * Phi^-1(p_low)`, rounded down, and 0 where `p_low` is at most 1/2.

    The inverse normal CDF is good to a few units in the last place; what is taken off is far more than that, and far
    less than anybody prints.
    """
    exact = np.asarray(ndtri(np.maximum(p_low, 0.5)))
    return np.asarray(sigma * np.maximum(exact * (1 - 1e-12) - 1e-13, 0))


def reach(n: int, sigma: float, alpha: float) -> float:
    """The largest radius that n unanimous votes certify, `sigma * Phi^-1(alpha^(1 / n))`."""
    return float(radius_of(stats.binomial_lower(np.array(n), n, alpha), sigma))


def certify(
    select: Int[np.ndarray, "n k"], estimate: Int[np.ndarray, "n k"], sigma: float, alpha: float
) -> Certificates:
    """Certificates from the votes of two independent sets of draws; each fails with probability at most alpha.

    The class with most votes in `select` is the candidate (the first, among equals); its votes in `estimate` bound its
    probability from below by Clopper and Pearson. It abstains where the bound is below 1/2.

    Arguments:
        select: Votes of the n0 draws.
        estimate: Votes of the n draws; every row must have the same sum.
        sigma: The noise level that is certified.
        alpha: The probability of failure, in (0, 1/2).

    Raises:
        ValueError: If rows of `estimate` have different sums.

    References:
        Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019),
        https://arxiv.org/abs/1902.02918
    """
    candidate = select.argmax(axis=1)
    votes = np.take_along_axis(estimate, candidate[:, None], axis=1)[:, 0]
    p_low = stats.binomial_lower(votes, _draws(estimate), alpha)
    certain = p_low >= 0.5
    return Certificates(np.where(certain, candidate, ABSTAIN), np.where(certain, radius_of(p_low, sigma), 0.0))


def predict(estimate: Int[np.ndarray, "n k"], alpha: float) -> Int[np.ndarray, " n"]:
    """The class with most votes, or -1 where a two-sided binomial test of the two top counts does not tell them apart.

    With counts a >= b the p-value is `min(1, 2 P(Binomial(a + b, 1/2) >= a))`, and it abstains where that exceeds
    alpha: a class that is not the most probable one is returned with probability at most alpha.

    Arguments:
        estimate: Votes, of at least two classes.
        alpha: The probability of a wrong class, in (0, 1).

    References:
        Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019),
        https://arxiv.org/abs/1902.02918
        Rank Verification for Exponential Families (Hung and Fithian, 2019), https://arxiv.org/abs/1610.03944
    """
    second, top = np.partition(estimate, -2, axis=1)[:, -2:].T.astype(np.float64)
    p_value = np.minimum(1, 2 * betainc(np.maximum(top, 1), second + 1, 0.5))
    # Rounding must not turn an abstention into an answer.
    return np.where(p_value * (1 + 1e-11) > alpha, ABSTAIN, estimate.argmax(axis=1))


def _draws(votes: Int[np.ndarray, "n k"]) -> int:
    sums = np.unique(votes.sum(axis=1))
    if len(sums) != 1:
        raise ValueError(f"votes are of {sums[0]} to {sums[-1]} draws; all rows need the same number of them")
    return int(sums[0])
