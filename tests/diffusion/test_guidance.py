"""Guided sampling: an exponential tilt of Gaussian data in closed form, and the published steps written out anew."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch

from robustbench_diffaug import rng
from robustbench_diffaug.diffusion.adaptation import Chain
from robustbench_diffaug.diffusion.base import Posterior, Schedule, Sigma
from robustbench_diffaug.diffusion.guidance import Sampler, guided, in_groups, sample
from robustbench_diffaug.diffusion.samplers import ddim

Kind = Literal["ancestral", "ddim"]
CENTRE = torch.tensor([0.4, 0.7], dtype=torch.float64)
SPREAD = torch.tensor([[0.05, 0.02], [0.02, 0.03]], dtype=torch.float64)  # of pixels, a covariance
TILT = torch.tensor([3.0, -2.0], dtype=torch.float64)  # log p(y | x0) = TILT . x0


def gaussian(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
    """E[x0 | x] of data N(CENTRE, SPREAD), images of two pixels."""
    gain = SPREAD @ torch.linalg.inv(SPREAD + float(sigma) ** 2 * torch.eye(2, dtype=torch.float64))
    return Posterior(CENTRE.reshape(1, 1, 2) + (noisy - CENTRE.reshape(1, 1, 2)) @ gain.T)


def tilt(noisy: torch.Tensor, sigma: float, denoised: torch.Tensor) -> torch.Tensor:
    """log E[exp(TILT . x0) | x] but for a constant: the posterior is Gaussian, its covariance the same for all x."""
    return (denoised * TILT).sum(dim=(1, 2, 3))


def moments(kind: Kind, steps: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact mean and covariance of what is drawn: images are an affine function of all noises together."""
    chain, count = Chain.of(Schedule(steps=4000).sigmas(), steps), 2 * (steps + 1)
    impulses = torch.cat([torch.zeros(1, count), torch.eye(count)]).double().unflatten(1, (steps + 1, 1, 1, 2))
    guide = guided(gaussian, tilt, through=True)
    weights = torch.full((count + 1,), scale)
    drawn = sample(guide, lambda step: impulses[:, step], chain, weights, Sampler(kind)).flatten(1)
    responses = drawn[1:] - drawn[0]
    return drawn[0], responses.T @ responses


@pytest.mark.parametrize("kind", ["ancestral", "ddim"])
def test_a_tilt_moves_the_mean_by_covariance_times_it_and_keeps_the_covariance(kind: Kind) -> None:
    errors = []
    for steps in (100, 200, 400):
        mean, covariance = moments(kind, steps)
        errors.append([float((covariance - SPREAD).norm()), float((mean - CENTRE - SPREAD @ TILT).norm())])
    assert errors[-1][0] < 0.05 * float(SPREAD.norm())
    assert errors[-1][1] < 0.07 * float((SPREAD @ TILT).norm())
    # The error of a method of first order halves; of the mean of DDIM only that of where it begins and ends is left.
    halving = slice(0, 2 if kind == "ancestral" else 1)
    for coarse, fine in pairwise(errors):
        assert all(1.7 < a / b < 2.3 for a, b in zip(coarse[halving], fine[halving], strict=True)), errors


def test_many_samples_have_these_moments() -> None:
    count, steps = 20_000, 100
    chain, key = Chain.of(Schedule(steps=4000).sigmas(), steps), rng.key("test", "tilt")

    def noise(step: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(key, range(step, step + 1), (count, 1, 1, 2))[0]).double()

    drawn = sample(guided(gaussian, tilt, through=True), noise, chain, torch.ones(count)).flatten(1)
    mean, covariance = moments("ancestral", steps)
    error = (covariance.diagonal() / count).sqrt()
    assert bool(((drawn.mean(dim=0) - mean).abs() < 4 * error).all())
    assert float((torch.cov(drawn.T) - covariance).abs().max()) < 4 * float(covariance.max()) * (2 / count) ** 0.5


def test_the_scale_is_the_size_of_the_tilt() -> None:
    plain, doubled = moments("ddim", 200, 0.0)[0], moments("ddim", 200, 2.0)[0]
    assert float((plain - CENTRE).norm()) < 0.01
    assert float((doubled - CENTRE - 2 * SPREAD @ TILT).norm()) < 0.03 * float((2 * SPREAD @ TILT).norm())


SCHEDULE = Schedule(steps=25)


def drawn_noise(step: int, count: int = 5) -> torch.Tensor:
    keys = [rng.key("test", "guidance", row) for row in range(count)]
    return torch.from_numpy(
        np.concatenate([rng.normal(key, range(step, step + 1), (1, 1, 2)) for key in keys])
    ).double()


def curved(noisy: torch.Tensor, sigma: float, denoised: torch.Tensor) -> torch.Tensor:
    """A likelihood of both images that is linear in neither, and as smooth in the state at every level: errors stay."""
    return (torch.sin(2 * noisy / (1 + 4 * sigma)) * torch.cos(denoised) + torch.sin(3 * denoised)).sum(dim=(1, 2, 3))


