"""The networks of recipes, with their initial weights."""

from torch import nn

from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.conditioning import Want, planes
from robustbench_diffaug.checkpoints.timm_model import build
from robustbench_diffaug.train.image_networks import build_image_network
from robustbench_diffaug.train.recipe import (
    AutoencoderRecipe,
    ClassifierRecipe,
    DenoiserRecipe,
    GuidanceRecipe,
    Recipe,
)

__all__ = ["network_of", "wants_of"]


def network_of(recipe: Recipe) -> nn.Module:
    """The recipe's network with its initial weights, a function of the recipe alone."""
    with rng.seeded(rng.key("initial weights", recipe.seed)):
        if isinstance(recipe, ClassifierRecipe):
            return build(recipe.arch, recipe.args, recipe.channels, recipe.classes)
        if isinstance(recipe, GuidanceRecipe):
            return build(recipe.arch, recipe.args, planes(recipe.channels, wants_of(recipe)), recipe.classes)
        if isinstance(recipe, AutoencoderRecipe):
            return build_image_network("autoencoder", recipe.args, recipe.channels)
        assert isinstance(recipe, DenoiserRecipe)
        return _unet(recipe)


def wants_of(recipe: GuidanceRecipe) -> tuple[Want, ...]:
    """What the classifier asks for besides the image."""
    return ("sigma", "denoised") if recipe.sees == "denoise-assisted" else ("sigma",)


def _unet(recipe: DenoiserRecipe) -> nn.Module:
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    from diffusers import UNet2DModel

    # One more class than there are stands for none.
    classes = {} if recipe.classes is None else {"num_class_embeds": recipe.classes + 1}
    outputs = recipe.channels * (2 if recipe.learned_sigma else 1)
    options = {"in_channels": recipe.channels, "out_channels": outputs, **classes, **dict(recipe.unet)}
    try:
        network: nn.Module = UNet2DModel(**options)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"diffusers cannot build a UNet2DModel with {dict(recipe.unet)}: {error}") from error
    return network
