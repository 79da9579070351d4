"""How much a gradient looks like an image: cosines, sparsity, roughness, steps along it, and its picture."""

from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import fingerprint
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.evaluators.differentiable import Shown, Through, pulled, rising

__all__ = ["ascended", "class_means", "cosine", "hoyer", "roughness", "tiles"]

READ = 256  # images of the reference that are held at once


def cosine(one: Float[Tensor, "n c h w"], other: Float[Tensor, "n c h w"]) -> Float64[Tensor, " n"]:
    """The cosine of each pair, in [-1, 1]; NaN where one of them is 0."""
    a, b = one.double().flatten(1), other.double().flatten(1)
    a, b = (flat / flat.abs().amax(dim=1, keepdim=True) for flat in (a, b))  # squares of small numbers vanish
    found: Tensor = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    return found.clamp(-1, 1)


def hoyer(images: Float[Tensor, "n c h w"]) -> Float64[Tensor, " n"]:
    """The sparsity `(sqrt(d) - |z|_1 / |z|_2) / (sqrt(d) - 1)` of d values, 0 where all are of one size.

    NaN where all are 0, or d is 1.

    References:
        Non-negative Matrix Factorization with Sparseness Constraints (Hoyer, 2004),
        https://www.jmlr.org/papers/v5/hoyer04a.html
    """
    flat = images.double().abs().flatten(1)
    flat = flat / flat.amax(dim=1, keepdim=True)
    root = flat.shape[1] ** 0.5
    found: Tensor = (root - flat.sum(dim=1) / flat.norm(dim=1)) / (root - 1)
    return found


def roughness(images: Float[Tensor, "n c h w"]) -> Float64[Tensor, " n"]:
    """The total variation over the spread, `TV(z) / |z - mean(z)|_2`, whatever the scale and the offset of z.

    TV is anisotropic, the sum of |z_i - z_j| over neighbours; the mean is each channel's. NaN where z is constant.
    """
    values = images.double()
    values = values - values.mean(dim=(2, 3), keepdim=True)
    values = values / values.abs().amax(dim=(1, 2, 3), keepdim=True)
    variation = values.diff(dim=2).abs().sum(dim=(1, 2, 3)) + values.diff(dim=3).abs().sum(dim=(1, 2, 3))
    found: Tensor = variation / values.flatten(1).norm(dim=1)
    return found


def tiles(images: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """Pictures of gradients: each channel of each from its smallest value, 0, to its largest, 255."""
    values = images.double()
    low, high = (end(dim=(2, 3), keepdim=True) for end in (values.amin, values.amax))
    span = torch.where(high > low, high - low, torch.ones_like(high))
    return ((values - low) / span * 255).round().to(torch.uint8)


def class_means(reference: Dataset, classes: int) -> Float[Tensor, "k c h w"]:
    """The mean image of each class of some labelled images; NaN for a class of which there is none.

    They are read once per process.

    Raises:
        ValueError: If an image has no label, or one that is none of the classes.
    """
    return _class_means(reference, fingerprint(reference), classes)


@lru_cache(maxsize=4)
def _class_means(reference: Dataset, identity: str, classes: int) -> Tensor:  # identity: changed files are read anew
    source, rows = reference.opened(), reference.rows()
    sums: Tensor | None = None
    counts = torch.zeros(classes, dtype=torch.float64)
    for start in range(0, len(rows), READ):
        images, labels = source.read(rows[start : start + READ])
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"reference {reference.name} has labels {found}; needed are classes 0 to {classes - 1}")
        sums = torch.zeros(classes, *images.shape[1:], dtype=torch.float64) if sums is None else sums
        sums.index_add_(0, labels.long(), images.double())
        counts += torch.bincount(labels.long(), minlength=classes)
    if sums is None:
        raise ValueError(f"reference {reference.name} has no images; name some of each class")
    return (sums / counts[:, None, None, None]).float()


def ascended(
    model: Model, shown: Shown, through: Through, targets: Int[Tensor, " n"], steps: int, step: float
) -> Float[Tensor, "n c h w"]:
    """Images after some steps up the probability of a class, `z + step * g / |g|_2`, as a judge is shown them.

    z is the image; for 'denoised' it is the denoised image, taken for a clean one. After each step a clean image is
    clamped to [0, 1]. A noisy one is not; it is denoised at the end.

    Arguments:
        model: The classifier whose gradient g of log p(target | z) is followed.
        shown: Where to start.
        through: To what the gradient is taken.
        targets: The class of each image.
        steps: Their number.
        step: The l2 length of each in pixels of [0, 1].
    """
    denoise = None if through == "denoised" else shown.denoise
    sees = through == "chain" or "denoised" in model.wants
    for number in range(1, steps + 1):
        found = pulled(model, shown, through, lambda logits, rows: [rising(logits, targets[rows]).direction])
        gradient = found.gradients[0].double()
        length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
        move = torch.where(length > 0, step * gradient / length, torch.zeros_like(gradient)).to(shown.images.dtype)
        if through == "denoised" and shown.denoised is not None:
            shown = replace(shown, denoised=(shown.denoised + move).clamp(0, 1))
        elif denoise is not None and shown.sigma is not None:
            images = shown.images + move
            again = sees or number == steps
            shown = replace(shown, images=images, denoised=denoise(images, shown.sigma).mean if again else None)
        else:
            images = (shown.images + move).clamp(0, 1)
            shown = replace(shown, images=images, denoised=None if shown.denoised is None else images)
    ended = shown.images if shown.denoised is None else shown.denoised
    return ended.clamp(0, 1)
