"""Products with Jacobians of denoisers against matrices, closed forms and finite differences."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.data.embedded import Mnist5k
from robustbench_diffaug.diffusion import jacobian as linear
from robustbench_diffaug.diffusion.base import Denoise, Posterior, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.jacobian import Jacobian
from robustbench_diffaug.diffusion.unet import UNet
from robustbench_diffaug.mixture import MixtureSpec

SPEC = MixtureSpec()
BUNDLED = UNet(folder="rdiff:zoo/mnist5k-ddpm", clip=False, microbatch=32)


def normal(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(rng.key(name), range(1), shape)[0]).double()


def matrices(matrix: Tensor) -> Denoise:
    """The denoiser D(x) = A x, with another A for each noise level: sigma times the matrix."""

    def denoise(noisy: Tensor, sigma: Sigma) -> Posterior:
        levels = torch.as_tensor(sigma, dtype=noisy.dtype).expand(len(noisy))
        rows = noisy.flatten(1) @ matrix.mT * levels[:, None]
        return Posterior(rows.reshape(noisy.shape))

    return denoise


def mixture(count: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Images of the mixture, and the same with noise, float64."""
    chance = rng.uniform(rng.key("class"), range(1), (count,))[0]
    labels = torch.from_numpy((chance * SPEC.classes).astype(np.int64))
    clean = SPEC.means()[labels] + SPEC.spread * normal("x0", count, 1, 8, 8)
    return clean, clean + sigma * normal("eps", count, 1, 8, 8)


def covariance(noisy: Tensor, sigma: float) -> Tensor:
    """Cov[x0 | x] of one image under the mixture, from its own formula."""
    spread, means = SPEC.spread**2, SPEC.means().flatten(1)
    total = spread + sigma**2
    weights = torch.softmax(-(noisy.flatten() - means).square().sum(dim=1) / (2 * total), dim=0)
    posterior = (spread * noisy.flatten() + sigma**2 * means) / total
    apart = posterior - weights @ posterior
    return spread * sigma**2 / total * torch.eye(64, dtype=torch.float64) + apart.mT @ (weights[:, None] * apart)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_theorem_1(sigma: float) -> None:
    _, noisy = mixture(6, sigma)
    denoise = MixtureDenoiser(spec=SPEC, clip=False).loaded(Limits())
    found = linear.exact(Jacobian(denoise, noisy, sigma, copies=7))
    expected = torch.stack([covariance(image, sigma) / sigma**2 for image in noisy])
    assert float((found - expected).abs().max()) < 1e-8
    assert float((found - found.mT).abs().max()) < 1e-12
    assert float(torch.linalg.eigvalsh(found).min()) > 0
    jacobian = Jacobian(denoise, noisy, sigma, copies=3)
    parts = linear.svd(jacobian, normal("start", 6, 64, 64), 3, iterations=0)
    values, vectors = torch.linalg.eigh(expected)
    assert torch.allclose(parts.values, values.flip(1)[:, :3], atol=1e-8)
    distinct = values[:, -1] - values[:, -2] > 1e-3  # else the first vector is any of a plane
    aligned = (parts.left[:, 0] * vectors[:, :, -1]).sum(dim=1).abs()
    assert float((aligned[distinct] - 1).abs().max() if distinct.any() else 0.0) < 1e-8


def test_the_trace_is_the_normalised_error() -> None:
    sigma = 0.3
    clean, noisy = mixture(1000, sigma)
    jacobian = Jacobian(MixtureDenoiser(spec=SPEC, clip=False).loaded(Limits()), noisy, sigma)
    traces = torch.stack([(covariance(image, sigma) / sigma**2).trace() for image in noisy])
    errors = (clean - jacobian.mean).square().sum(dim=(1, 2, 3)) / sigma**2
    gap = errors - traces
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / 1000**0.5
    assert float(gap.mean().abs()) < 0.1 * float(traces.mean())
    estimated = linear.trace(jacobian, normal("probes", 1000, 4, 64).sign())
    left = estimated - traces
    assert abs(float(left.mean())) < 4 * float(left.std()) / 1000**0.5


