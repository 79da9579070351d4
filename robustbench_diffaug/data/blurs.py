"""The corruptions that move light between pixels: the blurs and the elastic transform.

Every function takes 8-bit levels of shape (batch, channels, height, width) and treats each image by itself, in
elementwise numpy or one image at a time, so that an image's bits cannot depend on its neighbours.

References:
    Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
    ICLR 2019), https://arxiv.org/abs/1903.12261
    Common Corruptions Python library, https://github.com/bethgelab/imagecorruptions
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil, cos, floor, radians, sin
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft2, next_fast_len, rfft2

from robustbench_diffaug.rng import key, uniform

__all__ = [
    "clipped_zoom",
    "defocus_blur",
    "disk_kernel",
    "elastic_transform",
    "gaussian_blur",
    "glass_blur",
    "line_blur",
    "motion_blur",
    "motion_taps",
    "truncate",
    "zoom_blur",
]

Levels: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Number: TypeAlias = float | int
Border: TypeAlias = Literal["edge", "reflect", "symmetric"]

ROUNDING = np.float32(2.0**-10)


def truncate(values: Floats) -> Levels:
    """Clips to [0, 255] and cuts to 8 bits as the references do, save that 254.9999 counts as 255.

    A weighted mean of equal levels is that level only up to rounding; without the allowance of 2**-10 levels, flat
    regions would lose a level or not by chance.

    Arguments:
        values: Grey levels, any shape.
    """
    values = values + ROUNDING
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


@lru_cache(maxsize=256)
def border_index(size: int, before: int, after: int, border: Border) -> NDArray[np.intp]:
    """The source of each place along an axis of `size` places that is padded as `numpy.pad(mode=border)` does."""
    index = np.pad(np.arange(size), (before, after), mode=border)
    index.flags.writeable = False
    return index


@lru_cache(maxsize=64)
def disk_kernel(radius: Number, sigma: Number) -> NDArray[np.float64]:
    """A disk of weight one, smoothed by a Gaussian against aliasing.

    The disk lies in a square of side 17, or 2 radius + 1 past radius 8; the Gaussian has 3 taps a side, or 5.

    Arguments:
        radius: In px.
        sigma: Of the smoothing, in px.
    """
    reach, half = (8, 1) if radius <= 8 else (int(radius), 2)
    places = np.arange(-reach, reach + 1)
    disk = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for _ in range(2):
        index = border_index(len(disk), half, half, "reflect")
        disk = sum(tap * disk[index[start : start + len(disk)]] for start, tap in enumerate(taps)).T
    support = np.flatnonzero(disk.any(axis=0))
    return disk[support[0] : support[-1] + 1, support[0] : support[-1] + 1]


@lru_cache(maxsize=64)
def gaussian_kernel(sigma: Number) -> NDArray[np.float64]:
    """A Gaussian of weight one, cut at 4 standard deviations along each axis."""
    reach = floor(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    return np.outer(taps, taps)


@lru_cache(maxsize=64)
def spectrum(
    make: Callable[..., NDArray[np.float64]], constants: tuple[Number, ...], shape: tuple[int, int]
) -> NDArray[np.complex64]:
    """The Fourier transform of a kernel, padded by zeros to `shape`."""
    return np.asarray(rfft2(make(*constants), s=shape), dtype=np.complex64)


def convolve(
    levels: Levels, make: Callable[..., NDArray[np.float64]], constants: tuple[Number, ...], border: Border
) -> Levels:
    """The convolution of each channel with the kernel `make(*constants)`, by Fourier transforms.

    Arguments:
        levels: 8-bit images, (batch, channels, height, width).
        make: The kernel, square, even and of odd side.
        constants: What it takes.
        border: What the images are outside, in numpy.pad's words.
    """
    half = len(make(*constants)) // 2
    if half == 0:
        return levels
    height, width = levels.shape[2:]
    rows, columns = border_index(height, half, half, border), border_index(width, half, half, border)
    shape = (next_fast_len(len(rows), real=True), next_fast_len(len(columns), real=True))
    weights = spectrum(make, constants, shape)
    padded = levels.take(rows, axis=2).take(columns, axis=3).astype(np.float32)
    output = np.empty(levels.shape, dtype=np.float32)
    # One image at a time: whether a transform is computed alone or side by side with others might round differently.
    for image, result in zip(padded, output, strict=True):
        frequencies = rfft2(image, s=shape)
        frequencies *= weights
        blurred = irfft2(frequencies, s=shape, overwrite_x=True)
        result[:] = blurred[:, 2 * half : 2 * half + height, 2 * half : 2 * half + width]
    return truncate(output)


def defocus_blur(levels: Levels, constants: tuple[Number, Number], keys: Sequence[int]) -> Levels:
    """A lens out of focus: a convolution with `disk_kernel`, the image mirrored outside; the keys are not used."""
    return convolve(levels, disk_kernel, constants, "reflect")


def gaussian_blur(levels: Levels, sigma: Number, keys: Sequence[int]) -> Levels:
    """A Gaussian blur cut at 4 sigma, the last rows and columns repeating outside; the keys are not used."""
    return convolve(levels, gaussian_kernel, (sigma,), "edge")


def glass_blur(levels: Levels, constants: tuple[Number, int, int], keys: Sequence[int]) -> Levels:
    """The view through frosted glass: a Gaussian blur, pixels replaced by near ones, and the blur once more.

    The reference visits the pixels from the last to the first and gives each the value, at that time, of a pixel at
    most `shift` px away (it means to swap the two, but numpy's views make a copy of it). A pixel's source is thus
    the end of a chain: while the chosen pixel was visited before, it is followed to where that one's value came
    from. Doubling the links resolves all chains together in a logarithm of the longest one's length.

    Arguments:
        levels: 8-bit images, (batch, channels, height, width).
        constants: Sigma in px, greatest shift in px, rounds of shifting.
        keys: One key per image.
    """
    sigma, shift, rounds = constants
    batch, channels, height, width = levels.shape
    blurred = gaussian_blur(levels, sigma, keys).reshape(batch, channels, -1).copy()
    here = np.arange(height * width)
    visited = np.zeros((height, width), dtype=bool)
    visited[shift + 1 : height - shift + 1, shift + 1 : width - shift + 1] = True
    for image, image_key in zip(blurred, keys, strict=True):
        for draw in uniform(image_key, range(rounds), (height, width)):
            right, down = np.modf(draw * (2 * shift))
            offset = (down.astype(np.intp) - shift) * width + (right * (2 * shift)).astype(np.intp) - shift
            chosen = here + (offset * visited).ravel()
            # Visited earlier is later in reading order. An end of a chain links to itself.
            linked = visited.ravel().take(chosen) & (chosen > here)
            link = np.where(linked, chosen, here)
            going = np.flatnonzero(linked)
            while going.size:
                ends = link.take(going)
                further = link.take(ends)
                link[going] = further
                going = going[further != ends]
            image[:] = image.take(chosen.take(link), axis=1)
    return gaussian_blur(blurred.reshape(levels.shape), sigma, keys)


def motion_taps(radius: int, sigma: Number, angle: Number) -> dict[tuple[int, int], float]:
    """The kernel of a motion blur: half a Gaussian along a line, its places rounded to whole pixels.

    Tap i of 2 radius + 1 weighs exp(-i**2 / (2 sigma**2)), normalised, and reads the pixel
    (ceil(i sin angle - 1/2), ceil(i cos angle - 1/2)) rows down and columns right.

    Arguments:
        radius: In px.
        sigma: In px.
        angle: In degrees.

    Returns:
        The weight of each (row, column) offset; they sum to one.

    References:
        ImageMagick, MotionBlurImage, https://imagemagick.org/script/command-line-options.php#motion-blur
    """
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    down, right = sin(radians(angle)), cos(radians(angle))
    taps: dict[tuple[int, int], float] = {}
    for place, weight in enumerate(weights.tolist()):
        offset = (ceil(place * down - 0.5), ceil(place * right - 0.5))
        taps[offset] = taps.get(offset, 0.0) + weight
    return taps


def line_blur(image: NDArray[np.uint8] | Floats, taps: dict[tuple[int, int], float]) -> Floats:
    """The weighted sum of an image's shifts, its last rows and columns repeating outside.

    Arguments:
        image: Any image, (channels, height, width).
        taps: Weights by (row, column) offset, as `motion_taps` gives them.
    """
    height, width = image.shape[1:]
    top, left = (max(0, -min(offset[axis] for offset in taps)) for axis in (0, 1))
    bottom, right = (max(0, max(offset[axis] for offset in taps)) for axis in (0, 1))
    padded = image.take(border_index(height, top, bottom, "edge"), axis=1)
    padded = padded.take(border_index(width, left, right, "edge"), axis=2).astype(np.float32)
    total = np.zeros(image.shape, dtype=np.float32)
    term = np.empty_like(total)
    for (row, column), weight in taps.items():
        window = padded[:, top + row : top + row + height, left + column : left + column + width]
        np.multiply(window, np.float32(weight), out=term)
        np.add(total, term, out=total)
    return total


def motion_blur(levels: Levels, constants: tuple[int, Number], keys: Sequence[int]) -> Levels:
    """A camera that moves along a line, at an angle uniform on [-45, 45] degrees.

    Rounded to the nearest level, as ImageMagick does, with which the published data sets were made.

    Arguments:
        levels: 8-bit images, (batch, channels, height, width).
        constants: Radius and sigma in px.
        keys: One key per image.
    """
    output = np.empty_like(levels)
    for image, result, image_key in zip(levels, output, keys, strict=True):
        angle = 90 * float(uniform(image_key, range(1), (1,))[0, 0]) - 45
        result[:] = (line_blur(image, motion_taps(*constants, angle)) + np.float32(0.5)).astype(np.uint8)
    return output


def clipped_zoom(values: Floats, factor: Number) -> Floats:
    """Magnifies the middle of the images by linear interpolation and crops them to their size.

    Arguments:
        values: Images, (..., height, width).
        factor: 1 or more.
    """
    for axis in (-2, -1):
        size = values.shape[axis]
        kept = ceil(size / factor)
        grown = round(kept * factor)
        first = (size - kept) // 2
        places = first + (np.arange(size) + (grown - size) // 2) * ((kept - 1) / (grown - 1))
        lower = np.minimum(np.floor(places).astype(np.intp), size - 2)
        share = (places - lower).astype(np.float32)
        if axis == -2:
            share = share[:, None]
        below = values.take(lower, axis=axis)
        above = values.take(lower + 1, axis=axis)
        above -= below
        above *= share
        above += below
        values = above
    return values


def zoom_blur(levels: Levels, constants: tuple[Number, Number, Number], keys: Sequence[int]) -> Levels:
    """A camera that moves forward: the mean of the image and its magnifications by each factor.

    Arguments:
        levels: 8-bit images, (batch, channels, height, width).
        constants: Start, stop and step of the factors, as in `numpy.arange`.
        keys: Not used.
    """
    factors = np.arange(*constants).tolist()
    image = levels.astype(np.float32)
    total = image.copy()
    for factor in factors:
        total += clipped_zoom(image, factor)
    total /= len(factors) + 1
    return truncate(total)


@lru_cache(maxsize=16)
def smoothing(size: int, sigma: Number) -> NDArray[np.float64]:
    """The matrix of a Gaussian blur along an axis, cut at 3 sigma, the axis mirrored outside with its last place."""
    if sigma == 0:
        return np.eye(size)
    reach = floor(3 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    matrix = np.zeros((size, size))
    sources = border_index(size, reach, reach, "symmetric")
    for place in range(size):
        np.add.at(matrix[place], sources[place : place + len(taps)], taps / taps.sum())
    return matrix


def bilinear(image: Floats, down: NDArray[np.float64], right: NDArray[np.float64], mirror: int) -> Floats:
    """Reads an image between its pixels, by linear interpolation.

    Arguments:
        image: Any image, (channels, height, width).
        down: The rows to read, any numbers, (height, width).
        right: The columns to read.
        mirror: Outside, the image is mirrored; without its last place again for 0, with it for 1.
    """
    axes = []
    for places, size in ((down, image.shape[1]), (right, image.shape[2])):
        lower = np.floor(places)
        period = 2 * (size - 1 + mirror)
        corners = [(lower + step).astype(np.intp) % period for step in (0, 1)]
        low, high = (np.minimum(corner, period - mirror - corner) for corner in corners)
        axes.append((low, high, (places - lower).astype(np.float32)))
    (top, bottom, below), (left, after, beside) = axes
    flat, width = image.reshape(len(image), -1), image.shape[2]
    rows = []
    for row in (top * width, bottom * width):
        first = flat.take(row + left, axis=1)
        rows.append(first + (flat.take(row + after, axis=1) - first) * beside)
    return np.asarray(rows[0] + (rows[1] - rows[0]) * below)


def elastic_transform(levels: Levels, constants: tuple[Number, Number, Number], keys: Sequence[int]) -> Levels:
    """A rubber sheet: a random affine map, and then a smooth random shift of every pixel.

    Three points, a third of the side from the middle, move by uniform shifts, which fixes the affine map; the shifts
    of the pixels are uniforms on [-1, 1] under a Gaussian blur, times a strength. Both maps interpolate linearly.

    Arguments:
        levels: 8-bit images, (batch, channels, height, width).
        constants: Strength, sigma and greatest shift of the points, as shares of the shorter side.
        keys: One key per image.
    """
    height, width = levels.shape[2:]
    side = min(height, width)
    strength, sigma, greatest = (side * constant for constant in constants)
    third = side // 3
    # As (column, row), with the reference's middle: half the height comes first, which matters for no square image.
    points = np.array([[third, third], [third, -third], [-third, -third]]) + [height // 2, width // 2]
    rows, columns = np.indices((height, width), dtype=np.float64)
    output = np.empty_like(levels)
    for image, result, image_key in zip(levels, output, keys, strict=True):
        moved = points + greatest * (2 * uniform(key(image_key, "affine"), range(1), (3, 2))[0] - 1)
        # Where in the source each output pixel lies: the map from the moved points back.
        inverse = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)
        right, down = (inverse[0, axis] * columns + inverse[1, axis] * rows + inverse[2, axis] for axis in (0, 1))
        mapped = bilinear(image.astype(np.float32), down, right, mirror=0)
        shifts = 2 * uniform(image_key, range(2), (height, width)) - 1
        across, along = strength * (smoothing(height, sigma) @ shifts @ smoothing(width, sigma).T)
        result[:] = truncate(bilinear(mapped, rows + along, columns + across, mirror=1))
    return output
