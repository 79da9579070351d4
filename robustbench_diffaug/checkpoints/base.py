"""The family of checkpoints: trained classifiers, what they expect of an image, and their weights."""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.conditioning import Want
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Component, Outside, Value, fingerprint

__all__ = ["Checkpoint", "Preprocess"]

Fraction = Annotated[float, Field(gt=-10, lt=10)]


class Preprocess(Value):
    """From an image in [0, 1] to what the network was trained on: resize, then `(x - mean) / std` of each channel.

    Arguments:
        size: Height and width in pixels; images are taken as they are where it is left out.
        interpolation: Of the resizing, antialiased.
        mean: Of each channel, or one for all.
        std: Of each channel, or one for all.
    """

    size: PositiveInt | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)

    @model_validator(mode="after")
    def _same_length(self) -> "Preprocess":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one of each per channel")
        return self

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """The network's input.

        Raises:
            ValueError: If the images have another number of channels.
        """
        if len(self.mean) not in (1, images.shape[1]):
            raise ValueError(f"preprocess is for {len(self.mean)} channels and the images have {images.shape[1]}")
        if self.size and images.shape[-2:] != (self.size, self.size):
            images = functional.interpolate(
                images, size=(self.size, self.size), mode=self.interpolation, antialias=True, align_corners=False
            )
        mean = images.new_tensor(self.mean)[:, None, None]
        return (images - mean) / images.new_tensor(self.std)[:, None, None]


class Checkpoint(Component, ABC):
    """A trained classifier.

    Arguments:
        id: Its name in reports, unique in a suite.
        classes: The number of its outputs.
        preprocess: What it expects of an image.
        precision: Of the network's arithmetic.
        wants: What the network sees besides the image: 'sigma', its noise level, and 'denoised', its denoised twin.
            Such a network takes the planes of `conditioning.packed`, and `preprocess` is left as it is.
        microbatch: The number of images in every call of the network, part of the identity (see `fixed_shape`).
    """

    family: ClassVar[str] = "robustbench_diffaug.checkpoints"
    id: Annotated[str, Outside] = Field(min_length=1, max_length=120)
    classes: PositiveInt
    preprocess: Preprocess = Preprocess()
    precision: Literal["float32", "bfloat16"] = "float32"
    wants: tuple[Want, ...] = ()
    microbatch: PositiveInt = 128

    @model_validator(mode="after")
    def _wanted(self) -> "Checkpoint":
        if self.wants and "sigma" not in self.wants:
            raise ValueError("a network that wants denoised wants sigma too; give wants: [sigma, denoised]")
        if self.wants and self.preprocess != Preprocess():
            raise ValueError("a network that wants sigma is given images in [-1, 1]; leave out preprocess")
        return self

    @abstractmethod
    def load(self) -> nn.Module:
        """The network, from preprocessed images to logits; all quirks of its files live here.

        Raises:
            ValueError: If its files are missing, damaged, or do not fit.
        """

    def check(self) -> None:
        """Looks at the files without loading the network. Default: nothing to look at.

        Raises:
            ValueError: As `load`.
        """
        return

    @final
    def loaded(self, limits: Limits) -> Model:
        """The network behind its preprocessing, loaded once per process and device."""
        return _loaded(self, fingerprint(self), limits.device)


@lru_cache(maxsize=32)
def _loaded(
    checkpoint: Checkpoint,
    identity: str,  # so that changed files are loaded anew
    device: str,
) -> Model:
    with rng.seeded(rng.key("load", identity)):  # a network may be built with random weights before it has its own
        network = checkpoint.load().eval().requires_grad_(False)
    dtype: torch.dtype = getattr(torch, checkpoint.precision)
    network.to(device=device, dtype=dtype)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks the keyword
    shape = (checkpoint.classes, checkpoint.microbatch, dtype)
    return Model(checkpoint.id, network, checkpoint.preprocess, *shape, checkpoint.wants)
