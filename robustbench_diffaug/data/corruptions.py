"""The common corruptions of ImageNet-C and CIFAR-10-C, drawn on the fly from one key per image.

`corrupt` is a pure function: an image's result depends, to the bit, on the image, the corruption, its severity, the
table of constants and the image's key alone. All corruptions start from the image rounded to 8 bits and end in 8
bits, on the host, so that the bits are those of any device.

References:
    Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
    ICLR 2019), https://arxiv.org/abs/1903.12261
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from scipy.special import ndtr, pdtr
from torch import Tensor

from robustbench_diffaug.component import suggest
from robustbench_diffaug.data.blurs import (
    Floats,
    Levels,
    Number,
    clipped_zoom,
    defocus_blur,
    elastic_transform,
    gaussian_blur,
    glass_blur,
    line_blur,
    motion_blur,
    motion_taps,
    truncate,
    zoom_blur,
)
from robustbench_diffaug.data.corruption_constants import CONSTANTS
from robustbench_diffaug.data.frost import frost
from robustbench_diffaug.data.spatter import spatter
from robustbench_diffaug.rng import key, normal, uniform

__all__ = ["COMMON", "CONSTANTS", "NAMES", "NOISES", "VALIDATION", "corrupt", "known"]

Corruption: TypeAlias = Callable[[Levels, Any, Sequence[int]], Levels]

PARTS = 1024
"""Into how many equal parts the guides to the tables of noise divide [0, 1]; no result depends on it."""

CHUNK = 2**18
"""About how many values are worked on at a time, so that they stay in the cache; no result depends on it."""


def uniforms(keys: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """One draw of uniforms per key, (len(keys), *shape)."""
    return np.concatenate([uniform(image_key, range(1), shape) for image_key in keys])


def cut(values: Floats) -> Levels:
    """Clips to [0, 255] and cuts to 8 bits."""
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


# A noise that treats each value by itself is, on 8-bit levels, a table of 256 distributions over 256 levels: row l,
# column j < 255 holds the chance that level l comes out as j or less, under the references' cut to 8 bits. Column 255
# holds 2, out of reach of any uniform. Its inverse is exact, rejects nothing, and costs no inverse normal.


def gaussian_table(scale: Number) -> NDArray[np.float64]:
    """The distributions of x + scale z, with z standard normal."""
    return np.asarray(ndtr((np.arange(1, 257) - np.arange(256)[:, None]) / (255 * scale)))


def shot_table(photons: int) -> NDArray[np.float64]:
    """The distributions of Poisson(photons x) / photons."""
    counted = np.floor(np.arange(photons + 1) / photons * 255).searchsorted(np.arange(256), side="right") - 1
    return np.asarray(pdtr(counted, np.arange(256)[:, None] / 255 * photons))


def speckle_table(scale: Number) -> NDArray[np.float64]:
    """The distributions of x + x scale z, with z standard normal."""
    level = np.arange(1, 256)[:, None]
    rows = ndtr((np.arange(1, 257) / level - 1) / scale)
    return np.concatenate([np.ones((1, 256)), rows])


@lru_cache(maxsize=32)
def guide(
    table: Callable[[Any], NDArray[np.float64]], constant: Number
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The table, flat, and the entry at which to search it, by level and by which of `PARTS` parts of [0, 1] is drawn.

    References:
        Non-Uniform Random Variate Generation (Devroye, 1986), chapter III.2.4 (guide tables),
        http://luc.devroye.org/rnbookindex.html
    """
    distribution = table(constant)
    distribution[:, 255] = 2
    parts = np.arange(PARTS) / PARTS
    starts = [256 * level + row.searchsorted(parts, side="right") for level, row in enumerate(distribution)]
    return distribution.ravel(), np.concatenate(starts).astype(np.int32)


def pointwise(table: Callable[[Any], NDArray[np.float64]]) -> Corruption:
    """The corruption by a table of distributions: each value is the inverse, at one uniform, of its level's row."""

    def noise(levels: Levels, constant: Number, keys: Sequence[int]) -> Levels:
        distribution, starts = guide(table, constant)
        draws = uniforms(keys, levels.shape[1:]).ravel()
        entry = starts.take(levels.ravel() * np.int32(PARTS) + (draws * PARTS).astype(np.int32))
        late = np.flatnonzero(draws >= distribution.take(entry))
        for _ in range(2):
            entry[late] += 1
            late = late[draws[late] >= distribution[entry[late]]]
        # Few are left, in the tails, where many entries share a part: these search by halves.
        for step in (128, 64, 32, 16, 8, 4, 2, 1):
            further = np.minimum(entry[late] + step, entry[late] | 255)
            entry[late] = np.where(draws[late] >= distribution[further - 1], further, entry[late])
        return (entry & 255).astype(np.uint8).reshape(levels.shape)

    return noise


