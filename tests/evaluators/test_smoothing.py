"""The evaluator: certificates against the published loop, packing, several steps, and what it refuses."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from pydantic import ValidationError
from scipy.special import ndtri
from scipy.stats import beta, binom
from torch import nn

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Batch, Columns, Limits
from robustbench_diffaug.checkpoints.base import Preprocess
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.unet import as_denoise
from robustbench_diffaug.evaluators.certificates import certify, radius_of
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.records import Declared, Records
from robustbench_diffaug.testing import check_evaluator


def published(select: np.ndarray, estimate: np.ndarray, sigma: float, alpha: float) -> tuple[int, float]:
    """CERTIFY of Cohen et al. for one sample, from its pseudo-code."""
    candidate, n = int(select.argmax()), int(estimate.sum())
    k = int(estimate[candidate])
    low = 0.0 if k == 0 else float(beta.ppf(alpha, k, n - k + 1))
    return (-1, 0.0) if low < 0.5 else (candidate, sigma * float(ndtri(low)))


def evaluated(evaluator: Smoothing, model: Model, batch: Batch) -> Columns:
    """The rows of a batch."""
    return evaluator.record(
        {"draws": [evaluator.observe(model, view, batch) for view in evaluator.views(batch)]}, batch
    )


def images_of(count: int, limits: Limits = Limits()) -> Batch:  # noqa: B008  (a frozen value)
    """Images of the mixture."""
    images, labels = Mixture(name="m", size=count).opened().read(range(count))
    return Batch("m", tuple(map(str, range(count))), images, labels, 0, limits)


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
    rows = evaluated(evaluator, model, batch)
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
    assert evaluator.forwards().of(1, 1) == (20, 20, 0)
    assert Smoothing(sigmas=(0.25,), n0=4, n=16).forwards().of(1, 1) == (0, 20, 0)


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
    assert figures["certified@0.50"].high < 1 or figures["certified@0.50"].n == 3


def test_alpha_is_read_by_metrics_alone() -> None:
    one, other = Smoothing(n=100, alpha=0.001), Smoothing(n=100, alpha=0.05, radii=(0.1,))
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != Smoothing(n=101, alpha=0.001).fingerprint
    found = records([[9, 0]], [[95, 5]], [0])
    strict = {f.name: f.value for f in one.model_copy(update={"sigmas": (0.5,)}).metrics(found)}
    loose = {f.name: f.value for f in other.model_copy(update={"sigmas": (0.5,)}).metrics(found)}
    assert loose["acr"] > strict["acr"] > 0


class Told(MixtureDenoiser):
    """A denoiser that must be told the class."""

    def unconditional(self) -> bool:
        return False


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
    with pytest.raises(ValidationError, match="no denoiser takes them"):
        Smoothing(steps=2)
    with pytest.raises(ValueError, match="no 300 steps below it"):
        Smoothing(sigmas=(0.25,), denoiser=MixtureDenoiser(), steps=300).check()
    with pytest.raises(ValidationError, match="radii repeats"):
        Smoothing(radii=(0.5, 0.5))
    batch = images_of(2)
    unlabelled = Batch(batch.dataset, batch.ids, batch.images, torch.tensor([0, -1]), 0, batch.limits)
    with pytest.raises(ValueError, match="m has images without a label"):
        next(iter(Smoothing(sigmas=(0.5,), n0=4, n=16).views(unlabelled)))  # before anything is spent on them
    with pytest.raises(ValidationError, match="repeats a level, to the six digits"):
        Smoothing(sigmas=(0.2500001, 0.2500002))
    with pytest.raises(ValueError, match="needs the class of each image; give an unconditional one"):
        Smoothing(sigmas=(0.5,), n0=4, n=16, denoiser=Told()).check()


# --- packing ---------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A network that counts the rows it is given, and those of them that are padding: all zeros."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows, self.padding, self.shapes = network, 0, 0, set[int]()

    def forward(self, images: torch.Tensor, *told: torch.Tensor) -> object:
        self.rows += len(images)
        self.padding += int((images.flatten(1) == 0).all(dim=1).sum())
        self.shapes.add(len(images))
        return self.network(images, *told)


class Output:
    """What a denoising network returns."""

    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


class Silent(nn.Module):
    """Predicts no noise."""

    def forward(self, images: torch.Tensor, times: torch.Tensor) -> Output:
        return Output(torch.zeros_like(images))


class Watched(Denoiser):
    """A denoiser around a counted network."""

    kind: str = "watched"

    def sigmas(self) -> Float[np.ndarray, " t"]:
        return Schedule().sigmas()

    def load(self, device: torch.device) -> Denoise:
        return as_denoise(NETWORK, Schedule(), microbatch=self.microbatch)


NETWORK = Counted(Silent())


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_hardly_any_row_is_padding(count: int) -> None:
    """With 100 and 1,000 draws at two levels; one round at a time would pad up to 5 of 100 rows."""
    NETWORK.rows = NETWORK.padding = 0
    evaluator = Smoothing(sigmas=(0.25, 0.5), denoiser=Watched(), n0=100, n=1000)
    classifier = Counted(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    model = Model("counted", classifier.requires_grad_(False), lambda x: x, 3, 128)
    batch = images_of(count)
    rows = evaluated(evaluator, model, batch)
    needed = 2200 * count
    for counted in (NETWORK, classifier):
        assert counted.shapes == {128}
        assert counted.rows - needed < 0.02 * counted.rows
        assert counted.padding == counted.rows - needed
    assert rows["select"].dtype == rows["estimate"].dtype == torch.int32
    assert (rows["select"].sum(-1) == 100).all()
    assert (rows["estimate"].sum(-1) == 1000).all()


def test_votes_are_those_of_each_round_alone() -> None:
    """Against the plain loop: for each level and round all draws of its stream, denoised at one level, and counted."""
    evaluator = Smoothing(sigmas=(0.5, 0.25), denoiser=MixtureDenoiser(), n0=13, n=61)
    model = Bayes(id="b", classes=4, temperature=0.01).loaded(Limits())
    for batch in (images_of(3), images_of(3, Limits(budget=7)), images_of(5, Limits(budget=64))):
        rows = evaluated(evaluator, model, batch)
        for index, sigma in enumerate(evaluator.sigmas):
            level = evaluator.level(sigma)
            for name, draws in (("select", 13), ("estimate", 61)):
                noise = torch.cat(list(batch.noise(f"smoothing/{name}/{sigma!r}", range(draws))), dim=1)
                clean = MixtureDenoiser().loaded(Limits())(batch.images[:, None] + level * noise, level).mean
                classes = model.logits(clean).argmax(-1)
                expected = torch.nn.functional.one_hot(classes, 4).sum(1)
                assert torch.equal(rows[name][:, index], expected.int())
        assert rows["level"].tolist() == [[evaluator.level(0.5), evaluator.level(0.25)]] * len(batch.ids)


@pytest.mark.parametrize("settings", [{}, {"denoiser": MixtureDenoiser()}, {"denoiser": MixtureDenoiser(), "steps": 3}])
def test_promises_of_an_evaluator(settings: dict[str, object]) -> None:
    check_evaluator(Smoothing.model_validate({"sigmas": (0.25, 0.5), "n0": 6, "n": 21} | settings))


# --- several steps, and sizes ----------------------------------------------------------------------------------------


def test_times_of_several_steps() -> None:
    evaluator = Smoothing(sigmas=(0.25,), denoiser=MixtureDenoiser(), steps=4)
    noise = MixtureDenoiser()
    assert noise.time(0.25) == 145
    assert evaluator.path(0.25) == tuple(noise.sigma(t) for t in (145, 109, 73, 37))
    assert Smoothing(sigmas=(0.25,), denoiser=noise, steps=145).path(0.25)[-1] == noise.sigma(1)
    assert evaluator.forwards().of(1, 1) == (4 * 10_100, 10_100, 0)


def test_several_steps_follow_the_flow() -> None:
    """Of one Gaussian the flow has a closed form: `m + (x - m) s / sqrt(s^2 + sigma^2)`, which many steps come near."""
    spread, level = 0.2, 0.5

    class Gaussian(Denoiser):
        kind: str = "gaussian"

        def sigmas(self) -> Float[np.ndarray, " t"]:
            return Schedule().sigmas()

        def load(self, device: torch.device) -> Denoise:
            def denoise(noisy: Float[torch.Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
                variance = torch.as_tensor(sigma).to(noisy).expand(noisy.shape[:-3])[..., None, None, None] ** 2
                return Posterior((spread**2 * noisy + variance * 0.5) / (spread**2 + variance))

            return denoise

    batch, gaps = images_of(2), []
    for steps in (1, 4, 16, 128):
        evaluator = Smoothing(sigmas=(level,), denoiser=Gaussian(), steps=steps, n0=5, n=20, alpha=0.05)
        (view,) = evaluator.views(batch)
        noise = torch.cat(
            [next(batch.noise(f"smoothing/{name}/0.5", range(n))) for name, n in (("select", 5), ("estimate", 20))], 1
        )
        first = evaluator.level(level)
        exact = 0.5 + (batch.images[:, None] + first * noise - 0.5) * spread / np.sqrt(spread**2 + first**2)
        gaps.append(float((view.images - exact).abs().max()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.02 < 0.1 < gaps[0]


def test_the_classifier_resizes_what_the_denoiser_made() -> None:
    """The denoiser sees the dataset's size; resizing [0, 1] is resizing [-1, 1], as published, up to rounding."""
    sizes = []
    preprocess = Preprocess(size=12, mean=(0.5,), std=(0.5,))

    class Sized(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(images.shape[1:]))
            return images.flatten(1)[:, :4]

    model = Model("sized", Sized(), preprocess, 4, 128)
    evaluated(Smoothing(sigmas=(0.5,), denoiser=MixtureDenoiser(), n0=4, n=16), model, images_of(2))
    assert set(sizes) == {(1, 12, 12)}
    images = images_of(2).images
    resize = Preprocess(size=12)
    assert torch.allclose(preprocess(images), resize(2 * images - 1), atol=1e-6)


def test_networks_that_were_trained_on_noise_are_told_its_level() -> None:
    told = []

    class Told(nn.Module):
        def forward(self, planes: torch.Tensor) -> torch.Tensor:
            told.append(planes[:, 1:, 0, 0])
            return planes.flatten(1)[:, :4]

    model = Model("told", Told(), lambda x: x, 4, 32, wants=("sigma",))
    evaluated(Smoothing(sigmas=(0.25, 0.5), n0=4, n=12), model, images_of(1))
    assert len(torch.cat(told)[:32].unique(dim=0)) == 2
    with pytest.raises(ValueError, match="wants sigma"):
        evaluated(Smoothing(sigmas=(0.5,), denoiser=MixtureDenoiser(), n0=4, n=12), model, images_of(1))
