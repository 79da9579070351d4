"""Data in the plane whose score is exact: what diffusing and denoising does, where it can be drawn."""

from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import Field, PositiveInt

from robustbench_diffaug import rng
from robustbench_diffaug.component import Value

__all__ = ["Toy", "ToyPoints"]

ARC = 1.5 * np.pi  # the length of the curve, whose radius is 1


class ToyPoints(NamedTuple):
    """Points of the data, diffused and denoised.

    Arguments:
        clean: x0.
        noisy: x = x0 + sigma eps.
        denoised: E[x0 | x].
    """

    clean: Float[np.ndarray, "n 2"]
    noisy: Float[np.ndarray, "n 2"]
    denoised: Float[np.ndarray, "n 2"]


class Toy(Value):
    """A cluster of points along three quarters of the unit circle: a mixture of equal isotropic Gaussians on it.

    With component means m_k and spread s, the weights of the components are softmax_k(-|x - m_k|^2 / 2(s^2 + sigma^2)),
    and the mean of a component's posterior is (s^2 x + sigma^2 m_k) / (s^2 + sigma^2).

    Arguments:
        points: Of each sample.
        components: Gaussians, evenly spaced along the arc.
        spread: Their standard deviation, s.
        sigma: The standard deviation of the noise.
    """

    points: Annotated[int, Field(ge=1, le=10_000)] = 40
    components: PositiveInt = Field(60, le=1000)
    spread: float = Field(0.04, gt=0, le=1)
    sigma: float = Field(0.35, gt=0, le=100)

    def means(self) -> Float[np.ndarray, "k 2"]:
        """The components' means."""
        angles = ARC * (np.arange(self.components) + 0.5) / self.components
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def drawn(self, *stream: object) -> ToyPoints:
        """`points` draws from the mixture, each with its noise; a function of the stream alone.

        Arguments:
            stream: Anything that prints, the seed among it.
        """
        which = rng.uniform(rng.key("toy", "component", *stream), range(self.points), (1,))[:, 0]
        normals = rng.normal(rng.key("toy", "normal", *stream), range(self.points), (2, 2)).astype(np.float64)
        component = np.minimum((which * self.components).astype(int), self.components - 1)
        clean = self.means()[component] + self.spread * normals[:, 0]
        noisy = clean + self.sigma * normals[:, 1]
        return ToyPoints(clean, noisy, self.denoise(noisy))

    def weights(self, noisy: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n k"]:
        """The probability of each component given x = x0 + sigma eps."""
        squares = np.square(noisy[:, None] - self.means()).sum(axis=-1)
        exponents = -squares / (2 * (self.spread**2 + self.sigma**2))
        found = np.exp(exponents - exponents.max(axis=1, keepdims=True))
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def denoise(self, noisy: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """E[x0 | x] = x + sigma^2 s(x), with s the exact score of the data diffused to sigma."""
        kept, added = self.spread**2, self.sigma**2
        return np.asarray((kept * noisy + added * self.weights(noisy) @ self.means()) / (kept + added))

    def distance(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n"]:
        """How far points are from the arc on which the components lie."""
        angles = np.arctan2(points[..., 1], points[..., 0]) % (2 * np.pi)
        ends = np.array([[1.0, 0.0], [np.cos(ARC), np.sin(ARC)]])
        to_ends = np.linalg.norm(points[..., None, :] - ends, axis=-1).min(axis=-1)
        to_circle = np.abs(np.linalg.norm(points, axis=-1) - 1)
        return np.asarray(np.where(angles <= ARC, to_circle, to_ends))
