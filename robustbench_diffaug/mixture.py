"""A Gaussian mixture over images whose every posterior is known: the oracle of tests and of the smoke suite.

Image = mean of its class + spread * standard normal. The means are low-frequency waves around mid-grey, far enough from
0 and 1 that samples stay inside.
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from robustbench_diffaug.component import Value

__all__ = ["MixtureSpec"]


class MixtureSpec(Value):
    """Which mixture: equal weights, isotropic components.

    Arguments:
        classes: The number of components.
        size: Height and width of the images.
        channels: Of the images.
        spread: Standard deviation of a component in each pixel.
        contrast: How far the means reach from mid-grey.
    """

    classes: PositiveInt = Field(4, le=100)
    size: PositiveInt = Field(8, le=64)
    channels: PositiveInt = Field(1, le=4)
    spread: float = Field(0.04, gt=0, le=0.05)
    contrast: float = Field(0.15, gt=0, le=0.2)

    def means(self) -> Float[Tensor, "k c h w"]:
        """The mean of each class, float64."""
        return _means(self)


@lru_cache(maxsize=16)
def _means(spec: MixtureSpec) -> Float[Tensor, "k c h w"]:
    place = (torch.arange(spec.size, dtype=torch.float64) + 0.5) / spec.size
    waves = []
    for label in range(spec.classes):
        across, down = 1 + label // 2, 1 + (label + 1) // 2
        wave = torch.cos(torch.pi * across * place)[None, :] * torch.cos(torch.pi * down * place)[:, None]
        waves.append((0.5 + spec.contrast * wave).expand(spec.channels, -1, -1))
    return torch.stack(waves)
