"""Certificates are true: by simulation with known probabilities, and by high precision.

The true probability of a class is known where a linear network separates two half spaces, and for a Gaussian mixture
behind its exact denoiser, where quadrature gives it. Votes are then binomial, so that a million certificates are cheap.
"""

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binom

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.evaluators.certificates import certify, predict, radius_of, reach
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.mixture import MixtureSpec
from robustbench_diffaug.stats import binomial_lower

ALPHAS = (0.001, 0.05)


def votes(p: float, n: int, trials: int, *name: object) -> NDArray[np.int64]:
    """Votes of two classes, the first of probability p, in n draws."""
    chance = rng.uniform(rng.key("soundness", p, n, *name), range(1), (trials,))[0]
    # The inverse CDF of a table: scipy's own takes a second for 100,000.
    first = np.searchsorted(binom.cdf(np.arange(n + 1), n, p), chance)
    return np.stack([first, n - first], axis=1)


def allowed(trials: int, alpha: float) -> int:
    """Failures that so many trials have with a probability of no more than 1e-4, if one has it with alpha."""
    return int(binom.isf(1e-4, trials, alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_linear_classifiers(alpha: float, full: bool) -> None:
    """The radius of a linear network is the distance to its boundary, sigma Phi^-1(p), in closed form."""
    sigma, trials, rates = 0.5, 1_000_000 if full else 100_000, []
    for distance, n in [(0.1, 1000), (0.3, 100), (0.5, 1000), (0.8, 1000), (1.2, 10_000)]:
        p = float(ndtr(distance / sigma))
        found = certify(votes(p, 50, trials, "select"), votes(p, n, trials, "estimate"), sigma, alpha)
        wrong = (found.prediction == 1) | (found.radius > distance)
        assert wrong.sum() <= allowed(trials, alpha)
        rates.append(wrong.mean())
        # Were alpha half of what it is for, it would be seen.
        careless = certify(votes(p, 50, trials, "select"), votes(p, n, trials, "estimate"), sigma, min(4 * alpha, 0.4))
        assert (careless.radius > distance).sum() > allowed(trials, alpha)
    assert max(rates) > alpha / 2  # and the bound is not slack


def test_a_candidate_that_is_not_the_top_class() -> None:
    """Nearly even classes: the wrong one is often the candidate, and hardly ever certified."""
    trials, p = 200_000, 0.502
    for alpha in ALPHAS:
        found = certify(votes(p, 20, trials, "select"), votes(p, 1000, trials, "estimate"), 1.0, alpha)
        assert 0.3 < np.mean(votes(p, 20, trials, "select").argmax(1) == 1) < 0.6
        assert ((found.prediction == 1) | (found.radius > ndtri(p))).sum() <= allowed(trials, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_predictions_that_may_abstain(alpha: float) -> None:
    """The class returned is a wrong one with probability at most alpha, and nearly that for classes that tie."""
    trials, rates = 400_000, []
    for p in (0.5001, 0.52, 0.6):
        wrong = (predict(votes(p, 200, trials, "predict"), alpha) == 1).sum()
        assert wrong <= allowed(trials, alpha)
        rates.append(wrong / trials)
    assert rates[0] > alpha / 8  # two-sided: about half of alpha, less what whole numbers take


TILT = 0.05
"""Of the classifier behind the exact denoiser: it is then no longer the one whose boundary lies in the middle."""


def truth(spec: MixtureSpec, image: torch.Tensor, level: float) -> float:
    """P(class 0) of two classes, denoised exactly and classified linearly, by quadrature along the one direction.

    Along the unit vector between the means a noisy image lies at u. Its estimate lies where the posterior mean of a
    one-dimensional mixture does, which increases with u, and is of class 0 above `-tilt / length`.
    """
    means = spec.means().flatten(1).numpy()
    across = means[0] - means[1]
    length = float(np.linalg.norm(across))
    at = float((image.double().flatten().numpy() - means.mean(0)) @ across / length)
    variance, noise = spec.spread**2, level**2

    def over(u: float) -> float:
        centre = np.tanh(u * length / (2 * (variance + noise))) * length / 2
        return float((variance * u + noise * centre) / (variance + noise) + TILT / length)

    def density(u: float) -> float:
        return float(np.exp(-(((u - at) / level) ** 2) / 2) / (level * np.sqrt(2 * np.pi)))

    border = float(brentq(over, -100, 100, xtol=1e-13))
    assert abs(border) > 0.01  # far from where it would be without the denoiser
    found: tuple[float, float] = quad(density, border, at + 12 * level, points=[at], epsabs=1e-12)
    return found[0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_mixture_behind_its_exact_denoiser(alpha: float) -> None:
    """Images of two classes, with simulated votes; the truth is the quadrature's."""
    spec, sigma, trials = MixtureSpec(classes=2, size=4), 0.5, 100_000
    images, _ = Mixture(name="m", spec=spec, size=4).opened().read(range(4))
    level = Smoothing(sigmas=(sigma,), denoiser=MixtureDenoiser(spec=spec)).level(sigma)
    for row, image in enumerate(images):
        p = truth(spec, image, level)
        own = max(p, 1 - p)  # of the class that the smoothed classifier gives, right or wrong
        assert 0.51 < own < 0.9999
        selected, estimated = (votes(own, n, trials, "mixture", row, n) for n in (50, 1000))
        found = certify(selected, estimated, sigma, alpha)
        assert ((found.prediction == 1) | (found.radius > sigma * ndtri(own))).sum() <= allowed(trials, alpha)


def test_votes_of_the_evaluator_have_the_probability_of_the_quadrature() -> None:
    """End to end: views, the exact denoiser, the Bayes network and the counting agree with the quadrature."""
    spec, count = MixtureSpec(classes=2, size=4), 8
    evaluator = Smoothing(sigmas=(0.25, 1.0), denoiser=MixtureDenoiser(spec=spec), n0=10, n=2000, alpha=0.05)
    images, labels = Mixture(name="m", spec=spec, size=count).opened().read(range(count))
    batch = Batch("m", tuple(map(str, range(count))), images, labels, 0, Limits())
    model = Bayes(id="b", classes=2, spec=spec, tilt=TILT).loaded(Limits())
    seen = [evaluator.observe(model, view, batch) for view in evaluator.views(batch)]
    rows = evaluator.record({"draws": seen}, batch)
    for index, sigma in enumerate(evaluator.sigmas):
        p = np.array([truth(spec, image, evaluator.level(sigma)) for image in images])
        found = rows["estimate"][:, index, 0].numpy()
        error = np.sqrt(p * (1 - p) * 2000)
        assert (np.abs(found - 2000 * p) <= 4 * error + 1e-9).all()
        pair = [rows[name][:, index].numpy() for name in ("select", "estimate")]
        certified = certify(pair[0], pair[1], sigma, evaluator.alpha)
        wrong = (certified.prediction != (p < 0.5)) & (certified.prediction >= 0)
        assert (wrong | (certified.radius > sigma * ndtri(np.maximum(p, 1 - p)))).sum() <= allowed(count, 0.05)


# --- high precision --------------------------------------------------------------------------------------------------


def upper_tail(k: int, n: int, p: mpmath.mpf) -> mpmath.mpf:
    """P(Binomial(n, p) >= k) in 40 digits, each term from the one before it; p is below k / n, so that they fall."""
    odds = p / (1 - p)
    term = mpmath.exp(
        mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1)
        + k * mpmath.log(p) + (n - k) * mpmath.log1p(-p)
    )  # fmt: skip
    total = mpmath.mpf(0)
    for i in range(k, n + 1):
        total += term
        term *= odds * (n - i) / (i + 1)
        if term < total * mpmath.mpf(10) ** -25:
            break
    return total


def border(n: int, alpha: float) -> int:
    """The least votes that are no abstention."""
    return int(np.flatnonzero(binomial_lower(np.arange(n + 1), n, alpha) >= 0.5)[0])


def triples(count: int) -> list[tuple[int, int, float]]:
    """Votes, draws and alpha: edges, and seeded ones, all with a bound that may certify."""
    edges = [(n, n, alpha) for n in (10, 100, 1000, 10_000, 100_000) for alpha in (0.001, 0.05, 0.49)]
    edges += [(border(n, a) + more, n, a) for n in (100, 1000, 100_000) for a in ALPHAS for more in (0, 1)]
    edges += [(100_000 - miss, 100_000, 0.001) for miss in (1, 2, 50, 5000)]
    for u, v, w in rng.uniform(rng.key("triples"), range(count - len(edges)), (3,)):
        n, alpha = int(10 ** (1 + 4 * u)), float(10 ** (-5 * w - 0.31))
        low = min(n, int(n / 2 + 2 * np.sqrt(n)))
        edges.append((low + int(v * (n - low)), n, alpha))
    return edges


def test_the_radius_is_rounded_down_and_by_little(full: bool) -> None:
    """Against one evaluation of the tail on each side: never above the true radius, below by 1e-9 of it or 1e-12."""
    with mpmath.workdps(40):
        for k, n, alpha in triples(2000 if full else 100):
            low = float(binomial_lower(k, n, alpha))
            radius = mpmath.mpf(float(radius_of(np.array(low), 1.0)))
            if radius == 0:
                assert low <= 0.5 + 1e-12
                continue
            assert upper_tail(k, n, mpmath.ncdf(radius)) <= alpha
            more = radius + max(radius * mpmath.mpf("1e-9"), mpmath.mpf("1e-12"))
            assert upper_tail(k, n, mpmath.ncdf(more)) > alpha


def test_bounds_agree_with_scipy() -> None:
    """100,000 triples, to 1e-12, and never above."""
    u, v, w = rng.uniform(rng.key("scipy"), range(100_000), (3,)).T
    worst = 0.0
    for n in np.unique(np.floor(10 ** (5 * u[:400])).astype(int)):
        size = -(-100_000 // 400)
        k = 1 + np.floor(v[:size] ** 0.3 * n).astype(int)
        for alpha in (float(10 ** (-6 * w[n % 997] - 0.31)), 0.001):
            expected = beta.ppf(alpha, k, n - k + 1)
            found = binomial_lower(k, int(n), alpha)
            assert (found <= expected).all()
            worst = max(worst, float((expected - found).max()))
    assert worst < 1e-12


def test_reach_is_the_closed_form() -> None:
    for n, alpha in ((10_000, 0.001), (100_000, 0.001), (100_000, 0.01), (10, 0.001)):
        assert reach(n, 0.5, alpha) == pytest.approx(0.5 * ndtri(alpha ** (1 / n)), rel=1e-8)
    # The ceilings that the tables of denoised smoothing and of Cohen et al. have, in units of sigma.
    assert reach(10_000, 1.0, 0.001) == pytest.approx(3.20, abs=5e-3)
    assert reach(100_000, 1.0, 0.001) == pytest.approx(3.8115, abs=1e-4)