@settings(max_examples=25, deadline=None)
@given(some.integers(0, 2**32), some.integers(1, 6), some.integers(1, 5), some.integers(1, 3))
def test_products_are_those_of_the_matrix(seed: int, vectors: int, copies: int, images: int) -> None:
    matrix = normal(f"matrix/{seed}", 12, 12)
    noisy, rows = normal(f"x/{seed}", images, 3, 2, 2), normal(f"v/{seed}", images, vectors, 12)
    levels = torch.arange(1, images + 1, dtype=torch.float64)
    jacobian = Jacobian(matrices(matrix), noisy, levels, copies)
    scale = levels[:, None, None]
    assert torch.allclose(jacobian.jvp(rows), scale * rows @ matrix.mT, atol=1e-12)
    assert torch.allclose(jacobian.vjp(rows), scale * rows @ matrix, atol=1e-12)
    assert torch.allclose(linear.exact(jacobian), scale * matrix, atol=1e-12)
    assert torch.allclose(jacobian.mean.flatten(1), scale[:, 0] * noisy.flatten(1) @ matrix.mT, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(some.integers(0, 2**32), some.integers(1, 4), some.integers(0, 2))
def test_low_rank_is_found_whole(seed: int, rank: int, iterations: int) -> None:
    """A matrix of rank r is its r singular values and vectors, whatever the random start."""
    matrix = normal(f"left/{seed}", 12, rank) @ normal(f"right/{seed}", rank, 12)
    jacobian = Jacobian(matrices(matrix), normal("x", 1, 3, 2, 2), 1.0, 2)
    parts = linear.svd(jacobian, normal(f"start/{seed}", 1, rank + 2, 12), rank, iterations)
    assert torch.allclose(parts.left[0].mT @ (parts.values[0, :, None] * parts.right[0]), matrix, atol=1e-8)
    assert torch.allclose(parts.values[0], torch.linalg.svdvals(matrix)[:rank], atol=1e-8)
    assert bool((parts.left.gather(2, parts.left.abs().argmax(dim=2, keepdim=True)) > 0).all())
    whole = linear.whole_svd(matrix[None], rank)
    assert torch.allclose(whole.left[0].mT @ (whole.values[0, :, None] * whole.right[0]), matrix, atol=1e-8)


def test_sketches_and_the_smallest_eigenvalue() -> None:
    matrix = normal("matrix", 48, 48) / 7 + torch.eye(48, dtype=torch.float64)
    jacobian = Jacobian(matrices(matrix), normal("x", 2, 3, 4, 4), 1.0, 16)
    whole = linear.summary(linear.exact(jacobian))
    expected = float(((matrix - matrix.mT).square().sum() / matrix.square().sum()).sqrt())
    assert torch.allclose(whole.asymmetry, torch.full((2,), expected, dtype=torch.float64))
    assert torch.allclose(whole.rank, matrix.trace() ** 2 / matrix.square().sum())
    estimated = linear.sketch(jacobian, normal("probes", 2, 2000, 48).sign())
    for found, value in zip(estimated, whole, strict=True):
        assert torch.allclose(found, value, rtol=0.1)
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    lowest = [linear.smallest(jacobian, normal("start", 2, 4, 48), steps) for steps in (1, 3, 6, 12, 99)]
    for few, more in pairwise(lowest):
        assert bool((more <= few + 1e-12).all())
        assert bool((more >= values[0] - 1e-12).all())
    assert torch.allclose(lowest[-1], values[0].expand(2), atol=1e-10)


def test_an_exhausted_span_has_no_eigenvalue_of_its_own() -> None:
    """Two distinct eigenvalues are found in two steps; what follows is rounding, and must not fall below them."""
    axis = torch.linalg.qr(normal("axis", 24, 3))[0]
    matrix = torch.eye(24, dtype=torch.float64) - 1.5 * axis @ axis.mT
    jacobian = Jacobian(matrices(matrix), normal("x", 1, 1, 4, 6), 1.0, 4)
    found = linear.smallest(jacobian, normal("start", 1, 4, 24), 6)
    assert float((found + 0.5).abs().max()) < 1e-10


def test_the_bundled_denoiser() -> None:
    """Leading singular values and vectors against the whole matrix of a trained network of 32 x 32 pixels."""
    images, _ = Mnist5k().opened().read([3])
    sigma = BUNDLED.sigma(300)
    noisy = (images + sigma * normal("eps", 1, 1, 32, 32)).double()
    jacobian = Jacobian(BUNDLED.loaded(Limits()), noisy, sigma, copies=32)
    whole = linear.whole_svd(linear.exact(jacobian), 8)
    found = linear.svd(jacobian, normal("start", 1, 24, 1024), 8)
    assert torch.allclose(found.values, whole.values, rtol=2e-3)
    aligned = (found.left * whole.left).sum(dim=2).abs()
    assert float(aligned[:, :4].min()) > 0.99
    rows = normal("v", 1, 3, 1024)
    across = (jacobian.jvp(rows) * found.left[:, :3]).sum(dim=2)
    back = (rows * jacobian.vjp(found.left[:, :3].contiguous())).sum(dim=2)
    assert torch.allclose(across, back, rtol=1e-3, atol=1e-4)  # <u, J v> = <J^T u, v>, in float32


def test_finite_differences() -> None:
    exactly = BUNDLED.model_copy(update={"precision": "float64", "microbatch": 2})
    denoise, sigma, step = exactly.loaded(Limits()), exactly.sigma(300), 1e-5
    images, _ = Mnist5k().opened().read([5])
    noisy, rows = images.double() + sigma * normal("eps", 1, 1, 32, 32), normal("v", 1, 2, 1024)
    found = Jacobian(denoise, noisy, sigma, copies=2).jvp(rows)
    for row, product in zip(rows[0], found[0], strict=True):
        shift = step * row.reshape(noisy.shape)
        expected = (denoise(noisy + shift, sigma).mean - denoise(noisy - shift, sigma).mean).flatten() / (2 * step)
        assert float((product - expected).norm() / expected.norm()) < 1e-4


def test_what_cannot_be_computed_is_named() -> None:
    noisy = normal("x", 1, 1, 2, 2)
    with pytest.raises(ValueError, match="not differentiable"):
        Jacobian(lambda images, sigma: Posterior(images.detach()), noisy, 1.0)
    jacobian = Jacobian(matrices(torch.eye(4, dtype=torch.float64)), noisy, 1.0)
    for k, start in ((3, 2), (0, 2), (2, 5)):
        with pytest.raises(ValueError, match="needed is 1 <= k"):
            linear.svd(jacobian, normal("start", 1, start, 4), k)
    with pytest.raises(ValueError, match="two or more"):
        linear.sketch(jacobian, normal("start", 1, 1, 4))
