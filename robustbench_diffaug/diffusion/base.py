"""Denoisers `D(x, sigma) = E[x0 | x0 + sigma eps = x]`, and the schedules of discrete diffusion models."""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.component import Component, Value, fingerprint

__all__ = ["Denoise", "Denoiser", "Posterior", "Schedule", "Sigma"]

Sigma = float | Float[Tensor, "*n"]
"""A noise level in [0, 1] pixel units: one for all images, or one of each image."""


class Posterior(NamedTuple):
    """What a denoiser knows of the clean image.

    Arguments:
        mean: E[x0 | x], in [0, 1] where the denoiser clips.
        spread: The learned variance of one reverse step, where the network has one.
    """

    mean: Float[Tensor, "*n c h w"]
    spread: Float[Tensor, "*n c h w"] | None = None


@runtime_checkable
class Denoise(Protocol):
    """A loaded denoiser: variance exploding, differentiable in `noisy`."""

    def __call__(self, noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
        """The posterior of the clean image given `noisy = x0 + sigma * eps`."""
        ...


class Schedule(Value):
    """The noise levels of a discrete diffusion model, as VE-equivalent sigma in [0, 1] pixel units.

    `sigma(t) = sqrt((1 - abar_t) / abar_t) / 2`: the model sees images in [-1, 1], hence the half.

    Arguments:
        betas: 'linear' (1e-4 to 0.02 over 1,000 steps, scaled to another number of them) or 'cosine'.
        steps: The number of times, `t = 0 .. steps - 1`.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672
    """

    betas: Literal["linear", "cosine"] = "linear"
    steps: Annotated[int, Field(ge=25, le=100_000)] = 1000

    def beta(self) -> Float[np.ndarray, " t"]:
        """The variance added in each step, float64."""
        if self.betas == "linear":
            scale = 1000 / self.steps
            return np.linspace(scale * 1e-4, scale * 0.02, self.steps)
        edges = np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas: np.ndarray = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
        return betas

    def sigmas(self) -> Float[np.ndarray, " t"]:
        """The noise level of each time, float64, increasing."""
        return _sigmas(self)


@lru_cache(maxsize=64)
def _sigmas(schedule: Schedule) -> Float[np.ndarray, " t"]:
    kept = np.cumprod(1 - schedule.beta())
    sigmas: np.ndarray = np.sqrt((1 - kept) / kept) / 2
    sigmas.setflags(write=False)
    return sigmas


class Denoiser(Component, ABC):
    """A denoiser with a grid of times.

    Arguments:
        precision: Of the network's arithmetic.
        clip: Whether the estimate is clamped to [0, 1], as published; off for Jacobians, whose rows clamping zeroes.
        microbatch: The number of images in every call of the network, part of the identity (see `fixed_shape`).
    """

    family: ClassVar[str] = "robustbench_diffaug.denoisers"
    precision: Literal["float64", "float32", "bfloat16"] = "float32"
    clip: bool = True
    microbatch: Annotated[int, Field(ge=1)] = 128

    @abstractmethod
    def sigmas(self) -> Float[np.ndarray, " t"]:
        """The noise level of each time in [0, 1] units, increasing; needs no weights."""

    @abstractmethod
    def load(self, device: torch.device) -> Denoise:
        """The network.

        Raises:
            ValueError: If its files are missing or damaged.
        """

    def channels(self) -> int | None:
        """The number of image channels, where it is bound to one; needs no weights. Default: any."""
        return None

    @final
    def sigma(self, t: int) -> float:
        """The noise level of time `t`, which must be one of the schedule's."""
        sigmas = self.sigmas()
        if not 0 <= t < len(sigmas):
            raise ValueError(f"time {t} is outside the schedule, 0 to {len(sigmas) - 1}")
        return float(sigmas[t])

    @final
    def time(self, sigma: float) -> int:
        """The smallest `t >= 1` with `sigma(t) >= sigma`: the rule of diffusion denoised smoothing.

        Raises:
            ValueError: If the schedule ends below `sigma`.

        References:
            (Certified!!) Adversarial Robustness for Free! (Carlini et al., 2022), https://arxiv.org/abs/2206.10550
        """
        sigmas = self.sigmas()
        t = max(1, int(np.searchsorted(sigmas, sigma)))
        if t >= len(sigmas):
            raise ValueError(f"sigma {sigma:g} is beyond the schedule, which ends at {sigmas[-1]:.4g}")
        return t

    @final
    def loaded(self, limits: Limits) -> Denoise:
        """What `load` gives, loaded once per process and device."""
        return _loaded(self, fingerprint(self), limits.device)


@lru_cache(maxsize=8)
def _loaded(
    denoiser: Denoiser,
    identity: str,  # so that changed files are loaded anew
    device: str,
) -> Denoise:
    return denoiser.load(torch.device(device))
