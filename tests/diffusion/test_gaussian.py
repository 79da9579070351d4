"""The exact denoiser of a mixture against independent computations."""

import numpy as np
import torch
from scipy.stats import norm

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.mixture import MixtureSpec


def test_one_pixel_against_quadrature() -> None:
    spec = MixtureSpec(classes=3, size=1, spread=0.05, contrast=0.2)
    means = spec.means().flatten().tolist()
    denoise = MixtureDenoiser(spec=spec, clip=False).loaded(Limits())
    grid = np.linspace(-1.5, 2.5, 400_001)
    prior = np.logaddexp.reduce([norm.logpdf(grid, mean, 0.05) for mean in means])
    for sigma in (0.02, 0.1, 0.7):
        for noisy in (-0.3, 0.45, 0.52, 1.2):
            joint = prior + norm.logpdf(noisy, grid, sigma)
            weights = np.exp(joint - joint.max())  # the step is far below both widths: the sum is the integral
            expected = float((grid * weights).sum() / weights.sum())
            found = denoise(torch.tensor([[[[noisy]]]], dtype=torch.float64), sigma).mean
            assert abs(float(found) - expected) < 1e-9


def test_it_is_the_best_estimate() -> None:
    """The posterior mean is orthogonal to every function of the noisy image: E[(x0 - D(x)) g(x)] = 0."""
    spec = MixtureSpec(size=4)
    count, sigma = 20_000, 0.3
    chance = rng.uniform(rng.key("class"), range(1), (count,))[0]
    labels = torch.from_numpy((chance * spec.classes).astype(np.int64))
    shape = (count, 1, 4, 4)
    clean = spec.means()[labels] + spec.spread * torch.from_numpy(rng.normal(rng.key("x0"), range(1), shape)[0])
    noisy = clean + sigma * torch.from_numpy(rng.normal(rng.key("eps"), range(1), shape)[0])
    left = clean - MixtureDenoiser(spec=spec, clip=False).loaded(Limits())(noisy, sigma).mean
    for probe in (torch.ones_like(noisy), noisy - 0.5, (noisy - 0.5) ** 2):
        products = (left * probe).flatten(1).sum(1)
        assert abs(float(products.mean())) < 4 * float(products.std()) / count**0.5


def test_levels_per_image_and_leading_axes() -> None:
    spec = MixtureSpec()
    denoise = MixtureDenoiser(spec=spec).loaded(Limits())
    noisy = torch.from_numpy(rng.normal(rng.key("lead"), range(1), (2, 3, 1, 8, 8))[0])
    levels = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    together = denoise(noisy, levels).mean
    for row in range(2):
        for draw in range(3):
            assert torch.equal(together[row, draw], denoise(noisy[row, draw], float(levels[row, draw])).mean)
