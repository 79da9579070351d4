"""The family of checkpoints: trained classifiers, what they expect of an image, and their weights."""

import re
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.conditioning import Want
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Component, Later, Outside, Value, fingerprint
from robustbench_diffaug.diffusion.base import Denoiser

__all__ = ["Checkpoint", "Preprocess", "forget", "normalising"]

Fraction = Annotated[float, Field(gt=-10, lt=10)]


class Preprocess(Value):
    """From an image in [0, 1] to what the network was trained on: resize, then `(x - mean) / std` of each channel.

    Arguments:
        size: Height and width in pixels; images are taken as they are where it is left out.
        crop: Height and width of a crop from the centre, after the resizing.
        interpolation: Of the resizing, antialiased.
        mean: Of each channel, or one for all.
        std: Of each channel, or one for all.
    """

    size: PositiveInt | None = None
    crop: PositiveInt | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)

    @model_validator(mode="before")
    @classmethod
    def _no_word(cls, data: Any) -> Any:
        if isinstance(data, str):
            raise ValueError(
                f"preprocess is a mapping with size, crop, interpolation, mean and std, not {data[:80]!r}; only kind "
                "timm takes a word, which is timm"
            )
        return data

    @model_validator(mode="after")
    def _same_length(self) -> "Preprocess":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one of each per channel")
        return self

    @property
    def normalises(self) -> bool:
        """Whether it changes what it is given but for size."""
        return any(self.mean) or any(value != 1 for value in self.std)

    def sized(self, height: int, width: int) -> tuple[int, int]:
        """The height and width of the network's input, of images of some size."""
        side = self.crop or self.size
        return (side, side) if side else (height, width)

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
        if self.crop:
            height, width = images.shape[-2:]
            if min(height, width) < self.crop:
                raise ValueError(f"preprocess crops to {self.crop}, and images are {width}x{height}; make crop smaller")
            top, left = (round((side - self.crop) / 2) for side in (height, width))
            images = images[..., top : top + self.crop, left : left + self.crop]
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
        head: The dotted name of the last layer, whose input are the features; empty to find it.
        microbatch: The number of images in every call of the network, part of the identity (see `fixed_shape`).
        expect_accuracy: On clean images, a fraction in ]0, 1]: a run does not begin if some images say otherwise.
    """

    family: ClassVar[str] = "robustbench_diffaug.checkpoints"
    may_normalise: ClassVar[bool] = True
    """Whether its networks may have a layer of their own that normalises images; `warnings` then builds and looks."""
    differentiable: ClassVar[bool] = True
    """Whether its networks have gradients, which some evaluators need."""
    layered: ClassVar[bool] = True
    """Whether the layers of its networks can be looked at, which some evaluators need."""
    id: Annotated[str, Outside] = Field(min_length=1, max_length=120)
    classes: PositiveInt
    preprocess: Preprocess = Preprocess()
    precision: Literal["float32", "bfloat16"] = "float32"
    wants: tuple[Want, ...] = ()
    head: Annotated[str, Later] = ""
    microbatch: PositiveInt = 128
    expect_accuracy: Annotated[float | None, Outside] = Field(None, gt=0, le=1)

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

    def takes(self) -> int | None:
        """The channels of the images that it takes; None where that is not known.

        Default: its field `channels`, or as many as `preprocess` has means. Three channels take grey images too.
        """
        means = len(self.preprocess.mean)
        return getattr(self, "channels", None) or (means if means > 1 else None)

    def fits(self, height: int, width: int) -> None:
        """Finds that it takes images of a size. Default: any.

        Raises:
            ValueError: If it does not; the message says what to write.
        """
        return

    def about(self) -> tuple[tuple[str, str], ...]:
        """What its kind knows of the network, as pairs of a word and a text for `rdiff check`. Default: nothing."""
        return ()

    def analysed(self) -> Denoiser | None:
        """The denoiser, where an entry is one and no classifier. Default: it is a classifier."""
        return None

    @final
    def warnings(self) -> tuple[str, ...]:
        """Signs that images are normalised twice, or by numbers that are for images of 0 to 255.

        The network is built for it where its kind may have a normalising layer and `preprocess` normalises too.
        """
        found = []
        high = [
            name for name, values in (("mean", self.preprocess.mean), ("std", self.preprocess.std)) if max(values) > 1
        ]
        if high:
            numbers = " and ".join(f"{name} {list(getattr(self.preprocess, name))}" for name in high)
            found.append(
                f"preprocess has {numbers}, above 1, and images are in [0, 1]; divide by 255 if meant for 0..255"
            )
        if self.may_normalise and self.preprocess.normalises:
            try:
                with rng.seeded(rng.key("load", self.id)):
                    own = normalising(self.load())
            except ValueError:  # the run itself says so, in its place
                own = None
            if own:
                found.append(
                    f"the network normalises images itself ({own}), and preprocess has mean and std too; if both are "
                    "the same normalisation, leave mean and std out of preprocess"
                )
        return tuple(found)

    @final
    def loaded(self, limits: Limits, keep: bool = True) -> Model:
        """The network behind its preprocessing, loaded once per process and device, and compiled if that is asked.

        Arguments:
            limits: The device, and whether the network is compiled.
            keep: Whether it stays in memory for the next call.
        """
        load = _loaded if keep else _loaded.__wrapped__
        return load(self, fingerprint(self), limits.device, limits.compile)


def forget() -> None:
    """Frees the memory of all networks that `loaded` keeps."""
    _loaded.cache_clear()


MEAN = re.compile("_?(image_|pixel_|input_)?(means?|mu)_?")
STD = re.compile("_?(image_|pixel_|input_)?(stds?|sds?|sigmas?)_?")


def normalising(network: nn.Module) -> str | None:
    """The first module with a mean and a standard deviation of a few channels, whatever it is called; None for none.

    Such are RobustBench's, locuslab's and torchvision's layers of normalisation. BatchNorm's statistics have other
    names.
    """
    for name, module in network.named_modules():
        held = {
            **vars(module),
            **dict(module.named_buffers(recurse=False)),
            **dict(module.named_parameters(recurse=False)),
        }
        means = [value for key, value in held.items() if MEAN.fullmatch(key) and _few(value)]
        stds = [value for key, value in held.items() if STD.fullmatch(key) and _few(value)]
        if means and stds:
            return f"{name or 'the whole'}, a {type(module).__name__}"
    return None


def _few(value: object) -> bool:
    """Whether it is numbers of 1 to 4 channels."""
    if isinstance(value, Tensor):
        return 1 <= value.numel() <= 4
    if not isinstance(value, list | tuple):
        return False
    return 1 <= len(value) <= 4 and all(isinstance(number, int | float) for number in value)


@lru_cache(maxsize=32)
def _loaded(
    checkpoint: Checkpoint,
    identity: str,  # so that changed files are loaded anew
    device: str,
    compiled: bool,
) -> Model:
    if (denoiser := checkpoint.analysed()) is not None:
        denoise = denoiser.loaded(Limits(device=device, compile=compiled))
        nothing = (nn.Identity(), checkpoint.preprocess, checkpoint.classes, denoiser.microbatch)
        return Model(checkpoint.id, *nothing, denoise=denoise)
    with rng.seeded(rng.key("load", identity)):  # a network may be built with random weights before it has its own
        network = checkpoint.load().eval().requires_grad_(False)
    dtype: torch.dtype = getattr(torch, checkpoint.precision)
    network.to(device=device, dtype=dtype)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks the keyword
    if compiled:
        network.compile(dynamic=False)  # it is called in one shape
    shape = (checkpoint.classes, checkpoint.microbatch, dtype)
    seen = (*shape, checkpoint.wants, checkpoint.head)
    return Model(checkpoint.id, network, checkpoint.preprocess, *seen, channels=checkpoint.takes())
