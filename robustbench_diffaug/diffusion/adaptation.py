"""Diffusion-driven adaptation (DDA): an image is diffused half-way and sampled back, guided by its low frequencies."""

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, repeat
from math import ceil, sqrt
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from robustbench_diffaug.component import Value
from robustbench_diffaug.diffusion.base import Denoise

__all__ = ["Adaptation", "Chain", "adapt", "low_pass"]


class Adaptation(Value):
    """The settings of DDA; the defaults are the published call's.

    The published guidance takes one norm over a batch of 4 images. It is taken per image here, so that no image depends
    on its neighbours, at the scale `scale / sqrt(batch)` that gives the same step where the images of a batch differ
    from their references alike.

    Arguments:
        respacing: Steps of the respaced chain.
        N: Steps that are made: the image is diffused to step N, and the first reverse step is N - 1, as published.
        D: The factor by which the low-pass filter shrinks the image.
        scale: Of the guidance.
        batch: The images over which the published norm was taken.
        variance: Of the reverse steps: 'learned' by the network, or fixed: 'small' is the posterior's, 'large' beta.

    References:
        Back to the Source: Diffusion-Driven Test-Time Adaptation (Gao et al., CVPR 2023),
        https://arxiv.org/abs/2207.03442; settings of https://github.com/shiyegao/DDA, image_adapt.sh
    """

    respacing: Annotated[int, Field(ge=2, le=100_000)] = 100
    N: PositiveInt = 50
    D: PositiveInt = 4
    scale: PositiveFloat = 6.0
    batch: PositiveInt = 4
    variance: Literal["learned", "small", "large"] = "learned"

    @model_validator(mode="after")
    def _inside(self) -> "Adaptation":
        if self.respacing <= self.N:
            raise ValueError(f"N is {self.N} and the chain has the steps 0 to {self.respacing - 1}; give a smaller N")
        return self


class Chain(NamedTuple):
    """A respaced diffusion chain; one number of each of its steps, float64.

    Arguments:
        times: The original times, of the noise levels that the denoiser knows.
        sigma: The noise levels in [0, 1] units.
        alpha: sqrt(abar).
        first: What the estimate of the clean image weighs in the mean of the step before.
        second: What the image weighs in it.
        log_small: The logarithm of the posterior's variance, at step 0 that of step 1.
        log_large: The logarithm of beta.
    """

    times: Int[np.ndarray, " r"]
    sigma: Float[np.ndarray, " r"]
    alpha: Float[np.ndarray, " r"]
    first: Float[np.ndarray, " r"]
    second: Float[np.ndarray, " r"]
    log_small: Float[np.ndarray, " r"]
    log_large: Float[np.ndarray, " r"]

    @staticmethod
    def of(sigmas: Float[np.ndarray, " t"], respacing: int) -> "Chain":
        """`respacing` times, evenly spaced from the first to the last, with the betas that lead from one to the next.

        Raises:
            ValueError: If there are fewer times than that.

        References:
            Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), section 4,
            https://arxiv.org/abs/2102.09672
        """
        if respacing > len(sigmas):
            raise ValueError(f"respacing is {respacing} and the denoiser has {len(sigmas)} times; give no more")
        stride = (len(sigmas) - 1) / (respacing - 1)
        times = np.array([round(position) for position in accumulate(repeat(stride, respacing - 1), initial=0.0)])
        kept = 1 / (1 + 4 * sigmas[times] ** 2)
        before = np.append(1.0, kept[:-1])
        beta = 1 - kept / before
        posterior = beta * (1 - before) / (1 - kept)
        return Chain(
            times,
            sigmas[times],
            np.sqrt(kept),
            beta * np.sqrt(before) / (1 - kept),
            (1 - before) * np.sqrt(1 - beta) / (1 - kept),
            np.log(np.append(posterior[1], posterior[1:])),
            np.log(beta),
        )


