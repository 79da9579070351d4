"""Sampling that a classifier guides: each step of a diffusion chain leans towards images of the class asked for.

With the state `z = alpha (2 x0 - 1) + sqrt(1 - alpha^2) eps` of a model of images in [-1, 1], the images that networks
see are `x = (z / alpha + 1) / 2` at the level sigma in [0, 1] units, and `g = d log p(y | x) / dz`.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from robustbench_diffaug.diffusion.adaptation import Chain
from robustbench_diffaug.diffusion.base import Denoise

__all__ = ["Gradient", "Guide", "LogLikelihood", "Sampler", "Slope", "guided", "in_groups", "sample", "slope_of"]

LogLikelihood: TypeAlias = Callable[[Float[Tensor, "n c h w"], float, Float[Tensor, "n c h w"]], Float[Tensor, " n"]]
"""log p(y | x) of noisy images, their noise level and their denoised twins, one number of each image."""
Gradient: TypeAlias = Callable[[Float[Tensor, " n"], Float[Tensor, "n c h w"]], Float[Tensor, "n c h w"]]
"""The gradient of each number with respect to its image."""


class Slope(NamedTuple):
    """What a step needs to know of noisy images.

    Arguments:
        clean: E[x0 | x], in [0, 1] where the denoiser clips.
        gradient: Of log p(y | x) with respect to the noisy image x.
        spread: The learned range of the variance in [-1, 1], where the denoiser has one.
    """

    clean: Float[Tensor, "n c h w"]
    gradient: Float[Tensor, "n c h w"]
    spread: Float[Tensor, "n c h w"] | None = None


Guide: TypeAlias = Callable[[Float[Tensor, "n c h w"], float], Slope]
"""The slope at noisy images of one noise level."""


class Sampler(NamedTuple):
    """How images are drawn.

    Arguments:
        kind: 'ancestral' or 'ddim', which is deterministic once it has begun.
        variance: Of ancestral steps: 'learned' by the network, or fixed: 'small' is the posterior's, 'large' beta.
        mean: The grey that images begin around, in [0, 1].
    """

    kind: Literal["ancestral", "ddim"] = "ancestral"
    variance: Literal["learned", "small", "large"] = "small"
    mean: float = 0.5


def slope_of(output: Float[Tensor, " n"], inputs: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The gradient of each number with respect to its image, by one backward pass.

    Raises:
        ValueError: If the numbers do not depend on the images in a way that can be differentiated.
    """
    if not output.requires_grad:
        raise ValueError("log p(y | x) has no gradient with respect to the image, and guidance needs one")
    (gradient,) = torch.autograd.grad(output.sum(), inputs)
    return gradient.detach()


def guided(denoise: Denoise, likelihood: LogLikelihood | None, through: bool, gradient: Gradient = slope_of) -> Guide:
    """The slope of a classifier of noisy images.

    A classifier that looks at D(x) too, or at it alone, has the gradient

        d log p(y | x, D(x)) / dx = d_1 log p + J^T d_2 log p,    J = dD(x) / dx,

    whose second term goes through the denoiser.

    Arguments:
        denoise: `D(x, sigma)`.
        likelihood: log p(y | x) of the classes asked for; None for no guidance, whose gradient is 0.
        through: Whether the classifier looks at the denoised image; without it, the denoiser is not differentiated.
        gradient: How the derivative is taken.
    """

    def slope(noisy: Float[Tensor, "n c h w"], sigma: float) -> Slope:
        with torch.set_grad_enabled(likelihood is not None):
            given = noisy.detach().requires_grad_(likelihood is not None)
            found = denoise(given if through else given.detach(), sigma)
            if likelihood is None:
                return Slope(found.mean, torch.zeros_like(noisy), found.spread)
            derived = gradient(likelihood(given, sigma, found.mean), given)
        return Slope(found.mean.detach(), derived, None if found.spread is None else found.spread.detach())

    return slope