def published(kind: Kind, scale: float, noise: Callable[[int], torch.Tensor], large: bool = False) -> torch.Tensor:
    """Algorithms 1 and 2 of Dhariwal and Nichol for images in [-1, 1], gradients with respect to z.

    Nothing is respaced; variances are those of Ho et al., section 3.2, at the first time that of the second.
    """
    beta = SCHEDULE.beta()
    kept = np.cumprod(1 - beta)
    state = noise(25)
    for t in reversed(range(25)):
        before, sigma = (kept[t - 1] if t else 1.0), float(SCHEDULE.sigmas()[t])
        state = state.detach().requires_grad_()
        image = (state / np.sqrt(kept[t]) + 1) / 2
        clean = gaussian(image, sigma).mean
        (slope,) = torch.autograd.grad(curved(image, sigma, clean).sum(), state)
        state, clean = state.detach(), 2 * clean.detach() - 1
        if kind == "ddim":
            eps = (state - np.sqrt(kept[t]) * clean) / np.sqrt(1 - kept[t]) - scale * np.sqrt(1 - kept[t]) * slope
            found = (state - np.sqrt(1 - kept[t]) * eps) / np.sqrt(kept[t])
            state = np.sqrt(before) * found + np.sqrt(1 - before) * eps
            continue
        s, prior = max(t, 1), kept[max(t, 1) - 1]
        variance = beta[t] if large else beta[s] * (1 - prior) / (1 - kept[s])
        mean = np.sqrt(before) * beta[t] / (1 - kept[t]) * clean
        mean = mean + np.sqrt(1 - beta[t]) * (1 - before) / (1 - kept[t]) * state
        state = mean + scale * variance * slope + (np.sqrt(variance) * noise(t) if t else 0)
    return (state + 1) / 2


@pytest.mark.parametrize("scale", [0.0, 1.7])
@pytest.mark.parametrize("kind", ["ancestral", "ddim"])
def test_steps_are_the_published_ones(kind: Kind, scale: float) -> None:
    chain = Chain.of(SCHEDULE.sigmas(), 25)
    for variance in ("small", "large"):
        sampler = Sampler(kind, variance)
        guide = guided(gaussian, curved, through=True)
        found = sample(guide, drawn_noise, chain, torch.full((5,), scale, dtype=torch.float64), sampler)
        assert float((found - published(kind, scale, drawn_noise, variance == "large")).abs().max()) < 1e-10


def test_without_scale_it_is_the_unguided_sampler() -> None:
    chain = Chain.of(SCHEDULE.sigmas(), 12)
    none = sample(guided(gaussian, None, through=False), drawn_noise, chain, torch.ones(5), Sampler("ddim"))
    zero = sample(guided(gaussian, curved, through=True), drawn_noise, chain, torch.zeros(5), Sampler("ddim"))
    assert torch.equal(none, zero)
    images = (drawn_noise(12) / float(chain.alpha[-1]) + 1) / 2
    for level, following in zip(chain.sigma[::-1], [*chain.sigma[-2::-1], 0.0], strict=True):
        images = ddim(gaussian, images, float(level), float(following))
    assert float((none - images).abs().max()) < 1e-10


def test_the_mean_is_the_grey_that_images_begin_around() -> None:
    seen: list[torch.Tensor] = []

    def watched(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
        seen.append(noisy)
        return gaussian(noisy, sigma)

    chain = Chain.of(SCHEDULE.sigmas()[:10], 10)
    sample(guided(watched, None, False), lambda _: torch.zeros(1, 1, 1, 2), chain, torch.ones(1), Sampler(mean=0.2))
    assert torch.allclose(seen[0], torch.tensor(0.2))


@pytest.mark.parametrize(("spread", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_the_learned_variance_lies_between_the_two(spread: float, variance: Literal["small", "large"]) -> None:
    def learned(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
        return Posterior(gaussian(noisy, sigma).mean, torch.full_like(noisy, spread))

    chain = Chain.of(SCHEDULE.sigmas(), 25)
    guides = in_groups([guided(learned, curved, through=True)] * 3, 2)
    one = sample(guides, drawn_noise, chain, torch.ones(5), Sampler(variance="learned"))
    other = sample(guided(gaussian, curved, True), drawn_noise, chain, torch.ones(5), Sampler(variance=variance))
    assert float((one - other).abs().max()) < 1e-10
    with pytest.raises(ValueError, match="no learned variance"):
        sample(guided(gaussian, None, False), drawn_noise, chain, torch.ones(5), Sampler(variance="learned"))


def test_the_gradient_goes_through_the_denoiser_only_where_it_is_asked_for() -> None:
    asked: list[bool] = []

    def watched(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
        asked.append(noisy.requires_grad)
        return gaussian(noisy, sigma)

    images = drawn_noise(0)
    beside = guided(watched, lambda noisy, sigma, denoised: noisy.square().sum(dim=(1, 2, 3)), through=False)
    assert torch.allclose(beside(images, 0.3).gradient, 2 * images)
    through = guided(watched, lambda noisy, sigma, denoised: denoised.square().sum(dim=(1, 2, 3)), through=True)
    slope, step = through(images, 0.3).gradient, torch.zeros_like(images)
    step[:, 0, 0, 1] = 1e-6
    ends = [gaussian(images + sign * step, 0.3).mean.square().sum(dim=(1, 2, 3)) for sign in (1, -1)]
    assert torch.allclose((ends[0] - ends[1]) / 2e-6, slope[:, 0, 0, 1], atol=1e-7, rtol=1e-6)
    assert asked == [False, True]
    assert not slope.requires_grad


def test_what_has_no_gradient_is_refused() -> None:
    guide = guided(gaussian, lambda noisy, sigma, denoised: noisy.detach().sum(dim=(1, 2, 3)), through=True)
    with pytest.raises(ValueError, match="has no gradient with respect to the image"):
        guide(drawn_noise(0), 0.3)


@pytest.mark.parametrize("kind", ["ancestral", "ddim"])
def test_an_image_does_not_depend_on_those_beside(kind: Kind) -> None:
    chain, scale = Chain.of(SCHEDULE.sigmas(), 25), torch.tensor([0.0, 1, 2, 1, 5])
    guide = guided(gaussian, curved, through=True)
    together = sample(guide, drawn_noise, chain, scale, Sampler(kind))
    alone = sample(guide, lambda step: drawn_noise(step)[2:3], chain, scale[2:3], Sampler(kind))
    assert float((together[2:3] - alone).abs().max()) < 1e-12