def adapt(
    denoise: Denoise,
    images: Float[Tensor, "b c h w"],
    noise: Callable[[int], Float[Tensor, "b c h w"]],
    settings: Adaptation,
    chain: Chain,
    group: int,
) -> Float[Tensor, "b c h w"]:
    """Images moved to the denoiser's distribution, their low frequencies kept; clamped to [0, 1].

    With images in [-1, 1], `z_N = q(z_N | x)` and for i = N - 1 .. 0

        z_{i-1} = mean_i + std_i eps_i - (scale / sqrt(batch)) grad_z ||phi(x) - phi(x0-hat(z_i))||,

    where the mean is the ancestral step's, the norm is taken per image, and the gradient goes through the network.

    Arguments:
        denoise: `D(x, sigma)`, whose spread is the learned range of the variance, where it is asked for.
        images: In [0, 1]; height and width must be multiples of `settings.D`.
        noise: Standard normals by the number of the step; number N is that of the start.
        settings: Of the adaptation.
        chain: The respaced chain of the denoiser.
        group: Images whose gradients are held in memory at once.

    Raises:
        ValueError: If the image is not a multiple of D, or the network has no learned variance and it is asked for.
    """
    if images.shape[-1] % settings.D or images.shape[-2] % settings.D:
        height, width = images.shape[-2:]
        raise ValueError(f"DDA with D: {settings.D} takes images whose sides are multiples of it, not {width}x{height}")
    reference = 2 * images - 1
    alpha = float(chain.alpha[settings.N])
    state = alpha * reference + sqrt(1 - alpha**2) * noise(settings.N)
    for step in reversed(range(settings.N)):
        drawn = noise(step) if step else torch.zeros_like(state)
        parts = zip(state.split(group), reference.split(group), drawn.split(group), strict=True)
        state = torch.cat([_step(denoise, *part, settings, chain, step) for part in parts])
    return ((state + 1) / 2).clamp(0, 1)


def _step(
    denoise: Denoise, state: Tensor, reference: Tensor, noise: Tensor, settings: Adaptation, chain: Chain, step: int
) -> Float[Tensor, "b c h w"]:
    """One guided ancestral step of images in [-1, 1]."""
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        found = denoise((state / chain.alpha[step] + 1) / 2, float(chain.sigma[step]))
        clean = 2 * found.mean - 1
        distance = low_pass(reference - clean, settings.D).flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(distance.sum(), state)
    with torch.no_grad():
        mean = chain.first[step] * clean + chain.second[step] * state
        logarithm: float | Tensor = chain.log_large[step] if settings.variance == "large" else chain.log_small[step]
        if settings.variance == "learned":
            if found.spread is None:
                raise ValueError("the denoiser has no learned variance; give DDA variance: small (or large)")
            share = (found.spread + 1) / 2
            logarithm = share * chain.log_large[step] + (1 - share) * chain.log_small[step]
        deviation = torch.as_tensor(0.5 * logarithm).exp().to(state)
        moved: Tensor = mean + deviation * noise - settings.scale / sqrt(settings.batch) * gradient
        return moved


def low_pass(images: Float[Tensor, "b c h w"], factor: int) -> Float[Tensor, "b c h w"]:
    """Shrinks by a factor and grows back, cubic and antialiased, what lies beyond the border being 0.

    Arguments:
        images: With sides that are multiples of the factor.
        factor: 1 gives the images.

    References:
        ResizeRight (Shocher, 2021), https://github.com/assafshocher/ResizeRight
    """
    down, across = (_filter(side, factor).to(images) for side in images.shape[-2:])
    filtered: Tensor = down @ images @ across.T
    return filtered


@lru_cache(maxsize=16)
def _filter(side: int, factor: int) -> Float[Tensor, "side side"]:
    """The filter of one axis as a matrix, float64."""
    matrix = _resize(side // factor, side, float(factor)) @ _resize(side, side // factor, 1 / factor)
    return torch.from_numpy(matrix)


def _resize(size: int, target: int, scale: float) -> Float[np.ndarray, "target size"]:
    """Cubic resampling of one axis: weights of the input pixels in each output pixel, stretched where it shrinks.

    The weights of a window add up to 1; those of pixels beyond the border are then left out.
    """
    stretch = min(1.0, scale)
    width = 4 / stretch
    centres = np.arange(target) / scale + (size - 1) / 2 - (target - 1) / (2 * scale)
    left = np.ceil(centres - width / 2 - np.finfo(np.float32).eps).astype(int)
    matrix = np.zeros((target, size))
    for row, (centre, start) in enumerate(zip(centres, left, strict=True)):
        window = start + np.arange(ceil(width - np.finfo(np.float32).eps))
        weights = _cubic(stretch * (centre - window))
        inside = (window >= 0) & (window < size)
        matrix[row, window[inside]] = (weights / weights.sum())[inside]
    return matrix


def _cubic(distance: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The Keys kernel with a = -1/2."""
    x = np.abs(distance)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel: np.ndarray = np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
    return kernel