def impulse_noise(levels: Levels, amount: Number, keys: Sequence[int]) -> Levels:
    """Salt and pepper: each value becomes 0 with chance amount / 2, and 1 with the same."""
    draws = uniforms(keys, levels.shape[1:])
    output = levels * (draws >= amount / 2)
    output |= np.uint8(255) * (draws >= 1 - amount / 2)
    return output


def plasma(size: int, decay: Number, keys: Sequence[int]) -> Floats:
    """Clouds: a fractal on a torus by the diamond-square algorithm, scaled to [0, 1].

    From one scale to the next finer, the middle of each square, and then of each diamond, is the mean of its corners
    plus a uniform wobble, whose amplitude is 100**2 at first and decay**2 times less at each next scale.

    Arguments:
        size: The side of the map, a power of two.
        decay: Greater is smoother.
        keys: One key per map.

    Returns:
        The maps, (len(keys), size, size).
    """
    draws = (2 * uniforms(keys, (size * size,)) - 1).astype(np.float32)
    field = np.zeros((len(keys), size, size), dtype=np.float32)
    step, amplitude, used = size, 100.0, 0
    while step >= 2:
        count, half = size // step, step // 2
        wobble = draws[:, used : used + 3 * count**2].reshape(-1, 3, count, count) * np.float32(amplitude**2)
        used += 3 * count**2
        corners = field[:, ::step, ::step]
        right = corners + np.roll(corners, -1, axis=2)
        middles = (right + np.roll(right, -1, axis=1)) / 4 + wobble[:, 0]
        below = corners + np.roll(corners, -1, axis=1)
        field[:, half::step, half::step] = middles
        field[:, ::step, half::step] = (middles + np.roll(middles, 1, axis=1) + right) / 4 + wobble[:, 1]
        field[:, half::step, ::step] = (middles + np.roll(middles, 1, axis=2) + below) / 4 + wobble[:, 2]
        step, amplitude = half, amplitude / decay
    field -= field.min(axis=(1, 2), keepdims=True)
    field /= field.max(axis=(1, 2), keepdims=True)
    return field


def fog(levels: Levels, constants: tuple[Number, Number], keys: Sequence[int]) -> Levels:
    """Gives (x + strength plasma) m / (m + strength), where m is the image's greatest value."""
    strength, decay = constants
    height, width = levels.shape[2:]
    clouds = plasma(1 << (max(height, width) - 1).bit_length(), decay, keys)[:, None, :height, :width]
    brightest = levels.max(axis=(1, 2, 3), keepdims=True).astype(np.float32)
    values = levels + np.float32(255 * strength) * clouds
    values *= brightest / (brightest + np.float32(255 * strength))
    return cut(values)


def snow(levels: Levels, constants: tuple[Number, ...], keys: Sequence[int]) -> Levels:
    """Bright flakes, magnified and blurred along the wind, over the image and turned by 180 degrees, and a whitening.

    Arguments:
        levels: 8-bit images, (batch, channels, height, width).
        constants: Mean, standard deviation, zoom and threshold of the flakes; radius and sigma of their motion blur in
            px; the share of the image that is not whitened.
        keys: One key per image.
    """
    mean, scale, zoom, threshold, radius, sigma, share = constants
    noise = np.stack([normal(image_key, range(1), levels.shape[2:]) for image_key in keys])
    flakes = clipped_zoom(np.float32(mean) + np.float32(scale) * noise, zoom)
    flakes[flakes < threshold] = 0
    flakes = np.floor(255 * np.clip(flakes, 0, 1))
    for flake, image_key in zip(flakes, keys, strict=True):
        # Its own stream: the flakes' starts with the same numbers.
        angle = 90 * float(uniform(key(image_key, "angle"), range(1), (1,))[0, 0]) - 135
        flake[:] = np.floor(line_blur(flake, motion_taps(int(radius), sigma, angle)) + np.float32(0.5))
    image = levels.astype(np.float32)
    weights = np.array([0.299, 0.587, 0.114] if levels.shape[1] == 3 else [1], dtype=np.float32)
    grey = sum(weight * image[:, [channel]] for channel, weight in enumerate(weights))
    whitened = np.float32(share) * image + np.float32(1 - share) * np.maximum(image, 1.5 * grey + np.float32(127.5))
    return truncate(whitened + flakes + flakes[:, :, ::-1, ::-1])


