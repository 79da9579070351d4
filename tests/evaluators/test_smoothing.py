"""Certificates against closed forms, high precision, and the published loop."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import ndtri
from scipy.stats import beta, binom
from torch import nn

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.evaluators.smoothing import Smoothing, certify, radius_of
from robustbench_diffaug.records import Declared, Records


def published(select: np.ndarray, estimate: np.ndarray, sigma: float, alpha: float) -> tuple[int, float]:
    """CERTIFY of Cohen et al. for one sample, from its pseudo-code."""
    candidate, n = int(select.argmax()), int(estimate.sum())
    k = int(estimate[candidate])
    low = 0.0 if k == 0 else float(beta.ppf(alpha, k, n - k + 1))
    return (-1, 0.0) if low < 0.5 else (candidate, sigma * float(ndtri(low)))


def test_certify_is_the_published_algorithm() -> None:
    chance = rng.uniform(rng.key("votes"), range(200), (3,))
    for alpha in (0.001, 0.05):
        select = np.floor(chance * 20).astype(np.int64)
        shares = chance / chance.sum(axis=1, keepdims=True)
        estimate = np.floor(shares * 400).astype(np.int64)
        estimate[:, 0] += 400 - estimate.sum(axis=1)
        found = certify(select, estimate, 0.5, alpha)
        for row in range(200):
            prediction, radius = published(select[row], estimate[row], 0.5, alpha)
            assert found.prediction[row] == prediction
            assert radius - 1e-9 <= found.radius[row] <= radius


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_radius_never_exceeds_the_exact_one(numerator: int, extra: int) -> None:
    p = numerator / (numerator + extra)
    found = float(radius_of(np.array(p), 1.0))
    with mpmath.workdps(60):
        exact = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1) if p > 0.5 else mpmath.mpf(0)
        assert mpmath.mpf(found) <= exact
        assert exact - mpmath.mpf(found) <= mpmath.mpf("1e-9") * exact + mpmath.mpf("1e-12")


def test_linear_classifier_is_never_certified_beyond_its_margin() -> None:
    """Votes of a linear classifier are binomial with p = Phi(margin / sigma): failures stay within alpha."""
    sigma, alpha, n, trials = 0.5, 0.05, 100, 20_000
    margin = 0.3
    p = float(0.5 * (1 + mpmath.erf(margin / sigma / mpmath.sqrt(2))))
    votes = binom.ppf(rng.uniform(rng.key("linear votes"), range(1), (trials,))[0], n, p).astype(np.int64)
    estimate = np.stack([votes, n - votes], axis=1)
    select = np.tile([10, 0], (trials, 1))
    found = certify(select, estimate, sigma, alpha)
    failures = int((found.radius > margin).sum())
    assert failures <= binom.ppf(0.9999, trials, alpha)
    # and the test can fail: a bound that is taken at 1/2 would fail half of the time
    naive = sigma * ndtri(np.clip(votes / n, 1e-9, 1 - 1e-9))
    assert (naive > margin).sum() > 0.3 * trials


@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_whole_evaluator_on_a_linear_network(alpha: float) -> None:
    """Through views, network and records: the certified radius stays below |w.x + b| / ||w||."""
    size, count = 4, 48
    weight = torch.from_numpy(rng.normal(rng.key("w"), range(1), (2, size * size))[0])
    layer = nn.Linear(size * size, 2)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(-weight.sum(1) / 2)
    model = Model("linear", nn.Sequential(nn.Flatten(), layer).requires_grad_(False), lambda x: x, 2, 128)
    images = 0.5 + 0.1 * torch.from_numpy(rng.normal(rng.key("x"), range(count), (1, size, size)))
    evaluator = Smoothing(sigmas=(0.25,), n0=20, n=500, alpha=alpha)
    ids = tuple(map(str, range(count)))
    labels = model.logits(images).argmax(1)
    batch = Batch("linear", ids, images, labels, 0, Limits())
    seen: dict[str, list[dict[str, torch.Tensor]]] = {}
    for view in evaluator.views(batch):
        seen.setdefault(view.name, []).append(dict(evaluator.observe(model, view, batch)))
    rows = evaluator.record(seen, batch)
    assert rows["select"].sum() == 20 * count
    assert rows["estimate"].sum() == 500 * count
    found = certify(rows["select"][:, 0].numpy(), rows["estimate"][:, 0].numpy(), 0.25, alpha)
    logits = model.logits(images).double()
    gap = (weight[0] - weight[1]).double().norm()
    exact = ((logits[:, 0] - logits[:, 1]).abs() / gap).numpy()
    right = found.prediction == labels.numpy()
    assert (found.radius[~right & (found.prediction >= 0)] >= 0).sum() <= binom.ppf(0.9999, count, alpha)
    assert (found.radius[right] > exact[right]).sum() <= binom.ppf(0.9999, count, alpha)
    assert (found.radius[right] / exact[right]).max() > 0.6  # and they are not trivially small


def test_coverage_of_the_lower_bound() -> None:
    """The bound fails with probability at most alpha, and not much less: by exact enumeration."""
    for n in (30, 100, 1000):
        for p in (0.5, 0.6, 0.9, 0.99, 0.999):
            votes = np.arange(n + 1)
            from robustbench_diffaug.stats import binomial_lower

            failing = binomial_lower(votes, n, 0.05) > p
            assert binom.pmf(votes, n, p)[failing].sum() <= 0.05


def test_level_is_the_schedules_and_the_certificate_is_nominal() -> None:
    evaluator = Smoothing(sigmas=(0.25,), denoiser=MixtureDenoiser(), n0=4, n=16)
    assert evaluator.level(0.25) == pytest.approx(0.2516, abs=1e-4)
    assert evaluator.level(0.25) >= 0.25
    assert evaluator.forwards() == (20, 20)
    assert Smoothing(sigmas=(0.25,), n0=4, n=16).forwards() == (0, 20)


def records(select: list[list[int]], estimate: list[list[int]], labels: list[int]) -> Records:
    columns = {
        "dataset": np.array(["d"] * len(labels)),
        "origin": np.array(["d"] * len(labels)),
        "sample": np.array(list(map(str, range(len(labels))))),
        "label": np.array(labels),
        "select": np.array(select)[:, None],
        "estimate": np.array(estimate)[:, None],
    }
    return Records(columns, (Declared("d", "d", "clean", 0, len(labels), 100),))


def test_metrics_by_hand() -> None:
    # unanimous and right; unanimous and wrong; undecided
    found = records([[9, 0], [0, 9], [5, 4]], [[100, 0], [0, 100], [55, 45]], [0, 0, 0])
    evaluator = Smoothing(sigmas=(0.5,), n0=9, n=100, radii=(0.0, 0.5, 0.75))
    figures = {figure.name: figure for figure in evaluator.metrics(found)}
    reach = evaluator.reach(0.5)
    assert reach == pytest.approx(0.5 * ndtri(0.001 ** (1 / 100)), rel=1e-9)
    assert figures["certified@0.00"].value == pytest.approx(1 / 3)
    assert figures["certified@0.50"].value == pytest.approx(1 / 3)
    assert figures["certified@0.75"].value == pytest.approx(1 / 3 if reach >= 0.75 else 0)
    assert figures["abstain"].value == pytest.approx(1 / 3)
    assert figures["acr"].value == pytest.approx(reach / 3)
    assert (figures["acr"].n, figures["acr"].n_available) == (3, 100)
    for figure in figures.values():
        assert figure.low <= figure.value <= figure.high
    assert figures["certified@0.50"].high < 1 or figures["certified@0.50"].n == 3


def test_alpha_is_read_by_metrics_alone() -> None:
    one, other = Smoothing(n=100, alpha=0.001), Smoothing(n=100, alpha=0.05, radii=(0.1,))
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != Smoothing(n=101, alpha=0.001).fingerprint
    found = records([[9, 0]], [[95, 5]], [0])
    strict = {f.name: f.value for f in one.model_copy(update={"sigmas": (0.5,)}).metrics(found)}
    loose = {f.name: f.value for f in other.model_copy(update={"sigmas": (0.5,)}).metrics(found)}
    assert loose["acr"] > strict["acr"] > 0


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="n must be at least 10"):
        Smoothing(n=9, alpha=0.001)
    assert Smoothing(n=10, alpha=0.001).reach(1.0) > 0
    with pytest.raises(ValidationError, match="repeats"):
        Smoothing(sigmas=(0.5, 0.5))
    for alpha in (0.0, 0.5, 1.0, -0.1, float("nan")):
        with pytest.raises(ValidationError):
            Smoothing(alpha=alpha)
    with pytest.raises(ValueError, match="beyond the schedule"):
        Smoothing(sigmas=(500.0,), denoiser=MixtureDenoiser()).check()
    (warning,) = Smoothing(sigmas=(0.25,), n=100, radii=(0.25, 0.9)).check()
    assert "0.9" in warning
