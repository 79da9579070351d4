"""What a training step minimises, as functions of a recipe, a network and some samples."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.train.recipe import Affine, ClassifierRecipe, DenoiserRecipe, DiffAug
from robustbench_diffaug.train.samples import Samples

__all__ = ["Loss", "affine", "classifier_loss", "denoiser_loss", "diffaug"]


Loss = Callable[[nn.Module, Samples], dict[str, Tensor]]
"""The weighted terms by name; their sum is minimised."""


def affine(images: Float[Tensor, "b c h w"], chance: Float[Tensor, "b 4"], ranges: Affine) -> Float[Tensor, "b c h w"]:
    """Each image rotated, shifted and zoomed by amounts that its four uniforms choose; bilinear, black outside."""
    centred = (2 * chance - 1).float()
    angle = centred[:, 0] * (ranges.degrees * torch.pi / 180)
    scale = 1 / (1 + centred[:, 1] * ranges.zoom)
    # In grid coordinates the image is two units wide.
    shift = centred[:, 2:] * ranges.pixels * 2 / torch.tensor([images.shape[3], images.shape[2]])
    cos, sin = angle.cos() * scale, angle.sin() * scale
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def diffaug(samples: Samples, term: DiffAug) -> Float[Tensor, "b c h w"]:
    """Each image at a time drawn from [low, high), denoised in one step: E[x0 | x_t], clamped to [0, 1]."""
    denoise = term.denoiser.loaded(Limits(device=str(samples.images.device)))
    chance = samples.uniform("diffaug time", 1)[:, 0].cpu().numpy()
    times = term.low + np.floor(chance * (term.high - term.low)).astype(np.int64)
    sigma = torch.from_numpy(term.denoiser.sigmas()[times]).to(samples.images)
    noisy = samples.images + sigma[:, None, None, None] * samples.normal("diffaug noise")
    with torch.no_grad():
        return denoise(noisy, sigma).mean


def classifier_loss(recipe: ClassifierRecipe) -> Loss:
    """Cross-entropy on the images, and on their DiffAug versions where the recipe has the term; one forward."""

    def loss(network: nn.Module, samples: Samples) -> dict[str, Tensor]:
        images = samples.images
        if recipe.augment:
            images = affine(images, samples.uniform("affine", 4), recipe.augment)
        branches, weights = {"clean": images}, {"clean": 1.0}
        if recipe.diffaug:
            branches["diffaug"], weights["diffaug"] = diffaug(samples, recipe.diffaug), recipe.diffaug.weight
        prepared = recipe.preprocess(torch.cat(list(branches.values())))
        logits = network(prepared.contiguous(memory_format=torch.channels_last))
        parts = zip(branches, logits.chunk(len(branches)), strict=True)
        return {name: weights[name] * functional.cross_entropy(part, samples.labels) for name, part in parts}

    return loss


def denoiser_loss(recipe: DenoiserRecipe) -> Loss:
    """Mean squared error of the predicted noise at a uniformly random time of each image."""
    kept = torch.from_numpy(np.cumprod(1 - recipe.schedule.beta())).float()

    def loss(network: nn.Module, samples: Samples) -> dict[str, Tensor]:
        times = (samples.uniform("time", 1)[:, 0] * recipe.schedule.steps).long()
        noise = samples.normal("noise")
        share = kept.to(samples.images.device)[times][:, None, None, None]
        noisy = share.sqrt() * (2 * samples.images - 1) + (1 - share).sqrt() * noise
        predicted = network(noisy.contiguous(memory_format=torch.channels_last), times).sample
        return {"noise": functional.mse_loss(predicted, noise)}

    return loss