@lru_cache(maxsize=16)
def brightness_table(added: Number) -> Levels:
    """The level, by the greatest of a pixel's levels and its own, once HSV value `added` is added to the pixel."""
    value = np.arange(256)[:, None] / 255
    brighter = np.minimum(value + added, 1)
    # Hue and saturation stay, so that all channels grow alike; black is a grey, and has no ratio to keep.
    ratio = np.divide(np.arange(256) / 255, value, out=np.ones((256, 256)), where=value > 0)
    return np.asarray(np.minimum(brighter * ratio, 1) * 255, dtype=np.uint8)


def brightness(levels: Levels, added: Number, keys: Sequence[int]) -> Levels:
    """Adds to the HSV value, the greatest channel, and keeps hue and saturation; the keys are not used."""
    greatest = levels.max(axis=1, keepdims=True).astype(np.intp)
    return np.asarray(brightness_table(added).ravel().take((greatest << 8) + levels))


def saturate(levels: Levels, constants: tuple[Number, Number], keys: Sequence[int]) -> Levels:
    """Changes the HSV saturation s to factor s + added, and keeps hue and value; the keys are not used.

    A grey pixel has hue 0, so that it turns red; an image of one channel has no saturation and stays.
    """
    if levels.shape[1] == 1:
        return levels
    factor, added = constants
    image = levels.astype(np.float64)
    value = image.max(axis=1, keepdims=True)
    spread = value - image.min(axis=1, keepdims=True)
    grey = spread == 0
    saturation = np.divide(spread, value, out=np.zeros_like(value), where=value > 0)
    # Each channel lies below the value by value * saturation * (a function of hue alone).
    depth = np.where(grey, np.array([0, 1, 1]).reshape(3, 1, 1), (value - image) / np.where(grey, 1, spread))
    return truncate((value - value * np.clip(factor * saturation + added, 0, 1) * depth).astype(np.float32))


def contrast(levels: Levels, factor: Number, keys: Sequence[int]) -> Levels:
    """Gives m + factor (x - m), where m is the mean of the channel in the image; the keys are not used."""
    mean = levels.mean(axis=(2, 3), dtype=np.float64)[..., None] / 255
    table = (np.clip((np.arange(256) / 255 - mean) * factor + mean, 0, 1) * 255).astype(np.uint8)
    first = 256 * np.arange(mean.size).reshape(*levels.shape[:2], 1, 1)
    return np.asarray(table.ravel().take(first + levels))


def pixelate(levels: Levels, factor: Number, keys: Sequence[int]) -> Levels:
    """Shrinks by the means of boxes and grows back by repetition; the keys are not used.

    Rows and then columns of the whole batch are resized together, since no row depends on another; PIL itself works
    in these two steps and rounds to 8 bits between them.
    """
    batch, channels, height, width = levels.shape
    low, narrow = int(height * factor), int(width * factor)
    rows = Image.fromarray(levels.reshape(-1, width)).resize((narrow, batch * channels * height), Image.Resampling.BOX)
    turned = np.asarray(rows).reshape(-1, height, narrow).swapaxes(1, 2).reshape(-1, height)
    columns = Image.fromarray(turned).resize((low, len(turned)), Image.Resampling.BOX)
    small = np.asarray(columns).reshape(batch, channels, narrow, low)
    across = (np.arange(width) + 0.5) * narrow / width
    down = (np.arange(height) + 0.5) * low / height
    grown = small.take(across.astype(np.intp), axis=2).swapaxes(2, 3).take(down.astype(np.intp), axis=2)
    return np.asarray(grown)


