"""DiffAug: one forward diffusion step to a random time and one denoising step, as an augmentation."""

from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.component import Value
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Sigma
from robustbench_diffaug.diffusion.samplers import ddim, dpm_solver_2
from robustbench_diffaug.train.samples import Samples

__all__ = ["DiffAug", "diffaug", "shaped", "times_of"]


class DiffAug(Value):
    """The DiffAug term: cross-entropy on each image diffused to a random time and denoised.

    Arguments:
        denoiser: The diffusion model.
        low: The smallest time.
        high: One more than the largest time.
        weight: Of the term in the loss.
        sampler: 'ddim' takes E[x0 | x_t], one step of DDIM to time 0; 'dpm-solver-2' one second-order step to `end`.
        end: Where DPM-Solver-2 stops, a continuous time in (0, 1]. The paper's is not known; 1e-3 is the solver's own.
        mixing: The paper's lambda, the share of the class-conditional score: D = (1 - lambda) D(x) + lambda D(x | y).

    References:
        DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers (Sastry et al., NeurIPS 2024),
        https://arxiv.org/abs/2306.09192
        DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps (Lu et al., 2022),
        https://arxiv.org/abs/2206.00927
    """

    denoiser: Denoiser
    low: NonNegativeInt = 0
    high: PositiveInt = 1000
    weight: PositiveFloat = 1.0
    sampler: Literal["ddim", "dpm-solver-2"] = "ddim"
    end: Annotated[float, Field(gt=0, le=1)] = 1e-3
    mixing: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> "DiffAug":
        steps = len(self.denoiser.sigmas())
        if not self.low < self.high <= steps:
            raise ValueError(f"times must be 0 <= low < high <= {steps}, not [{self.low}, {self.high})")
        if self.mixing and self.denoiser.classes() is None:
            raise ValueError("mixing needs a class-conditional denoiser, and this one is not; set mixing to 0")
        return self


def shaped(denoiser: Denoiser, count: int) -> Denoiser:
    """The denoiser called with so many images at once: a training step's, so that nothing is padded."""
    return denoiser.model_copy(update={"microbatch": count})


def times_of(samples: Samples, low: int, high: int) -> Int[np.ndarray, " b"]:
    """A time of each sample, uniform on `low .. high - 1`."""
    chance = samples.uniform("diffaug time", 1)[:, 0].cpu().numpy()
    times: np.ndarray = low + np.floor(chance * (high - low)).astype(np.int64)
    return times


def diffaug(samples: Samples, term: DiffAug) -> Float[Tensor, "b c h w"]:
    """Each image as the data set gives it, at a time drawn from [low, high), denoised and clamped to [0, 1]."""
    levels = term.denoiser.sigmas()[times_of(samples, term.low, term.high)]
    sigma = torch.from_numpy(levels).to(samples.images)
    noisy = samples.images + sigma[:, None, None, None] * samples.normal("diffaug noise")
    with torch.no_grad():
        if term.sampler == "ddim":
            return ddim(_denoise(term, samples, term.denoiser), noisy, sigma)
        bare = term.denoiser.model_copy(update={"clip": False})  # the solver's noise is the network's own
        return dpm_solver_2(_denoise(term, samples, bare), noisy, sigma, bare.level(term.end)).clamp(0, 1)


def _denoise(term: DiffAug, samples: Samples, denoiser: Denoiser) -> Denoise:
    """The unconditional denoiser mixed with the one that knows the samples' classes."""
    limits = Limits(device=str(samples.images.device))
    told = shaped(denoiser, len(samples.keys)).loaded_mixed(limits, term.mixing)

    def denoise(noisy: Float[Tensor, "b c h w"], sigma: Sigma) -> Posterior:
        return told(noisy, sigma, samples.labels)

    return denoise
