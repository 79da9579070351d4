"""The samples of one training step, and the randomness of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustbench_diffaug import rng

__all__ = ["Samples"]


@dataclass(frozen=True)
class Samples:
    """The samples of one step.

    Arguments:
        images: As the dataset gives them, in [0, 1].
        labels: The classes.
        keys: What keys all randomness of each sample: (seed, epoch, id).
        ordinary: The same samples with the random crop of the recipe, where it has one.
    """

    images: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"]
    keys: Sequence[tuple[object, ...]]
    ordinary: Float[Tensor, "b c h w"] | None = None

    def uniform(self, stream: str, count: int) -> Float[Tensor, "b k"]:
        """`count` uniforms on (0, 1) of each sample, float64; another stream is another draw."""
        values = [rng.uniform(rng.key(stream, *key), range(1), (count,))[0] for key in self.keys]
        return torch.from_numpy(np.stack(values)).to(self.images.device)

    def normal(self, stream: str) -> Float[Tensor, "b c h w"]:
        """Standard normals in the shape of the images."""
        shape = tuple(self.images.shape[1:])
        values = [rng.normal(rng.key(stream, *key), range(1), shape)[0] for key in self.keys]
        return torch.from_numpy(np.stack(values)).to(self.images.device)