def in_groups(guides: Sequence[Guide], size: int) -> Guide:
    """A guide of each `size` images in turn, so that no more of them are held with what their gradients need.

    Arguments:
        guides: Of each group, the last of which may be smaller.
        size: Images of a group.
    """

    def slope(noisy: Float[Tensor, "n c h w"], sigma: float) -> Slope:
        parts = [guide(part, sigma) for guide, part in zip(guides, noisy.split(size), strict=True)]
        spreads = [part.spread for part in parts if part.spread is not None]
        joined = torch.cat([part.clean for part in parts]), torch.cat([part.gradient for part in parts])
        return Slope(*joined, torch.cat(spreads) if spreads else None)

    return slope


def sample(
    guide: Guide,
    noise: Callable[[int], Float[Tensor, "n c h w"]],
    chain: Chain,
    scale: Float[Tensor, " n"],
    sampler: Sampler = Sampler(),  # noqa: B008  (a value)
) -> Float[Tensor, "n c h w"]:
    """Images drawn down a chain; not clamped.

    They begin as `z = alpha (2 mean - 1) + eps`. With `scale` w, an ancestral step moves the mean of the model's step
    by its variance S times the gradient, at the last step too, which adds no noise,

        z' = mean(z) + w S g + S^(1/2) eps,

    and a DDIM step corrects the noise that the model sees,

        eps' = eps - w sqrt(1 - alpha^2) g,    x0' = (z - sqrt(1 - alpha^2) eps') / alpha,    z' = alpha' x0' + s' eps'.

    Arguments:
        guide: The slope of each step's images.
        noise: Standard normals by the number of the step; number `len(chain.times)` is that of the start.
        chain: The respaced chain, from the lowest level to the one that images begin at.
        scale: Of the guidance, for each image; 1 draws from p(x | y) as the classifier has it, 0 does not guide.
        sampler: How.

    Raises:
        ValueError: If the variance is to be the network's and it has none.

    References:
        Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), algorithms 1 and 2,
        https://arxiv.org/abs/2105.05233
    """
    steps = len(chain.times)
    state = noise(steps) + float(chain.alpha[-1]) * (2 * sampler.mean - 1)
    weight = scale.to(state)[:, None, None, None]
    for step in reversed(range(steps)):
        alpha = float(chain.alpha[step])
        found = guide((state / alpha + 1) / 2, float(chain.sigma[step]))
        push = weight * found.gradient / (2 * alpha)  # x changes by 1 / (2 alpha) of what z does
        clean = 2 * found.clean - 1
        if sampler.kind == "ddim":
            state = _ddim(state, clean, push, chain, step)
            continue
        variance = _variance(found, chain, step, sampler)
        state = float(chain.first[step]) * clean + float(chain.second[step]) * state + variance * push
        if step:
            state = state + variance**0.5 * noise(step)
    return (state + 1) / 2


def _ddim(state: Tensor, clean: Tensor, push: Tensor, chain: Chain, step: int) -> Float[Tensor, "n c h w"]:
    """The state after a DDIM step; the last ends at the estimate of the clean image."""
    alpha = float(chain.alpha[step])
    deviation = (1 - alpha**2) ** 0.5
    noise = (state - alpha * clean) / deviation - deviation * push
    corrected = clean + deviation**2 / alpha * push
    following = float(chain.alpha[step - 1]) if step else 1.0
    moved: Tensor = following * corrected + (1 - following**2) ** 0.5 * noise
    return moved


def _variance(found: Slope, chain: Chain, step: int, sampler: Sampler) -> Float[Tensor, "..."]:
    """The variance of an ancestral step, one number or one of each pixel."""
    large, small = float(chain.log_large[step]), float(chain.log_small[step])
    if sampler.variance != "learned":
        logarithm = large if sampler.variance == "large" else small
        return torch.as_tensor(logarithm, dtype=torch.float64).exp().to(found.clean)
    if found.spread is None:
        raise ValueError("the denoiser has no learned variance; give variance: small (or large)")
    share = (found.spread + 1) / 2
    variance: Tensor = (share * large + (1 - share) * small).exp()
    return variance
