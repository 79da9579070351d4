"""Recipes: everything that a training run depends on, as values."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from robustbench_diffaug.checkpoints.base import Preprocess
from robustbench_diffaug.component import Options, Outside, Value, digest_of
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion.base import Denoiser, Schedule
from robustbench_diffaug.train.augmix import AugMix
from robustbench_diffaug.train.deepaugment import DeepAugment
from robustbench_diffaug.train.diffaug import DiffAug
from robustbench_diffaug.train.geometry import Affine
from robustbench_diffaug.train.optimiser import Optimiser
from robustbench_diffaug.train.start import Start
from robustbench_diffaug.train.stream import Crop

__all__ = ["AutoencoderRecipe", "ClassifierRecipe", "DenoiserRecipe", "Extra", "GuidanceRecipe", "Mix", "Recipe"]

Share = Annotated[float, Field(gt=0, lt=1)]


class Extra(Value):
    """More training images, such as synthetic ones, mixed into every batch.

    Arguments:
        dataset: Where they are.
        share: Of the samples, exactly.
    """

    dataset: Dataset
    share: Share


class Mix(Value):
    """Label smoothing, mixup and cutmix, as timm does them.

    Arguments:
        smoothing: The share of the label that goes to all classes alike.
        mixup: Of its Beta distribution; 0 for none.
        cutmix: Of its Beta distribution; 0 for none.
        chance: That a batch is mixed.
        switch: That it is cutmix, where both are on.
        mode: 'batch' mixes all of a batch alike, 'pair' and 'elem' each pair or image by itself.

    References:
        mixup: Beyond Empirical Risk Minimization (Zhang et al., 2018), https://arxiv.org/abs/1710.09412
        CutMix: Regularization Strategy to Train Strong Classifiers (Yun et al., 2019), https://arxiv.org/abs/1905.04899
    """

    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    chance: Annotated[float, Field(gt=0, le=1)] = 1.0
    switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"


class Recipe(Value):
    """What all recipes hold.

    Arguments:
        name: Of the network that comes out.
        seed: Of initialisation, order, augmentation and noise.
        dataset: What it is trained on.
        channels: Of the images.
        steps: Updates of the weights.
        batch: Images in each, over all processes.
        accumulate: Parts that each batch is cut into, one after another, for less memory; BatchNorm sees the parts.
        ema: Decay of the average of the weights that is kept; 0 keeps the last ones.
        optimiser: How they are updated.
        start: Weights to start from, if not from scratch.
        precision: Of the network's arithmetic; bfloat16 by autocast, the weights stay float32.
        channels_last: The memory format.
        compile: Whether the network goes through torch.compile.
        test: What the accuracy on the card is measured on, once, at the end.
        half: Whether matrices are written in half precision; vectors, such as BatchNorm's, never are.
        save_every: Steps between two saved states; a run that is stopped continues from the last one.
        workers: Processes that read images which do not fit in memory.
    """

    name: str = Field(min_length=1)
    seed: NonNegativeInt = 0
    dataset: Dataset
    channels: PositiveInt
    steps: PositiveInt
    batch: PositiveInt
    accumulate: PositiveInt = 1
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    optimiser: Optimiser = Optimiser()
    start: Start | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True
    compile: bool = False
    test: Annotated[Dataset | None, Outside] = None
    half: Annotated[bool, Outside] = False
    save_every: Annotated[PositiveInt, Outside] = 250
    workers: Annotated[NonNegativeInt, Outside] = 0

    @model_validator(mode="after")
    def _divisible(self) -> "Recipe":
        if self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} cannot be cut into {self.accumulate} equal parts")
        return self

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of all that the weights depend on, data and denoiser included."""
        return digest_of(self.identity(), 16)


class ClassifierRecipe(Recipe):
    """Trains a classifier of timm; the loss is the sum of the terms that the recipe names.

    Cross-entropy on the ordinary branch always; each further term adds branches, and all branches go through the
    network in one forward, so that BatchNorm mixes them, as published. With AugMix and DeepAugment together the AugMix
    branches start from the ordinary image or one of its DeepAugment versions, at random, as published.

    Arguments:
        arch: As in `timm.create_model`.
        args: More arguments of the architecture.
        classes: The number of outputs.
        preprocess: What the network expects of an image.
        augment: Random affine maps of the ordinary branch.
        crop: Random resized crops of the ordinary branch, from the image as it lies on disk.
        extra: More training images.
        mix: Label smoothing, mixup and cutmix of the ordinary branch; smoothing of all labels.
        augmix: The AugMix term.
        deepaugment: The DeepAugment term.
        diffaug: The DiffAug term; it starts from the image without augmentation, as published.
    """

    kind: Literal["classifier"] = "classifier"
    arch: str
    args: Options = ()
    classes: PositiveInt
    preprocess: Preprocess = Preprocess()
    augment: Affine | None = None
    crop: Crop | None = None
    extra: Extra | None = None
    mix: Mix | None = None
    augmix: AugMix | None = None
    deepaugment: DeepAugment | None = None
    diffaug: DiffAug | None = None

    @model_validator(mode="after")
    def _even(self) -> "ClassifierRecipe":
        if self.mix and (self.mix.mixup or self.mix.cutmix) and self.batch // self.accumulate % 2:
            raise ValueError(f"mixup and cutmix need an even number of images, not {self.batch // self.accumulate}")
        return self


class DenoiserRecipe(Recipe):
    """Trains a UNet2DModel to predict noise: E ||eps - eps_theta(x_t, t)||^2 at uniformly random times.

    Arguments:
        unet: Arguments of diffusers' UNet2DModel.
        schedule: The noise levels.
        classes: Of a class-conditional denoiser; left out, it is unconditional.
        drop: The chance that a label is left out in training, so that it is an unconditional denoiser too.
        learned_sigma: Whether the network has a second output, the variance of a reverse step.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), https://arxiv.org/abs/2207.12598
    """

    kind: Literal["denoiser"] = "denoiser"
    unet: Options
    schedule: Schedule = Schedule()
    classes: PositiveInt | None = None
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.1
    learned_sigma: bool = False


class AutoencoderRecipe(Recipe):
    """Trains the small autoencoder behind DeepAugment: mean squared error of the image that comes out.

    Arguments:
        args: Arguments of the network.
    """

    kind: Literal["autoencoder"] = "autoencoder"
    args: Options = ()


class GuidanceRecipe(Recipe):
    """Trains a classifier of diffused images, for guidance: cross-entropy at a uniformly random time of each image.

    Arguments:
        arch: As in `timm.create_model`.
        args: More arguments of the architecture.
        classes: The number of outputs.
        augment: Random affine maps of the images before they are diffused.
        denoiser: Whose times are drawn, and which makes the denoised twin.
        sees: 'noisy' classifies x_t given t; 'denoise-assisted' classifies x_t and E[x0 | x_t] given t. How the paper
            joins the two images is not known; here they are planes of one input, and the time one more.

    References:
        DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers (Sastry et al., NeurIPS 2024),
        Table 4, https://arxiv.org/abs/2306.09192
        Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), https://arxiv.org/abs/2105.05233
    """

    kind: Literal["guidance"] = "guidance"
    arch: str
    args: Options = ()
    classes: PositiveInt
    augment: Affine | None = None
    denoiser: Denoiser
    sees: Literal["noisy", "denoise-assisted"]
