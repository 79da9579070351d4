"""Recipes: everything that a training run depends on, as values."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from robustbench_diffaug.checkpoints.base import Preprocess
from robustbench_diffaug.component import Options, Outside, Value, digest_of
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion.base import Denoiser, Schedule

__all__ = ["Affine", "ClassifierRecipe", "DenoiserRecipe", "DiffAug", "Optimiser", "Recipe"]


class Affine(Value):
    """A random affine map of each image, uniform in each range.

    Arguments:
        degrees: Rotation, at most, either way.
        pixels: Shift along each axis, at most, either way.
        zoom: Change of size, at most, either way: 0.1 is from 0.9 to 1.1.
    """

    degrees: NonNegativeFloat = 0.0
    pixels: NonNegativeFloat = 0.0
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0


class DiffAug(Value):
    """The DiffAug term: cross-entropy on each image diffused to a random time and denoised in one step.

    Arguments:
        denoiser: The diffusion model.
        low: The smallest time.
        high: One more than the largest time.
        weight: Of the term in the loss.

    References:
        DiffAug: Improving Robustness with Diffusion Denoised Augmentations (Sastry et al., NeurIPS 2024),
        https://arxiv.org/abs/2306.09192
    """

    denoiser: Denoiser
    low: NonNegativeInt = 0
    high: PositiveInt = 1000
    weight: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> "DiffAug":
        steps = len(self.denoiser.sigmas())
        if not self.low < self.high <= steps:
            raise ValueError(f"times must be 0 <= low < high <= {steps}, not [{self.low}, {self.high})")
        return self


class Optimiser(Value):
    """AdamW with a linear warm-up and a cosine decay to zero.

    Arguments:
        lr: The largest learning rate.
        weight_decay: Of the weights, not of biases and norms.
        warmup: The share of the steps in which the rate rises.
        clip: The largest norm of the gradient.
    """

    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip: PositiveFloat = 1.0


class Recipe(Value):
    """What all recipes hold.

    Arguments:
        name: Of the network that comes out.
        seed: Of initialisation, order, augmentation and noise.
        dataset: What it is trained on.
        channels: Of the images.
        steps: Updates of the weights.
        batch: Images in each.
        ema: Decay of the average of the weights that is kept; 0 keeps the last ones.
        optimiser: How they are updated.
        test: What the accuracy on the card is measured on, once, at the end.
        save_every: Steps between two saved states; a run that is stopped continues from the last one.
    """

    name: str = Field(min_length=1)
    seed: NonNegativeInt = 0
    dataset: Dataset
    channels: PositiveInt
    steps: PositiveInt
    batch: PositiveInt
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    optimiser: Optimiser = Optimiser()
    test: Annotated[Dataset | None, Outside] = None
    save_every: Annotated[PositiveInt, Outside] = 250

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of all that the weights depend on, data and denoiser included."""
        return digest_of(self.identity(), 16)


class ClassifierRecipe(Recipe):
    """Trains a classifier of timm: cross-entropy on augmented images, and the DiffAug term where there is one.

    Arguments:
        arch: As in `timm.create_model`.
        args: More arguments of the architecture.
        classes: The number of outputs.
        preprocess: What the network expects of an image.
        augment: Of the ordinary branch; the DiffAug branch starts from the image as it is, as published.
        diffaug: The DiffAug term. Both branches go through the network in one forward, as published.
    """

    kind: Literal["classifier"]
    arch: str
    args: Options = ()
    classes: PositiveInt
    preprocess: Preprocess = Preprocess()
    augment: Affine | None = None
    diffaug: DiffAug | None = None


class DenoiserRecipe(Recipe):
    """Trains a noise-predicting UNet2DModel: E ||eps - eps_theta(x_t, t)||^2 at uniformly random times.

    Arguments:
        unet: Arguments of diffusers' UNet2DModel.
        schedule: The noise levels.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
    """

    kind: Literal["denoiser"]
    unet: Options
    schedule: Schedule = Schedule()
