"""One step of the probability flow with a denoiser `D(x, sigma)`: from a noise level to a lower one, or to none.

In variance-exploding coordinates the flow is `dx / dsigma = (x - D(x, sigma)) / sigma`, for images in [0, 1] as for the
model's in [-1, 1], since it commutes with shifts and scales of both. A variance-preserving sample `z` with
`z = alpha x0 + s eps` is `y = z / alpha` here, and its level `s / alpha`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from robustbench_diffaug.diffusion.base import Denoise, Sigma

__all__ = ["ddim", "dpm_solver_2"]


def ddim(
    denoise: Denoise, noisy: Float[Tensor, "*n c h w"], sigma: Sigma, end_sigma: float = 0.0
) -> Float[Tensor, "*n c h w"]:
    """One deterministic DDIM step: `x_end = D + (sigma_end / sigma) (x - D)`, and so `D` itself at the end 0.

    Arguments:
        denoise: Of one step; one call.
        noisy: `x0 + sigma eps`.
        sigma: One for all images, or one of each.
        end_sigma: The level after the step, at most `sigma`.

    References:
        Denoising Diffusion Implicit Models (Song et al., 2020), https://arxiv.org/abs/2010.02502
    """
    mean = denoise(noisy, sigma).mean
    if end_sigma == 0:
        return mean
    return mean + _broadcast(end_sigma / _exact(sigma, noisy), noisy) * (noisy - mean)


def dpm_solver_2(
    denoise: Denoise, noisy: Float[Tensor, "*n c h w"], sigma: Sigma, end_sigma: float
) -> Float[Tensor, "*n c h w"]:
    """One step of the singlestep second-order DPM-Solver, r1 = 1/2, of the predicted noise; two calls of the denoiser.

    With `lambda = log(alpha / s)`, `h = lambda_t - lambda_s` and a middle time s1 at `lambda_s + h / 2` it is published
    as

        z_s1 = (alpha_s1 / alpha_s) z_s - s_s1 (e^{h/2} - 1) eps(z_s)
        z_t  = (alpha_t / alpha_s) z_s - s_t (e^h - 1) eps(z_s1)

    Divide by alpha_s1 and alpha_t. The levels are `sigma = s / alpha = e^{-lambda}`, so `sigma_s1 = sqrt(sigma_s
    sigma_t)`, the geometric mean, and `sigma_t (e^h - 1) = sigma_s - sigma_t`. What is left is the midpoint rule

        y_s1 = y_s + (sigma_s1 - sigma_s) eps(y_s)
        y_t  = y_s + (sigma_t - sigma_s) eps(y_s1),    eps(y, sigma) = (y - D(y, sigma)) / sigma.

    An image that is at or below `end_sigma` already comes from the denoiser in one step. The result is not clamped. It
    is the published solver's where the denoiser does not clamp either; where it does, the noise is that of the clamped
    estimate. A denoiser of discrete times sees the middle level at the nearest time above it.

    Arguments:
        denoise: Called at `sigma` and at the middle level.
        noisy: `x0 + sigma eps`.
        sigma: One for all images, or one of each.
        end_sigma: The level after the step, above 0 since lambda is infinite there; `Denoiser.level(1e-3)` is usual.

    Raises:
        ValueError: If `end_sigma` is not above 0.

    References:
        DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps (Lu et al., 2022),
        algorithm 1, https://arxiv.org/abs/2206.00927
    """
    if not end_sigma > 0:
        raise ValueError(f"end_sigma must be above 0, not {end_sigma:g}; give level(1e-3) of the denoiser, or use ddim")
    start = _exact(sigma, noisy)
    first = denoise(noisy, sigma).mean
    near = start <= end_sigma
    if bool(near.all()):
        return first
    start = start.clamp(min=end_sigma)
    middle = (start * end_sigma).sqrt()
    between = first + _broadcast(middle / start, noisy) * (noisy - first)
    slope = (between - denoise(between, middle.expand(noisy.shape[:-3])).mean) / _broadcast(middle, noisy)
    return torch.where(near[..., None, None, None], first, noisy + _broadcast(end_sigma - start, noisy) * slope)


def _exact(sigma: Sigma, noisy: Tensor) -> Tensor:
    """The levels in float64, on the device of the images."""
    return torch.as_tensor(sigma, dtype=torch.float64, device=noisy.device)


def _broadcast(values: Tensor, noisy: Tensor) -> Tensor:
    """One number of each image, or of all, in their shape and type."""
    return values.to(noisy.dtype)[..., None, None, None]
