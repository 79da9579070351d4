"""The toy's denoiser against quadrature, its score against differences, and what denoising does to distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp

from robustbench_diffaug.diffusion.toy import Toy

POINTS = np.array([[1.2, 0.3], [-0.4, -0.9], [0.1, 0.05], [0.9, -0.8], [-1.6, 1.1]])


def logarithm(toy: Toy, points: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """log of the density of the data diffused to sigma, up to a constant."""
    squares = np.square(points[..., None, :] - toy.means()).sum(axis=-1)
    return np.asarray(logsumexp(-squares / (2 * (toy.spread**2 + sigma**2)), axis=-1))


def test_the_denoiser_is_the_posterior_mean_by_quadrature() -> None:
    toy = Toy(components=7, spread=0.12, sigma=0.4)
    side = np.linspace(-1.9, 1.9, 381)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    prior = logarithm(toy, grid, 0.0)
    for point in POINTS:
        joint = prior - np.square(point - grid).sum(axis=1) / (2 * toy.sigma**2)
        weights = np.exp(joint - joint.max())
        expected = weights @ grid / weights.sum()
        assert np.allclose(toy.denoise(point[None])[0], expected, atol=1e-9)


def test_the_score_is_the_gradient_of_the_density() -> None:
    toy, step = Toy(), 1e-5
    score = (toy.denoise(POINTS) - POINTS) / toy.sigma**2
    for axis in (0, 1):
        move = step * np.eye(2)[axis]
        ahead, behind = (logarithm(toy, POINTS + sign * move, toy.sigma) for sign in (1, -1))
        assert np.allclose((ahead - behind) / (2 * step), score[:, axis], rtol=1e-6, atol=1e-6)


def test_denoised_points_lie_nearer_the_data_and_are_the_best_guess() -> None:
    toy = Toy(points=4000)
    clean, noisy, denoised = toy.drawn(0, "many")
    near, far, back = (toy.distance(points).mean() for points in (clean, noisy, denoised))
    assert near == pytest.approx(toy.spread * np.sqrt(2 / np.pi), rel=0.05)
    assert back < 0.3 * far

    def error(guess: NDArray[np.float64]) -> float:
        return float(np.square(guess - clean).sum(axis=1).mean())

    others = [scale * denoised for scale in (0.9, 1.1)] + [noisy, noisy / np.linalg.norm(noisy, axis=1)[:, None]]
    assert all(error(denoised) < error(other) for other in others)


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_distance_is_the_smallest_to_the_curve(x: float, y: float) -> None:
    angles = np.linspace(0, 1.5 * np.pi, 4001)
    curve = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    expected = np.linalg.norm(curve - [x, y], axis=1).min()
    assert float(Toy().distance(np.array([x, y]))) == pytest.approx(expected, abs=1e-3)


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(0, 30), st.text(max_size=5))
def test_points_are_functions_of_the_stream_alone(count: int, more: int, stream: str) -> None:
    few, many = (Toy(points=points).drawn(3, stream) for points in (count, count + more))
    for one, other in zip(few, many, strict=True):
        assert np.allclose(one, other[:count], rtol=1e-12)
    assert not np.array_equal(few.clean, Toy(points=count).drawn(4, stream).clean)
