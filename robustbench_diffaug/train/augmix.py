"""AugMix: chains of simple operations, mixed with the image, and the loss that makes predictions agree on them.

The operations are those of the published code, which calls PIL: from 8 bits to 8 bits, with PIL's arithmetic to the
last bit, but on tensors, for many images with parameters of their own at once. All of it is elementwise or in integers,
so what an image becomes does not depend on the images around it.

References:
    AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty (Hendrycks et al., ICLR 2020),
    https://arxiv.org/abs/1912.02781
    Its code, https://github.com/google-research/augmix
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from pydantic import Field, PositiveFloat, PositiveInt
from scipy.special import betaincinv, gammaincinv
from torch import Tensor
from torch.nn import functional

from robustbench_diffaug.component import Value
from robustbench_diffaug.train.samples import Samples

__all__ = ["OPERATIONS", "PUBLISHED", "AugMix", "Draws", "augmix", "draw", "jensen_shannon", "operate"]

DEEPEST = 3
"""The longest chain where the depth is left to chance, as published."""


class AugMix(Value):
    """The AugMix term: two mixed versions of each image, on which the network should say what it says of the image.

    Arguments:
        width: Chains that are mixed.
        depth: Operations in each chain; left out, each chain draws 1, 2 or 3 of its own, as published.
        severity: The largest level of an operation, above 0 and at most 10: published are 3 for CIFAR, 1 for ImageNet.
        alpha: Of the Dirichlet and Beta distributions of the weights, from 0.1 to 100; published is 1.
        weight: Of the Jensen-Shannon term in the loss.
        all_ops: Also colour, contrast, brightness and sharpness, which overlap with the corruptions of ImageNet-C.

    References:
        AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty (Hendrycks et al., ICLR 2020),
        https://arxiv.org/abs/1912.02781
    """

    width: PositiveInt = 3
    depth: PositiveInt | None = None
    severity: Annotated[float, Field(gt=0, le=10)] = 3.0
    alpha: Annotated[float, Field(ge=0.1, le=100)] = 1.0
    weight: PositiveFloat = 12.0
    all_ops: bool = False


@dataclass(frozen=True)
class Draws:
    """What chance decides about each image.

    Arguments:
        share: How much of an image is the mixture, in [0, 1].
        weights: Of the chains in the mixture; they sum to 1.
        operations: Positions in `OPERATIONS`, in the order of the chain; -1 after its end.
        levels: From 0.1 to the severity.
        negative: Whether a rotation, shear or shift goes the other way.
    """

    share: Float32[np.ndarray, " b"]
    weights: Float32[np.ndarray, "b width"]
    operations: Int64[np.ndarray, "b width depth"]
    levels: Float64[np.ndarray, "b width depth"]
    negative: Bool[np.ndarray, "b width depth"]


def draw(samples: Samples, term: AugMix, stream: str) -> Draws:
    """The draws of each sample, a function of its key, the term and the stream.

    A sample's uniforms are, in order: the share's; then of each chain its weight's, its depth's, and of each of as many
    steps as the chain can have the operation's, the level's and the sign's.

    Arguments:
        samples: Whose keys are used.
        term: The distributions.
        stream: Another stream is another draw.
    """
    steps, known = term.depth or DEEPEST, len(OPERATIONS if term.all_ops else PUBLISHED)
    chance = samples.uniform(f"augmix/{stream}", 1 + term.width * (2 + 3 * steps)).cpu().numpy()
    chains = chance[:, 1:].reshape(len(chance), term.width, 2 + 3 * steps)
    gamma = gammaincinv(term.alpha, chains[..., 0])  # independent gammas over their sum are a Dirichlet draw
    depth = term.depth or 1 + np.floor(chains[..., 1:2] * DEEPEST)
    operations = np.floor(chains[..., 2::3] * known).astype(np.int64)
    return Draws(
        share=betaincinv(term.alpha, term.alpha, chance[:, 0]).astype(np.float32),
        weights=(gamma / gamma.sum(1, keepdims=True)).astype(np.float32),
        operations=np.where(np.arange(steps) < depth, operations, -1),
        levels=0.1 + (term.severity - 0.1) * chains[..., 3::3],
        negative=chains[..., 4::3] > 0.5,
    )


def augmix(samples: Samples, images: Float[Tensor, "b c h w"], term: AugMix, stream: str) -> Float[Tensor, "b c h w"]:
    """Each image mixed with chains of operations on it: (1 - m) x + m sum_i w_i chain_i(x).

    The published code mixes after the normalisation of the channels. That is affine and the coefficients sum to 1, so
    mixing in [0, 1] is the same.

    Arguments:
        samples: Whose keys decide.
        images: The same samples, augmented in the ordinary way, in [0, 1], of 1 or 3 channels. The chains start from
            them in 8 bits.
        term: Width, depth, severity, alpha and operations.
        stream: Another stream is another version.

    Raises:
        ValueError: If the images do not have 1 or 3 channels.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"AugMix needs images of 1 or 3 channels, these have {images.shape[1]}; leave augmix out")
    drawn = draw(samples, term, stream)
    chains = (images * 255).round().clamp(0, 255).to(torch.uint8).repeat_interleave(term.width, 0)
    for step in range(drawn.operations.shape[2]):
        operations, levels, negative = (
            values[:, :, step].ravel() for values in (drawn.operations, drawn.levels, drawn.negative)
        )
        chains = operate(chains, operations, levels, negative)
    weighted = chains.to(images.dtype).div(255).unflatten(0, (len(images), term.width))
    weighted *= torch.from_numpy(drawn.weights).to(images)[:, :, None, None, None]
    mixture = weighted[:, 0]
    for chain in range(1, term.width):  # one after the other: the order of a reduction could depend on the batch
        mixture = mixture + weighted[:, chain]
    share = torch.from_numpy(drawn.share).to(images)[:, None, None, None]
    mixed: Tensor = (1 - share) * images + share * mixture
    return mixed


