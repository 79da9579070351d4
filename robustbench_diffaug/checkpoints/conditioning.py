"""What a classifier that knows the noise level sees: the noisy image, its denoised twin, and the level, as planes."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Want", "packed", "planes"]

Want: TypeAlias = Literal["sigma", "denoised"]
"""More than the image that a checkpoint asks for: its noise level, and its denoised twin."""


def planes(channels: int, wants: Sequence[Want]) -> int:
    """The number of input planes of a network for images of so many channels."""
    return channels * (1 + ("denoised" in wants)) + ("sigma" in wants)


def packed(
    noisy: Float[Tensor, "n c h w"],
    sigma: Float[Tensor, " n"],
    denoised: Float[Tensor, "n c h w"] | None = None,
) -> Float[Tensor, "n p h w"]:
    """The input of a classifier of noisy images.

    The first planes are x_t as a variance-preserving model sees it, `(2 x - 1) / sqrt(1 + s^2)` with `s = 2 sigma`;
    then, where there is one, the denoised image in [-1, 1]; the last is `log(s) / 4`, about -1 to 1.25 on the linear
    schedule (as in EDM).

    Arguments:
        noisy: `x0 + sigma * eps`, with x0 in [0, 1].
        sigma: The noise level of each image, above 0.
        denoised: `E[x0 | x]`, in [0, 1].

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
        https://arxiv.org/abs/2206.00364
    """
    doubled = 2 * sigma[:, None, None, None]
    parts = [(2 * noisy - 1) / (1 + doubled**2).sqrt()]
    if denoised is not None:
        parts.append(2 * denoised - 1)
    level = doubled.log() / 4
    return torch.cat([*parts, level.expand(-1, 1, *noisy.shape[2:])], dim=1)
