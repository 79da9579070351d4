"""The exact denoiser of a Gaussian mixture."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from robustbench_diffaug.diffusion.base import (
    ConditionalDenoise,
    Denoise,
    Denoiser,
    Posterior,
    Schedule,
    Sigma,
    check_labels,
)
from robustbench_diffaug.mixture import MixtureSpec

__all__ = ["MixtureDenoiser"]


class MixtureDenoiser(Denoiser):
    """`E[x0 | x]` of a mixture of isotropic Gaussians, in closed form; class k is component k.

    With component means m_k and spread s, the weights are softmax_k(-|x - m_k|^2 / 2(s^2 + sigma^2)) and the mean of a
    component's posterior is (s^2 x + sigma^2 m_k) / (s^2 + sigma^2). Told the class, the weight of its component is 1.

    Arguments:
        spec: Which mixture.
        schedule: The grid of times.
    """

    kind: Literal["mixture"] = "mixture"
    spec: MixtureSpec = MixtureSpec()
    schedule: Schedule = Schedule()

    def sigmas(self) -> Float[np.ndarray, " t"]:
        """The noise levels of the schedule."""
        return self.schedule.sigmas()

    def channels(self) -> int | None:
        """The mixture's."""
        return self.spec.channels

    def size(self) -> int | None:
        """The mixture's."""
        return self.spec.size

    def classes(self) -> int | None:
        """The number of components."""
        return self.spec.classes

    def load(self, device: torch.device) -> Denoise:
        """The closed form, in float64 inside."""
        conditional = self.load_conditional(device)

        def denoise(noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
            return conditional(noisy, sigma, torch.full(noisy.shape[:-3], -1, device=noisy.device))

        return denoise

    def load_conditional(self, device: torch.device) -> ConditionalDenoise:
        """The closed form for a component, or for all of them at the label -1."""
        means = self.spec.means().to(device)
        spread, clip = self.spec.spread**2, self.clip

        def denoise(noisy: Float[Tensor, "*n c h w"], sigma: Sigma, labels: Int[Tensor, "*n"]) -> Posterior:
            check_labels(labels, len(means))
            images = noisy.double()
            variance = torch.as_tensor(sigma, dtype=torch.float64, device=images.device) ** 2
            variance = variance.expand(noisy.shape[:-3])[..., None, None, None]
            squares = (images.unsqueeze(-4) - means).square().sum(dim=(-3, -2, -1))
            weights = torch.softmax(-squares / (2 * (spread + variance[..., 0, 0])), dim=-1)
            known = functional.one_hot(labels.long().clamp(min=0), len(means)).to(weights)
            weights = torch.where(labels[..., None] < 0, weights, known)
            centre = torch.einsum("...k,kchw->...chw", weights, means)
            mean = (spread * images + variance * centre) / (spread + variance)
            return Posterior((mean.clamp(0, 1) if clip else mean).to(noisy.dtype))

        return denoise
