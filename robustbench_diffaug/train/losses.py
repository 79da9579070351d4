"""What a training step minimises, as functions of a recipe, a network and some samples."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.conditioning import packed
from robustbench_diffaug.train.augmix import augmix, jensen_shannon
from robustbench_diffaug.train.deepaugment import DeepAugment, deepaugment
from robustbench_diffaug.train.denoising import noise_loss
from robustbench_diffaug.train.diffaug import diffaug, shaped, times_of
from robustbench_diffaug.train.geometry import affine
from robustbench_diffaug.train.recipe import (
    AutoencoderRecipe,
    ClassifierRecipe,
    DenoiserRecipe,
    GuidanceRecipe,
    Recipe,
)
from robustbench_diffaug.train.samples import Samples

__all__ = ["Loss", "Terms", "autoencoder_loss", "classifier_loss", "guidance_loss", "loss_of"]


class Terms(NamedTuple):
    """What a step minimises.

    Arguments:
        losses: The weighted terms by name; their sum is minimised.
        right: The share of the ordinary branch that is classified right, where there is one.
    """

    losses: dict[str, Float[Tensor, ""]]
    right: Float[Tensor, ""] | None = None


Loss = Callable[[nn.Module, Samples], Terms]


def loss_of(recipe: Recipe) -> Loss:
    """The loss of a recipe."""
    if isinstance(recipe, ClassifierRecipe):
        return classifier_loss(recipe)
    if isinstance(recipe, GuidanceRecipe):
        return guidance_loss(recipe)
    if isinstance(recipe, AutoencoderRecipe):
        return autoencoder_loss
    assert isinstance(recipe, DenoiserRecipe)
    schedule, classes, drop = recipe.schedule, recipe.classes, recipe.drop

    def denoiser_loss(network: nn.Module, samples: Samples) -> Terms:
        learned = recipe.learned_sigma
        return Terms(noise_loss(network, samples, schedule, classes=classes, drop=drop, learned_sigma=learned))

    return denoiser_loss


def classifier_loss(recipe: ClassifierRecipe) -> Loss:
    """Cross-entropy on the ordinary images and the further terms of the recipe, all branches in one forward."""

    def loss(network: nn.Module, samples: Samples) -> Terms:
        ordinary, targets, plain = _targets(recipe, samples, _ordinary(recipe, samples))
        branches = _branches(recipe, samples, ordinary)
        prepared = recipe.preprocess(torch.cat(list(branches.values())))
        logits = dict(zip(branches, network(prepared).float().chunk(len(branches)), strict=True))
        losses = {"clean": functional.cross_entropy(logits["clean"], targets)}
        if recipe.augmix:
            versions = [logits["clean"], logits.pop("augmix 1"), logits.pop("augmix 2")]
            losses["augmix"] = recipe.augmix.weight * jensen_shannon(versions)
        if recipe.diffaug:
            losses["diffaug"] = recipe.diffaug.weight * functional.cross_entropy(logits.pop("diffaug"), plain)
        for name, own in logits.items():
            if name != "clean":
                assert recipe.deepaugment is not None
                losses[name] = recipe.deepaugment.weight * functional.cross_entropy(own, targets)
        return Terms(losses, _right(logits["clean"], targets))

    return loss


def _ordinary(recipe: ClassifierRecipe | GuidanceRecipe, samples: Samples) -> Float[Tensor, "b c h w"]:
    """The images under the ordinary augmentation."""
    images = samples.images if samples.ordinary is None else samples.ordinary
    return affine(images, samples.uniform("affine", 4), recipe.augment) if recipe.augment else images


def _targets(
    recipe: ClassifierRecipe, samples: Samples, images: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b c h w"], Tensor, Tensor]:
    """The images, mixed where the recipe mixes, their targets, and those of the images before they were mixed."""
    mix = recipe.mix
    if mix is None:
        return images, samples.labels, samples.labels
    from timm.data.mixup import Mixup, mixup_target

    plain: Tensor = mixup_target(samples.labels, recipe.classes, 1.0, mix.smoothing)  # type: ignore[no-untyped-call]
    if not (mix.mixup or mix.cutmix):
        return images, plain, plain
    mixer = Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=mix.mixup,
        cutmix_alpha=mix.cutmix,
        prob=mix.chance,
        switch_prob=mix.switch,
        mode=mix.mode,
        label_smoothing=mix.smoothing,
        num_classes=recipe.classes,
    )
    with rng.seeded(rng.key("mix", *samples.keys[0])):
        mixed, targets = mixer(images.clone(), samples.labels)  # it works in place
    return mixed, targets, plain


def _branches(
    recipe: ClassifierRecipe, samples: Samples, ordinary: Float[Tensor, "b c h w"]
) -> dict[str, Float[Tensor, "b c h w"]]:
    branches = {"clean": ordinary}
    if recipe.deepaugment:
        branches |= _deep(recipe.deepaugment, samples, ordinary)
    if recipe.augmix:
        if recipe.deepaugment:
            branches = {"clean": _one_of(list(branches.values()), samples)}
        for name in ("augmix 1", "augmix 2"):
            branches[name] = augmix(samples, branches["clean"], recipe.augmix, name)
    if recipe.diffaug:
        branches["diffaug"] = diffaug(samples, recipe.diffaug)
    return branches


def _deep(
    term: DeepAugment, samples: Samples, ordinary: Float[Tensor, "b c h w"]
) -> dict[str, Float[Tensor, "b c h w"]]:
    """A version of each image by each network."""
    found = {}
    for index, network in enumerate(term.networks):
        name = f"deepaugment {index + 1}"
        found[name] = deepaugment(ordinary, network, term, (name, *samples.keys[0]))
    return found


def _one_of(versions: list[Float[Tensor, "b c h w"]], samples: Samples) -> Float[Tensor, "b c h w"]:
    """One of the versions of each image, each as likely."""
    chosen = (samples.uniform("version", 1)[:, 0] * len(versions)).long()
    return torch.stack(versions)[chosen, torch.arange(len(chosen), device=chosen.device)]


def _right(logits: Float[Tensor, "b k"], targets: Tensor) -> Float[Tensor, ""]:
    labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
    return (logits.detach().argmax(dim=1) == labels).float().mean()


def autoencoder_loss(network: nn.Module, samples: Samples) -> Terms:
    """Mean squared error between an image and what the network makes of it."""
    return Terms({"image": functional.mse_loss(network(samples.images).float(), samples.images)})


def guidance_loss(recipe: GuidanceRecipe) -> Loss:
    """Cross-entropy on each image diffused to a uniformly random time, with its denoised twin where that is seen."""
    denoiser = recipe.denoiser

    def loss(network: nn.Module, samples: Samples) -> Terms:
        images = _ordinary(recipe, samples)
        levels = denoiser.sigmas()[times_of(samples, 0, len(denoiser.sigmas()))]
        sigma = torch.from_numpy(levels).to(images)
        noisy = images + sigma[:, None, None, None] * samples.normal("diffaug noise")
        denoised = None
        if recipe.sees == "denoise-assisted":
            with torch.no_grad():
                denoised = shaped(denoiser, len(images)).loaded(Limits(device=str(images.device)))(noisy, sigma).mean
        logits = network(packed(noisy, sigma, denoised)).float()
        loss = functional.cross_entropy(logits, samples.labels)
        return Terms({"noisy": loss}, _right(logits, samples.labels))

    return loss