def jensen_shannon(logits: Sequence[Float[Tensor, "b k"]]) -> Float[Tensor, ""]:
    """The mean over images and versions i of KL(p_i || M), where M = max(mean_i p_i, 1e-7), as published.

    It lies between 0 (up to the clamping) and the logarithm of the number of versions.

    Arguments:
        logits: Of each version of the same images, two versions at least.

    Raises:
        ValueError: If there are fewer versions.
    """
    if len(logits) < 2:
        raise ValueError(f"the Jensen-Shannon divergence needs 2 versions of each image, not {len(logits)}")
    # In logarithms, since the gradient of p log p is not a number where a probability is 0 in floating point.
    logs = [functional.log_softmax(version, 1) for version in logits]
    mixture = torch.stack([version.exp() for version in logs]).mean(0).clamp(1e-7, 1).log()
    parts = [functional.kl_div(mixture, version, reduction="batchmean", log_target=True) for version in logs]
    return torch.stack(parts).mean()


def operate(
    images: UInt8[Tensor, "n c h w"],
    operations: Int64[np.ndarray, " n"],
    levels: Float64[np.ndarray, " n"],
    negative: Bool[np.ndarray, " n"],
) -> UInt8[Tensor, "n c h w"]:
    """Each image after its operation.

    Arguments:
        images: Of 1 or 3 channels, in 8 bits.
        operations: Positions in `OPERATIONS`; an image with -1 stays as it is.
        levels: From 0 to 10, what the published code calls `sample_level`.
        negative: Whether a rotation, shear or shift goes the other way.
    """
    after = images.clone()
    for position, operation in enumerate(OPERATIONS.values()):
        rows = np.flatnonzero(operations == position)
        if len(rows):
            index = torch.from_numpy(rows).to(images.device)
            after[index] = operation(images[index], levels[rows], negative[rows])
    return after


def _whole(levels: np.ndarray, most: float) -> np.ndarray:
    """A level as a whole number between 0 and `most`, rounded down."""
    return np.trunc(levels * most / 10)


def _each(values: np.ndarray, images: Tensor) -> Tensor:
    """One number for each image, in a shape that goes with them."""
    return torch.from_numpy(values).to(images.device)[:, None, None, None]


def _autocontrast(images: Tensor, levels: np.ndarray, negative: np.ndarray) -> Tensor:
    """The greys of each channel stretched to 0 and 255; one that is flat stays."""
    low, high = (found.double() for found in (images.amin((2, 3), True), images.amax((2, 3), True)))
    # Not 255 / (high - low): for torch that is a product with a reciprocal, which is rounded twice.
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)
    stretched = images.double() * scale + (-low) * scale
    return torch.where(high > low, stretched.clamp(0, 255).to(torch.uint8), images)


def _equalize(images: Tensor, levels: np.ndarray, negative: np.ndarray) -> Tensor:
    """Greys moved so that the histogram of each channel becomes even, by PIL's rule in whole numbers."""
    greys = images.flatten(2).long()
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, greys, torch.ones_like(greys))
    brightest = counts.gather(2, greys.amax(2, keepdim=True))
    step = (greys.shape[2] - brightest) // 255
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    moved = table.clamp(max=255).gather(2, greys)
    return torch.where(step > 0, moved, greys).to(torch.uint8).reshape(images.shape)


def _posterize(images: Tensor, levels: np.ndarray, negative: np.ndarray) -> Tensor:
    """The highest bits kept: 4 at level 0, none at level 10."""
    mask = 256 - 2 ** (4 + _whole(levels, 4.0))
    return images & _each(mask.astype(np.uint8), images)


def _solarize(images: Tensor, levels: np.ndarray, negative: np.ndarray) -> Tensor:
    """Greys from a threshold on inverted."""
    threshold = 256 - _whole(levels, 256.0)
    return torch.where(images < _each(threshold.astype(np.int16), images), images, 255 - images)