def jpeg_compression(levels: Levels, quality: int, keys: Sequence[int]) -> Levels:
    """Encodes as JPEG, in colour or grey, and decodes; the keys are not used."""
    output = np.empty_like(levels)
    for image, result in zip(levels, output, strict=True):
        file = BytesIO()
        planes = [Image.fromarray(plane) for plane in image]
        picture = planes[0] if len(planes) == 1 else Image.merge("RGB", planes)
        picture.save(file, "JPEG", quality=quality)
        with Image.open(file, formats=["JPEG"]) as decoded:
            result[:] = np.asarray(decoded).reshape(*image.shape[1:], len(image)).transpose(2, 0, 1)
    return output


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "gaussian_noise": pointwise(gaussian_table),
        "shot_noise": pointwise(shot_table),
        "impulse_noise": impulse_noise,
        "defocus_blur": defocus_blur,
        "glass_blur": glass_blur,
        "motion_blur": motion_blur,
        "zoom_blur": zoom_blur,
        "snow": snow,
        "frost": frost,
        "fog": fog,
        "brightness": brightness,
        "contrast": contrast,
        "elastic_transform": elastic_transform,
        "pixelate": pixelate,
        "jpeg_compression": jpeg_compression,
        "speckle_noise": pointwise(speckle_table),
        "gaussian_blur": gaussian_blur,
        "spatter": spatter,
        "saturate": saturate,
    }
)

NAMES: tuple[str, ...] = tuple(CORRUPTIONS)
"""All corruptions, in the order of ImageNet-C."""

COMMON, VALIDATION = NAMES[:15], NAMES[15:]
"""The 15 that benchmarks report, and the 4 that are for choosing among methods beforehand."""

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")


def known(name: str) -> str:
    """The name of a corruption, as it is.

    Raises:
        ValueError: If there is no such corruption.
    """
    if name not in NAMES:
        raise ValueError(f"no corruption is called {name!r}{suggest(name, list(NAMES))}")
    return name


def check(images: Tensor, name: str, severity: int, constants: str, keys: Sequence[int]) -> None:
    """Raises ValueError, with what to do about it, where `corrupt` cannot take its arguments."""
    known(name)
    if constants not in CONSTANTS:
        raise ValueError(f"There is no table of constants {constants!r}{suggest(constants, list(CONSTANTS))}.")
    if not isinstance(severity, int) or not 1 <= severity <= 5:
        raise ValueError(f"Severity is {severity!r}, but it goes from 1 (mild) to 5 (strong).")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 8:
        shape = tuple(images.shape)
        raise ValueError(f"Images have shape {shape}; give (batch, 1 or 3 channels, height, width) of 8 px or more.")
    if len(keys) != len(images):
        raise ValueError(f"There are {len(keys)} keys for {len(images)} images; give one per image.")
    # Comparisons with NaN are false, and extremes of what holds a NaN are NaN.
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError("Images must be finite and in [0, 1]; divide levels of 0 to 255 by 255, undo normalisation.")


def corrupt(
    images: Float[Tensor, "b c h w"],
    name: str,
    severity: int,
    constants: str,
    keys: Sequence[int],
    textures: Path | None = None,
) -> Float[Tensor, "b c h w"]:
    """Corrupts each image as the published data sets do, in 8 bits, with randomness drawn from its key.

    Arguments:
        images: In [0, 1], of 1 or 3 channels and at least 8 px a side; rounded to 8 bits first.
        name: One of `NAMES`.
        severity: 1 to 5.
        constants: "imagenet-c" or "cifar-c", what the severities mean.
        keys: One key of 128 bits per image.
        textures: The folder of the official textures of frost; None for those drawn by `frost.draw`.

    Returns:
        float32 images in [0, 1], multiples of 1/255, on the device of `images`.

    Raises:
        ValueError: For an unknown name or table, a severity outside 1 to 5, images that are not such, another number
            of keys than of images, or textures that are not there.

    References:
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        ICLR 2019), https://arxiv.org/abs/1903.12261
    """
    check(images, name, severity, constants, keys)
    values = images.detach().cpu().float().numpy()
    strength = CONSTANTS[constants][name][severity - 1]
    corruption = partial(frost, folder=textures) if name == "frost" else CORRUPTIONS[name]
    output = torch.empty(values.shape, dtype=torch.float32)
    size = max(1, CHUNK // max(1, values[:1].size))
    for start in range(0, len(values), size):
        part = slice(start, start + size)
        levels = np.rint(values[part] * np.float32(255), order="C").astype(np.uint8)
        corrupted = corruption(levels, strength, keys[part])
        np.divide(corrupted, np.float32(255), out=output.numpy()[part], dtype=np.float32)
    return output.to(images.device)
