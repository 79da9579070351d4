"""Images drawn from a Gaussian mixture, for tests and the smoke suite."""

from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt

from robustbench_diffaug import rng
from robustbench_diffaug.data.base import Dataset, Images, in_memory
from robustbench_diffaug.mixture import MixtureSpec

__all__ = ["Mixture"]


class Mixture(Dataset):
    """Images of a closed-form Gaussian mixture, classes in turn.

    Arguments:
        spec: Which mixture.
        size: The number of images.
        draw: Another number gives other images.
    """

    kind: Literal["mixture"] = "mixture"
    name: str = "mixture"
    spec: MixtureSpec = MixtureSpec()
    size: PositiveInt = Field(64, le=10_000)
    draw: int = 0

    def contents(self) -> str:
        """Nothing but the fields."""
        return "closed form"

    def open(self) -> Images:
        """All images, clamped to [0, 1] (at the default spread nothing is)."""
        labels = torch.arange(self.size) % self.spec.classes
        shape = (self.spec.channels, self.spec.size, self.spec.size)
        keys = [rng.key("mixture", self.draw, row) for row in range(self.size)]
        noise = torch.from_numpy(np.stack([rng.normal(key, range(1), shape)[0] for key in keys]))
        images = (self.spec.means()[labels] + self.spec.spread * noise.double()).clamp(0, 1).float()
        return in_memory([f"{row:05d}" for row in range(self.size)], images, labels)