def _rotate(images: Tensor, levels: np.ndarray, negative: np.ndarray) -> Tensor:
    """Turned about the middle by whole degrees."""
    x, y = images.shape[3] / 2, images.shape[2] / 2
    maps = []
    for degrees in np.where(negative, -1, 1) * _whole(levels, 30.0):
        angle = -math.radians(float(degrees) % 360.0)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)  # to 15 digits, as PIL
        maps.append((cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y))
    return _warp(images, np.array(maps))


def _moved(
    coefficient: int, amount: Callable[[Tensor, np.ndarray], np.ndarray]
) -> Callable[[Tensor, np.ndarray, np.ndarray], Tensor]:
    """A shear or a shift: the identity but for one of the six coefficients."""

    def operation(images: Tensor, levels: np.ndarray, negative: np.ndarray) -> Tensor:
        maps = np.tile((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (len(images), 1))
        maps[:, coefficient] = np.where(negative, -1, 1) * amount(images, levels)
        return _warp(images, maps)

    return operation


def _warp(images: Tensor, maps: Float64[np.ndarray, "n 6"]) -> Tensor:
    """The pixel at (x, y) taken from (a x + b y + c, d x + e y + f), bilinear, black where that is outside.

    Coordinates are those of pixels' centres, (0.5, 0.5) for the first. Products and sums are in PIL's order, in double
    precision and rounded down at the end, so the greys are PIL's where its compiler does not fuse them.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = torch.from_numpy(maps).to(images.device)[:, :, None, None].unbind(1)
    column = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    row = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
    x, y = a * column + b * row + c, d * column + e * row + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    right_share, lower_share = (x - left)[:, None], (y - top)[:, None]
    # One more line at each edge, so that four pixels that meet lie at fixed distances, as PIL's clamped ones.
    flat = _edged(_edged(images, 2), 3).flatten(2).double()
    line = width + 2
    index = ((top + 1) * line + (left + 1)).long().clamp(0, (height + 1) * line - 2)
    index = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)

    def along(first: int) -> Tensor:
        one, other = (flat[..., start:].gather(2, index).reshape(images.shape) for start in (first, first + 1))
        return one + (other - one) * right_share

    upper, lower = along(0), along(line)
    return ((upper + (lower - upper) * lower_share) * inside[:, None]).to(torch.uint8)


def _edged(images: Tensor, dim: int) -> Tensor:
    """The first and the last line along a dimension once more."""
    return torch.cat([images.narrow(dim, 0, 1), images, images.narrow(dim, images.shape[dim] - 1, 1)], dim)


def _blended(degenerate: Callable[[Tensor], Tensor]) -> Callable[[Tensor, np.ndarray, np.ndarray], Tensor]:
    """Drawn away from a degenerate version, by a factor from 0.1 (almost that) over 1 (the image) to 1.9."""

    def operation(images: Tensor, levels: np.ndarray, negative: np.ndarray) -> Tensor:
        factor = _each((levels * 1.8 / 10 + 0.1).astype(np.float32), images)
        base = degenerate(images).float()
        return (base + factor * (images.float() - base)).clamp(0, 255).to(torch.uint8)

    return operation


def _luma(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma in PIL's 16 bits of fraction; an image of one channel is its own."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().split(1, 1)
    luma: Tensor = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma


def _mean_luma(images: Tensor) -> Tensor:
    """The mean luma of each image, to the nearest whole number."""
    count = images.shape[2] * images.shape[3]
    return (2 * _luma(images).long().sum((2, 3), keepdim=True) + count) // (2 * count)


def _smooth(images: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels, of which the middle one counts five times; the border stays.

    PIL sums in single precision. A sum over 13 is never close to a half, so whole numbers give the same.
    """
    values = images.int()
    lines = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    middle = values[:, :, 1:-1, 1:-1]
    total = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * middle
    smooth = values.clone()
    smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth


OPERATIONS: dict[str, Callable[[Tensor, np.ndarray, np.ndarray], Tensor]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "posterize": _posterize,
    "rotate": _rotate,
    "solarize": _solarize,
    "shear_x": _moved(1, lambda images, levels: levels * 0.3 / 10),
    "shear_y": _moved(3, lambda images, levels: levels * 0.3 / 10),
    "translate_x": _moved(2, lambda images, levels: _whole(levels, images.shape[3] / 3)),
    "translate_y": _moved(5, lambda images, levels: _whole(levels, images.shape[2] / 3)),
    "color": _blended(_luma),
    "contrast": _blended(_mean_luma),
    "brightness": _blended(torch.zeros_like),
    "sharpness": _blended(_smooth),
}
"""All operations by their published names: what they do to images in 8 bits, given each image's level and sign."""
PUBLISHED = tuple(OPERATIONS)[:9]
"""Those that do not overlap with the corruptions of ImageNet-C."""
