"""The exact denoiser of a Gaussian mixture."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.mixture import MixtureSpec

__all__ = ["MixtureDenoiser"]


class MixtureDenoiser(Denoiser):
    """`E[x0 | x]` of a mixture of isotropic Gaussians, in closed form.

    With component means m_k and spread s, the weights are softmax_k(-|x - m_k|^2 / 2(s^2 + sigma^2)) and the mean of a
    component's posterior is (s^2 x + sigma^2 m_k) / (s^2 + sigma^2).

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

    def load(self, device: torch.device) -> Denoise:
        """The closed form, in float64 inside."""
        means = self.spec.means().to(device)
        spread, clip = self.spec.spread**2, self.clip

        def denoise(noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
            images = noisy.double()
            variance = torch.as_tensor(sigma, dtype=torch.float64, device=images.device) ** 2
            variance = variance.expand(noisy.shape[:-3])[..., None, None, None]
            squares = (images.unsqueeze(-4) - means).square().sum(dim=(-3, -2, -1))
            weights = torch.softmax(-squares / (2 * (spread + variance[..., 0, 0])), dim=-1)
            centre = torch.einsum("...k,kchw->...chw", weights, means)
            mean = (spread * images + variance * centre) / (spread + variance)
            return Posterior((mean.clamp(0, 1) if clip else mean).to(noisy.dtype))

        return denoise
